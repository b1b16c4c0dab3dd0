// Gated cross-attention in CUDA C++. Must move: queries, keys, values and gate once, the result once, 8 bytes a query
// for its softmax; no N x T matrix (but grad_bias, which is one). Queries, gate and result are. Keys and values are
// read by every block, of 64 queries or, where they stay in shared memory, of up to 512: from L2. Backward reads the
// gradient of the output, gate and what was attended for the rows' deltas, then all inputs and that gradient again:
// once where the text has up to 64 tokens and both channels fit a class, else once for the image's gradients and once
// for each 64 tokens. docs/generated/gpu.md has what is counted.
//
// Kernels, for T in f32, bf16, f16 and the class C in 64, 128, and, of 16-bit types, 256:
//   gated_cross_attention_forward_C_T(AttendTask)           block 128, dynamic shared memory AttendLayout.total
//   gated_cross_attention_merge_T(AttendTask)               block 128, after it where task.splits > 1; a warp a row
//   gated_cross_attention_delta_T(DeltaTask)                block 128
//   gated_cross_attention_backward_{image,text}_C_T(BackwardTask)
//                                                           block 256, dynamic shared memory BackwardLayout.total
//   gated_cross_attention_backward_merge_T(BackwardTask)    block 128, after it where task.splits > 1;
//                                                           a thread 8 channels of a row
// All grids are one-dimensional: heads x row tiles (forward: groups of them) x splits x chunks, the last the fastest.
#include "gated_cross_attention.h"

#include "heads_backward_launch.h"
#include "heads_delta.h"
#include "heads_forward_launch.h"

namespace mmk::cuda {

#define MMK_FORWARD(T, suffix, C)                                              \
  extern "C" __global__ void __launch_bounds__(128, MMK_ATTEND_TOGETHER(T, C)) \
      gated_cross_attention_forward_##C##_##suffix(const AttendTask task) {    \
    MMK_DYNAMIC_SHARED(shared);                                                \
    Attend<T, C, false>(task, shared).run();                                   \
  }
#define MMK_BACKWARD(side, Own, Other, T, suffix, C)                                    \
  extern "C" __global__ void __launch_bounds__(256, C == 64 && sizeof(T) == 2 ? 2 : 1)  \
      gated_cross_attention_backward_##side##_##C##_##suffix(const BackwardTask task) { \
    MMK_DYNAMIC_SHARED(shared);                                                         \
    Backward<T, C, Own, Other>(task, shared).run();                                     \
  }
#define MMK_BACKWARDS(T, suffix, C)              \
  MMK_BACKWARD(image, true, false, T, suffix, C) \
  MMK_BACKWARD(text, false, true, T, suffix, C)
#define MMK_KERNELS(T, suffix)                                                                                    \
  MMK_FORWARD(T, suffix, 64)                                                                                      \
  MMK_FORWARD(T, suffix, 128)                                                                                     \
  extern "C" __global__ void __launch_bounds__(128) gated_cross_attention_merge_##suffix(const AttendTask task) { \
    attend_merge<T>(task);                                                                                        \
  }                                                                                                               \
  MMK_BACKWARDS(T, suffix, 64)                                                                                    \
  MMK_BACKWARDS(T, suffix, 128)                                                                                   \
  extern "C" __global__ void __launch_bounds__(128) gated_cross_attention_delta_##suffix(const DeltaTask task) {  \
    backward_delta<T>(task);                                                                                      \
  }                                                                                                               \
  extern "C" __global__ void __launch_bounds__(128)                                                               \
      gated_cross_attention_backward_merge_##suffix(const BackwardTask task) {                                    \
    backward_merge<T>(task);                                                                                      \
  }
MMK_KERNELS(float, f32)
MMK_KERNELS(bf16, bf16)
MMK_KERNELS(f16, f16)
MMK_FORWARD(bf16, bf16, 256)
MMK_FORWARD(f16, f16, 256)
MMK_BACKWARDS(bf16, bf16, 256)
MMK_BACKWARDS(f16, f16, 256)

// ---- host

namespace {

AttendTask task_of(const GatedCrossAttention& a) {
  AttendTask t = {};
  t.count = a.B * a.H;
  t.heads = a.H;
  t.rows = a.N;
  t.columns = a.T;
  t.d = a.d;
  t.dv = a.dv;
  t.scale = a.scale;
  t.query = a.query;
  t.key = a.key;
  t.value = a.value;
  t.gate = a.gate;
  t.result = a.result;
  t.attended = a.attended;
  t.column_mask = a.tokens;
  t.pairs = a.pairs;
  t.bias = a.bias;
  t.softmax = static_cast<float*>(a.softmax);
  return t;
}

// Rows of the image attend to the streamed text.
BackwardTask image_task(const GatedCrossAttentionBackward& g) {
  const GatedCrossAttention& a = g.forward;
  BackwardTask t = {};
  t.count = a.B * a.H;
  t.heads = a.H;
  t.rows = a.N;
  t.columns = a.T;
  t.d = a.d;
  t.dv = a.dv;
  t.scale = a.scale;
  t.drop = 1;
  t.query = a.query;
  t.key = a.key;
  t.grad = g.grad_result;
  t.gate = a.gate;
  t.value = a.value;
  t.softmax = static_cast<const float*>(a.softmax);
  t.column_mask = a.tokens;
  t.pairs = a.pairs;
  t.bias = a.bias;
  t.grad_bias = static_cast<float*>(g.grad_bias);
  t.grad_bias_row = a.T;
  t.grad_bias_column = 1;
  t.grad_query = g.grad_query;
  return t;
}

// Rows of the text; the streamed image attends to them.
BackwardTask text_task(const GatedCrossAttentionBackward& g) {
  const GatedCrossAttention& a = g.forward;
  BackwardTask t = {};
  t.count = a.B * a.H;
  t.heads = a.H;
  t.rows = a.T;
  t.columns = a.N;
  t.d = a.d;
  t.dv = a.dv;
  t.scale = a.scale;
  t.drop = 1;
  t.query = a.key;
  t.key = a.query;
  t.column_grad = g.grad_result;
  t.column_gate = a.gate;
  t.row_value = a.value;
  t.column_softmax = static_cast<const float*>(a.softmax);
  t.row_mask = a.tokens;
  t.pairs = {a.pairs.data, a.pairs.b, a.pairs.h, a.pairs.t, a.pairs.n};
  t.bias = {a.bias.data, a.bias.b, a.bias.h, a.bias.t, a.bias.n};
  t.grad_query = g.grad_key;
  t.grad_row_value = g.grad_value;
  return t;
}

// The deltas come before the launches.
struct Backwards : BackwardSides<false> {
  DeltaTask delta = {};
  int64_t floats = 0;
  Backwards(const GatedCrossAttentionBackward& g, float* memory) {
    const GatedCrossAttention& a = g.forward;
    image = image_task(g);
    text = text_task(g);
    delta.heads = a.H;
    delta.count = a.B * a.H;
    delta.rows = a.N;
    delta.dv = a.dv;
    delta.grad = g.grad_result;
    delta.gate = a.gate;
    delta.result = a.attended;
    delta.grad_gate = g.grad_gate;
    delta.softmax = static_cast<const float*>(a.softmax);
    delta.delta = memory;
    floats = a.B * a.H * a.N;
    image.delta = text.column_delta = memory;
    const bool of_image = g.grad_query.data || g.grad_bias;
    const bool of_text = g.grad_key.data || g.grad_value.data;
    if ((of_image || of_text) && plan(a.dtype, of_image, of_text)) {
      text.grad_key = g.grad_query;
      text.grad_bias = image.grad_bias;
      text.grad_bias_row = 1;
      text.grad_bias_column = a.T;
    }
    floats += scratch(memory + floats);
  }
};

constexpr AttendKernel forwards[3][classes] = MMK_BY_CLASS(gated_cross_attention_forward);
constexpr AttendKernel merges[3] = MMK_BY_DTYPE(gated_cross_attention_merge);
constexpr BackwardKernel of_image[3][classes] = MMK_BY_CLASS(gated_cross_attention_backward_image);
constexpr BackwardKernel of_text[3][classes] = MMK_BY_CLASS(gated_cross_attention_backward_text);
constexpr BackwardKernel backward_merges[3] = MMK_BY_DTYPE(gated_cross_attention_backward_merge);
constexpr DeltaKernel deltas[3] = MMK_BY_DTYPE(gated_cross_attention_delta);

}  // namespace

AttendKernel attend_merge_kernel(Dtype dtype) {
  return merges[int(dtype)];
}
const char* attend(const AttendTask& t, Dtype dtype, int index, Stream stream) {
  return attend_launch(t, dtype, index, false, forwards[int(dtype)][index], merges[int(dtype)], stream);
}

int64_t gated_cross_attention_scratch(const GatedCrossAttention& a) {
  AttendTask t = task_of(a);
  return attend_plan(t, a.dtype, current_device(), false) < 0 ? 0 : attend_scratch(t, nullptr);
}
int64_t gated_cross_attention_scratch(const GatedCrossAttentionBackward& g) {
  return g.forward.dtype == Dtype::float64 ? 0 : Backwards(g, nullptr).floats;
}

const char* gated_cross_attention_forward(const GatedCrossAttention& a, float* memory, void* stream) {
  if (a.dtype == Dtype::float64)
    return no_float64;
  AttendTask t = task_of(a);
  const int index = attend_plan(t, a.dtype, current_device(), false);
  if (index < 0)
    return too_little;
  attend_scratch(t, memory);
  return attend(t, a.dtype, index, static_cast<Stream>(stream));
}

const char* gated_cross_attention_backward(const GatedCrossAttentionBackward& g, float* memory, void* stream) {
  const int dtype = int(g.forward.dtype);
  if (g.forward.dtype == Dtype::float64)
    return no_float64;
  const Backwards all(g, memory);
  if (!all.fits)
    return too_little;
  const Stream on = static_cast<Stream>(stream);
  const char* error = delta_launch(all.delta, deltas[dtype], on);
  return error ? error : all.launch(of_image[dtype], of_text[dtype], backward_merges[dtype], on);
}

}  // namespace mmk::cuda
