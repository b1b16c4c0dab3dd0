// How kernels find a row's sample, a sample's rows, and a row in memory; a warp takes a row.
#pragma once
#include "block.h"
#include "rows.h"

namespace mmk::cuda {

MMK_DEVICE int64_t sample_of(const SampledRows& s, int64_t row) {
  if (!s.offsets) return row / s.N;
  int64_t low = 0, high = s.B - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    load(s.offsets + middle) <= row ? low = middle : high = middle - 1;
  }
  return low;
}
MMK_DEVICE int64_t begin_of(const SampledRows& s, int64_t b) { return s.offsets ? least(most(load(s.offsets + b), int64_t(0)), s.rows) : b * s.N; }
MMK_DEVICE int64_t end_of(const SampledRows& s, int64_t b) {
  return s.offsets ? least(most(load(s.offsets + b + 1), begin_of(s, b)), s.rows) : (b + 1) * s.N;
}
// Where a row is in a tensor like image: [B, N, C], or packed.
MMK_DEVICE int64_t row_at(const SampledRows& s, const SampleRows& t, int64_t row) { return s.offsets ? row * t.n : row / s.N * t.b + row % s.N * t.n; }
MMK_DEVICE bool keeps(const SampledRows& s, const Mask& mask, int64_t row) {
  return !mask.data || load(mask.data + (s.offsets ? row * mask.x : row / s.N * mask.b + row % s.N * mask.x));
}

// Where a panel's row is, without a division of 64 bits. There are fewer than 2^31 positions.
struct Place {
  int64_t sample, position;
  MMK_DEVICE Place(const Panel& panel, int64_t N, int64_t r) {
    const uint32_t p = uint32_t(panel.position + r), past = p / uint32_t(N);
    sample = panel.sample + past, position = p - past * uint32_t(N);
  }
};

constexpr int row_threads = 256;                                     // eight warps
MMK_DEVICE int64_t warp_row() { return int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32; }
MMK_HOST_DEVICE int64_t row_blocks(int64_t rows) { return ceil_div(rows, row_threads / 32); }

}  // namespace mmk::cuda
