// The activations of additive attention and their derivatives. Float: polynomials of our own (minimax fits), relative
// error of tanh below 2^-22, absolute error of the others below 2^-22; tests/native checks them. Double: libm's, few
// are needed.
#pragma once
#include "../additive_attention.h"
#include "simd.h"

namespace mmk {
namespace {

template <class C>
MMK_INLINE vec<C> absolute(vec<C> x) {
  return x < 0 ? -x : x;
}

template <class C>
MMK_INLINE vec<C> sigmoid(vec<C> x) {
  return C(1) / (exp(-x) + C(1));
}

MMK_INLINE vec<float> tanh(vec<float> x) {
  const vec<float> t = exp(absolute<float>(x) * -2.f);
  const vec<float> far = (1.f - t) / (1.f + t);
  const vec<float> z = x * x;
  vec<float> p = splat(-0x1.697142p-8f);  // (tanh(x) / x - 1) / x^2 for |x| < 0.65
  p = p * z + 0x1.4f5f02p-6f;
  p = p * z - 0x1.b7cff4p-5f;
  p = p * z + 0x1.1103f2p-3f;
  p = p * z - 0x1.555524p-2f;
  const vec<float> near = x + x * z * p;
  return absolute<float>(x) < 0.65f ? near : x < 0 ? -far : far;
}

// The normal distribution's cumulative function: both tails to a few last bits, as 1 + erf has not.
MMK_INLINE vec<float> normal_cdf(vec<float> x) {
  const vec<float> size = absolute<float>(x);
  const vec<float> y = size > 10.f ? splat(10.f) : size;
  const vec<float> z = x * x;
  vec<float> p = splat(0x1.e62da2p-22f);  // (cdf(x) - 1/2) / x in x^2 for |x| < 1.3
  p = p * z - 0x1.2c0ff2p-17f;
  p = p * z + 0x1.e18d36p-14f;
  p = p * z - 0x1.3724p-10f;
  p = p * z + 0x1.46cf08p-7f;
  p = p * z - 0x1.105832p-4f;
  p = p * z + 0x1.988454p-2f;
  vec<float> q = splat(-0x1.8874f6p-20f);  // log(cdf(-y)) for y from 1.3 to 10
  q = q * y + 0x1.9131c2p-15f;
  q = q * y - 0x1.6bb166p-11f;
  q = q * y + 0x1.911a26p-8f;
  q = q * y - 0x1.36d02cp-5f;
  q = q * y - 0x1.44b6a2p-2f;
  q = q * y - 0x1.98c720p-1f;
  q = q * y - 0x1.62d854p-1f;
  const vec<float> tail = exp(q);
  const vec<float> far = x < 0 ? tail : 1.f - tail;
  return size < 1.3f ? x * p + 0.5f : x != x ? x : far;
}

MMK_INLINE vec<double> tanh(vec<double> x) {
  vec<double> y;
  for (int64_t i = 0; i < lanes<double>; ++i)
    y[i] = __builtin_tanh(x[i]);
  return y;
}
MMK_INLINE vec<double> normal_cdf(vec<double> x) {
  vec<double> y;
  for (int64_t i = 0; i < lanes<double>; ++i)
    y[i] = 0.5 * __builtin_erfc(x[i] * -0.70710678118654752440);
  return y;
}

// The value, and the derivative.
template <Activation F, class C>
MMK_INLINE vec<C> activate(vec<C> x, vec<C>& slope) {
  if constexpr (F == Activation::tanh) {
    const vec<C> y = tanh(x);
    slope = C(1) - y * y;
    return y;
  } else if constexpr (F == Activation::relu) {
    slope = x > 0 ? splat(C(1)) : vec<C>{};
    return x <= 0 ? vec<C>{} : x;  // NaN stays
  } else {
    const vec<C> phi = normal_cdf(x);
    slope = phi + x * exp(x * x * C(-0.5)) * C(0.39894228040143267794);
    return x * phi;
  }
}

template <Activation F, class C>
MMK_INLINE vec<C> activate(vec<C> x) {
  vec<C> unused;
  return activate<F, C>(x, unused);
}

// f of an integral constant.
template <class Run>
inline void with_activation(Activation activation, Run run) {
  switch (activation) {
    case Activation::tanh:
      return run(std::integral_constant<Activation, Activation::tanh>{});
    case Activation::relu:
      return run(std::integral_constant<Activation, Activation::relu>{});
    case Activation::gelu:
      return run(std::integral_constant<Activation, Activation::gelu>{});
  }
}

}  // namespace
}  // namespace mmk
