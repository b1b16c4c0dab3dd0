// The text's side, after: what becomes of the sums that blocks have left. A block takes 64 channels of a column; a
// thread adds 4 of them over every eighth split, so that many loads are on their way, then a channel over the threads.
// All orders are fixed.
#pragma once
#include "absorbed_pack.h"

namespace mmk::cuda {

constexpr int merge_threads = 128;
constexpr int merge_packs = padded_channels / 4;
constexpr int merge_lanes = merge_threads / merge_packs;  // threads that share out the splits
constexpr int64_t merge_shared = merge_lanes * padded_channels * 4;

struct MergedColumn {
  const AbsorbedTask& t;
  const ColumnPlace at;
  float* sums;          // [merge_lanes][64]
  const int64_t first;  // of what the splits have left

  MMK_DEVICE MergedColumn(const AbsorbedTask& t, unsigned char* shared)
      : t(t),
        at(t, blockIdx.x),
        sums(reinterpret_cast<float*>(shared)),
        first(t.left_at(at.b, at.column / tile, 0) + at.column % tile) {}

  MMK_DEVICE const float* stats(int64_t split) const { return t.stats + 2 * (first + split * tile); }
  // At a channel, the sum over the splits of weight(split) times what each has left; `partial`: [.., width]. A split
  // that weighs 0 is left out, whatever it holds. Thread i < 64 gets that of the i-th channel of the 64.
  template <class Weight>
  MMK_DEVICE float over_splits(const float* partial, int64_t width, int64_t channel, Weight weight) const {
    const int lane = threadIdx.x / merge_packs;
    const int c = threadIdx.x % merge_packs * 4;
    const float* from = partial + first * width + channel + c;
    const int64_t step = tile * width;
    Pack<float> sum = {};
#pragma unroll 4
    for (int64_t s = lane; s < t.splits; s += merge_lanes) {
      const float w = weight(s);
      const Pack<float> x = load(reinterpret_cast<const Pack<float>*>(from + s * step));
#pragma unroll
      for (int e = 0; e < 4; ++e)
        sum.at[e] += w == 0 ? 0.f : w * x.at[e];
    }
    *reinterpret_cast<Pack<float>*>(sums + lane * padded_channels + c) = sum;
    __syncthreads();
    float all = 0;
    if (threadIdx.x < padded_channels)
#pragma unroll
      for (int i = 0; i < merge_lanes; ++i)
        all += sums[i * padded_channels + threadIdx.x];
    return all;
  }
};

// text_out and its softmax. Grid (columns of all samples, D / 64), block 128.
template <class T>
MMK_DEVICE void absorbed_merge(const AbsorbedTask& t, unsigned char* shared) {
  const MergedColumn column(t, shared);
  const ColumnPlace& at = column.at;
  if (!at.there)
    return;
  const int lane = threadIdx.x % 32;  // all warps find the same
  float top = -INFINITY;
  for (int64_t s = lane; s < t.splits; s += 32)
    top = fmaxf(top, load(column.stats(s)));
  top = over_lanes(top, 32, Max());
  const Exponential power(top);
  auto share = [&](int64_t s) { return load(column.stats(s) + 1) == 0 ? 0.f : power(load(column.stats(s))); };
  float total = 0;
  for (int64_t s = lane; s < t.splits; s += 32)
    total += share(s) * load(column.stats(s) + 1);
  total = over_lanes(total, 32, Sum());
  if (blockIdx.y == 0 && threadIdx.x == 0)
    store_softmax(t.text_softmax, at.b * t.H + at.h, t.T, at.token, top, total);
  const int64_t first = int64_t(blockIdx.y) * padded_channels;
  const float sum = column.over_splits(t.partial, t.width(), first, share);
  const int64_t c = first + threadIdx.x;
  if (threadIdx.x >= padded_channels || c >= t.D)
    return;
  const float x = total == 0 ? 0.f : sum / total;
  store(head_of<T>(t.text_out, at.b, at.h) + at.token * t.text_out.n + c * t.text_out.c, from_float<T>(x));
  if (t.unrounded.data)
    store(head_of<float>(t.unrounded, at.b, at.h) + at.token * t.unrounded.n + c * t.unrounded.c, x);
}

// U: the dtype of key and value.
template <class U>
MMK_DEVICE void merge_gradients(const MergedColumn& column) {
  const AbsorbedTask& t = column.t;
  const ColumnPlace& at = column.at;
  const bool takes = token_takes(t, at.b, at.token);
  const int64_t of_key = t.grad_key.data ? ceil_div(t.D, padded_channels) : 0;
  const bool value = blockIdx.y >= of_key;
  const HeadRows& to = value ? t.grad_value : t.grad_key;
  if (!to.data)
    return;
  const int64_t first = (blockIdx.y - (value ? of_key : 0)) * padded_channels;
  float x = column.over_splits(value ? t.partial_value : t.partial, value ? t.value_width() : t.width(), first,
                               [](int64_t) { return 1.f; });
  const int64_t c = first + threadIdx.x;
  if (threadIdx.x >= padded_channels || c >= (value ? t.Dv : t.D))
    return;
  // What counted as 0 whatever it held has no gradient.
  if (!takes &&
      (value || !(fabsf(to_float(load(head_of<U>(t.key, at.b, at.h) + at.token * t.key.n + c * t.key.c))) < INFINITY)))
    x = 0;
  store(head_of<U>(to, at.b, at.h) + at.token * to.n + c * to.c, from_float<U>(x));
}

// The gradients of key, value and key_bias. Grid (columns of all samples, D / 64 + Dv / 64 of what is wanted, at least
// 1), block 128.
template <class T>
MMK_DEVICE void absorbed_backward_merge(const AbsorbedTask& t, unsigned char* shared) {
  const MergedColumn column(t, shared);
  const ColumnPlace& at = column.at;
  if (!at.there)
    return;
  if (t.grad_key_bias && blockIdx.y == 0 && threadIdx.x < 32) {
    float sum = 0;
    for (int64_t s = threadIdx.x; s < t.splits; s += 32)
      sum += load(column.stats(s));
    sum = over_lanes(sum, 32, Sum());
    if (threadIdx.x == 0)
      store(t.grad_key_bias + (at.b * t.H + at.h) * t.T + at.token, sum);
  }
  if (t.bits)
    merge_gradients<float>(column);
  else
    merge_gradients<T>(column);
}

}  // namespace mmk::cuda
