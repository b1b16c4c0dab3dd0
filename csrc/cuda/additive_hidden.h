// Additive attention's hidden vectors out of a panel's products, and back; a warp a row.
#pragma once
#include "additive_attention.h"
#include "rows_access.h"

namespace mmk::cuda {

struct HiddenTask {
  AdditiveAttention a;
  SampledRows rows;
  Panel panel;
  float *u, *t, *grad_hidden;
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

}  // namespace mmk::cuda
