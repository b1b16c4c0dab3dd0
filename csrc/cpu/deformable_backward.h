// Backward, in two passes. Threads share out queries: the products of the result's gradient with the four rows around
// each point give the gradients of scores and locations. The value's gradient is a sum over queries: threads own heads,
// or some of their channels and positions where heads are too few, and go through all queries in their order; so the
// same bits come from any number of threads.
#pragma once
#include "deformable.h"

namespace mmk {
namespace {

// A query's gradient in C, a row of whole packs: where the last one overlaps that before it, its first lanes are 0, so
// that nothing counts twice.
template <class Pack, int Packs, class T, class C>
MMK_INLINE void load_once(const T* from, int64_t first, int64_t last, typename Pack::type (&to)[Packs]) {
#pragma GCC unroll 4
  for (int v = 0; v < Packs; ++v)
    to[v] = Pack::load(from + channel_of<Pack, Packs>(v, first, last));
  if constexpr (Pack::overlaps) {
    const int64_t twice = first + (Packs - 1) * Pack::count - last;
    if (twice > 0)
      for (int64_t i = 0; i < Pack::count; ++i)
        to[Packs - 1][i] = i < twice ? C(0) : to[Packs - 1][i];
  }
}

// dots[corner][k] (+)= grad . row, for a block of packs.
template <class Pack, int Packs, class T, class R>
MMK_INLINE void dot_rows(const Sampling<T>& sampling, int64_t lane, R rows, const T* grad, int64_t first, int64_t last,
                         acc_t<T>* dots) {
  using C = acc_t<T>;
  typename Pack::type g[Packs];
  load_once<Pack, Packs, T, C>(grad, first, last, g);
  for (int64_t k = 0; k < sampling.a.K; ++k) {
    typename Pack::type total[4] = {};
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const auto* row = rows[sampling.position_of(c, k, lane)];
#pragma GCC unroll 4
      for (int v = 0; v < Packs; ++v)
        total[c] += Pack::load(row + channel_of<Pack, Packs>(v, first, last)) * g[v];
    }
    C sums[4];
    Pack::sum4(total, sums);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      C& dot = dots[(c * sampling.a.K + k) * sampling.block + lane];
      dot = first ? dot + sums[c] : sums[c];
    }
  }
}

template <class T>
struct QueryGradients {
  using C = acc_t<T>;
  static constexpr int64_t block = Sampling<T>::block;
  const DeformableAttentionBackward& g;
  const DeformableAttention& a;
  const Points<C>& points;
  Sampling<T> sampling;
  Scratch<C> dots, of_weight, of_location;

  QueryGradients(const DeformableAttentionBackward& g, const Points<C>& points)
      : g(g),
        a(g.forward),
        points(points),
        sampling(a, points),
        dots(4 * block * a.K),
        of_weight(block * padded<C>(a.K)),
        of_location(block * padded<C>(2 * a.K)) {
    // Lanes without a query, and what pads the squares that are written.
    memset(dots.data, 0, 4 * block * a.K * sizeof(C));
    memset(of_weight.data, 0, block * padded<C>(a.K) * sizeof(C));
    memset(of_location.data, 0, block * padded<C>(2 * a.K) * sizeof(C));
  }

  template <class R>
  void run(R rows, int64_t b, int64_t h, int64_t first, int64_t last) {
    const T* upstream = static_cast<const T*>(g.grad_result.data) + b * g.grad_result.b + h * g.grad_result.h;
    for (int64_t q = first; q < last; q += block) {
      sampling.set(b, h, q, last);
      sampling.weights_again();
      sampling.locate();
      for (int64_t lane = 0; lane < sampling.count; ++lane) {
        const T* grad = upstream + (q + lane) * g.grad_result.q;
        each_block<typename R::element>(a.d, [&](auto pack, auto packs, int64_t begin, int64_t end) {
          dot_rows<decltype(pack), packs.value>(sampling, lane, rows, grad, begin, end, dots.data);
        });
      }
      combine();
      if (g.grad_scores.data)
        sampling.write(of_weight.data, a.K, g.grad_scores, a.wide_scores);
      if (g.grad_locations.data)
        sampling.write(of_location.data, 2 * a.K, g.grad_locations, a.wide_locations);
    }
  }

 private:
  // A sample is s = (1 - y) ((1 - x) s0 + x s1) + y ((1 - x) s2 + x s3), x and y in pixels. What is outside is a
  // constant, even where its weight is NaN.
  void combine() {
    vec<C> mean = {};
    for (int64_t k = 0; k < a.K; ++k) {
      const vec<C> x = load(sampling.fraction_x.data + k * block);
      const vec<C> y = load(sampling.fraction_y.data + k * block);
      const vec<C> weight = load(sampling.weight.data + k * block);
      const vec<C> d0 = load(dots.data + k * block);
      const vec<C> d1 = load(dots.data + (a.K + k) * block);
      const vec<C> d2 = load(dots.data + (2 * a.K + k) * block);
      const vec<C> d3 = load(dots.data + (3 * a.K + k) * block);
      vec<C> sample = {};
      for (int c = 0; c < 4; ++c)
        sample += load(sampling.share.data + (c * a.K + k) * block) * load(dots.data + (c * a.K + k) * block);
      store(of_weight.data + k * block, sample);
      mean += weight * sample;
      const vec<C> along_x = (C(1) - y) * (d1 - d0) + y * (d3 - d2);
      const vec<C> along_y = (C(1) - x) * (d2 - d0) + x * (d3 - d1);
      const auto outside = x < C(0);
      store(of_location.data + 2 * k * block, outside ? vec<C>{} : weight * points.width.data[k] * along_x);
      store(of_location.data + (2 * k + 1) * block, outside ? vec<C>{} : weight * points.height.data[k] * along_y);
    }
    if (a.softmax)
      for (int64_t k = 0; k < a.K; ++k) {
        C* grad = of_weight.data + k * block;
        store(grad, load(sampling.weight.data + k * block) * (load(grad) - mean));
      }
  }
};

// rows[corner] += share * grad, for a block of packs.
template <class Pack, int Packs, class T, class R>
MMK_INLINE void add_rows(const Sampling<T>& sampling, int64_t lane, R rows, const T* grad, int64_t first,
                         int64_t last) {
  using C = acc_t<T>;
  typename Pack::type g[Packs];
  load_once<Pack, Packs, T, C>(grad, first, last, g);
  for (int64_t k = 0; k < sampling.a.K; ++k) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      C* row = rows[sampling.position_of(c, k, lane)];
      const C share = sampling.share_of(c, k, lane);
#pragma GCC unroll 4
      for (int v = 0; v < Packs; ++v) {
        C* to = row + channel_of<Pack, Packs>(v, first, last);
        Pack::store(to, Pack::load(to) + g[v] * share);
      }
    }
  }
}

// How the value's gradient is shared out: heads, cut into channels of whole cache lines and into positions where heads
// alone leave threads without work. Cuts of positions go through all points once more.
template <class C>
struct ValueParts {
  int64_t heads, channels, positions;  // parts of each
  int64_t width, height;               // of a part

  ValueParts(const DeformableAttention& a, const Parallel& parallel) : heads(a.B * a.H), channels(1), positions(1) {
    const int64_t line = 64 / sizeof(C);
    const int64_t most = (a.d + line - 1) / line;
    const int64_t wanted = heads % parallel.threads == 0 ? heads : 2 * parallel.threads;
    while (heads * channels < wanted && 2 * channels <= most)
      channels *= 2;
    while (heads * channels * positions < parallel.threads && positions < 8)
      positions *= 2;
    width = (most + channels - 1) / channels * line;
    height = (a.S + positions - 1) / positions;
  }
  int64_t count() const { return heads * channels * positions; }
};

template <class T>
struct ValueGradient {
  using C = acc_t<T>;
  const DeformableAttentionBackward& g;
  const DeformableAttention& a;
  const ValueParts<C>& parts;
  Sampling<T> sampling;
  DenseMap<C> sums;

  ValueGradient(const DeformableAttentionBackward& g, const Points<C>& points, const ValueParts<C>& parts)
      : g(g), a(g.forward), parts(parts), sampling(a, points), sums(parts.height, parts.width) {}

  void run(int64_t part) {
    const int64_t index = part / (parts.channels * parts.positions);
    const int64_t b = index / a.H;
    const int64_t h = index % a.H;
    const int64_t channel = part / parts.positions % parts.channels * parts.width;
    const int64_t position = part % parts.positions * parts.height;
    const int64_t channels = a.d - channel < parts.width ? a.d - channel : parts.width;
    const int64_t positions = a.S - position < parts.height ? a.S - position : parts.height;
    if (channels <= 0 || positions <= 0)
      return;
    sampling.lowest = position;
    sampling.highest = position + positions;
    const int64_t step = g.grad_value.n;
    T* to = static_cast<T*>(g.grad_value.data) + b * g.grad_value.b + h * g.grad_value.h + channel + position * step;
    add(b, h, channel, channels, positions);
    write(to, step, channels, positions);
  }

 private:
  void add(int64_t b, int64_t h, int64_t channel, int64_t channels, int64_t positions) {
    memset(sums.rows[0], 0, positions * sums.rows.step * sizeof(C));
    const T* upstream = static_cast<const T*>(g.grad_result.data) + b * g.grad_result.b + h * g.grad_result.h + channel;
    for (int64_t q = 0; q < a.Q; q += sampling.block) {
      sampling.set(b, h, q, a.Q);
      sampling.weights_again();
      sampling.locate();
      sampling.weigh_shares();
      for (int64_t lane = 0; lane < sampling.count; ++lane) {
        const T* grad = upstream + (q + lane) * g.grad_result.q;
        each_block<C>(channels, [&](auto pack, auto packs, int64_t begin, int64_t end) {
          add_rows<decltype(pack), packs.value>(sampling, lane, sums.rows, grad, begin, end);
        });
      }
    }
  }
  void write(T* to, int64_t step, int64_t channels, int64_t positions) const {
    const bool nontemporal = g.nontemporal && streamable(to, channels, step);
    for (int64_t s = 0; s < positions; ++s)
      write_row(static_cast<const C*>(sums.rows[s]), channels, C(1), to + s * step, 1, nontemporal);
    fence();
  }
};

template <class T>
void deformable_backward(const DeformableAttentionBackward& g, const Parallel& parallel) {
  using C = acc_t<T>;
  const DeformableAttention& a = g.forward;
  const Points<C> points(a);
  if (g.grad_scores.data || g.grad_locations.data) {
    const QueryParts parts{a, parallel, 8 * a.K * a.d};
    parts.run<T>([&] { return QueryGradients<T>(g, points); });
  }
  if (g.grad_value.data) {
    const ValueParts<C> parts(a, parallel);
    const int64_t threads = parts.count() < parallel.threads ? parts.count() : parallel.threads;
    each_part(parallel, threads, [&](int64_t thread) {
      ValueGradient<T> work(g, points, parts);
      for (int64_t part = parts.count() * thread / threads; part < parts.count() * (thread + 1) / threads; ++part)
        work.run(part);
    });
  }
}

}  // namespace
}  // namespace mmk
