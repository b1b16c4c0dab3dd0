// Bidirectional attention on the CPU. What must move: image queries and values once, text keys and values once, both
// results once; never an N x T matrix. A tile of scores is computed once and feeds both softmaxes while it is in the
// second-level cache: over tokens, for the rows of image_out, and over positions, for text_out, whose sums grow tile by
// tile (an online softmax along the columns). Threads share out the positions; each has text sums of its own, merged by
// maximum and sum in a fixed order. Masked tokens cost the image nothing: tokens that take part come first, and only
// they are multiplied there. Backward, with P over tokens and R over positions (columns), G and F the gradients of
// image_out and text_out:
//   dS = P (G text_value^T - rowsum(G image_out)) + R (image_value F^T - rowsum(F text_out)^T);
//   dquery = scale dS key;  dkey = scale dS^T query;  dtext_value = P^T G;  dimage_value = R F.
#include "bidirectional_backward.h"
#include "bidirectional_forward.h"
#include "dispatch.h"

namespace mmk {
namespace MMK_ISA {
void bidirectional_attention_forward(const BidirectionalAttention& a, const Parallel& p) {
  with_type(a.dtype, [&](auto zero) { forward<decltype(zero)>(a, p); });
}
void bidirectional_attention_backward(const BidirectionalAttentionBackward& g, const Parallel& p) {
  with_type(g.forward.dtype, [&](auto zero) { backward<decltype(zero)>(g, p); });
}
}  // namespace MMK_ISA
}  // namespace mmk

#ifdef MMK_DEFINE_ENTRY
MMK_CPU_ENTRY(bidirectional_attention_forward, BidirectionalAttention)
MMK_CPU_ENTRY(bidirectional_attention_backward, BidirectionalAttentionBackward)
#endif
