// What the threads of a block do together: sums along and across a tile in shared memory, and sums over teams of warps.
// Every function is called by all threads of the block. Orders are fixed: the same bits every time.
#pragma once
#include "primitives.h"

namespace mmk::cuda {

constexpr unsigned all_lanes = 0xffffffffu;

MMK_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
MMK_HOST_DEVICE int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}
template <class T>
MMK_HOST_DEVICE T least(T a, T b) {
  return a < b ? a : b;
}
template <class T>
MMK_HOST_DEVICE T most(T a, T b) {
  return a < b ? b : a;
}
MMK_HOST_DEVICE bool aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}
MMK_HOST_DEVICE bool aligned(int64_t bytes) {
  return bytes % 16 == 0;
}
MMK_DEVICE int power_of_two(int x) {  // the smallest that isn't below x
  int p = 1;
  while (p < x)
    p *= 2;
  return p;
}

// All that any thread of the cluster wrote to shared memory before is there for each after. A macro, so that the
// emulator knows where it was called.
#define cluster_sync() (cluster_arrive(), cluster_wait())

struct Sum {
  MMK_DEVICE float operator()(float a, float b) const { return a + b; }
};
struct Max {
  MMK_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};  // NaN is left out: the sum has it

// A thread's part of a softmax: the largest score, and the sum of exponentials of what the others are less. Scores of
// -Inf add 0, NaN makes the sum NaN.
struct Running {
  float top = -INFINITY;
  float total = 0;
  MMK_DEVICE void add(float score) {
    const float now = fmaxf(top, score);
    const float base = now == -INFINITY ? 0.f : now;
    total = total * exponential(top - base) + exponential(score - base);
    top = now;
  }
  MMK_DEVICE float below(float all) const {
    return total * exponential(top - all);
  }  // the sum, beside the largest of all
};

// Over the lanes of groups of `lanes`, a power of two.
template <class Op>
MMK_DEVICE float over_lanes(float value, int lanes, Op op) {
  for (int offset = lanes / 2; offset > 0; offset /= 2)
    value = op(value, __shfl_xor_sync(all_lanes, value, offset));
  return value;
}

// The block's warps in teams of equal size, a power of two; with more items than warps a team is one warp.
struct Teams {
  int warps, count, index, first, thread,
      threads;  // warps of a team, teams, this thread's team, its first warp, its place in it
  MMK_DEVICE explicit Teams(int items) {
    int all = blockDim.x / 32;
    warps = all;
    while (warps > 1 && all / warps < items)
      warps /= 2;
    count = all / warps;
    index = threadIdx.x / 32 / warps;
    first = index * warps;
    threads = 32 * warps;
    thread = threadIdx.x - 32 * first;
  }
  // Every thread of a team gets the team's result. scratch: a float a warp.
  template <class Op>
  MMK_DEVICE float over(float value, float* scratch, Op op) const {
    value = over_lanes(value, 32, op);
    if (warps == 1)
      return value;
    __syncthreads();  // the last call's readers are done
    if (threadIdx.x % 32 == 0)
      scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = scratch[first];
    for (int i = 1; i < warps; ++i)
      value = op(value, scratch[first + i]);
    return value;
  }
};

// A thread's part of sum a[j] * b[j], j < count, in a group of `lanes` threads of which it is `lane`. a and b lie in
// shared memory; `wide`: both are aligned to 16 bytes.
template <class T, class U>
MMK_DEVICE float dot(const T* a, const U* b, int count, int lane, int lanes, bool wide) {
  constexpr int V = Pack<T>::size;
  constexpr int W = Pack<U>::size < V ? Pack<U>::size : V;
  const int whole = wide ? count - count % V : 0;
  float sum = 0;
  for (int j = lane * V; j < whole; j += lanes * V) {
    const Pack<T> x = *reinterpret_cast<const Pack<T>*>(a + j);
#pragma unroll
    for (int k = 0; k < V; k += W) {
      const Pack<U> y = *reinterpret_cast<const Pack<U>*>(b + j + k);
#pragma unroll
      for (int i = 0; i < W; ++i)
        sum += to_float(x.at[k + i]) * to_float(y.at[i]);
    }
  }
  for (int j = whole + lane; j < count; j += lanes)
    sum += to_float(a[j]) * to_float(b[j]);
  return sum;
}

// store(item, sum over lanes of partial(item, lane, lanes)), by groups of as many threads as `length` elements can
// feed.
template <class Partial, class Store>
MMK_DEVICE void along(int items, int length, Partial partial, Store store) {
  const int lanes = least(32, power_of_two(most(length, 1)));
  const int groups = blockDim.x / lanes;
  const int group = threadIdx.x / lanes;
  const int lane = threadIdx.x % lanes;
  for (int base = 0; base < items; base += groups) {
    const int item = base + group;
    float sum = over_lanes(item < items ? partial(item, lane, lanes) : 0.f, lanes, Sum());
    if (item < items && lane == 0)
      store(item, sum);
  }
}

// store(item, sum over s < splits of partial(item, s, splits)): neighbouring threads have neighbouring items; few items
// are split so that more threads have work. scratch: a float a thread.
template <class Partial, class Store>
MMK_DEVICE void across(int items, float* scratch, Partial partial, Store store) {
  const int threads = blockDim.x;
  if (2 * items > threads) {
    for (int item = threadIdx.x; item < items; item += threads)
      store(item, partial(item, 0, 1));
    return;
  }
  const int splits = least(32, threads / most(items, 1));
  const int s = threadIdx.x / most(items, 1);
  const int item = threadIdx.x - s * items;
  __syncthreads();  // the last call's readers are done
  if (s < splits && items > 0)
    scratch[threadIdx.x] = partial(item, s, splits);
  __syncthreads();
  if (s == 0 && items > 0) {
    float sum = scratch[item];
    for (int i = 1; i < splits; ++i)
      sum += scratch[i * items + item];
    store(item, sum);
  }
}

}  // namespace mmk::cuda
