// Additive attention: weights = softmax over positions of v . h_n, h_n = act(w_image image_n + bias_hidden_b) [*
// sigmoid(w_gate image_n + bias_gate)], both factors dropped out by themselves; result = the weighted sum of image, for
// each of K maps, or image times its weight.
#pragma once
#include "dropout.h"
#include "parallel.h"
#include "tensor.h"

namespace mmk {

enum class Activation : int32_t { tanh, relu, gelu };

struct AdditiveAttention {
  Dtype dtype = Dtype::float32;
  Activation activation = Activation::tanh;
  int64_t B = 0;
  int64_t N = 0;
  int64_t D = 0;
  int64_t A = 0;
  int64_t K = 0;
  SampleRows image;                   // [B, N, D]; packed [N, D] with b = 0, N = rows
  const int64_t* offsets = nullptr;   // packed: [B + 1]
  const void* bias_hidden = nullptr;  // [B, A] contiguous, float (double), or null
  Projection w_image;                 // [A, D]
  Projection w_gate;                  // [A, D], or data null
  const void* bias_gate = nullptr;    // [A] contiguous, float (double), or null
  Projection v;                       // [K, A]
  Dropout dropout;
  Mask mask;  // [B, N], y = 0; packed: b = 0
  bool pool = true;
  SampleRows result;        // pool: [B, K, D], else like image (K = 1)
  void* weights = nullptr;  // [B, K, N] contiguous (packed: [K, N]), float (double); forward writes, backward reads
  void* scores = nullptr;   // like weights, or null: before the softmax, -Inf where masked; forward writes
  int64_t kept_rows =
      0;  // how many of the first rows' products are kept, so that backward needn't compute them again; CPU only
  void* kept = nullptr;  // [kept_rows, A] contiguous, with w_gate [kept_rows, 2 A], float (double): w_image image_n,
                         // w_gate image_n
};

struct AdditiveAttentionBackward {
  AdditiveAttention forward;
  SampleRows grad_result;              // data null = no gradient
  const void* grad_weights = nullptr;  // like weights, or null
  const void* grad_scores = nullptr;   // the same
  SampleRows grad_image;               // data null = not wanted, here and below
  void* grad_bias_hidden = nullptr;    // [B, A] contiguous, float (double)
  void* grad_w_image = nullptr;        // [A, D] contiguous, in dtype
  void* grad_v = nullptr;              // [K, A] contiguous, in dtype
  void* grad_w_gate = nullptr;         // [A, D] contiguous, in dtype
  void* grad_bias_gate = nullptr;      // [A] contiguous, float (double)
};

void additive_attention_forward(const AdditiveAttention&, const Parallel&);
void additive_attention_backward(const AdditiveAttentionBackward&, const Parallel&);

}  // namespace mmk
