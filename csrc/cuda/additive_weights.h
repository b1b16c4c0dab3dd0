// Additive attention's softmax over a sample's positions, and its gradient. Blocks share a sample's rows: each leaves
// what it found in `partial`, and the next kernel's merge what all have left, in order. Without company a block needs
// one kernel alone.
#pragma once
#include "additive_attention.h"
#include "rows_access.h"

namespace mmk::cuda {

struct FinishTask {
  AdditiveAttention a;
  SampledRows rows;
  const float* scores;
  float* partial;
  int64_t splits;
  bool wide = false;  // what is read of image are 16 bytes, aligned
  int lanes = 32;
};
struct BackTask {
  AdditiveAttentionBackward g;
  SampledRows rows;
  float *grad_scores, *partial;
  int64_t splits;
  int pass = 0;
  bool wide = false;  // rows of image and gradient are read four elements at a time
};

constexpr int64_t left = 3;           // floats that a block leaves
constexpr int64_t most_splits = 128;  // a thread reads what one block has left
static_assert(most_splits <= row_threads);

// Where a sample's row is in [B, K, N] (packed: [K, rows]) for the first map; the others are N apart.
MMK_DEVICE int64_t weight_at(const AdditiveAttention& a, int64_t b, int64_t row) {
  return a.offsets ? row : b * a.K * a.N + row - b * a.N;
}

// Whether a sample's rows take part; `r` counts among all rows.
struct Kept {
  const bool* data;
  int64_t step;
  MMK_DEVICE Kept(const AdditiveAttention& a, int64_t b, int64_t begin)
      : data(a.mask.data ? a.mask.data + (a.offsets ? 0 : b * a.mask.b - begin * a.mask.x) : nullptr), step(a.mask.x) {}
  MMK_DEVICE bool operator()(int64_t r) const { return !data || load(data + r * step); }
};

// Where a block leaves what it found of sample b's map k.
MMK_DEVICE float* left_at(float* partial, int64_t splits, int64_t maps, int64_t b, int64_t k, int64_t split) {
  return partial + ((b * maps + k) * splits + split) * left;
}

// The block's result of `op`; scratch: a float a warp.
template <class Op>
MMK_DEVICE float over_block(float value, float* scratch, Op op) {
  return Teams(1).over(value, scratch, op);
}

// Of scores: the largest, the sum of exponentials of what the others are less, and whether any takes part.
struct Spread {
  float top, total, takes_part;
};
MMK_DEVICE Spread over_block(const Running& own, float takes_part, float* scratch) {
  const float top = over_block(own.top, scratch, Max());
  const float total = over_block(own.below(top == -INFINITY ? 0.f : top), scratch, Sum());
  return {top, total, over_block(takes_part, scratch, Max())};
}
// Of the block's own rows.
MMK_DEVICE Spread measure(const FinishTask& t, const Share& own, int64_t k, const Kept& kept, float* scratch) {
  Running found;
  float takes_part = 0;
  for (int64_t r = own.first + threadIdx.x; r < own.last; r += blockDim.x)
    if (kept(r)) {
      found.add(load(t.scores + r * t.a.K + k));
      takes_part = 1;
    }
  return over_block(found, takes_part, scratch);
}
// Of all of the sample's, out of what blocks have left.
MMK_DEVICE Spread merged(const FinishTask& t, int64_t b, int64_t k, float* scratch) {
  Running found;
  float takes_part = 0;
  if (threadIdx.x < t.splits) {
    const float* from = left_at(t.partial, t.splits, t.a.K, b, k, threadIdx.x);
    found.top = load(from);
    found.total = load(from + 1);
    takes_part = load(from + 2);
  }
  return over_block(found, takes_part, scratch);
}

MMK_DEVICE void leave(const FinishTask& t) {
  MMK_DYNAMIC_SHARED(memory);
  const Share own(t.rows, t.splits, blockIdx.x);
  const int64_t k = blockIdx.y;
  const Spread found = measure(t, own, k, Kept(t.a, own.b, own.begin), reinterpret_cast<float*>(memory));
  if (threadIdx.x > 0)
    return;
  float* to = left_at(t.partial, t.splits, t.a.K, own.b, k, own.split);
  store(to, found.top);
  store(to + 1, found.total);
  store(to + 2, found.takes_part);
}

MMK_DEVICE void normalise(const FinishTask& t) {
  MMK_DYNAMIC_SHARED(memory);
  float* scratch = reinterpret_cast<float*>(memory);
  const AdditiveAttention& a = t.a;
  const Share own(t.rows, t.splits, blockIdx.x);
  const int64_t k = blockIdx.y;
  const Kept kept(a, own.b, own.begin);
  const Spread all = t.splits > 1 ? merged(t, own.b, k, scratch) : measure(t, own, k, kept, scratch);
  const float base = all.top == -INFINITY ? 0 : all.top;
  float share = 1 / all.total;  // exactly 1 for a single position; NaN stays
  if (all.total == 0)
    share = all.takes_part != 0 ? NAN : 0.f;  // all -Inf: NaN, as softmax has it. Nothing takes part: 0
  const int64_t at = weight_at(a, own.b, own.begin) + k * a.N - own.begin;
  float* to = static_cast<float*>(a.weights) + at;
  for (int64_t r = own.first + threadIdx.x; r < own.last; r += blockDim.x) {
    const bool takes_part = kept(r);
    const float score = takes_part ? load(t.scores + r * a.K + k) : -INFINITY;
    store(to + r, takes_part ? exponential(score - base) * share : 0.f);
    if (a.scores)
      store(static_cast<float*>(a.scores) + at + r, score);
  }
}

// The weights' gradient -> the scores'. Their mean is found twice, the second time of what is left: what all have in
// common has to cancel.
struct Moment {
  float total, mass;
  MMK_DEVICE float mean() const { return mass == 0 ? 0 : total / mass; }
};
MMK_DEVICE Moment over_block(const Moment& own, float* scratch) {
  const float total = over_block(own.total, scratch, Sum());
  return {total, over_block(own.mass, scratch, Sum())};
}
// Of the block's own rows, of what is more than `less`.
MMK_DEVICE Moment measure(const Share& own, const float* weights, const float* x, float less, float* scratch) {
  Moment found = {};
  for (int64_t r = own.first + threadIdx.x; r < own.last; r += blockDim.x) {
    const float w = load(weights + r);
    if (w != 0) {
      found.total += w * (load(x + r) - less);
      found.mass += w;
    }
  }
  return over_block(found, scratch);
}
// Of all of the sample's, out of what blocks have left in a pass.
MMK_DEVICE Moment merged(const BackTask& t, int64_t b, int64_t k, int pass, float* scratch) {
  Moment found = {};
  if (threadIdx.x < t.splits) {
    const float* from = left_at(t.partial, t.splits, t.g.forward.K, b, k, threadIdx.x);
    found.total = load(from + 1 + pass);
    found.mass = load(from);
  }
  return over_block(found, scratch);
}

MMK_DEVICE void leave(const BackTask& t) {
  MMK_DYNAMIC_SHARED(memory);
  float* scratch = reinterpret_cast<float*>(memory);
  const AdditiveAttention& a = t.g.forward;
  const Share own(t.rows, t.splits, blockIdx.x);
  const int64_t k = blockIdx.y;
  const float* weights = static_cast<const float*>(a.weights) + weight_at(a, own.b, own.begin) + k * a.N - own.begin;
  const float less = t.pass ? merged(t, own.b, k, 0, scratch).mean() : 0.f;
  const Moment found = measure(own, weights, t.grad_scores + k * t.rows.rows, less, scratch);
  if (threadIdx.x > 0)
    return;
  float* to = left_at(t.partial, t.splits, a.K, own.b, k, own.split);
  if (t.pass == 0)
    store(to, found.mass);
  store(to + 1 + t.pass, found.total);
}

MMK_DEVICE void center(const BackTask& t) {
  MMK_DYNAMIC_SHARED(memory);
  float* scratch = reinterpret_cast<float*>(memory);
  const AdditiveAttention& a = t.g.forward;
  const Share own(t.rows, t.splits, blockIdx.x);
  const int64_t k = blockIdx.y;
  const Kept kept(a, own.b, own.begin);
  const int64_t at = weight_at(a, own.b, own.begin) + k * a.N - own.begin;
  const float* weights = static_cast<const float*>(a.weights) + at;
  const float* given = static_cast<const float*>(t.g.grad_scores);
  float* x = t.grad_scores + k * t.rows.rows;
  float mean[2] = {0, 0};
#pragma unroll
  for (int pass = 0; pass < 2; ++pass) {
    const Moment all = t.splits > 1 ? merged(t, own.b, k, pass, scratch) : measure(own, weights, x, mean[0], scratch);
    mean[pass] = all.mean();
  }
  for (int64_t r = own.first + threadIdx.x; r < own.last; r += blockDim.x) {
    const float w = load(weights + r);
    const float centered = w != 0 ? w * (load(x + r) - mean[0] - mean[1]) : 0.f;
    store(x + r, given && kept(r) ? centered + load(given + at + r) : centered);
  }
}

}  // namespace mmk::cuda
