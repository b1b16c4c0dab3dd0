// What the CUDA bindings share: the tensor's device, its current stream, and scratch from torch's allocator.
#pragma once
#include "common.h"

#ifndef MMK_EMULATED
#ifndef USE_CUDA
#error "compile with -DUSE_CUDA: torch's C interface hides its CUDA functions otherwise"
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace mmk::binding {

// run(stream) on the tensor's device and its current stream.
template <class Run>
void on_stream(const Tensor& like, Run run) {
  void* stream = nullptr;
#ifndef MMK_EMULATED
  const int32_t device = like.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
#endif
  run(stream);
}

inline void check_launch(const char* error) {
  STD_TORCH_CHECK(!error, error ? error : "");
}

// run(scratch, stream) starts kernels and returns null or what went wrong; floats() tells how much scratch they need.
// The scratch is freed before they end: torch's allocator gives it to nobody but the same stream, that is, behind them.
template <class Floats, class Run>
void on_current_stream(const Tensor& like, Floats floats, Run run) {
  on_stream(like, [&](void* stream) {
    Tensor scratch = empty_tensor(like, {floats()}, ScalarType::Float);
    check_launch(run(static_cast<float*>(scratch.mutable_data_ptr()), stream));
  });
}

// What `forward` and `backward` of a binding launch: kernels of the GPU with the scratch that they ask for.
template <class Arguments, int64_t (*floats)(const Arguments&),
          const char* (*start)(const Arguments&, float* scratch, void* stream)>
void on_gpu(const Arguments& arguments, const Tensor& like) {
  on_current_stream(
      like, [&] { return floats(arguments); },
      [&](float* scratch, void* stream) { return start(arguments, scratch, stream); });
}

}  // namespace mmk::binding
