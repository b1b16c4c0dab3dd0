// Spatial attention: weights = softmax over positions of scale * <image_n, text>, per head; see
// mmkernels.spatial_attention. The one description of the arguments that the CPU kernels, the CUDA kernels and the
// emulator all receive.
#pragma once
#include "parallel.h"
#include "tensor.h"

namespace mmk {

struct SpatialAttention {
  Dtype dtype = Dtype::float32;
  // samples (or bags), grid of positions (N = Y * X; packed: Y = 1, X = rows), channels, heads; H divides D
  int64_t B = 0;
  int64_t Y = 1;
  int64_t X = 0;
  int64_t D = 0;
  int64_t H = 1;
  double scale = 1;
  bool pool = false;
  bool rescale = false;
  bool nontemporal = false;  // results are too large for the cache: write past it

  Features image;                    // [B, Y, X, D], packed [rows, D]
  Vectors text;                      // [B, D]
  Mask mask;                         // [B, Y, X], packed [rows]
  const int64_t* offsets = nullptr;  // [B + 1], ascending, first 0, last rows; null = not packed

  void* weights =
      nullptr;  // [B, H, N], packed [H, rows]: contiguous float (double for float64); forward writes, backward reads
  Features result;  // multiply: like image
  Vectors pooled;   // pool: [B, D]
};

struct SpatialAttentionBackward {
  SpatialAttention forward;            // image, text, mask, offsets, weights as above; result and pooled unused
  Features grad_result;                // multiply: like image; data null = no gradient
  Vectors grad_pooled;                 // pool: [B, D]; data null = no gradient
  const void* grad_weights = nullptr;  // like weights, contiguous; null = no gradient
  void* grad_scores = nullptr;         // scratch like weights
  Features grad_image;                 // like image; data null = not wanted
  Vectors grad_text;                   // [B, D]; data null = not wanted
};

void spatial_attention_forward(const SpatialAttention&, const Parallel&);
void spatial_attention_backward(const SpatialAttentionBackward&, const Parallel&);

}  // namespace mmk
