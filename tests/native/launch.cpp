// Starts kernels as csrc/cuda/launch.h does, from several threads, on a runtime that only keeps the state that they
// share. Prints what is wrong and exits with 1.
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include <tuple>
#include <vector>

#include "../../csrc/cuda/launch.h"

namespace {

constexpr int devices = 2, optin[devices] = {227 << 10, 99 << 10},
              fixed = 4 << 10;  // `fixed`: what a kernel has by itself

std::atomic<int> allowed[devices][2], settings, questions, launches, failures, absent;
thread_local int current;

void expect(bool right, const char* what) {
  if (!right)
    std::printf("%s\n", what), ++failures;
}

struct Task {
  int number;
};
void first(Task) {}
void second(Task) {}
int number(const void* kernel) {
  return kernel == reinterpret_cast<const void*>(first) ? 0 : 1;
}

// Launches of any size, at once: each has what it asks for.
void start_many(int device, int seed) {
  current = device;
  for (int i = 0; i < 40; ++i) {
    const int64_t most = optin[device] - fixed;
    const int64_t shared = (i + seed) % 3 ? most : 1 << 10;
    const char* error = mmk::cuda::launch((i + seed) % 2 ? first : second, 7, 1, 1, 128, shared, nullptr, Task{i});
    expect(!error, error ? error : "");
  }
}

}  // namespace

cudaError_t cudaGetDevice(int* index) {
  return *index = current, absent ? cudaErrorInvalidDevice : cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  if (absent)
    return cudaErrorInvalidDevice;
  ++questions;
  *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? optin[index]
           : attribute == cudaDevAttrMultiProcessorCount        ? 132 - index
           : attribute == cudaDevAttrL2CacheSize                ? 50 << 20
                                                                : index == 0;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  *attributes = {fixed, number(kernel) ? 80 : 90};
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value + fixed > optin[current])
    return cudaErrorInvalidValue;
  ++settings;
  allowed[current][number(kernel)] = value;
  std::this_thread::sleep_for(std::chrono::microseconds(100));  // another thread's turn
  return cudaSuccess;
}

cudaError_t launched(const cudaLaunchConfig_t& config, const void* kernel) {
  ++launches;
  return int64_t(config.dynamicSmemBytes) <= allowed[current][number(kernel)] ? cudaSuccess : cudaErrorInvalidValue;
}

int main() {
  using namespace mmk::cuda;
  absent = 1;  // what fails is asked again
  expect(current_device().shared == 48 << 10, "a device that can't be asked has what every device has");
  expect(launch(first, 1, 1, 1, 32, 0, nullptr, Task{}), "a launch without a device succeeds");
  absent = 0;

  std::vector<std::thread> threads;
  for (int i = 0; i < 6; ++i)
    threads.emplace_back(start_many, i % devices, i);
  for (std::thread& thread : threads)
    thread.join();
  expect(launches == 6 * 40, "a launch is missing");
  expect(settings == devices * 2, "a kernel's shared memory is set more than once a device");
  expect(questions == devices * 4, "a device is asked more than once");

  const Device plain = current_device();
  const Device clustered = current_device(first);
  const Device older = current_device(second);
  expect(plain.shared == optin[0] && plain.processors == 132 && plain.cluster == 1, "a device without clusters");
  expect(clustered.cluster == 8 && older.cluster == 1, "clusters need a device and code that have them");
  current = 1;
  expect(current_device().shared == optin[1] && current_device(first).cluster == 1, "each device has its own");
  expect(settings == devices * 2 && questions == devices * 4, "what is known is asked again");

  const int before = launches;
  expect(!launch(first, 0, 5, 1, 32, 0, nullptr, Task{}) && !launch(first, 5, 0, 1, 32, 0, nullptr, Task{}),
         "a grid of nothing");
  for (const auto& [x, y, told] :
       {std::tuple<int64_t, int64_t, const char*>{int64_t(1) << 31, 1, "2147483648 blocks along x"},
        {1, 65536, "65536 blocks along y"},
        {(int64_t(1) << 32) + 1, 1, "4294967297 blocks along x"}}) {
    const char* error = launch(first, x, y, 1, 32, 0, nullptr, Task{});
    expect(error && std::strstr(error, told), told);
  }
  expect(launches == before, "what is nothing, or too large, is launched");
  expect(!launch(first, (int64_t(1) << 31) - 1, 65535, 1, 32, 0, nullptr, Task{}), "the largest grid is refused");
  return failures ? 1 : 0;
}
