// What the two orders in which gated cross-attention is computed share: what is known of a head, how a tile's results
// are written with the gate, what arrives from them, and how weights are found again.
#pragma once
#include "../gated_cross_attention.h"

#include "heads.h"

namespace mmk {
namespace {

// What both directions know of a head: its tensors, the tokens that take part, and keys and values packed in blocks of
// tokens.
template <class T>
struct HeadInputs {
  using C = acc_t<T>;
  const GatedCrossAttention& a;
  Head<T> query, key, value, gate, attended;
  Head<const bool> pairs{};
  Head<const C> bias{};
  SoftmaxRows<C> softmax;
  Order order;
  const Scale<C> scale;
  int64_t index = 0;  // the head's among all

  explicit HeadInputs(const GatedCrossAttention& a) : a(a), order(a.T), scale(a.scale) {}

  void set(int64_t i) {
    index = i;
    const int64_t b = index / a.H;
    const int64_t h = index % a.H;
    query = head<T>(a.query, b, h);
    key = head<T>(a.key, b, h);
    value = head<T>(a.value, b, h);
    gate = head<T>(a.gate, b, h);
    attended = head<T>(a.attended, b, h);
    pairs = {a.pairs.data ? a.pairs.data + b * a.pairs.b + h * a.pairs.h : nullptr, a.pairs.n, a.pairs.t};
    bias = {a.bias.data ? static_cast<const C*>(a.bias.data) + b * a.bias.b + h * a.bias.h : nullptr, a.bias.n,
            a.bias.t};
    softmax = {a.softmax, index, a.N};
    order.find(a.tokens.data ? a.tokens.data + b * a.tokens.b + h * a.tokens.h : nullptr, a.tokens.t, a.T, false);
  }
  bool takes_part(int64_t t) const {
    return !a.tokens.data || a.tokens.data[index / a.H * a.tokens.b + index % a.H * a.tokens.h + t * a.tokens.t];
  }
  // A tile of products -> scores, [token, query], of `n` tokens from the t0-th that takes part: scaled, with the bias,
  // and -Inf for pairs that don't attend.
  void finish(C* scores, int64_t step, int64_t first, int64_t count, int64_t t0, int64_t n) const {
    scale.apply(scores, n, step, padded<C>(count));
    if (!pairs && !bias)
      return;
    for (int64_t i = 0; i < n; ++i) {
      C* s = scores + i * step;
      const int64_t t = order[t0 + i];
      if (bias)
        for (int64_t r = 0; r < count; ++r)
          s[r] += bias.row(first + r)[t * bias.c];
      if (pairs)
        for (int64_t r = 0; r < count; ++r)
          s[r] = pairs.row(first + r)[t * pairs.c] ? s[r] : -infinity<C>;
    }
  }
  // The same of a few queries, all of them, [query, token].
  void finish_rows(C* scores, int64_t step, int64_t t0, int64_t n) const {
    scale.apply(scores, a.N, step, n);
    for (int64_t r = 0; r < a.N; ++r) {
      C* s = scores + r * step;
      if (bias)
        for (int64_t i = 0; i < n; ++i)
          s[i] += bias.row(r)[order[t0 + i] * bias.c];
      if (pairs)
        for (int64_t i = 0; i < n; ++i)
          s[i] = pairs.row(r)[order[t0 + i] * pairs.c] ? s[i] : -infinity<C>;
    }
  }
};

template <class T>
struct Results {
  using C = acc_t<T>;
  const GatedCrossAttention& a;
  Head<T> result{};

  void set(int64_t index) { result = head<T>(a.result, index / a.H, index % a.H); }

  // A tile's results from its sums, `step` apart, and its softmax.
  void write(const HeadInputs<T>& in, int64_t first, int64_t count, const C* sums, int64_t step, const C* top,
             const C* total) const {
    in.softmax.write(first, count, top, total);
    const C* share = in.softmax.share + first;
    const bool unit = result.c == 1 && (!in.gate || in.gate.c == 1) && (!in.attended || in.attended.c == 1);
    for (int64_t r = 0; r < count; ++r) {
      const C* sum = sums + r * step;
      T* to = result.row(first + r);
      T* before = in.attended ? in.attended.row(first + r) : nullptr;
      const T* gate = in.gate ? in.gate.row(first + r) : nullptr;
      if (share[r] == 0) {  // nothing to attend to: 0, whatever the gate is
        write_row<T, C>(nullptr, a.dv, 0, to, result.c);
        if (before)
          write_row<T, C>(nullptr, a.dv, 0, before, in.attended.c);
      } else if (unit && a.nontemporal && streamable(to, a.dv, result.n) &&
                 (!before || streamable(before, a.dv, in.attended.n))) {
        write<true>(sum, share[r], gate, before, to);
      } else if (unit) {
        write<false>(sum, share[r], gate, before, to);
      } else {
        for (int64_t c = 0; c < a.dv; ++c) {
          const C x = sum[c] * share[r];
          if (before)
            before[c * in.attended.c] = from_acc<T>(x);
          to[c * result.c] = from_acc<T>(gate ? x * to_acc(gate[c * in.gate.c]) : x);
        }
      }
    }
    if (a.nontemporal)
      fence();
  }
  template <bool Nontemporal>
  void write(const C* sum, C share, const T* gate, T* before, T* to) const {
    int64_t c = 0;
    for (; c + lanes<C> <= a.dv; c += lanes<C>) {
      const vec<C> x = load(sum + c) * share;
      if (before)
        store_or_stream<Nontemporal>(before + c, x);
      store_or_stream<Nontemporal>(to + c, gate ? x * load(gate + c) : x);
    }
    for (; c < a.dv; ++c) {
      const C x = sum[c] * share;
      if (before)
        before[c] = from_acc<T>(x);
      to[c] = from_acc<T>(gate ? x * to_acc(gate[c]) : x);
    }
  }
};

// G = grad_result * gate * share, and the gate's gradient; returns its product with A.
template <class T>
inline acc_t<T> read_upstream(const HeadInputs<T>& in, const Head<T>& grad_result, const Head<T>& grad_gate, int64_t n,
                              acc_t<T>* to) {
  using C = acc_t<T>;
  const GatedCrossAttention& a = in.a;
  const int64_t value_width = padded<C>(a.dv);
  const T* from = grad_result.row(n);
  const T* gate = in.gate ? in.gate.row(n) : nullptr;
  const T* before = in.attended.row(n);
  T* of_gate = grad_gate ? grad_gate.row(n) : nullptr;
  if (in.softmax.share[n] == 0) {
    memset(to, 0, value_width * sizeof(C));
    if (of_gate)
      for (int64_t c = 0; c < a.dv; ++c)
        of_gate[c * grad_gate.c] = from_acc<T>(C(0));
    return 0;
  }
  const C share = in.softmax.share[n];
  const bool unit =
      grad_result.c == 1 && in.attended.c == 1 && (!gate || in.gate.c == 1) && (!of_gate || grad_gate.c == 1);
  vec<C> total = {};
  C rest = 0;
  int64_t c = 0;
  auto along = [&](auto nontemporal) {
    for (; c + lanes<C> <= a.dv; c += lanes<C>) {
      const vec<C> up = load(from + c);
      const vec<C> x = load(before + c);
      const vec<C> scaled = (gate ? up * load(gate + c) : up) * share;
      if (of_gate)
        store_or_stream<nontemporal.value>(of_gate + c, up * x);
      store(to + c, scaled);
      total += scaled * x;
    }
  };
  if (unit)
    with_flag(of_gate && a.nontemporal && streamable(of_gate, a.dv, grad_gate.n), along);
  for (; c < a.dv; ++c) {
    const C up = to_acc(from[c * grad_result.c]);
    const C x = to_acc(before[c * in.attended.c]);
    const C scaled = (gate ? up * to_acc(gate[c * in.gate.c]) : up) * share;
    if (of_gate)
      of_gate[c * grad_gate.c] = from_acc<T>(up * x);
    to[c] = scaled;
    rest += scaled * x;
  }
  for (; c < value_width; ++c)
    to[c] = 0;
  return sum<C>(total) + rest;
}

// Of a query that attends to nothing nothing is read: it may hold NaN.
template <class T>
inline const T* attending(const HeadInputs<T>& in, int64_t n) {
  return in.softmax.share[n] != 0 ? in.query.row(n) : nullptr;
}

// The bias's gradient from a tile's scores', [token, query], of `n` tokens from t0 on; with a bias all take part.
template <class T, class C>
inline void write_bias(const HeadInputs<T>& in, C* grad_bias, const C* grad_scores, int64_t step, int64_t first,
                       int64_t count, int64_t t0, int64_t n) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t i = 0; i < n; ++i)
      grad_bias[(in.index * in.a.N + first + r) * in.a.T + t0 + i] = grad_scores[i * step + r];
}

// Scores -> exponentials, and the weights' gradient -> that of the scores.
template <class C>
struct Recovery {
  const C *base, *certain, *mean;  // of the queries; mean null: found here, from all tokens
  C* excess;                       // what the gradients of a query's scores add up to
  bool some_certain;               // a weight may be exactly 1

  // Of `n` tokens, [token, query]; grad_scores null: only the weights.
  void operator()(C* weights, C* grad_scores, int64_t width, int64_t count, int64_t n) const {
    with_flag(some_certain, [&](auto some) {
      for (int64_t r = 0; r < count; r += lanes<C>) {
        C* p = weights + r;
        C* ds = grad_scores + r;
        vec<C> total = {};
        vec<C> sum = {};
        for (int64_t i = 0; i < n * width; i += width) {
          const vec<C> w = exp_below(load(p + i) - load(base + r));
          store(p + i, w);
          if (!grad_scores)
            continue;
          total += w;
          sum += w * load(ds + i);
        }
        if (!grad_scores)
          continue;
        const vec<C> own = mean ? load(mean + r) : sum / (total == 0 ? splat(C(1)) : total);
        vec<C> left = {};
        for (int64_t i = 0; i < n * width; i += width) {
          const vec<C> w = load(p + i);
          vec<C> d = w * (load(ds + i) - own);
          if (some.value)
            d = w == load(certain + r) ? vec<C>{} : d;
          store(ds + i, d);
          left += d;
        }
        store(excess + r, left);
      }
    });
  }
};

}  // namespace
}  // namespace mmk
