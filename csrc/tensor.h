// What the kernels of every device receive: raw pointers, sizes and strides. No torch, no allocation.
#pragma once
#include <cstdint>

namespace mmk {

enum class Dtype : int32_t { float32, bfloat16, float16, float64 };

// Image features seen as [B, Y, X, D] whatever the layout; strides in elements. Y = 1 unless rows of an image can't be
// walked with one stride. Packed bags: b = 0 and the bag's first row comes from `offsets`.
struct Features {
  void* data = nullptr;
  int64_t b = 0, y = 0, x = 0, d = 0;
};

// One vector a sample, [B, D].
struct Vectors {
  void* data = nullptr;
  int64_t b = 0, d = 0;
};

// True = takes part. [B, Y, X], null = all do. Packed: b = 0.
struct Mask {
  const bool* data = nullptr;
  int64_t b = 0, y = 0, x = 0;
};

}  // namespace mmk
