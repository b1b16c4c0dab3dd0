// What turns a panel's products into hidden vectors, scores into weights, and back, asynchronously, on a stream, of the
// device that is current. Null, or what went wrong. Hidden vectors are [rows, A], scores [rows, K], their gradients [K,
// rows], all float.
#pragma once
#include "../additive_attention.h"
#include "rows.h"

namespace mmk::cuda {

// Without bags no row takes part, whatever offsets say: there is no sample whose tensors it could read.
inline SampledRows sampled_rows(const AdditiveAttention& a) {
  return {a.B, a.N, a.offsets && a.B ? a.N : a.B * a.N, a.offsets};
}

// A panel: u, t (null: no gate) -> h, in place of u.
const char* additive_attention_activate(const AdditiveAttention&, const Panel&, float* u, const float* t, void* stream);
// All scores -> weights and result. partial: what additive_attention_scratch tells, of floats.
int64_t additive_attention_scratch(const AdditiveAttention&);
const char* additive_attention_finish(const AdditiveAttention&, const float* scores, float* partial, void* stream);
// grad_scores [K, rows]. partial: what additive_attention_scores_scratch tells, of floats.
int64_t additive_attention_scores_scratch(const AdditiveAttention&);
const char* additive_attention_scores(const AdditiveAttentionBackward&, float* grad_scores, float* partial,
                                      void* stream);
// A panel: u, t and h's gradient -> the gradients of u and t, and h, each in place.
const char* additive_attention_differentiate(const AdditiveAttention&, const Panel&, float* u, float* t,
                                             float* grad_hidden, void* stream);
// grad_image of a panel = through [rows, D] + weights * grad_result.
const char* additive_attention_write(const AdditiveAttentionBackward&, const Panel&, const float* through,
                                     void* stream);

}  // namespace mmk::cuda
