// Gated cross-attention in CUDA C++.
#include "gated_cross_attention.h"

#include "attention_forward.h"

namespace mmk::cuda {

#define MMK_FORWARD(T, suffix, C)                                                                                             \
  extern "C" __global__ void __launch_bounds__(128, C > 128 ? 1 : 2) gated_cross_attention_forward_##C##_##suffix(const AttendTask task) { \
    MMK_DYNAMIC_SHARED(shared);                                                                                              \
    Attend<T, C, false>(task, shared).run();                                                                                 \
  }
#define MMK_KERNELS(T, suffix)                                                                                                \
  MMK_FORWARD(T, suffix, 64)                                                                                                 \
  MMK_FORWARD(T, suffix, 128)                                                                                                \
  MMK_FORWARD(T, suffix, 256)                                                                                                \
  extern "C" __global__ void __launch_bounds__(128) gated_cross_attention_merge_##suffix(const AttendTask task) { attend_merge<T>(task); }
MMK_KERNELS(float, f32)
MMK_KERNELS(bf16, bf16)
MMK_KERNELS(f16, f16)

// ---- host

namespace {

AttendTask task_of(const GatedCrossAttention& a) {
  AttendTask t = {};
  t.count = a.B * a.H, t.heads = a.H, t.rows = a.N, t.streamed = a.T, t.d = a.d, t.dv = a.dv, t.scale = a.scale;
  t.query = a.query, t.key = a.key, t.value = a.value, t.gate = a.gate, t.result = a.result, t.attended = a.attended;
  t.stream_mask = a.tokens, t.pairs = a.pairs, t.bias = a.bias, t.log_sum = static_cast<float*>(a.log_sum);
  return t;
}

constexpr const char* no_float64 = "the CUDA kernels have no float64";
constexpr const char* too_little = "a block has too little shared memory for the CUDA kernels";

#define MMK_TABLE(name)                                                                                                       \
  {{gated_cross_attention_##name##_64_f32, gated_cross_attention_##name##_128_f32, gated_cross_attention_##name##_256_f32},   \
   {gated_cross_attention_##name##_64_bf16, gated_cross_attention_##name##_128_bf16, gated_cross_attention_##name##_256_bf16}, \
   {gated_cross_attention_##name##_64_f16, gated_cross_attention_##name##_128_f16, gated_cross_attention_##name##_256_f16}}
constexpr AttendKernel forwards[3][classes] = MMK_TABLE(forward);
constexpr AttendKernel merges[3] = {gated_cross_attention_merge_f32, gated_cross_attention_merge_bf16, gated_cross_attention_merge_f16};

}  // namespace

int64_t gated_cross_attention_scratch(const GatedCrossAttention& a) {
  AttendTask t = task_of(a);
  return attend_plan(t, a.dtype, current_device(), false) < 0 ? 0 : attend_scratch(t, nullptr);
}
int64_t gated_cross_attention_scratch(const GatedCrossAttentionBackward&) { return 0; }

const char* gated_cross_attention_forward(const GatedCrossAttention& a, float* memory, void* stream) {
  if (a.dtype == Dtype::float64) return no_float64;
  AttendTask t = task_of(a);
  const int index = attend_plan(t, a.dtype, current_device(), false);
  if (index < 0) return too_little;
  attend_scratch(t, memory);
  return attend_launch(t, a.dtype, index, false, forwards[int(a.dtype)][index], merges[int(a.dtype)], static_cast<Stream>(stream));
}
const char* gated_cross_attention_backward(const GatedCrossAttentionBackward&, float*, void*) { return "not yet"; }

}  // namespace mmk::cuda
