// Products of one tile of weights with all slabs of a chunk.
#pragma once
#include "heads.h"

namespace mmk::cuda {

// sum[i] += A B_i for i < count: what mma<J, AcrossA, true> does for each, B_i `step` elements after the one before. A
// is read once for a whole chunk, and products of its slabs don't wait for each other.
template <bool AcrossA, int Slabs, int J, class T>
MMK_DEVICE void mma_slabs(float (&sum)[Slabs][J][4], int count, const T* a, int pitch_a, const T* b, int step,
                          int pitch_b, int depth) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    if (count == Slabs) {
      a += AcrossA ? (lane % 8 + lane / 16 * 8) * pitch_a + lane / 8 % 2 * 8 : lane % 16 * pitch_a + lane / 16 * 8;
      b += lane % 16 * pitch_b + lane / 16 * 8;
#pragma unroll 1
      for (int k = 0; k < depth; k += 16) {
        uint32_t x[4];
        load_matrices<AcrossA>(x, a + k * (AcrossA ? pitch_a : 1));
#pragma unroll
        for (int i = 0; i < Slabs; ++i)
#pragma unroll
          for (int j = 0; j < J; j += 2) {
            uint32_t y[4];
            load_matrices<true>(y, b + i * step + k * pitch_b + 8 * j);
            mma_tile<T>(sum[i][j], x, y[0], y[1]);
            mma_tile<T>(sum[i][j + 1], x, y[2], y[3]);
          }
      }
      return;
    }
  } else if (count == Slabs) {
    a += AcrossA ? lane / 4 : lane / 4 * pitch_a;
    b += lane_column();
#pragma unroll 1
    for (int k = 0; k < depth; k += 4) {
      float x[2][4];
#pragma unroll
      for (int low = 0; low < 2; ++low) {
        if constexpr (AcrossA) {
#pragma unroll
          for (int e = 0; e < 4; ++e)
            x[low][e] = a[(k + e) * pitch_a + 8 * low];
        } else {
          *reinterpret_cast<Pack<float>*>(x[low]) = *reinterpret_cast<const Pack<float>*>(a + 8 * low * pitch_a + k);
        }
      }
#pragma unroll
      for (int i = 0; i < Slabs; ++i)
#pragma unroll
        for (int j = 0; j < J; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const Two y = *reinterpret_cast<const Two*>(b + i * step + (k + e) * pitch_b + 8 * j);
            sum[i][j][0] += x[0][e] * y.at[0];
            sum[i][j][1] += x[0][e] * y.at[1];
            sum[i][j][2] += x[1][e] * y.at[0];
            sum[i][j][3] += x[1][e] * y.at[1];
          }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < Slabs; ++i)
    if (i < count)
      mma<J, AcrossA, true>(sum[i], a, pitch_a, b + i * step, pitch_b, depth);
}

}  // namespace mmk::cuda
