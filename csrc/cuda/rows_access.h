// How kernels find a row's sample, a sample's rows, and a row in memory; a warp takes a row.
#pragma once
#include "block.h"
#include "rows.h"

namespace mmk::cuda {

MMK_DEVICE int64_t sample_of(const SampledRows& s, int64_t row) {
  if (!s.offsets)
    return row / s.N;
  int64_t low = 0;
  int64_t high = s.B - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    load(s.offsets + middle) <= row ? low = middle : high = middle - 1;
  }
  return low;
}
MMK_DEVICE int64_t begin_of(const SampledRows& s, int64_t b) {
  return s.offsets ? least(most(load(s.offsets + b), int64_t(0)), s.rows) : b * s.N;
}
MMK_DEVICE int64_t end_of(const SampledRows& s, int64_t b) {
  return s.offsets ? least(most(load(s.offsets + b + 1), begin_of(s, b)), s.rows) : (b + 1) * s.N;
}
// Where a row is in a tensor like image: [B, N, C], or packed.
MMK_DEVICE int64_t row_at(const SampledRows& s, const SampleRows& t, int64_t row) {
  return s.offsets ? row * t.n : row / s.N * t.b + row % s.N * t.n;
}
MMK_DEVICE bool row_valid(const SampledRows& s, const Mask& mask, int64_t row) {
  return !mask.data || load(mask.data + (s.offsets ? row * mask.x : row / s.N * mask.b + row % s.N * mask.x));
}

// Where a panel's row is, without a division of 64 bits.
constexpr int64_t most_positions = (int64_t(1) << 31) - 1;
struct Place {
  int64_t sample, position;
  MMK_DEVICE Place(const Panel& panel, int64_t N, int64_t r) {
    const uint32_t p = uint32_t(panel.position + r);
    const uint32_t past = p / uint32_t(N);
    sample = panel.sample + past;
    position = p - past * uint32_t(N);
  }
};

// V neighbouring elements as floats; V > 1: aligned to as many bytes as they are, at most 16.
template <int V, class T>
MMK_DEVICE void load_floats(float (&to)[V], const T* from) {
  if constexpr (V == 1) {
    to[0] = to_float(load(from));
  } else if constexpr (V * sizeof(T) == sizeof(uint64_t)) {
    const uint64_t all = load(reinterpret_cast<const uint64_t*>(from));
    const T* at = reinterpret_cast<const T*>(&all);
#pragma unroll
    for (int i = 0; i < V; ++i)
      to[i] = to_float(at[i]);
  } else {
    constexpr int P = Pack<T>::size;
#pragma unroll
    for (int i = 0; i < V; i += P) {
      const Pack<T> pack = load(reinterpret_cast<const Pack<T>*>(from + i));
#pragma unroll
      for (int j = 0; j < P; ++j)
        to[i + j] = to_float(pack.at[j]);
    }
  }
}

// Stores of what other kernels read soon; V > 1: aligned to 16 bytes, rounded ones to 8.
template <int V>
MMK_DEVICE void store_floats(float* to, const float (&values)[V]) {
  if constexpr (V == 1) {
    store(to, values[0]);
  } else {
    static_assert(V == 4);
    store_kept(reinterpret_cast<Pack<float>*>(to), Pack<float>{values[0], values[1], values[2], values[3]});
  }
}
template <int V, class T>
MMK_DEVICE void store_rounded(T* to, const float (&values)[V]) {
  if constexpr (V == 1)
    store(to, from_float<T>(values[0]));
  else
    store(reinterpret_cast<uint64_t*>(to), pair_of<T>(values[0], values[1]) | uint64_t(pair_of<T>(values[2], values[3]))
                                                                                  << 32);
}

// Of a result, in its dtype.
template <int V, class T>
MMK_DEVICE void store_result(T* to, const float (&values)[V]) {
  if constexpr (V == 4 && sizeof(T) == 4)
    store(reinterpret_cast<Pack<float>*>(to), Pack<float>{values[0], values[1], values[2], values[3]});
  else
    store_rounded(to, values);
}
// Whether rows can be read four elements at a time (or there are none).
inline bool wide_rows(const SampleRows& t) {
  return !t.data || (t.c == 1 && aligned(t.data) && t.b % 4 == 0 && t.n % 4 == 0);
}

// A block's part of a sample's rows, which `splits` blocks share.
struct Share {
  int64_t b, split, begin, first, last;  // the sample's first row; the block's rows
  MMK_DEVICE Share(const SampledRows& s, int64_t splits, int64_t block)
      : b(block / splits), split(block % splits), begin(begin_of(s, b)) {
    const int64_t end = end_of(s, b);
    const int64_t size = ceil_div(end - begin, splits);
    first = least(begin + split * size, end);
    last = least(first + size, end);
  }
};

constexpr int row_threads = 256;  // eight warps
MMK_DEVICE int64_t warp_row() {
  return int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
}
MMK_HOST_DEVICE int64_t row_blocks(int64_t rows) {
  return ceil_div(rows, row_threads / 32);
}

// A block's threads where they add up rows: `lanes`, a power of two, have V neighbouring columns each; groups of them
// take the rows in turn.
struct Lanes {
  int lanes, groups, lane, group;
  MMK_DEVICE explicit Lanes(int lanes)
      : lanes(lanes), groups(blockDim.x / lanes), lane(threadIdx.x % lanes), group(threadIdx.x / lanes) {}
};
inline int lanes_for(int64_t columns, int V) {
  int lanes = 1;
  while (lanes < 32 && lanes * V < columns)
    lanes *= 2;
  return lanes;
}
// Thread i < lanes * V gets column i's sum over the groups, in order. scratch: what groups_scratch tells, in bytes.
inline int64_t groups_scratch(int V) {
  return row_threads * V * int64_t(sizeof(float));
}
template <int V>
MMK_DEVICE float over_groups(const Lanes& lanes, const float (&own)[V], float* scratch) {
  __syncthreads();  // the last call's readers are done
#pragma unroll
  for (int i = 0; i < V; ++i)
    scratch[threadIdx.x * V + i] = own[i];
  __syncthreads();
  float total = 0;
  const int width = lanes.lanes * V;
  if (int(threadIdx.x) < width)
    for (int group = 0; group < lanes.groups; ++group)
      total += scratch[group * width + threadIdx.x];
  return total;
}

// sum += weight(r) times the row that get(row, r) reads, for r = first, first + step, ... before end; rows of weight 0
// aren't read. Several are on their way at once.
template <int V, class Weight, class Get>
MMK_DEVICE void add_rows(float (&sum)[V], int64_t first, int64_t end, int64_t step, Weight weight, Get get) {
  constexpr int flight = 4;
  for (int64_t r = first; r < end; r += flight * step) {
    float w[flight];
    float rows[flight][V] = {};
#pragma unroll
    for (int i = 0; i < flight; ++i)
      w[i] = r + i * step < end ? weight(r + i * step) : 0.f;
#pragma unroll
    for (int i = 0; i < flight; ++i)
      if (w[i] != 0)
        get(rows[i], r + i * step);
#pragma unroll
    for (int i = 0; i < flight; ++i)
#pragma unroll
      for (int j = 0; j < V; ++j)
        sum[j] += w[i] * rows[i][j];
  }
}
template <int V, class Get>
MMK_DEVICE void add_rows(float (&sum)[V], int64_t first, int64_t end, int64_t step, Get get) {
  add_rows(sum, first, end, step, [](int64_t) { return 1.f; }, get);
}

// The kernel of a dtype; and its start.
#define MMK_PICK(dtype, kernel) \
  ((dtype) == Dtype::float32 ? kernel##_f32 : (dtype) == Dtype::bfloat16 ? kernel##_bf16 : kernel##_f16)

template <class Task>
const char* run(Dtype dtype, void (*kernel)(Task), int64_t x, int64_t y, int threads, int64_t shared, const Task& task,
                void* stream) {
  if (dtype == Dtype::float64)
    return "the CUDA kernels have no float64";
  return launch(kernel, x, y, 1, threads, shared, static_cast<Stream>(stream), task);
}
// A kernel with a warp a row of a panel.
template <class Task>
const char* run(Dtype dtype, void (*kernel)(Task), const Panel& panel, const Task& task, void* stream) {
  return run(dtype, kernel, row_blocks(panel.rows), 1, row_threads, 0, task, stream);
}

}  // namespace mmk::cuda
