// Channel attention on a GPU. A panel's scores come from torch's library and stay in the L2 cache; a warp takes a row:
// it reads the scores twice (three times backward), image and gradients once or twice, and writes the result once. Sums
// over a row go lane by lane, then in a tree: the same bits every time.
#include "channel_attention.h"

#include "rows_access.h"

namespace mmk::cuda {
namespace {

struct WeighTask {
  ChannelAttention a;
  Panel panel;
  const float* scores;
};
struct DifferentiateTask {
  ChannelAttentionBackward g;
  Panel panel;
  float *scores, *direct;
};
struct WriteTask {
  ChannelAttentionBackward g;
  Panel panel;
  const float *direct, *through;
};

// A warp's row of a panel.
struct Row {
  int64_t r, lane;
  Place place;
  bool there;
  MMK_DEVICE Row(const ChannelAttention& a, const Panel& panel)
      : r(warp_row()), lane(threadIdx.x % 32), place(panel, a.N, r), there(r < panel.rows) {}
  MMK_DEVICE int64_t at(const SampleRows& t) const { return place.sample * t.b + place.position * t.n; }
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

template <class T>
MMK_DEVICE void weigh(const WeighTask& t) {
  const Row row(t.a, t.panel);
  if (!row.there)
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

template <class T>
MMK_DEVICE void differentiate(const DifferentiateTask& t) {
  const ChannelAttention& a = t.g.forward;
  const Row row(a, t.panel);
  if (!row.there)
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
    // A weight of 1 is the only one: its score has no gradient, and rounding must not leave one.
    store(scores + c, w == 1 ? 0.f : w * (arriving(c, grad) - mean));
    if (t.direct)
      store(t.direct + row.r * D + c, w * grad);
  }
}

template <class T>
MMK_DEVICE void write(const WriteTask& t) {
  const ChannelAttention& a = t.g.forward;
  const Row row(a, t.panel);
  if (!row.there)
    return;
  T* to = static_cast<T*>(t.g.grad_image.data) + row.at(t.g.grad_image);
  for (int64_t c = row.lane; c < a.D; c += 32)
    store(to + c * t.g.grad_image.c,
          from_float<T>(load(t.direct + row.r * a.D + c) + load(t.through + row.r * a.D + c)));
}

#define MMK_KERNELS(T, suffix)                                                                                  \
  extern "C" __global__ void __launch_bounds__(256, 4) channel_attention_weigh_##suffix(const WeighTask task) { \
    weigh<T>(task);                                                                                             \
  }                                                                                                             \
  extern "C" __global__ void __launch_bounds__(256, 4)                                                          \
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
const char* run_panel(Dtype dtype, void (*kernel)(Task), const Task& task, void* stream) {
  if (const char* error = beyond("positions", task.panel.position, most_positions))
    return error;
  return run(dtype, kernel, task.panel, task, stream);
}

}  // namespace

const char* channel_attention_weigh(const ChannelAttention& a, const Panel& panel, const float* scores, void* stream) {
  return run_panel(a.dtype, MMK_PICK(a.dtype, channel_attention_weigh), WeighTask{a, panel, scores}, stream);
}
const char* channel_attention_differentiate(const ChannelAttentionBackward& g, const Panel& panel, float* scores,
                                            float* direct, void* stream) {
  const Dtype dtype = g.forward.dtype;
  return run_panel(dtype, MMK_PICK(dtype, channel_attention_differentiate), DifferentiateTask{g, panel, scores, direct},
                   stream);
}
const char* channel_attention_write(const ChannelAttentionBackward& g, const Panel& panel, const float* direct,
                                    const float* through, void* stream) {
  const Dtype dtype = g.forward.dtype;
  return run_panel(dtype, MMK_PICK(dtype, channel_attention_write), WriteTask{g, panel, direct, through}, stream);
}

}  // namespace mmk::cuda
