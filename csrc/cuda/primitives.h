// The only place with inline PTX and dynamic shared memory: what CUDA kernels are made of, real under nvcc, emulated
// under g++ with -DMMK_EMULATED (tests/cuda_emulator). Kernels reach global memory through load, store, store_kept,
// add_atomically and copy_async alone, so that the emulator can count bytes.
#pragma once
#include <cstdint>

#ifdef MMK_EMULATED
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "launch.h"

namespace mmk::cuda {

#define MMK_DEVICE __device__ __forceinline__
#define MMK_HOST_DEVICE __host__ __device__ __forceinline__

template <class T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T at[size];
};

#ifdef MMK_EMULATED

using emulator::bf16;
using emulator::f16;

template <class T>
inline T load(const T* from) {
  return emulator::counted_load(from);
}
template <class T>
inline void store(T* to, T value) {
  emulator::counted_store(to, value);
}
template <class T>
inline void store_kept(T* to, T value) {
  emulator::counted_store(to, value);
}
inline void add_atomically(float* to, float value) {
  emulator::counted_add(to, value);
}
inline void copy_async(void* shared, const void* global, bool valid) {
  emulator::copy_async(shared, global, 16, valid);
}
inline void copy_commit() {
  emulator::copy_commit();
}
template <int Pending>
inline void copy_wait() {
  emulator::copy_wait(Pending);
}
inline float load_peer(const float* mine, int64_t rank) {
  return emulator::peer_load(mine, rank);
}
#define cluster_arrive() ::emulator::cluster_arrive(__FILE__, __LINE__)
#define cluster_wait() ::emulator::cluster_wait(__FILE__, __LINE__)
inline float exponential(float x) {
  return std::exp(x);
}
inline float exponential2(float x) {
  return std::exp2(x);
}
inline float reciprocal(float x) {
  return 1 / x;
}
template <bool Transposed>
inline void load_matrices(uint32_t (&to)[4], const void* row, const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  emulator::load_matrices(to, row, Transposed, file, line);
}
template <class T>
inline void mma_tile(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                     const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::mma_tile<T>(sum, a, b0, b1, file, line);
}
inline int opaque(int x) {
  return x;
}
inline float to_float(float x) {
  return x;
}
inline float to_float(bf16 x) {
  return float(x);
}
inline float to_float(f16 x) {
  return float(x);
}
template <class T>
inline T from_float(float x) {
  return T(x);
}
template <class T>
inline uint32_t pair_of(float low, float high) {
  const T both[2] = {T(low), T(high)};
  uint32_t bits;
  memcpy(&bits, both, 4);
  return bits;
}

#define MMK_DYNAMIC_SHARED(name) unsigned char* name = static_cast<unsigned char*>(::emulator::dynamic_shared())

#else

using bf16 = __nv_bfloat16;
using f16 = __half;

template <class T>
MMK_DEVICE T load(const T* from) {
  if constexpr (sizeof(T) == 16) {
    T value;
    *reinterpret_cast<uint4*>(&value) = *reinterpret_cast<const uint4*>(from);
    return value;
  } else {
    return *from;
  }
}

// Results aren't read again by these kernels: 128-bit stores ask to leave the cache to what is.
template <class T>
MMK_DEVICE void store(T* to, T value) {
  if constexpr (sizeof(T) == 16)
    __stcs(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(&value));
  else
    *to = value;
}

// 128 bits that other kernels read soon.
template <class T>
MMK_DEVICE void store_kept(T* to, T value) {
  static_assert(sizeof(T) == 16);
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&value);
}

// In whatever order threads come to it: other bits every time.
MMK_DEVICE void add_atomically(float* to, float value) {
  atomicAdd(to, value);
}

// 16 bytes from global to shared memory, both aligned to 16; zeros where not valid (then nothing is read).
MMK_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
MMK_DEVICE void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int Pending>
MMK_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Clusters. `rank` of a block: blockIdx.x % blocks of a cluster. Code for an older architecture is never launched as a
// cluster (current_device sees to that).
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// What block `rank` of the cluster has where this block has `mine`, in shared memory. A cluster barrier must come
// between its store and this, and another between this and the end of that block.
MMK_DEVICE float load_peer(const float* mine, int64_t rank) {
  uint32_t address;
  float value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(uint32_t(__cvta_generic_to_shared(mine))), "r"(uint32_t(rank)));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}
MMK_DEVICE void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
MMK_DEVICE void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
#else
MMK_DEVICE float load_peer(const float*, int64_t) {
  __trap();
  return 0.f;
}
MMK_DEVICE void cluster_arrive() {
  __trap();
}
MMK_DEVICE void cluster_wait() {}
#endif

MMK_DEVICE float exponential(float x) {
  return __expf(x);
}
MMK_DEVICE float reciprocal(float x) {
  return __fdividef(1.f, x);
}  // two last bits, and no call
MMK_DEVICE float exponential2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x, but the compiler doesn't know: what is computed from it is computed there again, and not kept in registers through
// a loop.
MMK_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Four 8 x 8 matrices of 16-bit elements from shared memory; lane 8 i + r tells where row r of matrix i is, 16 bytes,
// aligned. A lane gets of each matrix the elements 2 (lane % 4) and the next of row lane / 4 (Transposed: of that
// column).
template <bool Transposed>
MMK_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  const uint32_t at = uint32_t(__cvta_generic_to_shared(row));
  if constexpr (Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
}

// sum += a b, of 16 x 16 and 16 x 8 elements of type T, spread over a warp as mma.sync.m16n8k16 has it.
template <class T>
MMK_DEVICE void mma_tile(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
MMK_DEVICE float to_float(float x) {
  return x;
}
MMK_DEVICE float to_float(bf16 x) {
  return __bfloat162float(x);
}
MMK_DEVICE float to_float(f16 x) {
  return __half2float(x);
}
template <class T>
MMK_DEVICE T from_float(float x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else if constexpr (std::is_same_v<T, bf16>)
    return __float2bfloat16_rn(x);
  else
    return __float2half_rn(x);
}

template <class T>
MMK_DEVICE uint32_t pair_of(float low, float high) {  // two 16-bit elements
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  } else {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
}

#define MMK_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

#endif

}  // namespace mmk::cuda
