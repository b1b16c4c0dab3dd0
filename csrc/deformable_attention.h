// Deformable attention: each query and head samples its head's value map at K places; see
// mmkernels.deformable_attention.
#pragma once
#include "parallel.h"
#include "tensor.h"

namespace mmk {

// What each query and head has, [B, Q, H, ...]; the rest is contiguous.
struct QueryRows {
  void* data = nullptr;
  int64_t b = 0;
  int64_t q = 0;
  int64_t h = 0;
};

struct DeformableAttention {
  Dtype dtype = Dtype::float32;  // of value and result
  bool wide_locations = false;   // float (double), not of that dtype; their gradients likewise
  bool wide_scores = false;
  bool softmax = true;  // false: scores are the weights
  // samples, positions of all levels, heads, channels of a head, queries, points of all levels, levels
  int64_t B = 0;
  int64_t S = 0;
  int64_t H = 0;
  int64_t d = 0;
  int64_t Q = 0;
  int64_t K = 0;
  int64_t L = 0;

  const int64_t* shapes = nullptr;  // [L, 2] on the host: height and width, at least 1; S = sum of their products
  const int64_t* points = nullptr;  // [L] on the host: K = their sum
  HeadRows value;                   // [B, H, S, d]; c = 1
  QueryRows locations;              // [B, Q, H, K, 2]: x, y from 0 to 1 over the level's edges
  QueryRows scores;                 // [B, Q, H, K]
  TokenMask mask;                   // [B, 1, S]; null = all. Where masked out, value counts as 0 and is never read
  QueryRows result;                 // [B, Q, H, d]
  void* softmax_rows = nullptr;     // [B, Q, H, 2] contiguous float (double): the largest score and one over the sum of
                                    // exponentials, 0 where all scores are -Inf; null without softmax
};

struct DeformableAttentionBackward {
  DeformableAttention forward;
  QueryRows grad_result;  // [B, Q, H, d]
  // Contiguous, as their inputs lie: [B, S, H, d], [B, Q, H, K, 2], [B, Q, H, K]; data null = not wanted.
  HeadRows grad_value;
  QueryRows grad_locations;
  QueryRows grad_scores;
  bool nontemporal = false;    // the value's gradient, past the cache
  bool deterministic = false;  // the same bits every time; the CPU's kernels always have it so
};

void deformable_attention_forward(const DeformableAttention&, const Parallel&);
void deformable_attention_backward(const DeformableAttentionBackward&, const Parallel&);

}  // namespace mmk
