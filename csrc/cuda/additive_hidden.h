// Additive attention's hidden vectors out of a panel's products, and back; a warp a row.
#pragma once
#include "additive_attention.h"
#include "rows_access.h"

namespace mmk::cuda {

struct HiddenTask {
  AdditiveAttention a;
  SampledRows rows;
  Panel panel;
  int64_t width;
  const float* v;                      // [K, A]
  float* u;                            // [rows, width], the gate's behind the activation's
  float* scores = nullptr;             // [rows, K], of the panel
  const float* grad_scores = nullptr;  // [K, rows], of all
  float* hidden = nullptr;             // [rows, A], or null
  void* rounded = nullptr;             // like u, of 16 bits, or null
  bool wide = false;                   // all rows and biases are aligned to 16 bytes
};

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

// each(column, units) for V columns at a time of a warp's row.
template <Activation F, bool Drop, int V, class Each>
MMK_DEVICE void hidden(const HiddenTask& t, int64_t r, Each each) {
  const AdditiveAttention& a = t.a;
  const int64_t row = t.panel.first + r;
  const float* u = t.u + r * t.width;
  const bool gated = a.w_gate.data;
  const float* bias_gate = static_cast<const float*>(a.bias_gate);
  const float* bias_hidden =
      a.bias_hidden ? static_cast<const float*>(a.bias_hidden) + sample_of(t.rows, row) * a.A : nullptr;
  auto units = [&](int64_t c, Unit(&h)[V]) {
    float x[V];
    float bias[V] = {};
    float gate[V] = {};
    float bias_of_gate[V] = {};
    load_floats(x, u + c);
    if (bias_hidden)
      load_floats(bias, bias_hidden + c);
    if (gated)
      load_floats(gate, u + a.A + c);
    if (bias_gate)
      load_floats(bias_of_gate, bias_gate + c);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      h[i].y = activate<F>(x[i] + bias[i], h[i].slope);
      h[i].s = gated ? reciprocal(1 + exponential(-(gate[i] + bias_of_gate[i]))) : 1;
      h[i].rest = 1 - h[i].s;
    }
  };
  if constexpr (!Drop) {
    for (int64_t c = threadIdx.x % 32 * V; c < a.A; c += 32 * V) {
      Unit h[V];
      units(c, h);
      each(c, h);
    }
    return;
  }
  const uint64_t seed = uint64_t(load(a.dropout.seed));
  const float scale = float(a.dropout.scale);
  const int64_t quarter = quarter_of(a.A);
  for (int64_t j = threadIdx.x % 32; j < quarter; j += 32) {
    uint32_t word[philox_words];
    uint32_t word_of_gate[philox_words] = {};
    philox(seed, uint32_t(j), uint64_t(row), Dropped::hidden, word);
    if (gated)
      philox(seed, uint32_t(j), uint64_t(row), Dropped::gate, word_of_gate);
#pragma unroll 1  // together they take too many registers; so words move up, for an index that varies would spill them
    for (int64_t c = j; c < a.A; c += quarter) {
      Unit h[V];
      units(c, h);
      const float factor = word[0] < a.dropout.threshold ? 0.f : scale;
      h[0].y *= factor;
      h[0].slope *= factor;
      if (gated)
        h[0].s *= word_of_gate[0] < a.dropout.threshold ? 0.f : scale;
      each(c, h);
#pragma unroll
      for (int w = 1; w < philox_words; ++w) {
        word[w - 1] = word[w];
        word_of_gate[w - 1] = word_of_gate[w];
      }
    }
  }
}

// Scores of a row. The hidden vector is stored where there are more maps than one walk over it serves.
template <Activation F, bool Drop, int V>
MMK_DEVICE void forward_hidden(const HiddenTask& t, int64_t r) {
  constexpr int at_once = 4;
  const AdditiveAttention& a = t.a;
  float* u = t.u + r * t.width;
  const int64_t lane = threadIdx.x % 32;
  float sum[at_once] = {};
  hidden<F, Drop, V>(t, r, [&](int64_t c, const Unit(&h)[V]) {
    float product[V];
#pragma unroll
    for (int i = 0; i < V; ++i)
      product[i] = h[i].y * h[i].s;
#pragma unroll
    for (int k = 0; k < at_once; ++k)
      if (k < a.K) {
        float v[V];
        load_floats(v, t.v + k * a.A + c);
#pragma unroll
        for (int i = 0; i < V; ++i)
          sum[k] += product[i] * v[i];
      }
    if (a.K > at_once)
      store_floats(u + c, product);
  });
#pragma unroll
  for (int k = 0; k < at_once; ++k)
    if (k < a.K) {
      const float score = over_lanes(sum[k], 32, Sum());
      if (lane == 0)
        store(t.scores + r * a.K + k, score);
    }
  if (a.K <= at_once)
    return;
  __syncwarp();
  for (int64_t k = at_once; k < a.K; ++k) {
    float score = 0;
    for (int64_t c = lane; c < a.A; c += 32)
      score += load(u + c) * load(t.v + k * a.A + c);
    score = over_lanes(score, 32, Sum());
    if (lane == 0)
      store(t.scores + r * a.K + k, score);
  }
}

template <Activation F, bool Drop, int V>
MMK_DEVICE void backward_hidden(const HiddenTask& t, int64_t r) {
  const AdditiveAttention& a = t.a;
  const int64_t at = r * t.width;
  auto leave = [&](int64_t c, const float (&grad)[V]) {
    store_floats(t.u + at + c, grad);
    if (t.rounded)
      a.dtype == Dtype::bfloat16 ? store_rounded(static_cast<bf16*>(t.rounded) + at + c, grad)
                                 : store_rounded(static_cast<f16*>(t.rounded) + at + c, grad);
  };
  hidden<F, Drop, V>(t, r, [&](int64_t c, const Unit(&h)[V]) {
    float up[V] = {};
    for (int64_t k = 0; k < a.K; ++k) {
      const float grad = load(t.grad_scores + k * t.rows.rows + t.panel.first + r);
      float v[V];
      load_floats(v, t.v + k * a.A + c);
#pragma unroll
      for (int i = 0; i < V; ++i)
        up[i] += grad * v[i];
    }
    float product[V];
    float grad[V];
    float grad_gate[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      product[i] = h[i].y * h[i].s;
      grad[i] = up[i] * h[i].s * h[i].slope;
      grad_gate[i] = up[i] * h[i].y * h[i].s * h[i].rest;
    }
    leave(c, grad);
    if (a.w_gate.data)
      leave(a.A + c, grad_gate);
    if (t.hidden)
      store_floats(t.hidden + r * a.A + c, product);
  });
}

// Dropout's words are for columns that lie apart.
template <Activation F, bool Drop>
MMK_DEVICE void forward_hidden(const HiddenTask& t) {
  const int64_t r = warp_row();
  if (r >= t.panel.rows)
    return;
  if (!Drop && t.wide)
    forward_hidden<F, Drop, Drop ? 1 : 4>(t, r);
  else
    forward_hidden<F, Drop, 1>(t, r);
}
template <Activation F, bool Drop>
MMK_DEVICE void backward_hidden(const HiddenTask& t) {
  const int64_t r = warp_row();
  if (r >= t.panel.rows)
    return;
  if (!Drop && t.wide)
    backward_hidden<F, Drop, Drop ? 1 : 4>(t, r);
  else
    backward_hidden<F, Drop, 1>(t, r);
}

}  // namespace mmk::cuda
