// Softmax over positions in pieces: every chunk has its own maximum m and sum l of exp(score - m); the chunks are then
// merged in a fixed order, exp(m - M) / sum(l exp(m - M)) (Milakov & Gimelshein 2018, arXiv:1805.02867). The same
// chunks on any number of threads, so the same bits.
#pragma once
#include "simd.h"

namespace mmk {
namespace {

template <class C>
constexpr C infinity = C(__builtin_inf());

template <class C>
inline C max_of(const C* s, int64_t count) {
  int64_t i = 0;
  vec<C> top = splat(-infinity<C>);
  for (; i + lanes<C> <= count; i += lanes<C>) {
    vec<C> v = load(s + i);
    top = top < v ? v : top;
  }
  C m = max<C>(top);
  for (; i < count; ++i)
    m = maximum(m, s[i]);
  return m;
}

// s = exp(s - m), returns the sum. Nothing is above m.
template <class C>
inline C exp_sum(C* s, int64_t count, C m) {
  int64_t i = 0;
  vec<C> total = {};
  for (; i + lanes<C> <= count; i += lanes<C>) {
    vec<C> e = exp_below(load(s + i) - m);
    store(s + i, e);
    total += e;
  }
  if (i < count) {  // the rest padded with exp(-Inf) = 0
    vec<C> rest = splat(-infinity<C>);
    for (int64_t j = i; j < count; ++j)
      rest[j - i] = s[j] - m;
    rest = exp_below(rest);
    for (int64_t j = i; j < count; ++j)
      s[j] = rest[j - i];
    total += rest;
  }
  return sum<C>(total);
}

// From the chunks' maxima and sums, `step` apart, to the factor of each chunk's exponentials; in place of the maxima.
// A chunk without positions has a sum of 0. `positions` take part in all; weights add up to `mass`.
template <class C>
inline void merge_chunks(C* maxima, const C* sums, int64_t chunks, int64_t step, int64_t positions, C mass) {
  C top = -infinity<C>;
  C total = 0;
  for (int64_t k = 0; k < chunks; ++k)
    if (sums[k * step] != 0)
      top = maximum(top, maxima[k * step]);
  for (int64_t k = 0; k < chunks; ++k)
    if (sums[k * step] != 0) {
      maxima[k * step] = exp(maxima[k * step] - top);
      total += sums[k * step] * maxima[k * step];
    }
  // Scores that are all -Inf though positions take part: NaN, as softmax has it. Nothing takes part: 0.
  C share = total != 0 ? mass / total : positions ? C(__builtin_nan("")) : C(0);
  for (int64_t k = 0; k < chunks; ++k)
    maxima[k * step] = sums[k * step] != 0 || positions ? maxima[k * step] * share : C(0);
}

template <class C>
inline void multiply(C* s, int64_t count, C factor) {
  int64_t i = 0;
  for (; i + lanes<C> <= count; i += lanes<C>)
    store(s + i, load(s + i) * factor);
  for (; i < count; ++i)
    s[i] *= factor;
}
// s += x * factor
template <class C>
inline void add_scaled(C* s, const C* x, int64_t count, C factor) {
  int64_t i = 0;
  for (; i + lanes<C> <= count; i += lanes<C>)
    store(s + i, load(s + i) + load(x + i) * factor);
  for (; i < count; ++i)
    s[i] += x[i] * factor;
}

// Scale, as a factor of what is multiplied to scores; one beyond 1 is a factor of the scores: a query times it may be
// out of range where its scores aren't.
template <class C>
struct Scale {
  C query, score;
  explicit Scale(double scale)
      : query(scale < -1 || scale > 1 ? 1 : C(scale)), score(scale < -1 || scale > 1 ? C(scale) : 1) {}
  void apply(C* scores, int64_t rows, int64_t step, int64_t count) const {
    if (score == 1)
      return;
    for (int64_t r = 0; r < rows; ++r)
      multiply(scores + r * step, count, score);
  }
};

}  // namespace
}  // namespace mmk
