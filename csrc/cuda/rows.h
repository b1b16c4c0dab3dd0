// What channel and additive attention share on a GPU: rows of samples, and small kernels that put a panel of rows
// together and take sums out of it. A panel's products are torch's library's; its scores and hidden vectors are float,
// [rows, columns], contiguous.
#pragma once
#include "../tensor.h"

namespace mmk::cuda {

// All samples' rows as one matrix. Offsets needn't be valid: every access stays within `rows`.
struct SampledRows {
  // N positions a sample; packed: N = rows
  int64_t B = 0;
  int64_t N = 0;
  int64_t rows = 0;
  const int64_t* offsets = nullptr;
};

// A panel's rows of a matrix: `first` counts among all rows, and is that position of that sample (packed: of the one
// that all are).
struct Panel {
  int64_t first = 0;
  int64_t rows = 0;
  int64_t sample = 0;
  int64_t position = 0;
  const void* image = nullptr;  // [rows, D], strides n and c
  int64_t n = 0;
  int64_t c = 0;
};

inline Panel panel_of(const SampledRows& s, int64_t first, int64_t rows) {
  return s.offsets ? Panel{first, rows, 0, first} : Panel{first, rows, first / s.N, first % s.N};
}

// Rows of a panel where each has `width` floats in a product: these fill a third of the L2 cache, for backward has up
// to three such matrices at once; smaller panels leave processors without work. All panels are about as large.
int64_t panel_rows(int64_t rows, int64_t width);
// A panel [rows, D] contiguous out of image; rows that are masked out are 0.
const char* gather_rows(Dtype, const SampledRows&, const Panel&, const SampleRows& image, const Mask& mask, int64_t D,
                        void* to, void* stream);
// to[b, c] += sum over a panel's rows of sample b; in order, no atomics. Rows are `step` apart. partial: what
// columns_scratch tells, of floats.
int64_t columns_scratch(int64_t C);
const char* sum_columns(const SampledRows&, int64_t first, int64_t count, const float* rows, int64_t step, int64_t C,
                        float* to, float* partial, void* stream);
const char* clear(float* to, int64_t count, void* stream);
const char* accumulate(float* to, const float* from, int64_t count, void* stream);

}  // namespace mmk::cuda
