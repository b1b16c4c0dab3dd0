// Runs CUDA kernels on the CPU, to know that they are right without a GPU. csrc/cuda/*.cu is compiled with
// g++ -x c++ -DMMK_EMULATED; csrc/cuda/primitives.h then takes its primitives from here.
//
// A thread is a fiber; blocks run one after another, those of a cluster together. Barriers and warp operations are
// rendezvous that know where they were called: divergence, wrong masks, early returns and deadlocks are errors that
// name both places. Shared memory is full of NaN before each block and ends exactly where the launch said. copy_async
// copies at once (finds an overwrite that comes too early) or as late as copy_wait allows (finds a missing wait). Loads
// and stores of global memory are counted in bytes. Under ThreadSanitizer fibers switch without synchronising and only
// rendezvous order them: races in a block or a cluster show. A block that could end while a peer reads its shared
// memory is an error, whichever came first. Not covered: what runs between blocks of different clusters at the same
// time.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // for blocks that run one after another, that is, without clusters

namespace emulator {

// Threads take turns at every rendezvous; or a warp goes on until it waits for others, which finds what only a barrier
// of the block keeps in order.
enum Order : int { ascending, descending, shuffled, warps, warps_descending };

struct Config {
  int order = ascending;  // of threads and blocks
  unsigned seed = 1;      // of shuffled
  bool late_copies = true;
  int64_t shared = 163 << 10;  // what a block may have, and the number of processors: an A100's
  int64_t processors = 108;
  int64_t cluster = 1;  // the most blocks of a cluster
  bool tiles = false;   // spatial attention takes no other way, whatever its features' layout
};
struct Counts {
  // bytes of global memory
  uint64_t loaded = 0;
  uint64_t stored = 0;
  uint64_t launches = 0;
  uint64_t blocks = 0;
  // the largest that a launch asked for
  uint64_t shared = 0;
  uint64_t cluster = 0;
};
struct Thread {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
extern Config config;
extern Counts counts;
extern Thread* current;  // the thread that runs

#define threadIdx (::emulator::current->thread)
#define blockIdx (::emulator::current->block)
#define blockDim (::emulator::current->block_size)
#define gridDim (::emulator::current->grid_size)

// Calls body(context) in every thread. Null, or what went wrong.
const char* run(dim3 grid, unsigned cluster, dim3 block, size_t shared, void (*body)(void*), void* context);
template <class Arguments, class Given>
const char* launch(void (*kernel)(Arguments), dim3 grid, unsigned cluster, dim3 block, size_t shared,
                   const Given& given) {
  struct Call {
    void (*kernel)(Arguments);
    const Given& given;
  } call{kernel, given};
  return run(
      grid, cluster, block, shared, [](void* c) { static_cast<Call*>(c)->kernel(static_cast<Call*>(c)->given); },
      &call);
}

void* dynamic_shared();
int barrier(int value, const char* file, int line);  // the sum of value over the block
void warp_barrier(const char* file, int line);
struct Fragments {
  uint32_t a[4], b[2];
};  // a lane's part of what mma.sync multiplies
// What a lane brings to a meeting of its whole warp, for all to read until they meet again but one. It orders no
// memory.
const Fragments* exchange(const Fragments& mine, const char* kind, const char* file, int line);
void load_matrices(uint32_t* to, const void* row, bool transposed, const char* file, int line);
int lane();
uint64_t shuffle_xor(unsigned mask, uint64_t value, int lanes, const char* file, int line);
unsigned ballot(unsigned mask, bool value, const char* file, int line);
void copy_async(void* to, const void* from, int bytes, bool keep);
void copy_commit();
void copy_wait(int pending);
void cluster_arrive(const char* file, int line);
void cluster_wait(const char* file, int line);
const float* peer(const float* mine, int64_t rank);  // the same place in another block's shared memory
inline float peer_load(const float* mine, int64_t rank) {
  return *peer(mine, rank);
}

// Relaxed, so that ThreadSanitizer sees neither a race nor an order between fibers.
inline void count(uint64_t& counter, uint64_t bytes) {
  __atomic_store_n(&counter, __atomic_load_n(&counter, __ATOMIC_RELAXED) + bytes, __ATOMIC_RELAXED);
}
template <class T>
T counted_load(const T* from) {
  count(counts.loaded, sizeof(T));
  return *from;
}
template <class T>
void counted_store(T* to, const T& value) {
  count(counts.stored, sizeof(T));
  *to = value;
}
// To the sanitizers one step, which no other thread's can come between.
inline void counted_add(float* to, float value) {
  count(counts.stored, sizeof(float));
  uint32_t before = __atomic_load_n(reinterpret_cast<uint32_t*>(to), __ATOMIC_RELAXED);
  float sum;
  memcpy(&sum, &before, 4);
  sum += value;
  uint32_t after;
  memcpy(&after, &sum, 4);
  __atomic_compare_exchange_n(reinterpret_cast<uint32_t*>(to), &before, after, false, __ATOMIC_RELAXED,
                              __ATOMIC_RELAXED);
}

struct bf16 {
  uint16_t bits;
  bf16() = default;
  explicit bf16(float x) {  // to the nearest, ties to even
    uint32_t u;
    memcpy(&u, &x, 4);
    bits = uint16_t(x != x ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  explicit operator float() const {
    uint32_t u = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
  }
};
using f16 = _Float16;

template <class T>
float element(uint32_t pair, int which) {
  T x;
  const uint16_t half = uint16_t(pair >> 16 * which);
  memcpy(&x, &half, 2);
  return float(x);
}
// mma.sync.m16n8k16: a lane holds rows g = lane / 4 and g + 8 of a and of the sum, columns 2 q, 2 q + 1 (q = lane % 4)
// and, of a, those 8 further; of b column g, rows 2 q, 2 q + 1 and those 8 further.
template <class T>
void mma_tile(float* sum, const uint32_t* a, uint32_t b0, uint32_t b1, const char* file, int line) {
  const Fragments* all = exchange({{a[0], a[1], a[2], a[3]}, {b0, b1}}, "mma", file, line);
  const int g = lane() / 4;
  const int q = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * q + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int owner = k % 8 / 2;
      const int half = k / 8;
      sum[i] += element<T>(all[4 * g + owner].a[2 * half + i / 2], k % 2) *
                element<T>(all[4 * column + owner].b[half], k % 2);
    }
  }
}

}  // namespace emulator

#define __syncthreads() void(::emulator::barrier(0, __FILE__, __LINE__))
#define __syncwarp() ::emulator::warp_barrier(__FILE__, __LINE__)
#define __syncthreads_count(p) ::emulator::barrier((p) != 0, __FILE__, __LINE__)

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = emulator::shuffle_xor(mask, bits, lanes, file, line);
  memcpy(&value, &bits, sizeof(T));
  return value;
}
#define __ballot_sync(mask, value) ::emulator::ballot(mask, value, __FILE__, __LINE__)
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
