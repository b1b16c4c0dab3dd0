// Gated cross-attention: result = gate * softmax(scale * query key^T + bias) value, per head; see
// mmkernels.gated_cross_attention. The one description of the arguments that the CPU kernels, the CUDA kernels and the
// emulator all receive.
#pragma once
#include "parallel.h"
#include "tensor.h"

namespace mmk {

struct GatedCrossAttention {
  Dtype dtype = Dtype::float32;
  // samples, heads, queries, tokens, channels of query and key, of value
  int64_t B = 0;
  int64_t H = 0;
  int64_t N = 0;
  int64_t T = 0;
  int64_t d = 0;
  int64_t dv = 0;
  double scale = 1;
  bool nontemporal = false;  // results are too large for the cache: write past it

  HeadRows query;    // [B, H, N, d]
  HeadRows key;      // [B, H, T, d]
  HeadRows value;    // [B, H, T, dv]
  HeadRows gate;     // [B, H, N, dv]; data null = no gate
  TokenMask tokens;  // [B, H, T]: which tokens any query attends to; null = all. What the others hold is never read
  PairMask pairs;    // [B, H, N, T]: which query attends to which token; null = to all of `tokens`
  Bias bias;  // [B, H, N, T] float (double for float64), added to the scores; null = none. Never with the two above

  HeadRows result;    // [B, H, N, dv]
  HeadRows attended;  // [B, H, N, dv], the result before the gate; null = not wanted. Backward: the result where there
                      // is no gate
  void* softmax = nullptr;  // [B, H, 2, N] contiguous float (double): what backward finds a query's weights with: its
                            // largest score, in
};  // the kernels' own unit, and one over the sum of exponentials, 0 where no token takes part

struct GatedCrossAttentionBackward {
  GatedCrossAttention forward;                           // as above; result unused
  HeadRows grad_result;                                  // [B, H, N, dv]
  HeadRows grad_query, grad_key, grad_value, grad_gate;  // like their inputs; data null = not wanted
  void* grad_bias = nullptr;                             // [B, H, N, T] contiguous float (double); null = not wanted
};

void gated_cross_attention_forward(const GatedCrossAttention&, const Parallel&);
void gated_cross_attention_backward(const GatedCrossAttentionBackward&, const Parallel&);

}  // namespace mmk
