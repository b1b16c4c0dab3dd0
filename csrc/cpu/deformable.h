// What both passes of deformable attention share: where a query's and head's points lie in the value map, and how rows
// of its channels are walked.
#pragma once
#include "../deformable_attention.h"
#include "dispatch.h"
#include "gemm.h"
#include "scratch.h"
#include "softmax.h"

namespace mmk {
namespace {

// Integers that vectors have as many of as of C: positions fit.
template <class C>
using index_t = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;

// The first `count` elements; nothing behind them is read, and the rest is 0.
template <class T>
MMK_INLINE vec<acc_t<T>> load_first(const T* p, int64_t count) {
  constexpr int64_t n = lanes<acc_t<T>>;
#if defined(__AVX512BW__) && defined(__AVX512VL__) && MMK_VECTOR_BYTES == 64
  const uint32_t some = (uint32_t(1) << count) - 1;
  if constexpr (std::is_same<T, float>::value)
    return bit_cast<vec<float>>(_mm512_maskz_loadu_ps(__mmask16(some), p));
  else if constexpr (sizeof(T) == 2) {
    T all[n];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(all), _mm256_maskz_loadu_epi16(__mmask16(some), p));
    return mmk::load(static_cast<const T*>(all));
  }
#elif defined(__AVX2__) && MMK_VECTOR_BYTES == 32
  if constexpr (std::is_same<T, float>::value) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return bit_cast<vec<float>>(_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), lane)));
  }
#endif
  T all[n] = {};
  for (int64_t i = 0; i < n && i < count; ++i)
    all[i] = p[i];
  return mmk::load(static_cast<const T*>(all));
}

// Channels are walked in packs: vectors; where a row is shorter, vectors of 16 bytes; where it is still shorter, single
// channels. Packs may overlap, of those that say so.
template <class C>
struct Wide {
  using type = vec<C>;
  static constexpr int64_t count = lanes<C>;
  static constexpr bool overlaps = true;
  template <class T>
  static MMK_INLINE type load(const T* p) {
    return mmk::load(p);
  }
  template <class T>
  static MMK_INLINE void store(T* p, type v) {
    mmk::store(p, v);
  }
  static MMK_INLINE void sum4(const type (&v)[4], C (&sums)[4]) { mmk::sum4<C>(v, sums); }
};
template <class C>
struct Narrow {
  typedef C type __attribute__((vector_size(16)));
  static constexpr int64_t count = 16 / sizeof(C);
  static constexpr bool overlaps = true;
  template <class T>
  static MMK_INLINE type load(const T* p) {
    type v;
    if constexpr (std::is_same<T, C>::value)
      memcpy(&v, p, sizeof v);
    else
      for (int64_t i = 0; i < count; ++i)
        v[i] = to_acc(p[i]);
    return v;
  }
  template <class T>
  static MMK_INLINE void store(T* p, type v) {
    if constexpr (std::is_same<T, C>::value)
      memcpy(p, &v, sizeof v);
    else
      for (int64_t i = 0; i < count; ++i)
        p[i] = from_acc<T>(v[i]);
  }
  static MMK_INLINE void sum4(const type (&v)[4], C (&sums)[4]) {
    for (int i = 0; i < 4; ++i) {
      sums[i] = v[i][0] + v[i][1];
      if constexpr (count == 4)
        sums[i] += v[i][2] + v[i][3];
    }
  }
};
template <class C>
struct Single {
  using type = C;
  static constexpr int64_t count = 1;
  static constexpr bool overlaps = false;
  template <class T>
  static MMK_INLINE type load(const T* p) {
    return to_acc(*p);
  }
  template <class T>
  static MMK_INLINE void store(T* p, type v) {
    *p = from_acc<T>(v);
  }
  static MMK_INLINE void sum4(const type (&v)[4], C (&sums)[4]) {
    for (int i = 0; i < 4; ++i)
      sums[i] = v[i];
  }
};

// Neighbours in bfloat16 share 32 bits: a shift and a mask make floats of both, where a vector of neighbours would have
// to be spread first.
struct Pairs {
  struct type {
    vec<float> even, odd;
    MMK_INLINE type operator*(float x) const { return {even * x, odd * x}; }
    MMK_INLINE type operator*(const type& x) const { return {even * x.even, odd * x.odd}; }
    MMK_INLINE type& operator+=(const type& x) {
      even += x.even;
      odd += x.odd;
      return *this;
    }
  };
  static constexpr int64_t count = 2 * lanes<float>;
  static constexpr bool overlaps = false;
  static MMK_INLINE type load(const bf16* p) {
    vec<uint32_t> both;
    memcpy(&both, p, sizeof both);
    return {bit_cast<vec<float>>(both << 16), bit_cast<vec<float>>(both & 0xffff0000u)};
  }
  static MMK_INLINE void store(bf16* p, const type& v) {
    const vec<uint32_t> both = widen(round_bf16(v.even)) | widen(round_bf16(v.odd)) << 16;
    memcpy(p, &both, sizeof both);
  }
  static MMK_INLINE void sum4(const type (&v)[4], float (&sums)[4]) {
    vec<float> added[4];
    for (int i = 0; i < 4; ++i)
      added[i] = v[i].even + v[i].odd;
    mmk::sum4<float>(added, sums);
  }
};

// f(Pack, constant number of packs, first channel, first channel of the last pack) for blocks that cover `channels` of
// rows of T: the last pack ends with them, and overlaps the one before where they aren't whole packs.
template <class T, class F>
MMK_INLINE void each_block(int64_t channels, F f) {
  using C = acc_t<T>;
  auto blocks = [&](auto pack) {
    constexpr int64_t width = decltype(pack)::count;
    const int64_t packs = (channels + width - 1) / width;
    for (int64_t first = 0; first < packs; first += 4) {
      const int64_t last = first + 4 < packs ? (first + 3) * width : channels - width;
      switch (packs - first) {
        case 1:
          f(pack, std::integral_constant<int, 1>{}, first * width, last);
          break;
        case 2:
          f(pack, std::integral_constant<int, 2>{}, first * width, last);
          break;
        case 3:
          f(pack, std::integral_constant<int, 3>{}, first * width, last);
          break;
        default:
          f(pack, std::integral_constant<int, 4>{}, first * width, last);
      }
    }
  };
  if constexpr (std::is_same<T, bf16>::value)
    if (channels % Pairs::count == 0)
      return blocks(Pairs{});
  if (channels >= lanes<C>)
    blocks(Wide<C>{});
  else if (channels >= Narrow<C>::count)
    blocks(Narrow<C>{});
  else
    blocks(Single<C>{});
}
// Where pack v of a block begins.
template <class Pack, int Packs>
MMK_INLINE int64_t channel_of(int v, int64_t first, int64_t last) {
  return v == Packs - 1 ? last : first + v * Pack::count;
}

// Of each of the K points its level's size, and the level's first position; the same for all queries.
template <class C>
struct Points {
  using I = index_t<C>;
  Scratch<C> width, height;
  Scratch<I> begin;

  explicit Points(const DeformableAttention& a) : width(a.K), height(a.K), begin(a.K) {
    int64_t k = 0;
    int64_t from = 0;
    for (int64_t l = 0; l < a.L; ++l) {
      for (int64_t end = k + a.points[l]; k < end; ++k) {
        height.data[k] = C(a.shapes[2 * l]);
        width.data[k] = C(a.shapes[2 * l + 1]);
        begin.data[k] = I(from);
      }
      from += a.shapes[2 * l] * a.shapes[2 * l + 1];
    }
  }
};

// f(data) of numbers of type T or, where they are wide, C.
template <class T, class F>
MMK_INLINE void with_width(bool wide, const QueryRows& rows, int64_t offset, F f) {
  if (std::is_same<T, acc_t<T>>::value || wide)
    f(static_cast<acc_t<T>*>(rows.data) + offset);
  else
    f(static_cast<T*>(rows.data) + offset);
}

// The points of as many queries of a head as a vector has lanes, one a lane: the four positions around each point, -1
// where there is none, and the shares of its sample that those have. Number k of all queries is at k * block, of one
// query behind its lane.
template <class T>
struct Sampling {
  using C = acc_t<T>;
  using I = index_t<C>;
  typedef I ivec __attribute__((vector_size(MMK_VECTOR_BYTES)));
  static constexpr int64_t block = lanes<C>;

  const DeformableAttention& a;
  const Points<C>& points;
  int64_t lowest = 0;  // positions that count; they are told from the lowest
  int64_t highest;
  bool masked;                 // else nothing is hidden
  int64_t b, h, first, count;  // the queries
  Scratch<C> location, weight, share;
  Scratch<C> fraction_x, fraction_y;  // how far a point is from the first of its positions; -1: it is outside
  Scratch<I> position;

  Sampling(const DeformableAttention& a, const Points<C>& points)
      : a(a),
        points(points),
        highest(a.S),
        masked(a.mask.data),
        location(block * padded<C>(2 * a.K)),
        weight(block * padded<C>(a.K)),
        fraction_x(block * a.K),
        fraction_y(block * a.K),
        share(4 * block * a.K),
        position(4 * block * a.K) {}

  // Corner 0 is above and left, 1 right of it, 2 and 3 below.
  MMK_INLINE I position_of(int corner, int64_t k, int64_t lane) const {
    return position.data[(corner * a.K + k) * block + lane];
  }
  MMK_INLINE C share_of(int corner, int64_t k, int64_t lane) const {
    return share.data[(corner * a.K + k) * block + lane];
  }
  MMK_INLINE C weight_of(int64_t k, int64_t lane) const { return weight.data[k * block + lane]; }

  // Up to a block of queries from `from` on.
  void set(int64_t sample, int64_t head, int64_t from, int64_t end) {
    b = sample;
    h = head;
    first = from;
    count = end - from < block ? end - from : block;
  }
  // Weights, and where they are a softmax, what they can be computed from again.
  void weights() {
    read(a.scores, a.wide_scores, a.K, weight.data);
    if (!a.softmax)
      return;
    vec<C> top = splat(-infinity<C>);
    for (int64_t k = 0; k < a.K; ++k)
      top = maximum<C>(top, load(weight.data + k * block));
    const vec<C> base = top == -infinity<C> ? vec<C>{} : top;
    vec<C> total = {};
    for (int64_t k = 0; k < a.K; ++k) {
      const vec<C> e = exp_below(load(weight.data + k * block) - base);
      store(weight.data + k * block, e);
      total += e;
    }
    const vec<C> inverse = total != C(0) ? C(1) / total : vec<C>{};
    multiply(weight.data, inverse);
    for (int64_t lane = 0; lane < count; ++lane) {
      C* row = softmax_row(lane);
      row[0] = top[lane];
      row[1] = inverse[lane];
    }
  }
  void weights_again() {
    read(a.scores, a.wide_scores, a.K, weight.data);
    if (!a.softmax)
      return;
    vec<C> top = {};
    vec<C> inverse = {};
    for (int64_t lane = 0; lane < count; ++lane) {
      top[lane] = softmax_row(lane)[0];
      inverse[lane] = softmax_row(lane)[1];
    }
    const vec<C> base = top == -infinity<C> ? vec<C>{} : top;
    for (int64_t k = 0; k < a.K; ++k)
      store(weight.data + k * block, exp_below(load(weight.data + k * block) - base) * inverse);
  }

  // From locations to positions and shares.
  void locate() {
    read(a.locations, a.wide_locations, 2 * a.K, location.data);
    for (int64_t k = 0; k < a.K; ++k) {
      const C width = points.width.data[k];
      const C height = points.height.data[k];
      vec<C> x = load(location.data + 2 * k * block) * width - C(0.5);
      vec<C> y = load(location.data + (2 * k + 1) * block) * height - C(0.5);
      const ivec near = (x >= C(-1)) & (x < width) & (y >= C(-1)) & (y < height);  // not where it is NaN
      x = near ? x : vec<C>{};
      y = near ? y : vec<C>{};
      ivec column = __builtin_convertvector(x, ivec);
      ivec row = __builtin_convertvector(y, ivec);
      column += x < __builtin_convertvector(column, vec<C>);  // rounded down: a comparison that holds is -1
      row += y < __builtin_convertvector(row, vec<C>);
      x = near ? x - __builtin_convertvector(column, vec<C>) : splat(C(-1));
      y = near ? y - __builtin_convertvector(row, vec<C>) : splat(C(-1));
      store(fraction_x.data + k * block, x);
      store(fraction_y.data + k * block, y);

      const ivec left = column >= 0;
      const ivec right = column < I(width) - 1;
      const ivec above = near & (row >= 0);
      const ivec below = near & (row < I(height) - 1);
      const ivec at = row * I(width) + column + (points.begin.data[k] - I(lowest));
      put_position(0, k, left & above, at);
      put_position(1, k, right & above, at + 1);
      put_position(2, k, left & below, at + I(width));
      put_position(3, k, right & below, at + (I(width) + 1));

      put_share(0, k, (C(1) - y) * (C(1) - x));
      put_share(1, k, (C(1) - y) * x);
      put_share(2, k, y * (C(1) - x));
      put_share(3, k, y * x);
    }
    if (masked)
      hide();
  }
  // From shares of a point's sample to those of the result.
  void weigh_shares() {
    for (int c = 0; c < 4; ++c)
      for (int64_t k = 0; k < a.K; ++k)
        put_share(c, k, load(share.data + (c * a.K + k) * block) * load(weight.data + k * block));
  }

  // to = what is laid out like weights or locations, a row a query.
  void write(const C* numbers, int64_t columns, const QueryRows& to, bool wide) const {
    for (int64_t k = 0; k < columns; k += block) {
      vec<C> square[block];
      for (int64_t i = 0; i < block; ++i)
        square[i] = load(numbers + (k + i) * block);
      transpose<C>(square);
      for (int64_t lane = 0; lane < count; ++lane)
        with_width<T>(wide, to, offset(to, lane) + k, [&](auto* row) {
          using To = std::remove_reference_t<decltype(*row)>;
          if (k + block <= columns)
            return store(row, square[lane]);
          for (int64_t i = 0; i < columns - k; ++i)
            row[i] = from_acc<To>(square[lane][i]);
        });
    }
  }

 private:
  int64_t offset(const QueryRows& rows, int64_t lane) const {
    return b * rows.b + (first + lane) * rows.q + h * rows.h;
  }
  C* softmax_row(int64_t lane) const {
    return static_cast<C*>(a.softmax_rows) + ((b * a.Q + first + lane) * a.H + h) * 2;
  }
  // Rows of the block's queries, transposed: whole squares.
  void read(const QueryRows& from, bool wide, int64_t columns, C* to) const {
    for (int64_t k = 0; k < columns; k += block) {
      vec<C> square[block];
      for (int64_t lane = 0; lane < block; ++lane)
        with_width<T>(wide, from, offset(from, lane < count ? lane : 0) + k, [&](const auto* row) {
          square[lane] = k + block <= columns ? load(row) : load_first(row, columns - k);
        });
      transpose<C>(square);
      for (int64_t i = 0; i < block; ++i)
        store(to + (k + i) * block, square[i]);
    }
  }
  void multiply(C* numbers, vec<C> factor) const {
    for (int64_t k = 0; k < a.K; ++k)
      store(numbers + k * block, load(numbers + k * block) * factor);
  }
  MMK_INLINE void put_position(int corner, int64_t k, ivec inside, ivec at) {
    at = inside & (at >= 0) & (at < I(highest - lowest)) ? at : ivec{} - 1;
    memcpy(position.data + (corner * a.K + k) * block, &at, sizeof at);
  }
  MMK_INLINE void put_share(int corner, int64_t k, vec<C> value) {
    store(share.data + (corner * a.K + k) * block, value);
  }
  void hide() {
    const bool* mask = a.mask.data + b * a.mask.b;
    for (int64_t i = 0; i < 4 * a.K * block; ++i) {
      I& at = position.data[i];
      if (at >= 0 && !mask[(lowest + at) * a.mask.t])
        at = -1;
    }
  }
};

// Rows of a head's value map where they lie, and what stands for those that aren't there.
template <class T>
struct Rows {
  using element = std::remove_const_t<T>;
  T* data;
  int64_t step;
  T* absent;
  template <class I>
  MMK_INLINE T* operator[](I position) const {
    return position < 0 ? absent : data + int64_t(position) * step;
  }
};

// A head's rows side by side; the one before the first stands for those that aren't there. Where heads lie side by
// side, the rows of one are so far apart that they share a few sets of each cache, which then holds a fraction of
// what it could.
template <class C>
struct DenseRows {
  using element = std::remove_const_t<C>;
  C* data;
  int64_t step;
  template <class I>
  MMK_INLINE C* operator[](I position) const {
    return data + int64_t(position) * step;
  }
};
template <class C>
struct DenseMap {
  Scratch<C> memory;
  DenseRows<C> rows;
  DenseMap(int64_t positions, int64_t channels)
      : memory((positions + 1) * channels), rows{memory.data + channels, channels} {
    memset(memory.data, 0, channels * sizeof(C));
  }
};

// Whether so many rows are read of a head's map that a copy of it pays.
inline bool copy_pays(const DeformableAttention& a) {
  return a.Q * a.K >= 2 * a.S;
}

template <class T, class C>
inline void copy_row(const T* from, int64_t count, C* to) {
  int64_t i = 0;
  for (; i + lanes<C> <= count; i += lanes<C>)
    store(to + i, load(from + i));
  for (; i < count; ++i)
    to[i] = to_acc(from[i]);
}

// Positions `first` to `last` of a head's map; what is masked out is 0.
template <class T>
inline void copy_rows(const DeformableAttention& a, int64_t b, int64_t h, int64_t first, int64_t last,
                      DenseRows<acc_t<T>> to) {
  using C = acc_t<T>;
  const T* value = static_cast<const T*>(a.value.data) + b * a.value.b + h * a.value.h;
  const bool* mask = a.mask.data ? a.mask.data + b * a.mask.b : nullptr;
  for (int64_t s = first; s < last; ++s) {
    C* row = to[s];
    if (mask && !mask[s * a.mask.t])
      memset(row, 0, a.d * sizeof(C));
    else
      copy_row(value + s * a.value.n, a.d, row);
  }
}

// Threads share out the queries of all heads, a head's after the other: neighbours sample near each other, and what
// they need of one head's map stays in the second-level cache. Heads that are copied are taken one by one, by all
// threads, so that there is one copy.
struct QueryParts {
  const DeformableAttention& a;
  const Parallel& parallel;
  const int64_t flops_per_query;

  // work(thread) makes what a thread needs; its run(rows, b, h, first query, last query) does the work.
  template <class T, class Work>
  void run(Work work) const {
    if (copy_pays(a))
      dense<T>(work);
    else
      in_place<T>(work);
  }

 private:
  // Of `queries`, so many that it is worth waking another thread.
  int64_t parts(int64_t queries) const {
    const int64_t worth = queries * flops_per_query >> 17;
    const int64_t most = parallel.threads < queries ? parallel.threads : queries;
    return worth < 1 ? 1 : worth < most ? worth : most;
  }
  template <class T, class Work>
  void in_place(Work work) const {
    const int64_t all = a.B * a.H * a.Q;
    const int64_t count = parts(all);
    Scratch<T> zeros(a.d);
    memset(static_cast<void*>(zeros.data), 0, a.d * sizeof(T));
    each_part(parallel, all ? count : 0, [&](int64_t part) {
      auto own = work();
      const int64_t end = all * (part + 1) / count;
      for (int64_t i = all * part / count; i < end;) {
        const int64_t b = i / a.Q / a.H;
        const int64_t h = i / a.Q % a.H;
        const int64_t first = i % a.Q;
        const int64_t last = first + end - i < a.Q ? first + end - i : a.Q;
        const T* value = static_cast<const T*>(a.value.data) + b * a.value.b + h * a.value.h;
        own.run(Rows<const T>{value, a.value.n, zeros.data}, b, h, first, last);
        i += last - first;
      }
    });
  }
  template <class T, class Work>
  void dense(Work work) const {
    using C = acc_t<T>;
    DenseMap<C> map(a.S, a.d);
    const int64_t count = parts(a.Q);
    for (int64_t index = 0; index < a.B * a.H; ++index) {
      const int64_t b = index / a.H;
      const int64_t h = index % a.H;
      each_part(parallel, count,
                [&](int64_t part) { copy_rows<T>(a, b, h, a.S * part / count, a.S * (part + 1) / count, map.rows); });
      each_part(parallel, count, [&](int64_t part) {
        auto own = work();
        own.sampling.masked = false;
        own.run(DenseRows<const C>{map.rows.data, map.rows.step}, b, h, a.Q * part / count, a.Q * (part + 1) / count);
      });
    }
  }
};

}  // namespace
}  // namespace mmk
