// Absorbed attention on the CPU. What must move: the image once, its result once (backward: the image and its result's
// gradient once, its gradient once); never an N x H T matrix. The tokens of all heads are columns of one product with a
// tile of the image, [column, position]: a softmax over tokens runs down the columns' rows, for whole vectors of
// positions; one over positions along them, online from tile to tile. The sum over heads of the image's result is that
// of one product over all columns. Threads share out the positions; each has pooled sums of its own, merged by maximum
// and sum in a fixed order. Backward, with P over tokens, R over positions, G and F the gradients of image_out and
// text_out:
//   dS = P (G value^T - rowsum(P G value^T)) + R (image F^T - rowsum(F text_out)^T), per head;
//   dimage = dS key + R F;  dkey = dS^T image;  dkey_bias = colsum(dS);  dvalue = P^T G.
#include "absorbed_backward.h"
#include "absorbed_forward.h"
#include "dispatch.h"

namespace mmk {
namespace MMK_ISA {
void absorbed_attention_forward(const AbsorbedAttention& a, const Parallel& p) {
  with_type(a.dtype, [&](auto zero) { absorbed_forward<decltype(zero)>(a, p); });
}
void absorbed_attention_backward(const AbsorbedAttentionBackward& g, const Parallel& p) {
  with_type(g.forward.dtype, [&](auto zero) { absorbed_backward<decltype(zero)>(g, p); });
}
}  // namespace MMK_ISA
}  // namespace mmk

#ifdef MMK_DEFINE_ENTRY
MMK_CPU_ENTRY(absorbed_attention_forward, AbsorbedAttention)
MMK_CPU_ENTRY(absorbed_attention_backward, AbsorbedAttentionBackward)
#endif
