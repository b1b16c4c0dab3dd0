// What the kernels of every device receive: raw pointers, sizes and strides. No torch, no allocation.
#pragma once
#include <cstdint>

namespace mmk {

enum class Dtype : int32_t { float32, bfloat16, float16, float64 };

// Image features seen as [B, Y, X, D] whatever the layout; strides in elements. Y = 1 unless rows of an image can't be
// walked with one stride. Packed bags: b = 0 and the bag's first row comes from `offsets`.
struct Features {
  void* data = nullptr;
  int64_t b = 0;
  int64_t y = 0;
  int64_t x = 0;
  int64_t d = 0;
};

// One vector a sample, [B, D].
struct Vectors {
  void* data = nullptr;
  int64_t b = 0;
  int64_t d = 0;
};

// True = takes part. [B, Y, X], null = all do. Packed: b = 0.
struct Mask {
  const bool* data = nullptr;
  int64_t b = 0;
  int64_t y = 0;
  int64_t x = 0;
};

// Rows of a head, [B, H, N, C].
struct HeadRows {
  void* data = nullptr;
  int64_t b = 0;
  int64_t h = 0;
  int64_t n = 0;
  int64_t c = 0;
};

// Rows of a sample, [B, N, C].
struct SampleRows {
  void* data = nullptr;
  int64_t b = 0;
  int64_t n = 0;
  int64_t c = 0;
};

// A layer's weight, [out, in].
struct Projection {
  const void* data = nullptr;
  int64_t row = 0;
  int64_t column = 0;
};

// True = takes part, [B, H, T]; null = all do.
struct TokenMask {
  const bool* data = nullptr;
  int64_t b = 0;
  int64_t h = 0;
  int64_t t = 0;
};

// True = query n attends to token t, [B, H, N, T]; null = all do.
struct PairMask {
  const bool* data = nullptr;
  int64_t b = 0;
  int64_t h = 0;
  int64_t n = 0;
  int64_t t = 0;
};

// What is added to the scores, [B, H, N, T], float (double for float64); null = nothing.
struct Bias {
  const void* data = nullptr;
  int64_t b = 0;
  int64_t h = 0;
  int64_t n = 0;
  int64_t t = 0;
};

}  // namespace mmk
