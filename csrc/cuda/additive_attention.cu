// Additive attention on a GPU. A panel's products come from torch's library and stay in the L2 cache; these kernels
// read and write them once. Beside them the image is read once more for the result, backward once more for the weights'
// gradient; scores, [rows, K], twice.
//   activate, differentiate   a warp a row
//   normalise, center         a block a sample and map: softmax over its scores; its scores' gradient
//   pool, merge               a sample is split over blocks, a thread a channel; their sums are added in order
//   spread, arrive, write     a warp a row: weights times image; the weights' gradient; the image's
// No atomics. Rows that are masked out are never read but as zeros.
#include "additive_attention.h"

#include "rows_access.h"

namespace mmk::cuda {
namespace {

struct HiddenTask {
  AdditiveAttention a;
  SampledRows rows;
  Panel panel;
  float *u, *t, *grad_hidden;
};
struct FinishTask {
  AdditiveAttention a;
  SampledRows rows;
  const float* scores;
  float* partial;
  int64_t splits;
};
struct BackTask {
  AdditiveAttentionBackward g;
  SampledRows rows;
  float* grad_scores;
};
struct WriteTask {
  AdditiveAttentionBackward g;
  SampledRows rows;
  Panel panel;
  const float* through;
};

// Where a sample's row is in [B, K, N] (packed: [K, rows]) for the first map; the others are N apart.
MMK_DEVICE int64_t weight_at(const AdditiveAttention& a, int64_t b, int64_t row) {
  return a.offsets ? row : b * a.K * a.N + row - b * a.N;
}

template <Activation F>
MMK_DEVICE float activate(float x, float& slope) {
  if constexpr (F == Activation::tanh) {
    const float y = tanhf(x);
    slope = 1 - y * y;
    return y;
  } else if constexpr (F == Activation::relu) {
    slope = x > 0 ? 1.f : 0.f;
    return x <= 0 ? 0.f : x;
  } else {
    const float phi = 0.5f * erfcf(x * -0.70710678f);
    slope = phi + x * 0.39894228f * exponential(-0.5f * x * x);
    return x * phi;
  }
}

// A hidden unit: its activation and the gate, as they are multiplied, the activation's slope, and what is left of the
// gate to 1.
struct Unit {
  float y, slope, s, rest;
};

// f(column, unit) for a warp's row.
template <Activation F, bool Drop, class Each>
MMK_DEVICE void hidden(const HiddenTask& t, int64_t r, Each each) {
  const AdditiveAttention& a = t.a;
  const int64_t row = t.panel.first + r;
  const float* u = t.u + r * a.A;
  const float* gates = t.t ? t.t + r * a.A : nullptr;
  const float* bias_gate = static_cast<const float*>(a.bias_gate);
  const float* bias_hidden =
      a.bias_hidden ? static_cast<const float*>(a.bias_hidden) + sample_of(t.rows, row) * a.A : nullptr;
  auto unit = [&](int64_t c) {
    Unit h;
    h.y = activate<F>(load(u + c) + (bias_hidden ? load(bias_hidden + c) : 0.f), h.slope);
    h.s = 1;
    if (gates)
      h.s = reciprocal(1 + exponential(-(load(gates + c) + (bias_gate ? load(bias_gate + c) : 0.f))));
    h.rest = 1 - h.s;
    return h;
  };
  if constexpr (!Drop) {
    for (int64_t c = threadIdx.x % 32; c < a.A; c += 32)
      each(c, unit(c));
    return;
  }
  const uint64_t seed = uint64_t(load(a.dropout.seed));
  const float scale = float(a.dropout.scale);
  const int64_t quarter = quarter_of(a.A);
  for (int64_t j = threadIdx.x % 32; j < quarter; j += 32) {
    uint32_t word[philox_words];
    uint32_t word_of_gate[philox_words] = {};
    philox(seed, uint32_t(j), uint64_t(row), Dropped::hidden, word);
    if (gates)
      philox(seed, uint32_t(j), uint64_t(row), Dropped::gate, word_of_gate);
#pragma unroll 1  // together they take too many registers; so words move up, for an index that varies would spill them
    for (int64_t c = j; c < a.A; c += quarter) {
      Unit h = unit(c);
      const float factor = word[0] < a.dropout.threshold ? 0.f : scale;
      h.y *= factor;
      h.slope *= factor;
      if (gates)
        h.s *= word_of_gate[0] < a.dropout.threshold ? 0.f : scale;
      each(c, h);
#pragma unroll
      for (int w = 1; w < philox_words; ++w) {
        word[w - 1] = word[w];
        word_of_gate[w - 1] = word_of_gate[w];
      }
    }
  }
}

template <Activation F, bool Drop>
MMK_DEVICE void forward_hidden(const HiddenTask& t) {
  const int64_t r = warp_row();
  if (r < t.panel.rows)
    hidden<F, Drop>(t, r, [&](int64_t c, const Unit& h) { store(t.u + r * t.a.A + c, h.y * h.s); });
}

template <Activation F, bool Drop>
MMK_DEVICE void backward_hidden(const HiddenTask& t) {
  const int64_t r = warp_row();
  if (r >= t.panel.rows)
    return;
  hidden<F, Drop>(t, r, [&](int64_t c, const Unit& h) {
    const int64_t at = r * t.a.A + c;
    const float grad = load(t.grad_hidden + at);
    store(t.grad_hidden + at, h.y * h.s);
    store(t.u + at, grad * h.s * h.slope);
    if (t.t)
      store(t.t + at, grad * h.y * h.s * h.rest);
  });
}

// The block's result of `op`; scratch: a float a warp.
template <class Op>
MMK_DEVICE float over_block(float value, float* scratch, Op op) {
  return Teams(1).over(value, scratch, op);
}

MMK_DEVICE void normalise(const FinishTask& t) {
  MMK_DYNAMIC_SHARED(memory);
  float* scratch = reinterpret_cast<float*>(memory);
  const AdditiveAttention& a = t.a;
  const SampledRows& rows = t.rows;
  const int64_t b = blockIdx.x;
  const int64_t k = blockIdx.y;
  const int64_t begin = begin_of(rows, b);
  const int64_t end = end_of(rows, b);
  Running own;
  float takes_part = 0;
  for (int64_t r = begin + threadIdx.x; r < end; r += blockDim.x)
    if (row_valid(rows, a.mask, r)) {
      own.add(load(t.scores + r * a.K + k));
      takes_part = 1;
    }
  const float all = over_block(own.top, scratch, Max());
  const float base = all == -INFINITY ? 0 : all;
  const float total = over_block(own.below(base), scratch, Sum());
  float share = 1 / total;  // exactly 1 for a single position; NaN stays
  if (total == 0)
    share = over_block(takes_part, scratch, Max()) != 0
                ? NAN
                : 0.f;  // all -Inf: NaN, as softmax has it. Nothing takes part: 0
  const int64_t at = weight_at(a, b, begin) + k * a.N - begin;
  float* to = static_cast<float*>(a.weights) + at;
  for (int64_t r = begin + threadIdx.x; r < end; r += blockDim.x) {
    const float score = row_valid(rows, a.mask, r) ? load(t.scores + r * a.K + k) : -INFINITY;
    store(to + r, row_valid(rows, a.mask, r) ? exponential(score - base) * share : 0.f);
    if (a.scores)
      store(static_cast<float*>(a.scores) + at + r, score);
  }
}

// partial [B, splits, K, D]
template <class T>
MMK_DEVICE void pool(const FinishTask& t) {
  const AdditiveAttention& a = t.a;
  const SampledRows& rows = t.rows;
  const int64_t b = blockIdx.x / t.splits;
  const int64_t split = blockIdx.x % t.splits;
  const int64_t slabs = ceil_div(a.D, blockDim.x);
  const int64_t k = blockIdx.y / slabs;
  const int64_t c = blockIdx.y % slabs * blockDim.x + threadIdx.x;
  const int64_t begin = begin_of(rows, b);
  const int64_t size = ceil_div(end_of(rows, b) - begin, t.splits);
  if (c >= a.D)
    return;
  const int64_t first = least(begin + split * size, end_of(rows, b));
  const int64_t last = least(first + size, end_of(rows, b));
  const float* weights = static_cast<const float*>(a.weights) + weight_at(a, b, begin) + k * a.N;
  const T* image =
      static_cast<const T*>(a.image.data) + (a.offsets ? 0 : b * a.image.b - begin * a.image.n) + c * a.image.c;
  float total = 0;
  for (int64_t piece = first; piece < last; piece += 64) {  // in pieces, which keeps long sums exact
    float sum = 0;
    for (int64_t r = piece; r < least(piece + 64, last); ++r) {
      const float w = load(weights + r - begin);
      if (w != 0)
        sum += w * to_float(load(image + r * a.image.n));
    }
    total += sum;
  }
  store(t.partial + ((b * t.splits + split) * a.K + k) * a.D + c, total);
}

template <class T>
MMK_DEVICE void merge(const FinishTask& t) {
  const AdditiveAttention& a = t.a;
  const int64_t b = blockIdx.x;
  const int64_t slabs = ceil_div(a.D, blockDim.x);
  const int64_t k = blockIdx.y / slabs;
  const int64_t c = blockIdx.y % slabs * blockDim.x + threadIdx.x;
  if (c >= a.D)
    return;
  float total = 0;
  for (int64_t split = 0; split < t.splits; ++split)
    total += load(t.partial + ((b * t.splits + split) * a.K + k) * a.D + c);
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

template <class T>
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
      for (int64_t c = threadIdx.x % 32; c < a.D; c += 32)
        sum += to_float(load(image + c * a.image.c)) * to_float(load(grad + c * t.g.grad_result.c));
      sum = over_lanes(sum, 32, Sum());
    }
    if (t.g.grad_weights)
      sum += load(static_cast<const float*>(t.g.grad_weights) + at);
  }
  if (threadIdx.x % 32 == 0)
    store(t.grad_scores + k * rows.rows + row, sum);
}

// The weights' gradient -> the scores'. Their mean is found twice, the second time of what is left: what all have in
// common has to cancel.
MMK_DEVICE void center(const BackTask& t) {
  MMK_DYNAMIC_SHARED(memory);
  float* scratch = reinterpret_cast<float*>(memory);
  const AdditiveAttention& a = t.g.forward;
  const SampledRows& rows = t.rows;
  const int64_t b = blockIdx.x;
  const int64_t k = blockIdx.y;
  const int64_t begin = begin_of(rows, b);
  const int64_t end = end_of(rows, b);
  const int64_t at = weight_at(a, b, begin) + k * a.N - begin;
  const float* weights = static_cast<const float*>(a.weights) + at;
  const float* given = static_cast<const float*>(t.g.grad_scores);
  float* x = t.grad_scores + k * rows.rows;
  float mean[2] = {0, 0};
  for (int pass = 0; pass < 2; ++pass) {
    float total = 0;
    float mass = 0;
    for (int64_t r = begin + threadIdx.x; r < end; r += blockDim.x) {
      const float w = load(weights + r);
      if (w != 0) {
        total += w * (load(x + r) - mean[0]);
        mass += w;
      }
    }
    total = over_block(total, scratch, Sum());
    mass = over_block(mass, scratch, Sum());
    mean[pass] = mass == 0 ? 0 : total / mass;
  }
  for (int64_t r = begin + threadIdx.x; r < end; r += blockDim.x) {
    const float w = load(weights + r);
    const float own = w != 0 ? w * (load(x + r) - mean[0] - mean[1]) : 0.f;
    store(x + r, given && row_valid(rows, a.mask, r) ? own + load(given + at + r) : own);
  }
}

template <class T>
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
  for (int64_t c = threadIdx.x % 32; c < a.D; c += 32) {
    float total = valid ? load(t.through + r * a.D + c) : 0.f;
    for (int64_t k = 0; k < maps; ++k) {
      const float w = load(weights + k * a.N);
      if (w != 0)
        total += w * to_float(load(grad + k * t.g.grad_result.n + c * t.g.grad_result.c));
    }
    store(to + c * t.g.grad_image.c, from_float<T>(total));
  }
}

#define MMK_HIDDEN(name, Drop, suffix)                                         \
  extern "C" __global__ void __launch_bounds__(256, 1)                         \
      additive_attention_activate_##name##suffix(const HiddenTask task) {      \
    forward_hidden<Activation::name, Drop>(task);                              \
  }                                                                            \
  extern "C" __global__ void __launch_bounds__(256, 1)                         \
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
extern "C" __global__ void __launch_bounds__(256, 1) additive_attention_normalise(const FinishTask task) {
  normalise(task);
}
extern "C" __global__ void __launch_bounds__(256, 1) additive_attention_center(const BackTask task) {
  center(task);
}
#define MMK_KERNELS(T, suffix)                                                                                     \
  extern "C" __global__ void __launch_bounds__(128) additive_attention_pool_##suffix(const FinishTask task) {      \
    pool<T>(task);                                                                                                 \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(128) additive_attention_merge_##suffix(const FinishTask task) {     \
    merge<T>(task);                                                                                                \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(256, 1) additive_attention_spread_##suffix(const FinishTask task) { \
    spread<T>(task);                                                                                               \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(256, 1) additive_attention_arrive_##suffix(const BackTask task) {   \
    arrive<T>(task);                                                                                               \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(256, 1) additive_attention_write_##suffix(const WriteTask task) {   \
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

constexpr int columns = 128;  // threads of pool and merge, a channel each
constexpr int64_t block_scratch = row_threads / 32 * int64_t(sizeof(float));

// Blocks that share a sample's pooled sums: enough for four a processor, none with few rows.
int64_t splits_of(const AdditiveAttention& a) {
  const int64_t own = a.B * a.K * ceil_div(a.D, columns);
  const int64_t rows = a.offsets ? a.N : a.B * a.N;
  const int64_t wanted = own ? 4 * current_device().processors / own : 1;
  const int64_t most_splits = rows / 256 < 64 ? rows / 256 : 64;
  return wanted < 1 || most_splits < 1 ? 1 : wanted < most_splits ? wanted : most_splits;
}

}  // namespace

const char* additive_attention_activate(const AdditiveAttention& a, const Panel& panel, float* u, const float* t,
                                        void* stream) {
  return run(a.dtype, MMK_ACTIVATION(a, additive_attention_activate), panel,
             HiddenTask{a, sampled_rows(a), panel, u, const_cast<float*>(t), nullptr}, stream);
}
const char* additive_attention_differentiate(const AdditiveAttention& a, const Panel& panel, float* u, float* t,
                                             float* grad_hidden, void* stream) {
  return run(a.dtype, MMK_ACTIVATION(a, additive_attention_differentiate), panel,
             HiddenTask{a, sampled_rows(a), panel, u, t, grad_hidden}, stream);
}

int64_t additive_attention_scratch(const AdditiveAttention& a) {
  return a.pool ? a.B * splits_of(a) * a.K * a.D : 0;
}

const char* additive_attention_finish(const AdditiveAttention& a, const float* scores, float* partial, void* stream) {
  const FinishTask task{a, sampled_rows(a), scores, partial, splits_of(a)};
  if (const char* error =
          run(a.dtype, additive_attention_normalise, a.B, a.K, row_threads, block_scratch, task, stream))
    return error;
  if (!a.pool)
    return run(a.dtype, MMK_PICK(a.dtype, additive_attention_spread), row_blocks(task.rows.rows), 1, row_threads, 0,
               task, stream);
  const int64_t slabs = a.K * ceil_div(a.D, columns);
  if (const char* error =
          run(a.dtype, MMK_PICK(a.dtype, additive_attention_pool), a.B * task.splits, slabs, columns, 0, task, stream))
    return error;
  return run(a.dtype, MMK_PICK(a.dtype, additive_attention_merge), a.B, slabs, columns, 0, task, stream);
}

const char* additive_attention_scores(const AdditiveAttentionBackward& g, float* grad_scores, void* stream) {
  const AdditiveAttention& a = g.forward;
  const BackTask task{g, sampled_rows(a), grad_scores};
  if (const char* error = run(a.dtype, MMK_PICK(a.dtype, additive_attention_arrive), row_blocks(task.rows.rows), a.K,
                              row_threads, 0, task, stream))
    return error;
  return run(a.dtype, additive_attention_center, a.B, a.K, row_threads, block_scratch, task, stream);
}

const char* additive_attention_write(const AdditiveAttentionBackward& g, const Panel& panel, const float* through,
                                     void* stream) {
  const AdditiveAttention& a = g.forward;
  return run(a.dtype, MMK_PICK(a.dtype, additive_attention_write), panel, WriteTask{g, sampled_rows(a), panel, through},
             stream);
}

}  // namespace mmk::cuda
