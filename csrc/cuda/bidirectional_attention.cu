// Bidirectional attention in CUDA C++. Must move: queries, keys and both values once, both results once, 8 bytes a row
// for its softmax; no N x T matrix. So it is where the text has up to 64 tokens and the channels fit a class: each
// block buffers a part of the image past all of the text, takes each tile of scores once, finishes the image's rows,
// and leaves its part of the text's sums, which a second launch merges by maximum and sum in a fixed order. A longer
// text takes the kernels of gated cross-attention, once with the rows of the image and once with those of the text: the
// scores twice, the other side read again by each 64 rows, from L2. The same backward. docs/generated/gpu.md has what
// is counted.
//
// Kernels, for T in f32, bf16, f16 and the class C in 64, 128, and, of 16-bit types, 256:
//   bidirectional_attention_forward_C_T(AttendTask)         block 128, dynamic shared memory AttendLayout.total (both)
//   bidirectional_attention_delta_T(DeltaTask)              block 128
//   bidirectional_attention_backward_C_T(BackwardTask)      block 256, dynamic shared memory BackwardLayout.total
//   bidirectional_attention_backward_merge_T(BackwardTask)  block 128, where task.splits > 1
// All grids are one-dimensional: heads x row tiles x splits x chunks, the last the fastest.
#include "bidirectional_attention.h"

#include <initializer_list>

#include "heads_backward_launch.h"
#include "heads_delta.h"
#include "heads_forward_launch.h"

namespace mmk::cuda {

#define MMK_FORWARD(T, suffix, C)                                              \
  extern "C" __global__ void __launch_bounds__(128, MMK_ATTEND_TOGETHER(T, C)) \
      bidirectional_attention_forward_##C##_##suffix(const AttendTask task) {  \
    MMK_DYNAMIC_SHARED(shared);                                                \
    Attend<T, C, true>(task, shared).run();                                    \
  }
#define MMK_BACKWARD(T, suffix, C)                                               \
  extern "C" __global__ void __launch_bounds__(256, 1)                           \
      bidirectional_attention_backward_##C##_##suffix(const BackwardTask task) { \
    MMK_DYNAMIC_SHARED(shared);                                                  \
    Backward<T, C, true, true>(task, shared).run();                              \
  }
#define MMK_KERNELS(T, suffix)                                                                                     \
  MMK_FORWARD(T, suffix, 64)                                                                                       \
  MMK_FORWARD(T, suffix, 128)                                                                                      \
  MMK_BACKWARD(T, suffix, 64)                                                                                      \
  MMK_BACKWARD(T, suffix, 128)                                                                                     \
  extern "C" __global__ void __launch_bounds__(128) bidirectional_attention_delta_##suffix(const DeltaTask task) { \
    backward_delta<T>(task);                                                                                       \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(128)                                                                \
      bidirectional_attention_backward_merge_##suffix(const BackwardTask task) {                                   \
    backward_merge<T>(task);                                                                                       \
  }
MMK_KERNELS(float, f32)
MMK_KERNELS(bf16, bf16)
MMK_KERNELS(f16, f16)
MMK_FORWARD(bf16, bf16, 256)
MMK_FORWARD(f16, f16, 256)
MMK_BACKWARD(bf16, bf16, 256)
MMK_BACKWARD(f16, f16, 256)

// ---- host

namespace {

// Rows of the text attend to the streamed image; `both`: and the other way round, with the same scores.
AttendTask text_rows(const BidirectionalAttention& a, bool both) {
  AttendTask t = {};
  t.count = a.B * a.H;
  t.heads = a.H;
  t.rows = a.T;
  t.columns = a.N;
  t.d = a.d;
  t.dv = a.dv;
  t.scale = a.scale;
  t.query = a.text_key;
  t.key = a.image_query;
  t.value = a.image_value;
  t.result = a.text_out;
  t.unrounded = a.unrounded;
  t.row_mask = a.text_mask;
  t.column_mask = a.image_mask;
  t.softmax = static_cast<float*>(a.text_softmax);
  if (both)
    t.row_value = a.text_value, t.column_result = a.image_out, t.column_softmax = static_cast<float*>(a.image_softmax);
  return t;
}

AttendTask image_rows(const BidirectionalAttention& a) {
  AttendTask t = {};
  t.count = a.B * a.H;
  t.heads = a.H;
  t.rows = a.N;
  t.columns = a.T;
  t.d = a.d;
  t.dv = a.dv;
  t.scale = a.scale;
  t.query = a.image_query;
  t.key = a.text_key;
  t.value = a.text_value;
  t.result = a.image_out;
  t.row_mask = a.image_mask;
  t.column_mask = a.text_mask;
  t.softmax = static_cast<float*>(a.image_softmax);
  return t;
}

// One launch where all of the text is one tile of rows, else one a side, and the scores twice: the text's sums over all
// positions don't fit a block beside the image's over all tokens.
struct Forwards {
  AttendTask text, image = {};
  int text_index, image_index = -1;
  bool both = false, fits;
  int64_t floats;
  Forwards(const BidirectionalAttention& a, float* memory) : text(text_rows(a, true)) {
    const Device device = current_device();
    text_index = a.T > 0 && a.T <= tile_rows ? attend_plan(text, a.dtype, device, true) : -1;
    both = text_index >= 0 && a.d <= class_channels[text_index] && a.dv <= class_channels[text_index];
    if (!both) {
      text = text_rows(a, false);
      text_index = attend_plan(text, a.dtype, device, false);
      image = image_rows(a);
      image_index = attend_plan(image, a.dtype, device, false);
    }
    fits = text_index >= 0 && (both || image_index >= 0);
    floats = fits ? attend_scratch(text, memory) : 0;
    if (fits && !both)
      floats += attend_scratch(image, memory + floats);
  }
};

struct Backwards : BackwardSides<true> {
  DeltaTask image_delta = {}, text_delta = {};
  int64_t floats;
  Backwards(const BidirectionalAttentionBackward& g, float* memory) {
    const BidirectionalAttention& a = g.forward;
    const int64_t heads = a.B * a.H;
    const float* image_softmax = static_cast<const float*>(a.image_softmax);
    const float* text_softmax = static_cast<const float*>(a.text_softmax);
    float* image_deltas = memory;
    float* text_deltas = memory + heads * a.N;
    floats = heads * (a.N + a.T);
    for (DeltaTask* t : {&image_delta, &text_delta}) {
      t->heads = a.H;
      t->count = heads;
      t->dv = a.dv;
    }
    image_delta.rows = a.N;
    image_delta.grad = g.grad_image_out;
    image_delta.result = a.image_out;
    image_delta.softmax = image_softmax;
    image_delta.delta = image_deltas;
    text_delta.rows = a.T;
    text_delta.grad = g.grad_text_out;
    text_delta.result = a.unrounded;
    text_delta.wide = 1;
    text_delta.softmax = text_softmax;
    text_delta.delta = text_deltas;

    for (BackwardTask* t : {&image, &text}) {
      t->heads = a.H;
      t->count = heads;
      t->d = a.d;
      t->dv = a.dv;
      t->scale = a.scale;
    }
    image.rows = a.N;
    image.columns = a.T;
    image.query = a.image_query;
    image.key = a.text_key;
    image.grad = g.grad_image_out;
    image.value = a.text_value;
    image.column_grad = g.grad_text_out;
    image.row_value = a.image_value;
    image.softmax = image_softmax;
    image.delta = image_deltas;
    image.column_softmax = text_softmax;
    image.column_delta = text_deltas;
    image.row_mask = a.image_mask;
    image.column_mask = a.text_mask;
    image.grad_query = g.grad_image_query;
    image.grad_row_value = g.grad_image_value;
    text.rows = a.T;
    text.columns = a.N;
    text.query = a.text_key;
    text.key = a.image_query;
    text.grad = g.grad_text_out;
    text.value = a.image_value;
    text.column_grad = g.grad_image_out;
    text.row_value = a.text_value;
    text.softmax = text_softmax;
    text.delta = text_deltas;
    text.column_softmax = image_softmax;
    text.column_delta = image_deltas;
    text.row_mask = a.text_mask;
    text.column_mask = a.image_mask;
    text.grad_query = g.grad_text_key;
    text.grad_row_value = g.grad_text_value;

    const bool of_image = image.grad_query.data || image.grad_row_value.data;
    const bool of_text = text.grad_query.data || text.grad_row_value.data;
    if (plan(a.dtype, of_image, of_text)) {
      text.grad_key = g.grad_image_query;
      text.grad_value = g.grad_image_value;
    }
    floats += scratch(memory + floats);
  }
};

constexpr AttendKernel forwards[3][classes] = MMK_BY_CLASS(bidirectional_attention_forward);
constexpr BackwardKernel backwards[3][classes] = MMK_BY_CLASS(bidirectional_attention_backward);
constexpr BackwardKernel backward_merges[3] = MMK_BY_DTYPE(bidirectional_attention_backward_merge);
constexpr DeltaKernel deltas[3] = MMK_BY_DTYPE(bidirectional_attention_delta);

}  // namespace

int64_t bidirectional_attention_scratch(const BidirectionalAttention& a) {
  return a.dtype == Dtype::float64 ? 0 : Forwards(a, nullptr).floats;
}
int64_t bidirectional_attention_scratch(const BidirectionalAttentionBackward& g) {
  return g.forward.dtype == Dtype::float64 ? 0 : Backwards(g, nullptr).floats;
}

const char* bidirectional_attention_forward(const BidirectionalAttention& a, float* memory, void* stream) {
  const int dtype = int(a.dtype);
  if (a.dtype == Dtype::float64)
    return no_float64;
  const Forwards all(a, memory);
  if (!all.fits)
    return too_little;
  const Stream on = static_cast<Stream>(stream);
  if (all.both)
    return attend_launch(all.text, a.dtype, all.text_index, true, forwards[dtype][all.text_index],
                         attend_merge_kernel(a.dtype), on);
  const char* error = attend(all.text, a.dtype, all.text_index, on);
  return error ? error : attend(all.image, a.dtype, all.image_index, on);
}

const char* bidirectional_attention_backward(const BidirectionalAttentionBackward& g, float* memory, void* stream) {
  const int dtype = int(g.forward.dtype);
  if (g.forward.dtype == Dtype::float64)
    return no_float64;
  const Backwards all(g, memory);
  if (!all.fits)
    return too_little;
  const Stream on = static_cast<Stream>(stream);
  const char* error = delta_launch(all.image_delta, deltas[dtype], on);
  if (!error)
    error = delta_launch(all.text_delta, deltas[dtype], on);
  return error ? error : all.launch(backwards[dtype], backwards[dtype], backward_merges[dtype], on);
}

}  // namespace mmk::cuda
