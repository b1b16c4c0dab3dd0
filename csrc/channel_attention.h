// Channel attention: result = image * weights, weights = softmax over channels of (weight image_n + bias_hidden_b).
#pragma once
#include "parallel.h"
#include "tensor.h"

namespace mmk {

struct ChannelAttention {
  Dtype dtype = Dtype::float32;
  int64_t B = 0;
  int64_t N = 0;
  int64_t D = 0;
  bool nontemporal = false;           // results are too large for the cache: write past it
  SampleRows image;                   // [B, N, D]
  const void* bias_hidden = nullptr;  // [B, D] contiguous, float (double): the text's part of the scores and the bias
  Projection weight;                  // [D, D], what acts on the image
  SampleRows result, weights;         // [B, N, D], channels 1 apart; data null = not wanted
  int64_t kept_rows =
      0;  // how many of the first rows' weights are kept, so that backward needn't compute them again; CPU only
  void* kept = nullptr;  // [kept_rows, D] contiguous, float (double); forward writes, backward reads
};

struct ChannelAttentionBackward {
  ChannelAttention forward;  // without result and weights: the scores are computed again, but for the kept rows
  SampleRows grad_result, grad_weights;  // data null = no gradient
  SampleRows grad_image;                 // channels 1 apart; data null = not wanted, here and below
  void* grad_bias_hidden = nullptr;      // [B, D] contiguous, float (double)
  void* grad_weight = nullptr;           // [D, D], columns side by side
  int64_t grad_weight_row = 0;           // from one row of it to the next
};

void channel_attention_forward(const ChannelAttention&, const Parallel&);
void channel_attention_backward(const ChannelAttentionBackward&, const Parallel&);

}  // namespace mmk
