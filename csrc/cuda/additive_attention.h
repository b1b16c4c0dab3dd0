// What turns a panel's products into scores, scores into weights, and back, asynchronously, on a stream, of the device
// that is current. Null, or what went wrong. Hidden vectors are [rows, A], scores [rows, K], their gradients [K, rows],
// all float.
#pragma once
#include "../additive_attention.h"
#include "rows.h"

namespace mmk::cuda {

// Without bags no row takes part, whatever offsets say: there is no sample whose tensors it could read.
inline SampledRows sampled_rows(const AdditiveAttention& a) {
  return {a.B, a.N, a.offsets && a.B ? a.N : a.B * a.N, a.offsets};
}

// Columns of a panel's products u: the activations', and behind them the gates'.
inline int64_t hidden_width(const AdditiveAttention& a) {
  return a.w_gate.data ? 2 * a.A : a.A;
}
// A panel: u [rows, width] -> scores [rows, K], the panel's; v [K, A], float. u is lost.
const char* additive_attention_activate(const AdditiveAttention&, const Panel&, float* u, const float* v, float* scores,
                                        void* stream);
// All scores -> weights and result. partial: what additive_attention_scratch tells, of floats.
int64_t additive_attention_scratch(const AdditiveAttention&);
const char* additive_attention_finish(const AdditiveAttention&, const float* scores, float* partial, void* stream);
// grad_scores [K, rows]. partial: what additive_attention_scores_scratch tells, of floats.
int64_t additive_attention_scores_scratch(const AdditiveAttention&);
const char* additive_attention_scores(const AdditiveAttentionBackward&, float* grad_scores, float* partial,
                                      void* stream);
// A panel: u -> its gradient, in place, and in 16 bits in `rounded` (like u; null for float); hidden [rows, A] or null.
// v as above, grad_scores [K, rows] of all panels.
const char* additive_attention_differentiate(const AdditiveAttention&, const Panel&, float* u, const float* v,
                                             const float* grad_scores, float* hidden, void* rounded, void* stream);
// grad_image of a panel = through [rows, D] + weights * grad_result.
const char* additive_attention_write(const AdditiveAttentionBackward&, const Panel&, const float* through,
                                     void* stream);

}  // namespace mmk::cuda
