// Absorbed attention: heads with keys and values of their own over the same image features; see
// mmkernels.absorbed_attention.
#pragma once
#include "parallel.h"
#include "tensor.h"

namespace mmk {

struct AbsorbedAttention {
  Dtype dtype = Dtype::float32;  // of image, image_out and text_out
  bool wide_text = false;        // key and value are float (double), not of that dtype
  bool pool = true;              // text_out is wanted
  // samples, heads, positions, tokens, channels of the image, of the values (0: there are none, and no image_out)
  int64_t B = 0;
  int64_t H = 0;
  int64_t N = 0;
  int64_t T = 0;
  int64_t D = 0;
  int64_t Dv = 0;

  SampleRows image;      // [B, N, D]
  HeadRows key;          // [B, H, T, D]
  Bias key_bias;         // [B, H, 1, T] float (double); null = 0
  HeadRows value;        // [B, H, T, Dv]
  TokenMask image_mask;  // [B, 1, N]: positions that the text attends to; null = all
  TokenMask text_mask;   // [B, 1, T]: tokens that the image attends to; null = all
                         // Where masked out: a value is never read; image, key and key_bias that are NaN or Inf count
                         // as 0
  SampleRows image_out;  // [B, N, Dv]; forward writes
  HeadRows text_out;     // [B, H, T, D]; forward writes
  HeadRows unrounded;    // text_out in float (double): backward's means are differences of large numbers where features
                         // have much in common. Forward writes it where text_out has 16 bits, else null
  void* image_softmax = nullptr;  // [B, H, 2, N] contiguous float (double): of the softmax over tokens the largest
                                  // score and one over the sum of exponentials; null without value
  void* text_softmax = nullptr;   // [B, H, 2, T], of that over positions; null without pool. 0 where nothing takes part
};

struct AbsorbedAttentionBackward {
  AbsorbedAttention forward;
  SampleRows grad_image_out;  // data null = no gradient
  HeadRows grad_text_out;
  SampleRows grad_image;  // like their inputs; data null = not wanted
  HeadRows grad_key;
  void* grad_key_bias = nullptr;  // [B, H, T] contiguous float (double)
  HeadRows grad_value;
};

void absorbed_attention_forward(const AbsorbedAttention&, const Parallel&);
void absorbed_attention_backward(const AbsorbedAttentionBackward&, const Parallel&);

}  // namespace mmk
