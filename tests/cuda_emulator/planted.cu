// Kernels with bugs to choose from, to see that the emulator finds each: planted BUG ORDER LATE_COPIES
// BUG: 0 none, 1 missing barrier, 2 divergent barrier, 3 early return, 4 wrong wait count, 5 missing trailing barrier,
// 6 overrun of dynamic shared memory, 7 overrun of static shared memory, 8 forgotten wait, 9 a shuffle that not all
// reach, 10 a shuffle from the wrong place. In clusters: 11 no barrier before a peer's memory is read, 12 none before a
// block ends that peers read, 13 a barrier that a block leaves out, 14 a wait that nothing arrived for. Of products of
// matrices, which also run where there is no bug: 15 a missing warp barrier before a matrix is loaded, 16 a matrix
// loaded from rows that aren't aligned, 17 half a warp multiplies elsewhere, 18 a matrix that isn't transposed though
// it has to be. Exit status: 0 right, 2 wrong sums, 3 the emulator refused; a sanitizer has its own.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/cuda/primitives.h"

namespace mmk::cuda {

constexpr int threads = 128, elements = 4 * threads, rounds = 5, cluster = 4;

struct Task {
  int64_t bug;
  const float* from;  // [blocks, rounds, elements]; of clusters [blocks, threads]
  float* to;          // [blocks]: the sum of all; of clusters [blocks, threads]
};

// Rows come in turn into two buffers, one ahead. A thread sums what its neighbour has copied.
void sum_rows(Task t) {
  __shared__ float sums[threads / 32];
  MMK_DYNAMIC_SHARED(memory);
  float* buffer = reinterpret_cast<float*>(memory);
  const int thread = threadIdx.x;
  const int warp = thread / 32;
  const float* from = t.from + int64_t(blockIdx.x) * rounds * elements;
  auto bring = [&](int round) {
    copy_async(buffer + round % 2 * elements + 4 * thread, from + round * elements + 4 * thread, true);
    copy_commit();
  };
  float sum = 0;
  bring(0);
  for (int round = 0; round < rounds; ++round) {
    if (round + 1 < rounds) {
      bring(round + 1);
      t.bug == 4 ? copy_wait<2>() : copy_wait<1>();
    } else if (t.bug != 8) {
      copy_wait<0>();
    }
    if (t.bug == 2) {
      if (thread < 64)
        __syncthreads();
      else
        __syncthreads();
    } else if (t.bug != 1) {
      __syncthreads();
    }
    const int neighbour = (thread + 33) % threads;
    for (int i = 0; i < 4; ++i)
      sum += buffer[round % 2 * elements + 4 * neighbour + i];
    if (t.bug == 6 && round == rounds - 1 && thread == 0)
      sum += 0 * buffer[2 * elements];
    if (t.bug == 3 && round == rounds - 1 && thread == 5)
      return;
    if (t.bug != 5)
      __syncthreads();
  }
  if (t.bug == 9) {
    if (thread % 32 < 16)
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  } else if (t.bug == 10) {
    if (thread % 32 < 16)
      sum += __shfl_xor_sync(0xffffffffu, sum, 16);
    else
      sum += __shfl_xor_sync(0xffffffffu, sum, 16);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2)
    sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  int slot = warp;
  if (t.bug == 7 && warp == 3)
    slot += 1;
  if (thread % 32 == 0)
    sums[slot] = sum;
  __syncthreads();
  if (thread == 0)
    store(t.to + blockIdx.x, sums[0] + sums[1] + sums[2] + sums[3]);
}

// A block of a cluster sums what it and its peers have in shared memory, in the order of their ranks.
void sum_cluster(Task t) {
  MMK_DYNAMIC_SHARED(memory);
  float* own = reinterpret_cast<float*>(memory);
  own[threadIdx.x] = load(t.from + int64_t(blockIdx.x) * threads + threadIdx.x);
  if (t.bug == 14)
    cluster_wait();
  if (t.bug != 11 && !(t.bug == 13 && blockIdx.x % cluster == 1))
    cluster_arrive(), cluster_wait();
  float sum = 0;
  for (int rank = 0; rank < cluster; ++rank)
    sum += load_peer(own + (threadIdx.x + 33) % threads, rank);
  if (t.bug != 12)
    cluster_arrive();
  store(t.to + int64_t(blockIdx.x) * threads + threadIdx.x, sum);
  if (t.bug != 12)
    cluster_wait();
}

struct Products {
  int64_t bug;
  const f16 *a, *b;  // [16][16] each
  float* to;         // [16][8] sums of a b, [16][8] of a transposed and b's columns from 8 on, b as it is
};

// Both ways to load, in shared memory with rows of 24.
void multiply_once(Products t) {
  constexpr int pitch = 24;
  MMK_DYNAMIC_SHARED(memory);
  f16* a = reinterpret_cast<f16*>(memory);
  f16* b = a + 16 * pitch;
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32)
    a[i / 16 * pitch + i % 16] = load(t.a + i), b[i / 16 * pitch + i % 16] = load(t.b + i);
  if (t.bug != 15)
    __syncwarp();
  float sum[4] = {}, other[4] = {};
  uint32_t x[4], y[4];
  load_matrices<false>(x, a + lane % 16 * pitch + lane / 16 * 8 + (t.bug == 16));
  if (t.bug == 18)
    load_matrices<false>(y, b + lane % 16 * pitch + lane / 16 * 8);
  else
    load_matrices<true>(y, b + lane % 16 * pitch + lane / 16 * 8);
  if (t.bug == 17 && lane < 16)
    mma_tile<f16>(sum, x, y[0], y[1]);
  else
    mma_tile<f16>(sum, x, y[0], y[1]);
  load_matrices<true>(x, a + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);
  mma_tile<f16>(other, x, y[2], y[3]);
  for (int i = 0; i < 4; ++i) {
    const int at = (lane / 4 + i / 2 * 8) * 8 + 2 * (lane % 4) + i % 2;
    store(t.to + at, sum[i]), store(t.to + 128 + at, other[i]);
  }
}

}  // namespace mmk::cuda

int main(int, char** arguments) {
  using namespace mmk::cuda;
  constexpr int blocks = 3;
  emulator::config.order = atoi(arguments[2]);
  emulator::config.late_copies = atoi(arguments[3]);
  std::vector<float> to(blocks), from(blocks * rounds * elements + 4);
  float* aligned = from.data();
  while (reinterpret_cast<uintptr_t>(aligned) % 16)
    ++aligned;
  for (int i = 0; i < blocks * rounds * elements; ++i)
    aligned[i] = float(i % 13 - i / 1000);
  const int64_t bug = atoi(arguments[1]);
  emulator::config.cluster = cluster;
  if (bug == 0 || (bug > 10 && bug < 15)) {
    constexpr int places = 2 * cluster * threads;
    std::vector<float> sums(places);
    const char* error =
        launch(sum_cluster, 2 * cluster, 1, cluster, threads, threads * 4, nullptr, Task{bug, aligned, sums.data()});
    if (error)
      return printf("%s\n", error), 3;
    for (int i = 0; i < places; ++i) {
      float sum = 0;
      for (int rank = 0; rank < cluster; ++rank)
        sum += aligned[(i / threads / cluster * cluster + rank) * threads + (i + 33) % threads];
      if (!(sum == sums[i]))
        return printf("place %d: %g instead of %g\n", i, sums[i], sum), 2;
    }
    if (bug)
      return 0;
    emulator::counts = {};
  }
  const char* error = launch(sum_rows, blocks, 1, 1, threads, 2 * elements * 4, nullptr, Task{bug, aligned, to.data()});
  if (error)
    return printf("%s\n", error), 3;
  for (int b = 0; b < blocks; ++b) {
    double sum = 0;
    for (int i = 0; i < rounds * elements; ++i)
      sum += aligned[b * rounds * elements + i];
    if (!(sum == to[b]))
      return printf("block %d: %g instead of %g\n", b, to[b], sum), 2;
  }
  if (emulator::counts.loaded != blocks * rounds * elements * 4 || emulator::counts.stored != blocks * 4)
    return printf("miscounted\n"), 2;

  std::vector<f16> a(256), b(256);
  std::vector<float> products(256);
  for (int i = 0; i < 256; ++i)
    a[i] = f16(float(i * 7 % 23 - 11)), b[i] = f16(float(i * 5 % 19 - 9));
  error = launch(multiply_once, 1, 1, 1, 32, 2 * 16 * 24 * 2, nullptr,
                 Products{atoi(arguments[1]), a.data(), b.data(), products.data()});
  if (error)
    return printf("%s\n", error), 3;
  for (int i = 0; i < 256; ++i) {
    float sum = 0;
    for (int k = 0; k < 16; ++k)
      sum += i < 128 ? float(a[i / 8 * 16 + k]) * float(b[k * 16 + i % 8])
                     : float(a[k * 16 + i / 8 % 16]) * float(b[k * 16 + 8 + i % 8]);
    if (sum != products[i])
      return printf("product %d: %g instead of %g\n", i, products[i], sum), 2;
  }
  return 0;
}
