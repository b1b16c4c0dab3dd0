// Where a query's and head's points lie in the value map, and what they weigh.
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
        share(4 * block * a.K),
        fraction_x(block * a.K),
        fraction_y(block * a.K),
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

}  // namespace
}  // namespace mmk
