// Spatial attention on the CPU. S = bytes of the image features. What must move, and how it does:
//   multiply  read S, write S: a chunk's scores are taken while it streams in, the weights multiply it from the cache
//   when a
//             sample fits there; a larger sample is read twice;
//   pool      read S: a chunk's weighted sum follows its scores while it is in cache, chunks are merged at the end;
//   backward  read S (image) + S (gradient), write S; a sample larger than the cache reads its gradient once more.
//             Pool: read S, write S.
// Backward, with w = weights, g = the result's gradient and dw[n] = <g[n], x[n]> + the weights' own gradient:
//   ds[n] = w[n] (dw[n] - c), c = sum(w dw) / sum(w);  dx[n] = w[n] g[n] + scale ds[n] t;  dt = scale sum(ds[n] x[n]).
// c is known only after all positions, yet no position is read again for dt: each chunk takes its own c_k, sums
// u = sum(w (dw - c_k) x) and v = sum(w x), and dt = scale sum_k(u_k + (c_k - c) v_k). No cancellation: c_k - c is a
// difference of means.
#include "../spatial_attention.h"

#include "dispatch.h"
#include "features.h"
#include "softmax.h"
#include "split.h"

namespace mmk {
namespace {

// What both directions need to know of a chunk.
template <class T, class L>
struct Common {
  using C = acc_t<T>;
  const SpatialAttention& a;
  Heads<C> heads;
  const Split& split;
  const Scale<C> scale;

  Common(const SpatialAttention& a, const Split& split) : a(a), heads{a.H, a.D / a.H}, split(split), scale(a.scale) {}

  int64_t head_stride(const Sample& s) const { return a.offsets ? a.X : s.count; }
  template <class P>
  P* of_sample(P* base, const Sample& s) const {
    return base + (a.offsets ? s.first : s.index * a.H * s.count);
  }
  C* weights(const Sample& s) const { return of_sample(static_cast<C*>(a.weights), s); }

  Run<T> run(const Features& f, const Sample& s, int64_t y, int64_t x) const {
    return {static_cast<T*>(f.data) + s.index * f.b + s.first * f.x + y * f.y + x * f.x, f.x, f.d};
  }
  void read(const Vectors& v, const Sample& s, C factor, C* to) const {
    const T* from = static_cast<const T*>(v.data) + s.index * v.b;
    for (int64_t d = 0; d < a.D; ++d)
      to[d] = to_acc(from[d * v.d]) * factor;
  }
  void write(const C* from, const Vectors& v, const Sample& s) const {
    T* to = static_cast<T*>(v.data) + s.index * v.b;
    for (int64_t d = 0; d < a.D; ++d)
      to[d * v.d] = from_acc<T>(from[d]);
  }

  // f(n, y, x, count, valid) for a chunk's runs; f(n, count) for the valid ones.
  template <class F>
  void runs(const Sample& s, int64_t k, F f) const {
    int64_t begin = k * split.chunk_positions;
    int64_t end = begin + split.chunk_positions;
    for_each_run(a.mask, s, a.X, begin, end < s.count ? end : s.count, f);
  }

  static void clear(Run<T> out, int64_t count, int64_t D) {
    bool rows = out.channel == 1;
    int64_t outer = rows ? count : D;
    int64_t inner = rows ? D : count;
    int64_t outer_step = rows ? out.position : out.channel;
    int64_t inner_step = rows ? out.channel : out.position;
    for (int64_t i = 0; i < outer; ++i) {
      T* row = out.data + i * outer_step;
      if (inner_step == 1)
        memset(row, 0, inner * sizeof(T));
      else
        for (int64_t j = 0; j < inner; ++j)
          row[j * inner_step] = from_acc<T>(C(0));
    }
  }
};

template <class T, class L>
struct Forward : Common<T, L> {
  using Base = Common<T, L>;
  using C = typename Base::C;
  using Base::a, Base::heads, Base::split;
  Scratch<C> text, maxima, sums, valid_count, partial;

  Forward(const SpatialAttention& a, const Split& split)
      : Base(a, split),
        text(split.slots * a.D),
        maxima(split.chunk_slots * a.H),
        sums(split.chunk_slots * a.H),
        valid_count(split.chunk_slots),
        partial(a.pool ? split.chunk_slots * a.D + a.D * split.slots : 0) {}

  void prepare(const Sample& s) { this->read(a.text, s, this->scale.query, text.data + s.slot * a.D); }

  void first(const Sample& s, int64_t k) {
    const int64_t c = s.chunk + k;
    const int64_t stride = this->head_stride(s);
    C* w = this->weights(s);
    C* m = maxima.data + c * a.H;
    C* l = sums.data + c * a.H;
    Shared<C> t{text.data + s.slot * a.D};
    C positions = 0;
    for (int64_t h = 0; h < a.H; ++h)
      m[h] = -infinity<C>, l[h] = 0;
    this->runs(s, k, [&](int64_t n, int64_t y, int64_t x, int64_t count, bool valid) {
      if (!valid) {
        for (int64_t h = 0; h < a.H; ++h)
          memset(w + h * stride + n, 0, count * sizeof(C));
        return;
      }
      L::dot(this->run(a.image, s, y, x), t, count, heads, w + n, stride);
      this->scale.apply(w + n, a.H, stride, count);
      for (int64_t h = 0; h < a.H; ++h)
        m[h] = maximum(m[h], max_of(w + h * stride + n, count));
      positions += count;
    });
    valid_count.data[c] = positions;
    C* pooled = partial.data + c * a.D;
    if (a.pool)
      memset(pooled, 0, a.D * sizeof(C));
    if (!positions)
      return;
    this->runs(s, k, [&](int64_t n, int64_t y, int64_t x, int64_t count, bool valid) {
      if (!valid)
        return;
      for (int64_t h = 0; h < a.H; ++h) {
        C* e = w + h * stride + n;
        l[h] += exp_sum(e, count, m[h] == -infinity<C> ? C(0) : m[h]);  // a chunk of -Inf: exponentials 0, not NaN
      }
      if (a.pool)
        L::weighted_sum(this->run(a.image, s, y, x), w + n, static_cast<C*>(nullptr), count, heads, stride, pooled,
                        static_cast<C*>(nullptr));
    });
  }

  void merge(const Sample& s) {
    C positions = 0;
    for (int64_t k = 0; k < s.chunks; ++k)
      positions += valid_count.data[s.chunk + k];
    for (int64_t h = 0; h < a.H; ++h)
      merge_chunks(maxima.data + s.chunk * a.H + h, sums.data + s.chunk * a.H + h, s.chunks, a.H, int64_t(positions),
                   a.rescale ? positions : C(1));
    if (!a.pool)
      return;
    C* total = partial.data + split.chunk_slots * a.D + s.slot * a.D;
    memset(total, 0, a.D * sizeof(C));
    for (int64_t k = 0; k < s.chunks; ++k) {
      if (!valid_count.data[s.chunk + k])
        continue;
      const C* pooled = partial.data + (s.chunk + k) * a.D;
      for (int64_t h = 0; h < a.H; ++h) {
        C factor = maxima.data[(s.chunk + k) * a.H + h];
        for (int64_t d = h * heads.width; d < (h + 1) * heads.width; ++d)
          total[d] += factor * pooled[d];
      }
    }
    this->write(total, a.pooled, s);
  }

  void second(const Sample& s, int64_t k) {
    const int64_t c = s.chunk + k;
    const int64_t stride = this->head_stride(s);
    C* w = this->weights(s);
    this->runs(s, k, [&](int64_t n, int64_t y, int64_t x, int64_t count, bool valid) {
      if (!valid) {
        if (!a.pool)
          Base::clear(this->run(a.result, s, y, x), count, a.D);
        return;
      }
      for (int64_t h = 0; h < a.H; ++h)
        multiply(w + h * stride + n, count, maxima.data[c * a.H + h]);
      if (!a.pool)
        L::scale(this->run(a.image, s, y, x), w + n, count, heads, stride, this->run(a.result, s, y, x), a.nontemporal);
    });
  }
};

template <class T, class L>
struct Backward : Common<T, L> {
  using Base = Common<T, L>;
  using C = typename Base::C;
  using Base::a, Base::heads, Base::split;
  const SpatialAttentionBackward& g;
  Scratch<C> text, pooled, means, masses, partial;

  Backward(const SpatialAttentionBackward& g, const Split& split)
      : Base(g.forward, split),
        g(g),
        text(split.slots * a.D),
        pooled(split.slots * a.D),
        means(split.chunk_slots * a.H),
        masses(split.chunk_slots * a.H),
        partial(g.grad_text.data ? (2 * split.chunk_slots + split.slots) * a.D : 0) {}

  C* grad_scores(const Sample& s) const { return this->of_sample(static_cast<C*>(g.grad_scores), s); }
  bool two_sums(const Sample& s) const { return s.chunks > 1; }  // one chunk knows c at once

  void prepare(const Sample& s) {
    this->read(a.text, s, C(1), text.data + s.slot * a.D);
    if (g.grad_pooled.data)
      this->read(g.grad_pooled, s, C(1), pooled.data + s.slot * a.D);
    else
      memset(pooled.data + s.slot * a.D, 0, a.D * sizeof(C));
  }

  void first(const Sample& s, int64_t k) {
    const int64_t c = s.chunk + k;
    const int64_t stride = this->head_stride(s);
    C* w = this->weights(s);
    C* dw = grad_scores(s);
    C* mean = means.data + c * a.H;
    C* mass = masses.data + c * a.H;
    const C* grad_weights = g.grad_weights ? this->of_sample(static_cast<const C*>(g.grad_weights), s) : nullptr;
    for (int64_t h = 0; h < a.H; ++h)
      mean[h] = mass[h] = 0;
    this->runs(s, k, [&](int64_t n, int64_t y, int64_t x, int64_t count, bool valid) {
      if (!valid)
        return;
      if (g.grad_result.data)
        L::dot(this->run(a.image, s, y, x), this->run(g.grad_result, s, y, x), count, heads, dw + n, stride);
      else if (g.grad_pooled.data)
        L::dot(this->run(a.image, s, y, x), Shared<C>{pooled.data + s.slot * a.D}, count, heads, dw + n, stride);
      else
        for (int64_t h = 0; h < a.H; ++h)
          memset(dw + h * stride + n, 0, count * sizeof(C));
      for (int64_t h = 0; h < a.H; ++h) {
        const C* wh = w + h * stride + n;
        C* dwh = dw + h * stride + n;
        if (grad_weights)
          add_scaled(dwh, grad_weights + h * stride + n, count, C(1));
        mean[h] += product_sum(wh, dwh, count);
        mass[h] += sum_of(wh, count);
      }
    });
    for (int64_t h = 0; h < a.H; ++h)
      mean[h] = mass[h] != 0 ? mean[h] / mass[h] : C(0);
    C* u = nullptr;
    C* v = nullptr;
    if (g.grad_text.data) {
      u = partial.data + 2 * c * a.D;
      v = two_sums(s) ? u + a.D : nullptr;
      memset(u, 0, 2 * a.D * sizeof(C));
    }
    this->runs(s, k, [&](int64_t n, int64_t y, int64_t x, int64_t count, bool valid) {
      if (!valid)
        return;
      for (int64_t h = 0; h < a.H; ++h) {
        const C* wh = w + h * stride + n;
        C* dwh = dw + h * stride + n;
        int64_t i = 0;
        for (; i + lanes<C> <= count; i += lanes<C>)
          store(dwh + i, load(wh + i) * (load(dwh + i) - mean[h]));
        for (; i < count; ++i)
          dwh[i] = wh[i] * (dwh[i] - mean[h]);
      }
      if (u)
        L::weighted_sum(this->run(a.image, s, y, x), dw + n, w + n, count, heads, stride, u, v);
    });
  }

  void merge(const Sample& s) {
    for (int64_t h = 0; h < a.H; ++h) {
      C* mean = means.data + s.chunk * a.H + h;
      C* mass = masses.data + s.chunk * a.H + h;
      C total = 0;
      C weight = 0;
      for (int64_t k = 0; k < s.chunks; ++k) {
        total += mean[k * a.H] * mass[k * a.H];
        weight += mass[k * a.H];
      }
      C all = s.chunks == 1 ? mean[0] : weight != 0 ? total / weight : C(0);
      for (int64_t k = 0; k < s.chunks; ++k)
        mean[k * a.H] -= all;  // c_k - c
    }
    if (!g.grad_text.data)
      return;
    C* total = partial.data + 2 * split.chunk_slots * a.D + s.slot * a.D;
    memset(total, 0, a.D * sizeof(C));
    for (int64_t k = 0; k < s.chunks; ++k) {
      const C* u = partial.data + 2 * (s.chunk + k) * a.D;
      const C* v = u + a.D;
      for (int64_t h = 0; h < a.H; ++h) {
        C shift = two_sums(s) ? means.data[(s.chunk + k) * a.H + h] : C(0);
        for (int64_t d = h * heads.width; d < (h + 1) * heads.width; ++d)
          total[d] += u[d] + shift * v[d];
      }
    }
    for (int64_t d = 0; d < a.D; ++d)
      total[d] *= C(a.scale);
    this->write(total, g.grad_text, s);
  }

  void second(const Sample& s, int64_t k) {
    if (!g.grad_image.data)
      return;
    const int64_t c = s.chunk + k;
    const int64_t stride = this->head_stride(s);
    C* w = this->weights(s);
    C* ds = grad_scores(s);
    const C* t = text.data + s.slot * a.D;
    this->runs(s, k, [&](int64_t n, int64_t y, int64_t x, int64_t count, bool valid) {
      Run<T> out = this->run(g.grad_image, s, y, x);
      if (!valid)
        return Base::clear(out, count, a.D);
      for (int64_t h = 0; h < a.H; ++h) {
        const C* wh = w + h * stride + n;
        C* dsh = ds + h * stride + n;
        add_scaled(dsh, wh, count, means.data[c * a.H + h]);
        multiply(dsh, count, C(a.scale));
      }
      if (g.grad_result.data)
        L::blend(this->run(g.grad_result, s, y, x), w + n, t, ds + n, count, heads, stride, out, a.nontemporal);
      else
        L::blend(Shared<C>{pooled.data + s.slot * a.D}, w + n, t, ds + n, count, heads, stride, out, a.nontemporal);
    });
  }

  static C product_sum(const C* p, const C* q, int64_t count) {
    vec<C> total = {};
    C rest = 0;
    int64_t i = 0;
    for (; i + lanes<C> <= count; i += lanes<C>)
      total += load(p + i) * load(q + i);
    for (; i < count; ++i)
      rest += p[i] * q[i];
    return sum<C>(total) + rest;
  }
  static C sum_of(const C* p, int64_t count) {
    vec<C> total = {};
    C rest = 0;
    int64_t i = 0;
    for (; i + lanes<C> <= count; i += lanes<C>)
      total += load(p + i);
    for (; i < count; ++i)
      rest += p[i];
    return sum<C>(total) + rest;
  }
};

// Positions of a chunk: about 128 KiB of features, so that a chunk (and its gradient) stays in the second-level cache;
// samples of one size are cut evenly.
template <class T, class L>
int64_t chunk_positions(const SpatialAttention& a) {
  constexpr int64_t least = L::least_bytes / int64_t(sizeof(T));
  constexpr int64_t step = 16;
  int64_t fit = (128 << 10) / (a.D * int64_t(sizeof(T)));
  fit = fit < least ? least : fit;
  int64_t N = a.Y * a.X;
  if (a.offsets || N == 0)
    return fit;
  int64_t chunks = (N + fit - 1) / fit;
  int64_t even = (N + chunks - 1) / chunks;
  return (even + step - 1) / step * step;
}

template <class T, class L, template <class, class> class Direction, class Arguments>
void run(const SpatialAttention& a, const Arguments& arguments, const Parallel& parallel) {
  Split split(a.B, a.Y * a.X, a.offsets, chunk_positions<T, L>(a), a.D * sizeof(T), parallel);
  Direction<T, L> direction(arguments, split);
  split.run(direction);
}

template <template <class, class> class Direction, class Arguments>
void run(const SpatialAttention& a, const Arguments& arguments, const Parallel& parallel) {
  bool planes = a.image.x == 1 && (a.image.d != 1 || a.D == 1);
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    planes ? run<T, Planes, Direction>(a, arguments, parallel) : run<T, Lines, Direction>(a, arguments, parallel);
  });
}

}  // namespace

namespace MMK_ISA {
void spatial_attention_forward(const SpatialAttention& a, const Parallel& p) {
  run<Forward>(a, a, p);
}
void spatial_attention_backward(const SpatialAttentionBackward& g, const Parallel& p) {
  run<Backward>(g.forward, g, p);
}
}  // namespace MMK_ISA
}  // namespace mmk

#ifdef MMK_DEFINE_ENTRY
MMK_CPU_ENTRY(spatial_attention_forward, SpatialAttention)
MMK_CPU_ENTRY(spatial_attention_backward, SpatialAttentionBackward)
#endif
