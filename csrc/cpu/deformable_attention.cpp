// Deformable attention on the CPU. What must move: locations, scores and the result once; of the value map four rows a
// point, B Q H K 4 d numbers, through the caches, as neighbouring queries sample near each other. Backward the same
// rows once for the gradients of scores and locations, and once, read and written, for that of the value. With g the
// result's gradient, w the weights, s_k a point's sample:
//   dw_k = g . s_k, through the softmax w (dw - sum w dw);  dlocation_k = w_k g . ds_k/dlocation;
//   dvalue[corner] += w_k share g.
#include "deformable_backward.h"
#include "deformable_forward.h"

namespace mmk {
namespace MMK_ISA {
void deformable_attention_forward(const DeformableAttention& a, const Parallel& p) {
  with_type(a.dtype, [&](auto zero) { deformable_forward<decltype(zero)>(a, p); });
}
void deformable_attention_backward(const DeformableAttentionBackward& g, const Parallel& p) {
  with_type(g.forward.dtype, [&](auto zero) { deformable_backward<decltype(zero)>(g, p); });
}
}  // namespace MMK_ISA
}  // namespace mmk

#ifdef MMK_DEFINE_ENTRY
MMK_CPU_ENTRY(deformable_attention_forward, DeformableAttention)
MMK_CPU_ENTRY(deformable_attention_backward, DeformableAttentionBackward)
#endif
