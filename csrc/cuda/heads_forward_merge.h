// The merge of what the splits of a stream have left in scratch: the second launch of attention over heads, forward.
#pragma once
#include "heads_task.h"

namespace mmk::cuda {

// A warp a row. Lanes have 8 neighbouring channels each; where the row has fewer, teams of lanes take every so many-th
// split, and their sums are added in a fixed order. Grid (rows of all heads / 4), block 128.
template <class T>
MMK_DEVICE void attend_merge(const AttendTask& t) {
  const int64_t row = int64_t(blockIdx.x) * 4 + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= t.count * t.rows)
    return;
  const int64_t bh = row / t.rows;
  const int64_t r = row % t.rows;
  const int64_t b = bh / t.heads;
  const int64_t h = bh % t.heads;
  const int splits = int(t.splits);
  auto stats = [&](int split) { return t.stats_of(bh, split, r); };
  float top = -INFINITY;
  for (int s = lane; s < splits; s += 32)
    top = fmaxf(top, load(stats(s)));
  top = over_lanes(top, 32, Max());
  const Exponential power(top);
  auto share = [&](int s) {
    const float m = load(stats(s));
    return load(stats(s) + 1) == 0 ? 0.f : power(m);
  };
  float total = 0;
  for (int s = lane; s < splits; s += 32)
    total += share(s) * load(stats(s) + 1);
  total = over_lanes(total, 32, Sum());
  if (lane == 0)
    store_softmax(t.softmax, bh, t.rows, r, top, total);

  const int lanes = least(32, power_of_two(int(least<int64_t>(ceil_div(t.dv, 8), 32))));
  const int teams = 32 / lanes;
  for (int64_t first = 0; first < t.dv; first += 8 * lanes) {
    const int64_t c = first + lane % lanes * 8;
    const int count = int(least<int64_t>(8, t.dv - c));
    float sum[8] = {};
#pragma unroll 4
    for (int s = lane / lanes; s < splits; s += teams) {
      float x[8];
      get<8>(x, t.partial_of(bh, s, r) + c, 1, count);
      const float w = share(s);
#pragma unroll
      for (int e = 0; e < 8; ++e)
        sum[e] += w == 0 ? 0.f : w * x[e];
    }
    for (int other = lanes; other < 32; other *= 2)
#pragma unroll
      for (int e = 0; e < 8; ++e)
        sum[e] += __shfl_xor_sync(all_lanes, sum[e], other);
    if (lane >= lanes || count <= 0)
      continue;
#pragma unroll
    for (int e = 0; e < 8; ++e)
      sum[e] = total == 0 ? 0.f : sum[e] / total;
    if (t.attended.data)
      put<8>(head_of<T>(t.attended, b, h) + r * t.attended.n + c * t.attended.c, sum, t.attended.c, count);
    if (t.unrounded.data)
      put<8>(head_of<float>(t.unrounded, b, h) + r * t.unrounded.n + c * t.unrounded.c, sum, t.unrounded.c, count);
    if (t.gate.data && total != 0) {
      float y[8];
      get<8>(y, head_of<T>(t.gate, b, h) + r * t.gate.n + c * t.gate.c, t.gate.c, count);
#pragma unroll
      for (int e = 0; e < 8; ++e)
        sum[e] *= y[e];
    }
    put<8>(head_of<T>(t.result, b, h) + r * t.result.n + c * t.result.c, sum, t.result.c, count);
  }
}

}  // namespace mmk::cuda
