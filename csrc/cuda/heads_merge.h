// What backward of attention over heads writes, and the merge of sums that splits of the stream have left.
#pragma once
#include "heads_task.h"

namespace mmk::cuda {

// What both the kernel and the merge know of a task: where it takes part, and what is written there.
template <class T>
struct BackwardRows {
  const BackwardTask& t;
  int64_t bh, b, h;
  MMK_DEVICE BackwardRows(const BackwardTask& t, int64_t bh)
      : t(t), bh(bh), b(unsigned(bh) / unsigned(t.heads)), h(unsigned(bh) % unsigned(t.heads)) {}
  MMK_DEVICE bool row_valid(int64_t r) const {
    return !t.row_mask.data || load(t.row_mask.data + b * t.row_mask.b + h * t.row_mask.h + r * t.row_mask.t);
  }
  MMK_DEVICE bool column_valid(int64_t n) const {
    return !t.column_mask.data ||
           load(t.column_mask.data + b * t.column_mask.b + h * t.column_mask.h + n * t.column_mask.t);
  }
  MMK_DEVICE bool fully_masked(const float* softmax, int64_t rows, int64_t r) const {
    return softmax && share_of(softmax, bh, rows, r) == 0;
  }
  // The gradient of what counted as 0 because it takes no part and isn't finite is 0.
  MMK_DEVICE void put_input(const HeadRows& to, const HeadRows& input, int64_t r, int64_t c, float (&x)[8], int count,
                            bool valid, bool fully_masked) const {
    if (!valid && !t.drop) {
      float y[8];
      get<8>(y, head_of<T>(input, b, h) + r * input.n + c * input.c, input.c, count);
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (!(fabsf(y[e]) < INFINITY))
          x[e] = 0;
    }
#pragma unroll
    for (int e = 0; e < 8; ++e)
      x[e] = fully_masked || (!valid && t.drop) ? 0.f : x[e] * float(t.scale);
    put<8>(head_of<T>(to, b, h) + r * to.n + c * to.c, x, to.c, count);
  }
  MMK_DEVICE void put_value(const HeadRows& to, int64_t r, int64_t c, float (&x)[8], int count, bool valid) const {
#pragma unroll
    for (int e = 0; e < 8; ++e)
      x[e] = valid ? x[e] : 0.f;
    put<8>(head_of<T>(to, b, h) + r * to.n + c * to.c, x, to.c, count);
  }
  MMK_DEVICE void put_query(int64_t r, int64_t c, float (&x)[8], int count) const {
    put_input(t.grad_query, t.query, r, c, x, count, row_valid(r), t.drop && fully_masked(t.softmax, t.rows, r));
  }
};

// Adds what the splits of the stream have left: a thread 8 channels of a row. Grid (.., 1), block 128.
template <class T>
MMK_DEVICE void backward_merge(const BackwardTask& t) {
  const int64_t packs = ceil_div(t.d, 8);
  const int64_t value_packs = ceil_div(t.dv, 8);
  const int64_t item = int64_t(blockIdx.x) * 128 + threadIdx.x;
  const int64_t row = item / (packs + value_packs);
  const int64_t c = item % (packs + value_packs) * 8;
  if (row >= t.count * t.rows)
    return;
  const BackwardRows<T> on(t, row / t.rows);
  const int64_t r = row % t.rows;
  const int64_t v = c - packs * 8;
  const bool values = v >= 0;
  if (!(values ? t.grad_row_value : t.grad_query).data)
    return;
  const int64_t width = values ? t.dv : t.d;
  const int64_t channel = values ? v : c;
  const int count = int(least<int64_t>(8, width - channel));
  const float* from = (values ? t.partial_value_of(on.bh, 0, r) : t.partial_query_of(on.bh, 0, r)) + channel;
  float sum[8] = {};
  for (int64_t s = 0; s < t.splits; ++s, from += t.rows * width) {
    float x[8];
    get<8>(x, from, 1, count);
    for (int e = 0; e < 8; ++e)
      sum[e] += x[e];
  }
  if (values)
    on.put_value(t.grad_row_value, r, channel, sum, count, on.row_valid(r));
  else
    on.put_query(r, channel, sum, count);
}

}  // namespace mmk::cuda
