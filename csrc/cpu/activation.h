// The activations of additive attention and their derivatives. Float: polynomials of our own (minimax fits), absolute error below 4e-7,
// tanh's relative error below 2^-22; tests/native checks them. Double: libm's, few are needed.
#pragma once
#include "../additive_attention.h"
#include "simd.h"

namespace mmk {
namespace {

template <class C> MMK_INLINE vec<C> absolute(vec<C> x) { return x < 0 ? -x : x; }

template <class C> MMK_INLINE vec<C> sigmoid(vec<C> x) { return C(1) / (exp(-x) + C(1)); }

MMK_INLINE vec<float> tanh(vec<float> x) {
  const vec<float> t = exp(absolute<float>(x) * -2.f), far = (1.f - t) / (1.f + t), z = x * x;
  vec<float> p = splat(-0x1.697142p-8f);           // (tanh(x) / x - 1) / x^2 for |x| < 0.65
  p = p * z + 0x1.4f5f02p-6f;
  p = p * z - 0x1.b7cff4p-5f;
  p = p * z + 0x1.1103f2p-3f;
  p = p * z - 0x1.555524p-2f;
  const vec<float> near = x + x * z * p;
  return absolute<float>(x) < 0.65f ? near : x < 0 ? -far : far;
}

MMK_INLINE vec<float> erf(vec<float> x) {
  const vec<float> y = x > 4.f ? splat(4.f) : x < -4.f ? splat(-4.f) : x, z = y * y;
  vec<float> p = splat(-0x1.d59658p-27f), q = splat(0x1.0c797p-14f);      // erf(x) / x = p / q in x^2
  p = p * z + 0x1.40d10ep-18f;
  p = p * z + 0x1.91482cp-12f;
  p = p * z + 0x1.f7413ap-9f;
  p = p * z + 0x1.bd17b8p-5f;
  p = p * z + 0x1.7a496cp-3f;
  p = p * z + 0x1.20dd76p0f;
  q = q * z + 0x1.574c5ep-10f;
  q = q * z + 0x1.fa617ep-7f;
  q = q * z + 0x1.d23b8ap-4f;
  q = q * z + 0x1.fcf52p-2f;
  q = q * z + 1.f;
  return y * p / q;
}

MMK_INLINE vec<double> tanh(vec<double> x) {
  vec<double> y;
  for (int64_t i = 0; i < lanes<double>; ++i) y[i] = __builtin_tanh(x[i]);
  return y;
}
MMK_INLINE vec<double> erf(vec<double> x) {
  vec<double> y;
  for (int64_t i = 0; i < lanes<double>; ++i) y[i] = __builtin_erf(x[i]);
  return y;
}

template <Activation F, class C> MMK_INLINE vec<C> activate(vec<C> x) {
  if constexpr (F == Activation::tanh) return tanh(x);
  else if constexpr (F == Activation::relu) return x <= 0 ? vec<C>{} : x;              // NaN stays
  else return x * (erf(x * C(0.70710678118654752440)) + C(1)) * C(0.5);
}

// The value, and the derivative.
template <Activation F, class C> MMK_INLINE vec<C> activate(vec<C> x, vec<C>& slope) {
  if constexpr (F == Activation::tanh) {
    const vec<C> y = tanh(x);
    slope = C(1) - y * y;
    return y;
  } else if constexpr (F == Activation::relu) {
    slope = x > 0 ? splat(C(1)) : vec<C>{};
    return x <= 0 ? vec<C>{} : x;
  } else {
    const vec<C> phi = (erf(x * C(0.70710678118654752440)) + C(1)) * C(0.5);
    slope = phi + x * exp(x * x * C(-0.5)) * C(0.39894228040143267794);
    return x * phi;
  }
}

// f of an integral constant.
template <class Run> inline void with_activation(Activation activation, Run run) {
  switch (activation) {
    case Activation::tanh: return run(std::integral_constant<Activation, Activation::tanh>{});
    case Activation::relu: return run(std::integral_constant<Activation, Activation::relu>{});
    case Activation::gelu: return run(std::integral_constant<Activation, Activation::gelu>{});
  }
}

}  // namespace
}  // namespace mmk
