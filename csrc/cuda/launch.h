// How kernels are started, and what a plan may ask of the device: real under nvcc, emulated under g++ with
// -DMMK_EMULATED (tests/cuda_emulator). Any number of threads may start kernels at once.
#pragma once
#include <cstdint>
#include <cstdio>

#ifdef MMK_EMULATED
#include "emulator.h"
#else
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>
#endif

namespace mmk::cuda {

// What a plan depends on. `shared`: bytes of shared memory that one block may have. `cluster`: the most blocks of a
// cluster, a power of two; 1: there are no clusters (before compute capability 9.0). `cache`: bytes of the L2 cache.
struct Device {
  int64_t shared, processors, cluster, cache;
};
constexpr int64_t least_cache = 12 << 20;  // the emulator's, so that tests see several panels of rows

// Null, or that there are more of something than the kernels take; the text is the calling thread's until its next.
inline const char* beyond(const char* what, int64_t size, int64_t most) {
  if (size <= most)
    return nullptr;
  static thread_local char text[160];
  snprintf(text, sizeof text, "the sizes are beyond the CUDA kernels: %lld %s, at most %lld",
           static_cast<long long>(size), what, static_cast<long long>(most));
  return text;
}

// Null, or why a grid can't be launched.
inline const char* grid_error(int64_t x, int64_t y) {
  const char* error = beyond("blocks along x", x, (int64_t(1) << 31) - 1);
  return error ? error : beyond("blocks along y", y, (1 << 16) - 1);
}

#ifdef MMK_EMULATED

using Stream = void*;

inline Device current_device() {
  return {emulator::config.shared, emulator::config.processors, 1, least_cache};
}
template <class Arguments>
inline Device current_device(void (*)(Arguments)) {
  return {emulator::config.shared, emulator::config.processors, emulator::config.cluster, least_cache};
}

template <class Arguments>
inline const char* start(void (*kernel)(Arguments), int64_t x, int64_t y, int64_t cluster, int threads, int64_t shared,
                         Stream, const Arguments& arguments) {
  return emulator::launch(kernel, dim3(unsigned(x), unsigned(y)), unsigned(cluster), dim3(unsigned(threads)),
                          size_t(shared), arguments);
}

#else

using Stream = cudaStream_t;

// Asked once, for all threads; what failed is asked again.
template <class Key, class Value>
class Remembered {
 public:
  template <class Ask>
  cudaError_t get(const Key& key, Value& value, Ask ask) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = known_.find(key);
    if (found == known_.end()) {
      Value fresh = {};
      const cudaError_t error = ask(fresh);
      if (error != cudaSuccess)
        return error;
      found = known_.emplace(key, fresh).first;
    }
    value = found->second;
    return cudaSuccess;
  }

 private:
  std::mutex mutex_;
  std::map<Key, Value> known_;
};

// `cluster`: 1 if the device has clusters at all.
inline cudaError_t device_at(int index, Device& device) {
  static Remembered<int, Device> devices;
  return devices.get(index, device, [&](Device& fresh) {
    int shared = 0;
    int processors = 0;
    int clusters = 0;
    int cache = 0;
    cudaError_t error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, index);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, index);
    fresh = {shared, processors, clusters, cache};
    return error;
  });
}

// The PTX version that a kernel was compiled to. It may then have all the shared memory that the device gives a block:
// that is state of the kernel, so it is set once and to the same for all, never to what one launch needs, which another
// thread's launch might exceed.
inline cudaError_t prepare(const void* kernel, int index, int& ptx) {
  static Remembered<std::pair<const void*, int>, int> kernels;
  return kernels.get({kernel, index}, ptx, [&](int& fresh) {
    Device device = {};
    cudaFuncAttributes compiled = {};
    cudaError_t error = device_at(index, device);
    if (error == cudaSuccess)
      error = cudaFuncGetAttributes(&compiled, kernel);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   int(device.shared) - int(compiled.sharedSizeBytes));
    fresh = compiled.ptxVersion;
    return error;
  });
}

// Of the device that is current, for kernels without clusters.
inline Device current_device() {
  int index = 0;
  Device device = {};
  if (cudaGetDevice(&index) != cudaSuccess || device_at(index, device) != cudaSuccess)
    return {48 << 10, 1, 1, least_cache};
  device.cluster = 1;
  return device;
}
// As `kernel` (and what was compiled with it) can use it: PTX for an older architecture runs on a newer device, but has
// no clusters.
template <class Arguments>
inline Device current_device(void (*kernel)(Arguments)) {
  Device device = {};
  int index = 0;
  int ptx = 0;
  const bool known = cudaGetDevice(&index) == cudaSuccess && device_at(index, device) == cudaSuccess;
  const bool clusters =
      known && device.cluster && prepare(reinterpret_cast<const void*>(kernel), index, ptx) == cudaSuccess && ptx >= 90;
  device = current_device();
  if (clusters)
    device.cluster = 8;  // what every such device can do
  return device;
}

template <class Arguments>
inline const char* start(void (*kernel)(Arguments), int64_t x, int64_t y, int64_t cluster, int threads, int64_t shared,
                         Stream stream, const Arguments& arguments) {
  int index = 0;
  int ptx = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess)
    error = prepare(reinterpret_cast<const void*>(kernel), index, ptx);
  if (error == cudaSuccess) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(x), unsigned(y));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = cluster > 1;
    error = cudaLaunchKernelEx(&config, kernel, arguments);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#endif

// A grid of x times y blocks; none where there is nothing to do. Blocks of a cluster follow each other along x. Returns
// null, or what went wrong.
template <class Arguments>
inline const char* launch(void (*kernel)(Arguments), int64_t x, int64_t y, int64_t cluster, int threads, int64_t shared,
                          Stream stream, const Arguments& arguments) {
  if (x == 0 || y == 0)
    return nullptr;
  const char* error = grid_error(x, y);
  return error ? error : start(kernel, x, y, cluster, threads, shared, stream, arguments);
}

}  // namespace mmk::cuda
