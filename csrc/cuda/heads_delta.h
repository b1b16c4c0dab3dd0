// What backward of attention over heads begins with: the rows' deltas, and the gate's gradient.
#pragma once
#include "heads.h"

namespace mmk::cuda {

// delta = <grad * gate, result> a row, and the gate's gradient, grad * result. A warp takes a few rows. Grid (rows / 4,
// 1), block 128.
struct DeltaTask {
  int64_t heads, count, rows, dv;          //  0 every field has 8 bytes
  HeadRows grad, gate, result, grad_gate;  //  4 gate, grad_gate: data null = none; result: before the gate
  const float* softmax;                    // 24 [b, h, 2, rows], share 0: the row takes no part, is 0
  float* delta;                            // 25 [b, h, rows]
  int64_t wide;                            // 26 1: result is float
};
static_assert(sizeof(DeltaTask) == 27 * 8, "every field has 8 bytes");

template <class T>
MMK_DEVICE void backward_delta(const DeltaTask& t) {
  const int lanes = least(32, power_of_two(int(least<int64_t>(ceil_div(t.dv, 8), 32))));
  const int lane = threadIdx.x % lanes;
  const int64_t row = (int64_t(blockIdx.x) * 128 + threadIdx.x) / lanes;
  const bool there = row < t.count * t.rows;
  const int64_t bh = there ? row / t.rows : 0;
  const int64_t r = there ? row % t.rows : 0;
  const int64_t b = bh / t.heads;
  const int64_t h = bh % t.heads;
  const bool fully_masked = there && share_of(t.softmax, bh, t.rows, r) == 0;
  float sum = 0;
  for (int64_t c = 8 * lane; there && c < t.dv; c += 8 * lanes) {
    const int count = int(least<int64_t>(8, t.dv - c));
    float g[8] = {}, x[8] = {}, y[8];
    if (!fully_masked) {
      get<8>(g, head_of<T>(t.grad, b, h) + r * t.grad.n + c * t.grad.c, t.grad.c, count);
      if (t.wide)
        get<8>(x, head_of<float>(t.result, b, h) + r * t.result.n + c * t.result.c, t.result.c, count);
      else
        get<8>(x, head_of<T>(t.result, b, h) + r * t.result.n + c * t.result.c, t.result.c, count);
    }
    if (t.grad_gate.data) {
      for (int e = 0; e < 8; ++e)
        y[e] = g[e] * x[e];
      put<8>(head_of<T>(t.grad_gate, b, h) + r * t.grad_gate.n + c * t.grad_gate.c, y, t.grad_gate.c, count);
    }
    if (t.gate.data && !fully_masked) {
      get<8>(y, head_of<T>(t.gate, b, h) + r * t.gate.n + c * t.gate.c, t.gate.c, count);
      for (int e = 0; e < 8; ++e)
        g[e] = to_float(from_float<T>(g[e] * y[e]));  // as the other kernels have it
    }
    for (int e = 0; e < 8; ++e)
      sum += g[e] * x[e];
  }
  sum = over_lanes(sum, lanes, Sum());
  if (there && lane == 0)
    store(t.delta + row, sum);
}

// ---- host

using DeltaKernel = void (*)(DeltaTask);

inline const char* delta_launch(const DeltaTask& t, DeltaKernel kernel, Stream stream) {
  int64_t lanes = 1;
  while (lanes < 32 && 8 * lanes < t.dv)
    lanes *= 2;
  const int64_t blocks = ceil_div(t.count * t.rows * lanes, 128);
  return !t.grad.data ? nullptr : launch(kernel, blocks, 1, 1, 128, 0, stream, t);
}

}  // namespace mmk::cuda
