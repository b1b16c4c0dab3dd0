// Channel attention on a GPU. A panel's scores come from torch's library and stay in the L2 cache; a warp takes a
// row, or several short ones: it reads the scores once, and holds them, where they are at most 1,024 and aligned, else
// twice (three times backward); image and gradients once or twice. The result is written once. Sums over a row go lane
// by lane, then in a tree: the same bits every time.
#include "channel_attention.h"

#include <initializer_list>

#include "rows_access.h"

namespace mmk::cuda {
namespace {

// `lanes`, a power of two, of a warp have a row. `wide`: they hold it, four channels at a time.
struct WeighTask {
  ChannelAttention a;
  Panel panel;
  const float* scores;
  int lanes;
  bool wide;
};
struct DifferentiateTask {
  ChannelAttentionBackward g;
  Panel panel;
  float *scores, *direct;
  void* rounded;
  int lanes;
  bool wide;
};
struct WriteTask {
  ChannelAttentionBackward g;
  Panel panel;
  const float *direct, *through;
  bool wide;
};

// A row of a panel. What there is not has no channels, but its lanes go along.
struct Row {
  int64_t r, lane, end;
  Place place;
  MMK_DEVICE Row(const ChannelAttention& a, const Panel& panel, int lanes = 32)
      : r(int64_t(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes),
        lane(threadIdx.x % lanes),
        end(r < panel.rows ? a.D : 0),
        place(panel, a.N, end ? r : 0) {}
  MMK_DEVICE int64_t at(const SampleRows& t) const { return place.sample * t.b + place.position * t.n; }
};

constexpr int most_held = 8;  // by a lane, of four channels each
constexpr int few_held = 2;

// A row's weights. All loads come before what waits for them.
template <int P>
struct Held {
  float at[P][4];
  const int step, first, end;  // channels
  MMK_DEVICE Held(const Row& row, int lanes, const float* scores, const float* bias_hidden)
      : step(lanes * 4), first(int(row.lane) * 4), end(int(row.end)) {
#pragma unroll
    for (int i = 0; i < P; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        at[i][j] = -INFINITY;
      if (there(i))
        load_floats(at[i], scores + channel(i));
    }
    float top = -INFINITY;
#pragma unroll
    for (int i = 0; i < P; ++i) {
      float bias[4] = {};
      if (there(i))
        load_floats(bias, bias_hidden + channel(i));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        at[i][j] += bias[j];
        top = fmaxf(top, at[i][j]);
      }
    }
    top = over_lanes(top, lanes, Max());
    if (top == -INFINITY)
      top = 0;
    float total = 0;
#pragma unroll
    for (int i = 0; i < P; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        at[i][j] = exponential(at[i][j] - top);
        total += at[i][j];
      }
    const float share = 1 / over_lanes(total, lanes, Sum());  // exactly 1 for a single channel
#pragma unroll
    for (int i = 0; i < P; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        at[i][j] *= share;
  }
  MMK_DEVICE int channel(int i) const { return i * step + first; }
  MMK_DEVICE bool there(int i) const { return channel(i) < end; }
};

// Softmax over a row's scores: exp(score - top) * share.
struct Softmax {
  float top, share;
  MMK_DEVICE Softmax(const float* scores, const float* bias_hidden, int64_t D, int64_t lane) {
    Running own;
    for (int64_t c = lane; c < D; c += 32)
      own.add(load(scores + c) + load(bias_hidden + c));
    top = over_lanes(own.top, 32, Max());
    if (top == -INFINITY)
      top = 0;
    share = 1 / over_lanes(own.below(top), 32, Sum());  // exactly 1 for a single channel
  }
  MMK_DEVICE float operator()(float score) const { return exponential(score - top) * share; }
};

template <int P, class T>
MMK_DEVICE void weigh_held(const WeighTask& t) {
  constexpr int flight = P < 4 ? P : 4;
  const int lanes = P == most_held ? 32 : t.lanes;  // what the compiler knows takes no registers
  const Row row(t.a, t.panel, lanes);
  const Held<P> weights(row, lanes, t.scores + row.r * t.a.D,
                        static_cast<const float*>(t.a.bias_hidden) + row.place.sample * t.a.D);
  const T* image = static_cast<const T*>(t.panel.image) + row.r * t.panel.n;
  T* result = static_cast<T*>(t.a.result.data) + row.at(t.a.result);
  T* to = t.a.weights.data ? static_cast<T*>(t.a.weights.data) + row.at(t.a.weights) : nullptr;
#pragma unroll
  for (int first = 0; first < P; first += flight) {
    float x[flight][4] = {};
#pragma unroll
    for (int i = 0; i < flight; ++i)
      if (weights.there(first + i))
        load_floats(x[i], image + weights.channel(first + i));
#pragma unroll
    for (int i = 0; i < flight; ++i) {
      const int c = weights.channel(first + i);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        x[i][j] *= weights.at[first + i][j];
      if (weights.there(first + i))
        store_result(result + c, x[i]);
      if (to && weights.there(first + i))
        store_result(to + c, weights.at[first + i]);
    }
  }
}

template <class T>
MMK_DEVICE void weigh(const WeighTask& t) {
  if (t.wide)
    return t.a.D <= few_held * 128 ? weigh_held<few_held, T>(t) : weigh_held<most_held, T>(t);
  const Row row(t.a, t.panel);
  if (!row.end)
    return;
  const int64_t D = t.a.D;
  const float* scores = t.scores + row.r * D;
  const float* bias_hidden = static_cast<const float*>(t.a.bias_hidden) + row.place.sample * D;
  const Softmax weight(scores, bias_hidden, D, row.lane);
  const T* image = static_cast<const T*>(t.panel.image) + row.r * t.panel.n;
  T* result = static_cast<T*>(t.a.result.data) + row.at(t.a.result);
  T* weights = t.a.weights.data ? static_cast<T*>(t.a.weights.data) + row.at(t.a.weights) : nullptr;
  for (int64_t c = row.lane; c < D; c += 32) {
    const float w = weight(load(scores + c) + load(bias_hidden + c));
    store(result + c * t.a.result.c, from_float<T>(w * to_float(load(image + c * t.panel.c))));
    if (weights)
      store(weights + c * t.a.weights.c, from_float<T>(w));
  }
}

// A score's gradient. A weight of 1 is the only one: its score has none, and rounding must not leave one.
MMK_DEVICE float grad_of_score(float w, float arriving, float mean) {
  return w == 1 ? 0.f : w * (arriving - mean);
}

template <int P, class T>
MMK_DEVICE void differentiate_held(const DifferentiateTask& t) {
  constexpr int flight = sizeof(T) == 2 ? 2 : 1;
  const ChannelAttention& a = t.g.forward;
  const int lanes = P == most_held ? 32 : t.lanes;
  const Row row(a, t.panel, lanes);
  float* scores = t.scores + row.r * a.D;
  const Held<P> weights(row, lanes, scores, static_cast<const float*>(a.bias_hidden) + row.place.sample * a.D);
  const SampleRows& gr = t.g.grad_result;
  const SampleRows& gw = t.g.grad_weights;
  const T* image = static_cast<const T*>(t.panel.image) + row.r * t.panel.n;
  const T* grad_result = gr.data ? static_cast<const T*>(gr.data) + row.at(gr) : nullptr;
  const T* grad_weights = gw.data ? static_cast<const T*>(gw.data) + row.at(gw) : nullptr;
  const int of_result = grad_result ? weights.end : 0;
  const int of_weights = grad_weights ? weights.end : 0;
  // use(i, the result's gradient, the weight's) for all that is held
  auto each = [&](auto use) {
#pragma unroll
    for (int first = 0; first < P; first += flight) {
      float grad[flight][4] = {};
      float x[flight][4] = {};
      float sum[flight][4] = {};
#pragma unroll
      for (int i = 0; i < flight; ++i) {
        const int c = weights.channel(first + i);
        if (c < of_result)
          load_floats(grad[i], grad_result + c);
        if (c < of_result)
          load_floats(x[i], image + c);
        if (c < of_weights)
          load_floats(sum[i], grad_weights + c);
      }
#pragma unroll
      for (int i = 0; i < flight; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          sum[i][j] += grad[i][j] * x[i][j];
        use(first + i, grad[i], sum[i]);
      }
    }
  };
  float mean = 0;
  each([&](int i, float (&)[4], float (&arriving)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      mean += weights.at[i][j] * arriving[j];
  });
  mean = over_lanes(mean, lanes, Sum());
  each([&](int i, float (&grad)[4], float (&arriving)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      arriving[j] = grad_of_score(weights.at[i][j], arriving[j], mean);
      grad[j] *= weights.at[i][j];
    }
    if (!weights.there(i))
      return;
    const int64_t at = row.r * a.D + weights.channel(i);
    store_floats(t.scores + at, arriving);
    if constexpr (sizeof(T) == 2)
      store_rounded(static_cast<T*>(t.rounded) + at, arriving);
    if (t.direct)
      store_floats(t.direct + at, grad);
  });
}

template <class T>
MMK_DEVICE void differentiate(const DifferentiateTask& t) {
  if (t.wide)
    return t.g.forward.D <= few_held * 128 ? differentiate_held<few_held, T>(t) : differentiate_held<most_held, T>(t);
  const ChannelAttention& a = t.g.forward;
  const Row row(a, t.panel);
  if (!row.end)
    return;
  const int64_t D = a.D;
  float* scores = t.scores + row.r * D;
  const float* bias_hidden = static_cast<const float*>(a.bias_hidden) + row.place.sample * D;
  const Softmax weight(scores, bias_hidden, D, row.lane);
  const SampleRows& gr = t.g.grad_result;
  const SampleRows& gw = t.g.grad_weights;
  const T* image = static_cast<const T*>(t.panel.image) + row.r * t.panel.n;
  const T* grad_result = gr.data ? static_cast<const T*>(gr.data) + row.at(gr) : nullptr;
  const T* grad_weights = gw.data ? static_cast<const T*>(gw.data) + row.at(gw) : nullptr;
  auto grad_output = [&](int64_t c) { return grad_result ? to_float(load(grad_result + c * gr.c)) : 0.f; };
  auto arriving = [&](int64_t c, float grad) {
    return (grad_result ? grad * to_float(load(image + c * t.panel.c)) : 0.f) +
           (grad_weights ? to_float(load(grad_weights + c * gw.c)) : 0.f);
  };
  float mean = 0;
  for (int64_t c = row.lane; c < D; c += 32)
    mean += weight(load(scores + c) + load(bias_hidden + c)) * arriving(c, grad_output(c));
  mean = over_lanes(mean, 32, Sum());
  for (int64_t c = row.lane; c < D; c += 32) {
    const float w = weight(load(scores + c) + load(bias_hidden + c));
    const float grad = grad_output(c);
    const float found = grad_of_score(w, arriving(c, grad), mean);
    store(scores + c, found);
    if constexpr (sizeof(T) == 2)
      store(static_cast<T*>(t.rounded) + row.r * D + c, from_float<T>(found));
    if (t.direct)
      store(t.direct + row.r * D + c, w * grad);
  }
}

template <int V, class T>
MMK_DEVICE void write(const WriteTask& t) {
  const ChannelAttention& a = t.g.forward;
  const Row row(a, t.panel);
  T* to = static_cast<T*>(t.g.grad_image.data) + row.at(t.g.grad_image);
  for (int64_t c = row.lane * V; c < row.end; c += 32 * V) {
    float direct[V];
    float sum[V];
    load_floats(direct, t.direct + row.r * a.D + c);
    load_floats(sum, t.through + row.r * a.D + c);
#pragma unroll
    for (int i = 0; i < V; ++i)
      sum[i] += direct[i];
    store_result(to + c * t.g.grad_image.c, sum);
  }
}
template <class T>
MMK_DEVICE void write(const WriteTask& t) {
  t.wide ? write<4, T>(t) : write<1, T>(t);
}

#define MMK_KERNELS(T, suffix)                                                                                  \
  extern "C" __global__ void __launch_bounds__(256, 2) channel_attention_weigh_##suffix(const WeighTask task) { \
    weigh<T>(task);                                                                                             \
  }                                                                                                             \
  extern "C" __global__ void __launch_bounds__(256, 2)                                                          \
      channel_attention_differentiate_##suffix(const DifferentiateTask task) {                                  \
    differentiate<T>(task);                                                                                     \
  }                                                                                                             \
  extern "C" __global__ void __launch_bounds__(256, 4) channel_attention_write_##suffix(const WriteTask task) { \
    write<T>(task);                                                                                             \
  }
MMK_KERNELS(float, f32)
MMK_KERNELS(bf16, bf16)
MMK_KERNELS(f16, f16)
#undef MMK_KERNELS

// Place counts positions in 32 bits.
template <class Task>
const char* run_panel(Dtype dtype, void (*kernel)(Task), const Task& task, int lanes, void* stream) {
  if (const char* error = beyond("positions", task.panel.position, most_positions))
    return error;
  return run(dtype, kernel, ceil_div(task.panel.rows, row_threads / lanes), 1, row_threads, 0, task, stream);
}

// Whether a panel's rows of floats, and of the image, can be read four channels at a time.
bool is_wide(const ChannelAttention& a, const Panel& panel, std::initializer_list<const void*> floats) {
  bool wide = a.D % 4 == 0 && panel.c == 1 && panel.n % 4 == 0 && aligned(panel.image) && aligned(a.bias_hidden);
  for (const void* rows : floats)
    wide = wide && aligned(rows);
  return wide;
}

}  // namespace

const char* channel_attention_weigh(const ChannelAttention& a, const Panel& panel, const float* scores, void* stream) {
  const bool wide =
      a.D <= most_held * 128 && is_wide(a, panel, {scores}) && wide_rows(a.result) && wide_rows(a.weights);
  const int lanes = wide ? lanes_for(a.D, 4) : 32;
  return run_panel(a.dtype, MMK_PICK(a.dtype, channel_attention_weigh), WeighTask{a, panel, scores, lanes, wide}, lanes,
                   stream);
}
const char* channel_attention_differentiate(const ChannelAttentionBackward& g, const Panel& panel, float* scores,
                                            float* direct, void* rounded, void* stream) {
  const ChannelAttention& a = g.forward;
  const bool wide = a.D <= most_held * 128 && is_wide(a, panel, {scores, direct, rounded}) &&
                    wide_rows(g.grad_result) && wide_rows(g.grad_weights);
  const int lanes = wide ? lanes_for(a.D, 4) : 32;
  return run_panel(a.dtype, MMK_PICK(a.dtype, channel_attention_differentiate),
                   DifferentiateTask{g, panel, scores, direct, rounded, lanes, wide}, lanes, stream);
}
const char* channel_attention_write(const ChannelAttentionBackward& g, const Panel& panel, const float* direct,
                                    const float* through, void* stream) {
  const ChannelAttention& a = g.forward;
  const bool wide = is_wide(a, panel, {direct, through}) && wide_rows(g.grad_image);
  return run_panel(a.dtype, MMK_PICK(a.dtype, channel_attention_write), WriteTask{g, panel, direct, through, wide}, 32,
                   stream);
}

}  // namespace mmk::cuda
