// Bidirectional attention: two softmaxes of one score matrix, per head; see mmkernels.bidirectional_attention.
#pragma once
#include "parallel.h"
#include "tensor.h"

namespace mmk {

struct BidirectionalAttention {
  Dtype dtype = Dtype::float32;
  // samples, heads, positions, tokens, channels of query and key, of the values
  int64_t B = 0;
  int64_t H = 0;
  int64_t N = 0;
  int64_t T = 0;
  int64_t d = 0;
  int64_t dv = 0;
  double scale = 1;

  HeadRows image_query;  // [B, H, N, d]
  HeadRows text_key;     // [B, H, T, d]
  HeadRows image_value;  // [B, H, N, dv]
  HeadRows text_value;   // [B, H, T, dv]
  TokenMask image_mask;  // [B, H, N] (h stride 0): positions that the text attends to; null = all
  TokenMask text_mask;   // [B, H, T] (h stride 0): tokens that the image attends to; null = all
                         // Where masked out: a value is never read, a query or key that is NaN or Inf counts as 0
  HeadRows image_out;    // [B, H, N, dv]; forward writes, backward reads
  HeadRows text_out;     // [B, H, T, dv]; forward writes
  HeadRows unrounded;    // text_out in float (double): a mean of what all tokens have in common must not be wrong by a
                         // rounding. Forward writes it where text_out has 16 bits, else null; backward reads
  void* image_softmax = nullptr;  // [B, H, 2, N] contiguous float (double): of the softmax over tokens the largest
                                  // score, in the kernels' own
  void* text_softmax = nullptr;   // [B, H, 2, T] unit, and one over the sum of exponentials; of that over positions. 0
                                  // where nothing takes part
};

struct BidirectionalAttentionBackward {
  BidirectionalAttention forward;
  HeadRows grad_image_out, grad_text_out;  // data null = no gradient
  HeadRows grad_image_query, grad_text_key, grad_image_value,
      grad_text_value;  // like their inputs; data null = not wanted
};

void bidirectional_attention_forward(const BidirectionalAttention&, const Parallel&);
void bidirectional_attention_backward(const BidirectionalAttentionBackward&, const Parallel&);

}  // namespace mmk
