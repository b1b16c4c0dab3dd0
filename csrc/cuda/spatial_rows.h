// Spatial attention where a position's channels lie together and aligned: rows go straight through registers. A lane
// has P packs of 16 bytes of a row of one head, a group of lanes the row, a block 128 threads of such groups, which
// walk a chunk's rows. Nothing waits for a tile: as many loads are in flight as there are lanes. A sample of one chunk
// is finished by the block that has it; else a second launch finds the chunks' statistics merged and reads the rows
// again, from L2 where that holds them.
//
// One head a block: Task.heads is 1, tile and slab are 0, and Task.chunk is the rows of a block.
#pragma once
#include "spatial_forward.h"

namespace mmk::cuda::spatial {

constexpr int rows_threads = 128;
constexpr int rows_warps = rows_threads / 32;

// Rows that a group has in flight: with the blocks that registers leave room for, 32 KB a processor.
constexpr int rows_at_once(int packs, bool backward) {
  const int rows = backward ? 2 / packs : 4 / packs;  // of the image and of the gradient
  return rows > 1 ? rows : 1;
}

// What a row of `width` elements needs: lanes, a power of two, and packs of each.
MMK_HOST_DEVICE int lanes_of_row(int64_t width, int64_t pack) {
  int lanes = 1;
  while (lanes < 32 && lanes * pack < width)
    lanes *= 2;
  return lanes;
}

// Bytes of shared memory behind Layout: three floats a warp; the text; sums [warps][width].
MMK_HOST_DEVICE int64_t rows_shared(int64_t width, int64_t element, bool sums) {
  return 16 * rows_warps + width * element + (sums ? rows_warps * width * 4 : 0);
}

template <class T, int P, bool Backward>
struct Rows {
  static constexpr int V = Pack<T>::size;
  static constexpr int R = rows_at_once(P, Backward);
  using Row = Pack<T>[P];
  const Block<T>& b;
  int lanes, lane, group, groups, packs;
  float *of_warps, *sums;
  T* text;

  MMK_DEVICE Rows(const Block<T>& b, unsigned char* shared) : b(b) {
    lanes = lanes_of_row(b.width, V);
    lane = threadIdx.x % lanes;
    group = threadIdx.x / lanes;
    groups = rows_threads / lanes;
    packs = b.width / V;
    of_warps = reinterpret_cast<float*>(shared + Layout(b.t, sizeof(T), Backward).total);
    text = reinterpret_cast<T*>(of_warps + 4 * rows_warps);
    sums = reinterpret_cast<float*>(text + b.width);
  }

  MMK_DEVICE int64_t step() const { return int64_t(R) * groups; }
  MMK_DEVICE int64_t row(int64_t n0, int r) const { return n0 + r * groups + group; }
  // Which of the rows from n0 on take part.
  MMK_DEVICE void find_valid(bool (&valid)[R], int64_t n0) const {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t n = row(n0, r);
      valid[r] = n < b.end && (!b.t.mask.data || load(b.t.mask.data + b.position(b.t.mask, n)));
    }
  }
  MMK_DEVICE int pack(int p) const { return p * lanes + lane; }

  MMK_DEVICE void read(Row& x, const Features& f, int64_t n, bool valid) const {
    const Pack<T>* from = reinterpret_cast<const Pack<T>*>(b.pointer(f, valid ? n : b.begin, 0));
#pragma unroll
    for (int p = 0; p < P; ++p) {
      x[p] = {};
      if (valid && pack(p) < packs)
        x[p] = load(from + pack(p));
    }
  }
  MMK_DEVICE void read(Row& x, const Vectors& f) const {
#pragma unroll
    for (int p = 0; p < P; ++p)
#pragma unroll
      for (int e = 0; e < V; ++e)
        x[p].at[e] = pack(p) < packs ? load(b.pointer(f, pack(p) * V + e)) : from_float<T>(0);
  }
  // The text in shared memory: registers are for what changes with each row.
  MMK_DEVICE void keep_text() const {
    for (int c = threadIdx.x; c < b.width; c += rows_threads)
      text[c] = load(b.pointer(b.t.text, c));
    __syncthreads();
  }
  // value(p, e, the text's pack): an element of the row, which is in range.
  template <class Value>
  MMK_DEVICE void write(const Features& f, int64_t n, Value value) const {
    Pack<T>* to = reinterpret_cast<Pack<T>*>(b.pointer(f, n, 0));
#pragma unroll
    for (int p = 0; p < P; ++p) {
      if (pack(p) >= packs)
        continue;
      Pack<T> x;
      const Pack<T>& own = *reinterpret_cast<const Pack<T>*>(text + pack(p) * V);
#pragma unroll
      for (int e = 0; e < V; ++e)
        x.at[e] = from_float<T>(value(p, e, own));
      store(to + pack(p), x);
    }
  }

  // The compiler would keep all elements as floats through a loop.
  MMK_DEVICE static void unpack_again(Row& x) {
#pragma unroll
    for (int i = 0; i < 4 * P; ++i) {
      int* word = reinterpret_cast<int*>(x) + i;
      *word = opaque(*word);
    }
  }

  // Of what each lane has, over the group; all lanes get it.
  MMK_DEVICE void sum_rows(float (&x)[R]) const {
    for (int offset = lanes / 2; offset > 0; offset /= 2)
#pragma unroll
      for (int r = 0; r < R; ++r)
        x[r] += __shfl_xor_sync(all_lanes, x[r], offset);
  }
  // Over the groups of a warp, lane by lane.
  template <class Op>
  MMK_DEVICE float over_groups(float x, Op op) const {
    for (int offset = 16; offset >= lanes; offset /= 2)
      x = op(x, __shfl_xor_sync(all_lanes, x, offset));
    return x;
  }
  // Over the warps, of what each has in place i of three. All threads get it; a barrier comes before.
  template <class Op>
  MMK_DEVICE float over_warps(int i, Op op) const {
    float x = of_warps[i * rows_warps];
    for (int w = 1; w < rows_warps; ++w)
      x = op(x, of_warps[i * rows_warps + w]);
    return x;
  }
  MMK_DEVICE void tell(int i, float x) const {
    if (threadIdx.x % 32 == 0)
      of_warps[i * rows_warps + threadIdx.x / 32] = x;
  }

  // store(c, sum over all groups of a lane's elements). Ends with the sums of a chunk.
  template <class Store>
  MMK_DEVICE void sum_columns(float (&x)[P * V], Store store) const {
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < P * V; ++i)
      x[i] = over_groups(x[i], Sum());
    if (int(threadIdx.x % 32) < lanes)
#pragma unroll
      for (int p = 0; p < P; ++p)
#pragma unroll
        for (int e = 0; e < V; ++e)
          if (pack(p) < packs)
            sums[warp * b.width + pack(p) * V + e] = x[p * V + e];
    __syncthreads();
    for (int c = threadIdx.x; c < b.width; c += rows_threads) {
      float sum = sums[c];
      for (int w = 1; w < rows_warps; ++w)
        sum += sums[w * b.width + c];
      store(c, sum);
    }
  }
};

template <class T, int P>
MMK_DEVICE float element(const Pack<T> (&x)[P], int p, int e) {
  return to_float(x[p].at[e]);
}

// The final weights of the block's rows, from the scores that their groups have left, and what they multiply.
template <class T, int P>
MMK_DEVICE void rows_forward_finish(const Task& t, const Rows<T, P, false>& rows, float maximum, float factor) {
  using Rows = spatial::Rows<T, P, false>;
  const Block<T>& b = rows.b;
  float* weights = t.weights + b.weights_at(0);
  for (int64_t n0 = b.begin; n0 < b.end; n0 += rows.step()) {
    typename Rows::Row x[Rows::R];
    bool valid[Rows::R];
    float w[Rows::R];
    rows.find_valid(valid, n0);
#pragma unroll
    for (int r = 0; r < Rows::R; ++r) {
      w[r] = valid[r] && rows.lane == 0 ? load(weights + rows.row(n0, r)) : 0.f;
      if (!t.pool)
        rows.read(x[r], t.image, rows.row(n0, r), valid[r]);
    }
    rows.sum_rows(w);  // of one score and zeros: all have it before the weight takes its place
#pragma unroll
    for (int r = 0; r < Rows::R; ++r) {
      const int64_t n = rows.row(n0, r);
      w[r] = valid[r] ? exponential(w[r] - base(maximum)) * factor : 0.f;
      if (n >= b.end)
        continue;
      if (rows.lane == 0)
        store(weights + n, w[r]);
      if (!t.pool)
        rows.write(t.result, n, [&](int p, int e, const Pack<T>&) { return w[r] * element(x[r], p, e); });
    }
  }
}

template <class T, int P>
MMK_DEVICE void rows_forward_first(const Task& t, unsigned char* shared) {
  using Rows = spatial::Rows<T, P, false>;
  const Block<T> b(t, shared, false, false);
  if (b.nothing())
    return;
  const Rows rows(b, shared);
  float* weights = t.weights + b.weights_at(0);
  typename Rows::Row text;
  rows.read(text, t.text);
  float sums[P * Rows::V] = {};
  float m = -INFINITY;
  float l = 0;
  float valid_count = 0;
  for (int64_t n0 = b.begin; n0 < b.end; n0 += rows.step()) {
    typename Rows::Row x[Rows::R];
    bool valid[Rows::R];
    float s[Rows::R];
    rows.find_valid(valid, n0);
#pragma unroll
    for (int r = 0; r < Rows::R; ++r)
      rows.read(x[r], t.image, rows.row(n0, r), valid[r]);
    Rows::unpack_again(text);
#pragma unroll
    for (int r = 0; r < Rows::R; ++r)
      s[r] = 0;
#pragma unroll
    for (int i = 0; i < P * Rows::V; ++i) {
      const float factor = element(text, i / Rows::V, i % Rows::V) * text_scale(t);
#pragma unroll
      for (int r = 0; r < Rows::R; ++r)
        s[r] = fmaf(element(x[r], i / Rows::V, i % Rows::V), factor, s[r]);
    }
    rows.sum_rows(s);
    float top = m;
#pragma unroll
    for (int r = 0; r < Rows::R; ++r) {
      s[r] = valid[r] ? s[r] * score_scale(t) : -INFINITY;
      top = fmaxf(top, s[r]);
      if (valid[r] && rows.lane == 0)
        store(weights + rows.row(n0, r), s[r]);
    }
    const float decay = m == -INFINITY ? 0.f : exponential(m - base(top));
    l *= decay;
    m = top;
    if (t.pool)
#pragma unroll
      for (int i = 0; i < P * Rows::V; ++i)
        sums[i] *= decay;
#pragma unroll
    for (int r = 0; r < Rows::R; ++r) {
      s[r] = valid[r] ? exponential(s[r] - base(m)) : 0.f;
      l += s[r];
      valid_count += valid[r];
      if (t.pool)
#pragma unroll
        for (int i = 0; i < P * Rows::V; ++i)
          sums[i] = fmaf(s[r], element(x[r], i / Rows::V, i % Rows::V), sums[i]);
    }
  }

  // The block's maximum, and everything below it.
  rows.tell(0, rows.over_groups(m, Max()));
  __syncthreads();
  const float maximum = rows.over_warps(0, Max());
  const float decay = m == -INFINITY ? 1.f : exponential(m - base(maximum));
  rows.tell(1, rows.over_groups(l * decay, Sum()));
  rows.tell(2, rows.over_groups(valid_count, Sum()));
  __syncthreads();
  const float total = rows.over_warps(1, Sum());
  valid_count = rows.over_warps(2, Sum());
  const bool alone = b.chunks == 1;
  const float factor = share(t, total, valid_count);
  if (t.pool) {
#pragma unroll
    for (int i = 0; i < P * Rows::V; ++i)
      sums[i] *= decay;
    rows.sum_columns(sums, [&](int c, float sum) {
      if (alone)
        store(b.pointer(t.pooled, c), from_float<T>(sum * factor));
      else
        store(b.global_sum(b.k, 1, 0, c), sum);
    });
  }
  if (alone) {
    rows_forward_finish(t, rows, maximum, factor);
  } else if (threadIdx.x == 0) {
    ChunkStats* to = b.stats_of(b.k, 0);
    store(&to->level, maximum);
    store(&to->mass, total);
    store(b.valid_count_of(b.k), valid_count);
  }
}

template <class T, int P>
MMK_DEVICE void rows_forward_second(const Task& t, unsigned char* shared) {
  const Block<T> b(t, shared, false, true);
  if (b.nothing() || b.chunks == 1)
    return;
  const SoftmaxStats stats(b);
  forward_merge(t, b, stats);
  rows_forward_finish(t, Rows<T, P, false>(b, shared), stats.maximum[0], stats.factor[0]);
}

}  // namespace mmk::cuda::spatial
