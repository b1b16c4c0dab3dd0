// Additive attention on a GPU. A panel's products come from torch's library and stay in the L2 cache; these kernels
// read and write them once. Beside them the image is read once more for the result, backward once more for the weights'
// gradient; scores, [rows, K], twice.
//   activate, differentiate   a warp a row
//   leave, normalise          a sample and map is split over blocks: softmax over its scores
//   lean, center              the same: its scores' gradient
//   pool, merge               a sample is split over blocks, threads of channels; their sums are added in order
//   spread, arrive, write     a warp a row: weights times image; the weights' gradient; the image's
// No atomics. Rows that are masked out are never read but as zeros.
#include "additive_attention.h"

#include "additive_hidden.h"
#include "additive_weights.h"

namespace mmk::cuda {
namespace {

struct WriteTask {
  AdditiveAttentionBackward g;
  SampledRows rows;
  Panel panel;
  const float* through;
  bool wide;
};

// partial [B, splits, K, D]; a block has lanes * V channels of a share of a sample's rows.
template <int V, class T>
MMK_DEVICE void pool(const FinishTask& t) {
  MMK_DYNAMIC_SHARED(memory);
  const AdditiveAttention& a = t.a;
  const Lanes lanes(t.lanes);
  const int64_t slabs = ceil_div(a.D, t.lanes * V);
  const Share own(t.rows, t.splits, blockIdx.x / slabs);
  const int64_t k = blockIdx.y;
  const int64_t column = blockIdx.x % slabs * t.lanes * V;
  const int64_t c = column + lanes.lane * V;
  const float* weights = static_cast<const float*>(a.weights) + weight_at(a, own.b, own.begin) + k * a.N - own.begin;
  const T* image =
      static_cast<const T*>(a.image.data) + (a.offsets ? 0 : own.b * a.image.b - own.begin * a.image.n) + c * a.image.c;
  const int64_t piece = 64 * lanes.groups;  // in pieces, which keeps long sums exact
  float total[V] = {};
  for (int64_t first = own.first + lanes.group; first < (c < a.D ? own.last : 0); first += piece) {
    float sum[V] = {};
    add_rows(
        sum, first, least(first + piece, own.last), lanes.groups, [&](int64_t r) { return load(weights + r); },
        [&](float (&row)[V], int64_t r) { load_floats(row, image + r * a.image.n); });
#pragma unroll
    for (int i = 0; i < V; ++i)
      total[i] += sum[i];
  }
  const float sum = over_groups(lanes, total, reinterpret_cast<float*>(memory));
  if (int(threadIdx.x) < t.lanes * V && column + threadIdx.x < a.D)
    store(t.partial + (blockIdx.x / slabs * a.K + k) * a.D + column + threadIdx.x, sum);
}
template <class T>
MMK_DEVICE void pool(const FinishTask& t) {
  t.wide ? pool<Pack<T>::size, T>(t) : pool<1, T>(t);
}

// A block has 32 channels.
template <class T>
MMK_DEVICE void merge(const FinishTask& t) {
  MMK_DYNAMIC_SHARED(memory);
  const AdditiveAttention& a = t.a;
  const Lanes lanes(32);
  const int64_t slabs = ceil_div(a.D, 32);
  const int64_t b = blockIdx.x / slabs;
  const int64_t k = blockIdx.y;
  const int64_t c = blockIdx.x % slabs * 32 + lanes.lane;
  const float* partial = t.partial + (b * t.splits * a.K + k) * a.D + c;
  float sum[1] = {};
  add_rows(sum, lanes.group, c < a.D ? t.splits : 0, lanes.groups,
           [&](float (&row)[1], int64_t split) { row[0] = load(partial + split * a.K * a.D); });
  const float total = over_groups(lanes, sum, reinterpret_cast<float*>(memory));
  if (lanes.group == 0 && c < a.D)
    store(static_cast<T*>(a.result.data) + b * a.result.b + k * a.result.n + c * a.result.c, from_float<T>(total));
}

template <class T>
MMK_DEVICE void spread(const FinishTask& t) {
  const AdditiveAttention& a = t.a;
  const SampledRows& rows = t.rows;
  const int64_t row = warp_row();
  if (row >= rows.rows)
    return;
  const float w = load(static_cast<const float*>(a.weights) + row);  // one map: [B, N]
  const T* image = static_cast<const T*>(a.image.data) + row_at(rows, a.image, row);
  T* result = static_cast<T*>(a.result.data) + row_at(rows, a.result, row);
  for (int64_t c = threadIdx.x % 32; c < a.D; c += 32)
    store(result + c * a.result.c,
          from_float<T>(w != 0 || row_valid(rows, a.mask, row) ? w * to_float(load(image + c * a.image.c)) : 0.f));
}

// A row's gradient of the output: its sample's for map k, or its own.
template <class T>
MMK_DEVICE const T* grad_output(const AdditiveAttentionBackward& g, const SampledRows& rows, int64_t b, int64_t k,
                                int64_t row) {
  return static_cast<const T*>(g.grad_result.data) +
         (g.forward.pool ? b * g.grad_result.b + k * g.grad_result.n : row_at(rows, g.grad_result, row));
}

template <int V, class T>
MMK_DEVICE void arrive(const BackTask& t) {
  const AdditiveAttention& a = t.g.forward;
  const SampledRows& rows = t.rows;
  const int64_t row = warp_row();
  const int64_t k = blockIdx.y;
  if (row >= rows.rows)
    return;
  const int64_t b = sample_of(rows, row);
  const int64_t at = weight_at(a, b, row) + k * a.N;
  float sum = 0;
  if (load(static_cast<const float*>(a.weights) + at) != 0) {  // the same for the whole warp
    if (t.g.grad_result.data) {
      const T* image = static_cast<const T*>(a.image.data) + row_at(rows, a.image, row);
      const T* grad = grad_output<T>(t.g, rows, b, k, row);
#pragma unroll 4
      for (int64_t c = threadIdx.x % 32 * V; c < a.D; c += 32 * V) {
        float x[V];
        float up[V];
        load_floats(x, image + c * a.image.c);
        load_floats(up, grad + c * t.g.grad_result.c);
#pragma unroll
        for (int i = 0; i < V; ++i)
          sum += x[i] * up[i];
      }
      sum = over_lanes(sum, 32, Sum());
    }
    if (t.g.grad_weights)
      sum += load(static_cast<const float*>(t.g.grad_weights) + at);
  }
  if (threadIdx.x % 32 == 0)
    store(t.grad_scores + k * rows.rows + row, sum);
}
template <class T>
MMK_DEVICE void arrive(const BackTask& t) {
  t.wide ? arrive<4, T>(t) : arrive<1, T>(t);
}

template <int V, class T>
MMK_DEVICE void write(const WriteTask& t) {
  const AdditiveAttention& a = t.g.forward;
  const SampledRows& rows = t.rows;
  const int64_t r = warp_row();
  const int64_t row = t.panel.first + r;
  if (r >= t.panel.rows)
    return;
  const int64_t b = sample_of(rows, row);
  const bool valid = row_valid(rows, a.mask, row);
  const float* weights = static_cast<const float*>(a.weights) + weight_at(a, b, row);
  T* to = static_cast<T*>(t.g.grad_image.data) + row_at(rows, t.g.grad_image, row);
  const T* grad = grad_output<T>(t.g, rows, b, 0, row);
  const int64_t maps = valid && t.g.grad_result.data ? a.K : 0;
  for (int64_t c = threadIdx.x % 32 * V; c < a.D; c += 32 * V) {
    float total[V] = {};
    if (valid)
      load_floats(total, t.through + r * a.D + c);
    for (int64_t k = 0; k < maps; ++k) {
      const float w = load(weights + k * a.N);
      if (w == 0)
        continue;
      float up[V];
      load_floats(up, grad + k * t.g.grad_result.n + c * t.g.grad_result.c);
#pragma unroll
      for (int i = 0; i < V; ++i)
        total[i] += w * up[i];
    }
    store_result(to + c * t.g.grad_image.c, total);
  }
}
template <class T>
MMK_DEVICE void write(const WriteTask& t) {
  t.wide ? write<4, T>(t) : write<1, T>(t);
}

#define MMK_HIDDEN(name, Drop, suffix)                                         \
  extern "C" __global__ void __launch_bounds__(256, Drop ? 3 : 4)              \
      additive_attention_activate_##name##suffix(const HiddenTask task) {      \
    forward_hidden<Activation::name, Drop>(task);                              \
  }                                                                            \
  extern "C" __global__ void __launch_bounds__(256, 3)                         \
      additive_attention_differentiate_##name##suffix(const HiddenTask task) { \
    backward_hidden<Activation::name, Drop>(task);                             \
  }
MMK_HIDDEN(tanh, false, )
MMK_HIDDEN(relu, false, )
MMK_HIDDEN(gelu, false, )
MMK_HIDDEN(tanh, true, _dropout)
MMK_HIDDEN(relu, true, _dropout)
MMK_HIDDEN(gelu, true, _dropout)
#undef MMK_HIDDEN
extern "C" __global__ void __launch_bounds__(256, 4) additive_attention_leave(const FinishTask task) {
  leave(task);
}
extern "C" __global__ void __launch_bounds__(256, 4) additive_attention_normalise(const FinishTask task) {
  normalise(task);
}
extern "C" __global__ void __launch_bounds__(256, 4) additive_attention_lean(const BackTask task) {
  leave(task);
}
extern "C" __global__ void __launch_bounds__(256, 3) additive_attention_center(const BackTask task) {
  center(task);
}
#define MMK_KERNELS(T, suffix)                                                                                     \
  extern "C" __global__ void __launch_bounds__(256, 3) additive_attention_pool_##suffix(const FinishTask task) {   \
    pool<T>(task);                                                                                                 \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(256, 4) additive_attention_merge_##suffix(const FinishTask task) {  \
    merge<T>(task);                                                                                                \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(256, 4) additive_attention_spread_##suffix(const FinishTask task) { \
    spread<T>(task);                                                                                               \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(256, 4) additive_attention_arrive_##suffix(const BackTask task) {   \
    arrive<T>(task);                                                                                               \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(256, 4) additive_attention_write_##suffix(const WriteTask task) {   \
    write<T>(task);                                                                                                \
  }
MMK_KERNELS(float, f32)
MMK_KERNELS(bf16, bf16)
MMK_KERNELS(f16, f16)
#undef MMK_KERNELS

#define MMK_ACTIVATION(a, kernel) \
  ((a).dropout.seed ? MMK_ACTIVATION_OF((a).activation, kernel, _dropout) : MMK_ACTIVATION_OF((a).activation, kernel, ))
#define MMK_ACTIVATION_OF(activation, kernel, suffix)         \
  ((activation) == Activation::tanh   ? kernel##_tanh##suffix \
   : (activation) == Activation::relu ? kernel##_relu##suffix \
                                      : kernel##_gelu##suffix)

bool is_wide(const HiddenTask& t) {
  return t.a.A % 4 == 0 && aligned(t.u) && aligned(t.v) && aligned(t.hidden) && aligned(t.rounded) &&
         aligned(t.a.bias_hidden) && aligned(t.a.bias_gate);
}

constexpr int64_t block_scratch = row_threads / 32 * int64_t(sizeof(float));

// Blocks that share a sample's rows: three a processor, as many as it has room for; none with few rows. `own`: blocks
// that are there without.
int64_t splits_of(const AdditiveAttention& a, int64_t own, int64_t fewest, int64_t most_blocks) {
  const int64_t wanted = own ? 3 * current_device().processors / own : 1;
  return most(least(least(wanted, a.N / fewest), most_blocks), int64_t(1));
}
int64_t splits_of_softmax(const AdditiveAttention& a) {
  return splits_of(a, a.B * a.K, row_threads, most_splits);
}
int64_t softmax_scratch(const AdditiveAttention& a) {
  return a.B * a.K * splits_of_softmax(a) * left;
}

FinishTask pooling(const AdditiveAttention& a, float* partial) {
  FinishTask t{a, sampled_rows(a), nullptr, partial, 1};
  const int64_t bytes = a.dtype == Dtype::float32 ? 4 : 2;
  t.wide = a.image.c == 1 && aligned(a.image.data) && aligned(a.image.b * bytes) && aligned(a.image.n * bytes) &&
           aligned(a.D * bytes);
  const int V = t.wide ? int(16 / bytes) : 1;
  t.lanes = lanes_for(a.D, V);
  t.splits = splits_of(a, a.B * a.K * ceil_div(a.D, t.lanes * V), 64, 256);
  return t;
}

}  // namespace

const char* additive_attention_activate(const AdditiveAttention& a, const Panel& panel, float* u, const float* v,
                                        float* scores, void* stream) {
  HiddenTask task{a, sampled_rows(a), panel, hidden_width(a), v, u, scores};
  task.wide = is_wide(task);
  return run(a.dtype, MMK_ACTIVATION(a, additive_attention_activate), panel, task, stream);
}
const char* additive_attention_differentiate(const AdditiveAttention& a, const Panel& panel, float* u, const float* v,
                                             const float* grad_scores, float* hidden, void* rounded, void* stream) {
  HiddenTask task{a, sampled_rows(a), panel, hidden_width(a), v, u, nullptr, grad_scores, hidden, rounded};
  task.wide = is_wide(task);
  return run(a.dtype, MMK_ACTIVATION(a, additive_attention_differentiate), panel, task, stream);
}

int64_t additive_attention_scratch(const AdditiveAttention& a) {
  return most(softmax_scratch(a), a.pool ? a.B * pooling(a, nullptr).splits * a.K * a.D : 0);
}

const char* additive_attention_finish(const AdditiveAttention& a, const float* scores, float* partial, void* stream) {
  const FinishTask task{a, sampled_rows(a), scores, partial, splits_of_softmax(a)};
  const int64_t blocks = a.B * task.splits;
  if (task.splits > 1)
    if (const char* error =
            run(a.dtype, additive_attention_leave, blocks, a.K, row_threads, block_scratch, task, stream))
      return error;
  if (const char* error =
          run(a.dtype, additive_attention_normalise, blocks, a.K, row_threads, block_scratch, task, stream))
    return error;
  if (!a.pool)
    return run(a.dtype, MMK_PICK(a.dtype, additive_attention_spread), row_blocks(task.rows.rows), 1, row_threads, 0,
               task, stream);
  const FinishTask sums = pooling(a, partial);
  const int V = sums.wide ? a.dtype == Dtype::float32 ? 4 : 8 : 1;
  if (const char* error =
          run(a.dtype, MMK_PICK(a.dtype, additive_attention_pool), a.B * sums.splits * ceil_div(a.D, sums.lanes * V),
              a.K, row_threads, groups_scratch(V), sums, stream))
    return error;
  return run(a.dtype, MMK_PICK(a.dtype, additive_attention_merge), a.B * ceil_div(a.D, 32), a.K, row_threads,
             groups_scratch(1), sums, stream);
}

int64_t additive_attention_scores_scratch(const AdditiveAttention& a) {
  return softmax_scratch(a);
}
const char* additive_attention_scores(const AdditiveAttentionBackward& g, float* grad_scores, float* partial,
                                      void* stream) {
  const AdditiveAttention& a = g.forward;
  BackTask task{g, sampled_rows(a), grad_scores, partial, splits_of_softmax(a)};
  task.wide = a.D % 4 == 0 && wide_rows(a.image) && wide_rows(g.grad_result);
  if (const char* error = run(a.dtype, MMK_PICK(a.dtype, additive_attention_arrive), row_blocks(task.rows.rows), a.K,
                              row_threads, 0, task, stream))
    return error;
  const int64_t blocks = a.B * task.splits;
  for (; task.splits > 1 && task.pass < 2; ++task.pass)
    if (const char* error =
            run(a.dtype, additive_attention_lean, blocks, a.K, row_threads, block_scratch, task, stream))
      return error;
  return run(a.dtype, additive_attention_center, blocks, a.K, row_threads, block_scratch, task, stream);
}

const char* additive_attention_write(const AdditiveAttentionBackward& g, const Panel& panel, const float* through,
                                     void* stream) {
  const AdditiveAttention& a = g.forward;
  const bool wide = a.D % 4 == 0 && aligned(through) && wide_rows(g.grad_image) && wide_rows(g.grad_result);
  return run(a.dtype, MMK_PICK(a.dtype, additive_attention_write), panel,
             WriteTask{g, sampled_rows(a), panel, through, wide}, stream);
}

}  // namespace mmk::cuda
