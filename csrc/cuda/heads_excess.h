// What the gradients of a softmax's scores add up to in backward of attention over heads, their excess: 0, but for
// roundings, which multiply what queries or keys have in common. Times the mean of some it is taken away.
#pragma once
#include "heads_merge.h"

namespace mmk::cuda {

template <class T, int C, bool Own, bool Other>
struct BackwardExcess : BackwardRows<T> {
  using Base = BackwardRows<T>;
  using Base::b, Base::h, Base::t;
  using Layout = BackwardLayout<T, C, Own, Other>;
  static constexpr int S = Layout::S;
  int chunk, group;     // of channels; the warp's 16 rows
  T *ds, *other, *own;  // [64][Layout::weights]: the scores' gradients, p' and p
  float* centre;        // of the keys (Own), else of the queries: their channels of this chunk

  // Float i of the 256 in the padding of a panel of weights: shared memory has no room beside two buffers.
  MMK_DEVICE static float& in_padding(T* panel, int i) {
    return reinterpret_cast<float*>(panel + i / 4 * Layout::weights + S)[i % 4];
  }
  static_assert(4 * S <= 4 * tile_rows && C <= 4 * tile_rows && pad<T> * sizeof(T) == 4 * sizeof(float));
  // Of the queries, where all are in one tile.
  MMK_DEVICE float& row_centre(int c) const { return Own ? in_padding(own, c) : centre[c]; }
  // From the 16 rows of a group of warps.
  MMK_DEVICE float& column_excess(int group, int column) const { return in_padding(other, group * S + column); }

  MMK_DEVICE BackwardExcess(const BackwardTask& t, int64_t bh) : Base(t, bh) {}

  // About what the queries, or keys, of those that take part have in common: the mean of some. By C threads, this one
  // for channel c.
  template <class Valid>
  MMK_DEVICE void find_centre(float& to, int c, const HeadRows& f, int64_t count, Valid takes_part) const {
    constexpr int most = 16;
    const int64_t channel = chunk * C + c;
    const int64_t apart = ceil_div(count, int64_t(most));
    const T* from = head_of<T>(f, b, h) + channel * f.c;
    float x[most];
    bool taken[most];
#pragma unroll
    for (int i = 0; i < most; ++i) {  // all on their way together
      taken[i] = channel < t.d && i * apart < count && takes_part(i * apart);
      x[i] = taken[i] ? to_float(load(from + i * apart * f.n)) : 0.f;
    }
    float sum = 0;
    float found = 0;
#pragma unroll
    for (int i = 0; i < most; ++i)
      if (taken[i]) {
        sum += x[i];
        found += 1;
      }
    to = found == 0 ? 0.f : sum / found;
  }

  // Of two neighbouring columns, from the warp's rows: lanes of four have the same columns.
  MMK_DEVICE void put_column_excess(int column, const float (&x)[2]) const {
    const int lane = threadIdx.x % 32;
    const bool odd = lane / 4 % 2;
    float sum = (odd ? x[1] : x[0]) + __shfl_xor_sync(all_lanes, odd ? x[0] : x[1], 4);
    for (int apart = 8; apart < 32; apart *= 2)
      sum += __shfl_xor_sync(all_lanes, sum, apart);
    if (lane < 8)
      column_excess(group, column + odd) = sum;
  }

  // What 16 columns' gradients add up to, as far as it should be 0, spread as the rows of a product. Own: its part of
  // ds adds up to more than roundings, so column_excess is without it.
  MMK_DEVICE void excess_of_columns(float (&sum)[4], int r0) const {
    if (!Own)
      return add_up(sum, ds + r0);
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      sum[0] += column_excess(g, r0 + lane_row());
      sum[2] += column_excess(g, r0 + lane_row() + 8);
    }
  }

  // The sums of 16 columns of ds.
  MMK_DEVICE void add_up(float (&sum)[4], const T* from) const {
    const int lane = threadIdx.x % 32;
    if constexpr (sizeof(T) == 2) {
      from += (lane % 8 + lane / 16 * 8) * Layout::weights + lane / 8 % 2 * 8;
      const uint32_t ones = pair_of<T>(1, 1);
#pragma unroll
      for (int k = 0; k < tile_rows; k += 16) {
        uint32_t x[4];
        load_matrices<true>(x, from + k * Layout::weights);
        mma_tile<T>(sum, x, ones, ones);
      }
    } else {
      for (int k = lane % 4; k < tile_rows; k += 4) {
        sum[0] += from[k * Layout::weights + lane_row()];
        sum[2] += from[k * Layout::weights + lane_row() + 8];
      }
      sum[0] = over_lanes(sum[0], 4, Sum());
      sum[2] = over_lanes(sum[2], 4, Sum());
    }
  }
};

}  // namespace mmk::cuda
