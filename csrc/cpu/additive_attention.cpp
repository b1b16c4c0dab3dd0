// Additive attention on the CPU. What must move: the image once (twice for "multiply", and once more backward), the
// weights [K, N], the result; the layers' weights stay in the caches. A tile of rows goes through product (gemm.h),
// activation, gate and v while its hidden vectors are in the second-level cache; its scores feed an online softmax, and
// its rows, still in that cache, the pooled sums. Threads share out the tiles; samples that several threads have a part
// of are merged in a fixed order.
// Backward, with w = weights, h = act(u) s, s = sigmoid(t), G = grad_result (dropout multiplies act, act' and s):
//   dw_kn = <G_k, x_n> + grad_weights_kn (multiply: <G_n, x_n>);
//   ds_kn = w_kn (dw_kn - sum_n w_kn dw_kn) + grad_scores_kn;
//   dh_n = sum_k ds_kn v_k;  du = dh s act'(u);  dt = dh act(u) s (1 - s);
//   dx_n = sum_k w_kn G_k + W^T du_n + W_gate^T dt_n;  dW = du^T x;  dv_k = sum_n ds_kn h_n.
// Panels of u and t are computed again, but for the first rows, whose u and t forward may keep.
#include "additive_backward.h"
#include "additive_forward.h"
#include "dispatch.h"

namespace mmk {
namespace MMK_ISA {
void additive_attention_forward(const AdditiveAttention& a, const Parallel& p) {
  with_type(a.dtype, [&](auto zero) { forward<decltype(zero)>(a, p); });
}
void additive_attention_backward(const AdditiveAttentionBackward& g, const Parallel& p) {
  with_type(g.forward.dtype, [&](auto zero) { backward<decltype(zero)>(g, p); });
}
}  // namespace MMK_ISA
}  // namespace mmk

#ifdef MMK_DEFINE_ENTRY
MMK_CPU_ENTRY(additive_attention_forward, AdditiveAttention)
MMK_CPU_ENTRY(additive_attention_backward, AdditiveAttentionBackward)
#endif
