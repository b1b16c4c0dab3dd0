// Additive attention backward: the scores' gradients first, for all rows; then panels of tiles, whose gradients of u
// and t give the image's and, summed over rows, the layers'.
#pragma once
#include "activation.h"
#include "additive.h"

namespace mmk {
namespace {

template <class T>
struct Backward {
  using C = acc_t<T>;
  const AdditiveAttentionBackward& g;
  const AdditiveAttention& a;
  const Inputs<T>& in;
  const Source<const T> grad_result;
  const Source<T> grad_image;
  const C* weights;
  const int64_t channels;                     // D, padded
  Scratch<C> grad_scores;                     // like weights: dw, then ds
  Scratch<C> weight_rows, gate_rows, v_rows;  // B[A, D], B[A, D], B[K, A]
  Scratch<C> grad_v;                          // [parts, K + slack, width]

  Backward(const AdditiveAttentionBackward& g, const Inputs<T>& in, const Parallel& parallel, int64_t parts)
      : g(g),
        a(g.forward),
        in(in),
        grad_result(g.grad_result, a.pool ? a.K : a.N),
        grad_image(g.grad_image, a.N),
        weights(static_cast<const C*>(a.weights)),
        channels(padded<C>(a.D)),
        grad_scores(in.samples.rows() * a.K),
        weight_rows(grad_image ? a.A * channels : 0),
        gate_rows(grad_image && a.w_gate.data ? a.A * channels : 0),
        v_rows(a.K * in.width),
        grad_v(g.grad_v ? parts * v_size() : 0) {
    const T* v = static_cast<const T*>(a.v.data);
    pack<T>(a.K, a.A, [&](int64_t k) { return v + k * a.v.row; }, a.v.column, C(1), v_rows.data);
    if (g.grad_v)
      memset(grad_v.data, 0, parts * v_size() * sizeof(C));
    if (!grad_image)
      return;
    pack_weight<T>(a.w_image, a.A, a.D, weight_rows.data, parallel, parts);
    if (a.w_gate.data)
      pack_weight<T>(a.w_gate, a.A, a.D, gate_rows.data, parallel, parts);
  }
  int64_t v_size() const { return (a.K + slack) * in.width; }

  // A part's dw.
  void find_grad_weights(int64_t begin, int64_t end) const {
    Scratch<C> copy((tile_rows + slack) * channels), grad_output(grad_result && a.pool ? a.D * in.maps : 0),
        found((tile_rows + slack) * in.maps);
    const C* given = static_cast<const C*>(g.grad_weights);
    int64_t packed = -1;
    for (int64_t first = begin; first < end; first += tile_rows) {
      const int64_t count = end - first < tile_rows ? end - first : tile_rows;
      int64_t step = 0;
      const C* x = grad_result ? in.tile(first, count, copy.data, step) : nullptr;
      in.samples.of_rows(first, first + count, [&](int64_t b, int64_t r, int64_t last) {
        if (grad_result && a.pool && packed != b)
          pack_grad_result(b, grad_output.data), packed = b;
        if (grad_result && a.K > 1)
          gemm_tile<C, false>(last - r, a.K, a.D, x + (r - first) * step, step, {grad_output.data, 0}, found.data,
                              in.maps, false);
        for (int64_t i = r; grad_result && a.K == 1 && i < last; ++i) {
          const C* row = x + (i - first) * step;
          found.data[(i - r) * in.maps] =
              a.pool ? product(row, grad_output.data, 1) : product(row, grad_result.row(i), grad_result.c);
        }
        const int64_t at = in.at(b, r);
        for (int64_t k = 0; k < a.K; ++k)
          for (int64_t i = 0; i < last - r; ++i)
            grad_scores.data[at + k * a.N + i] =
                (grad_result ? found.data[i * in.maps + k] : C(0)) + (given ? given[at + k * a.N + i] : C(0));
      });
    }
  }
  // A sample's gradient as dw's products read it: of one map as a row, since a panel would be as wide as a vector of
  // maps; else B[D, K].
  void pack_grad_result(int64_t b, C* to) const {
    if (a.K == 1)
      return read_rows<T>(1, a.D, [&](int64_t) -> const T* { return grad_result.row(b); }, grad_result.c, to);
    pack_transposed<T>(a.D, a.K, [&](int64_t k) { return grad_result.row(b * a.K + k); }, grad_result.c, C(1), to);
  }
  template <class U>
  C product(const C* x, const U* up, int64_t step) const {
    vec<C> sums = {};
    C total = 0;
    int64_t c = 0;
    if (step == 1)
      for (; c + lanes<C> <= a.D; c += lanes<C>)
        sums += load(x + c) * load(up + c);
    for (; c < a.D; ++c)
      total += x[c] * to_acc(up[c * step]);
    return total + sum<C>(sums);
  }

  // dw -> ds, a sample's map at a time. Their mean is found twice, the second time of what is left: what all have in
  // common has to cancel. Where a weight is 0, masked positions among them, nothing arrives through it; what the scores
  // themselves are given is added where a position takes part.
  void find_grad_scores(int64_t begin, int64_t end) const {
    const C* given = static_cast<const C*>(g.grad_scores);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / a.K;
      const int64_t at = in.at(b, in.samples.begin(b)) + i % a.K * a.N;
      const int64_t count = in.samples.end(b) - in.samples.begin(b);
      const C* w = weights + at;
      C* ds = grad_scores.data + at;
      const C first = mean(w, ds, count, 0);
      const C second = mean(w, ds, count, first);
      for (int64_t n = 0; n < count; ++n)
        ds[n] = w[n] == 0 ? C(0) : w[n] * ((ds[n] - first) - second);
      for (int64_t n = 0; given && n < count; ++n)
        if (in.valid(in.samples.begin(b) + n))
          ds[n] += given[at + n];
    }
  }
  // sum of w (x - base) over the sum of w; in pieces, which keeps long sums exact.
  static C mean(const C* w, const C* x, int64_t count, C base) {
    double total = 0;
    double mass = 0;
    for (int64_t first = 0; first < count; first += 16 * lanes<C>) {
      const int64_t last = count - first < 16 * lanes<C> ? count : first + 16 * lanes<C>;
      vec<C> sums = {}, masses = {};
      for (int64_t n = first; n < last; n += lanes<C>) {
        const vec<C> weight = load_some(w + n, last - n);
        const vec<C> value = load_some(x + n, last - n);
        sums += weight == 0 ? vec<C>{} : weight * (value - base);
        masses += weight;
      }
      total += sum<C>(sums);
      mass += sum<C>(masses);
    }
    return mass != 0 ? C(total / mass) : C(0);
  }

  // [rows, maps] out of [K, N].
  void transpose(const C* from, int64_t b, int64_t begin, int64_t end, C* to) const {
    const int64_t at = in.at(b, begin);
    for (int64_t r = 0; r < end - begin; ++r)
      for (int64_t k = 0; k < in.maps; ++k)
        to[r * in.maps + k] = k < a.K ? from[at + k * a.N + r] : C(0);
  }

  // A part's tiles of a panel: gradients of u and t, into `gradient`, and the image's.
  void panel(int64_t p, int64_t first_tile, int64_t begin, int64_t end, const RowTiles& tiles,
             const WeightGradient<C>& gradient) const {
    Scratch<C> copy((tile_rows + slack) * channels), maps((tile_rows + slack) * in.maps),
        hidden((tile_rows + slack) * in.width), grad_rows(grad_image ? (tile_rows + slack) * channels : 0),
        result_rows(grad_image && a.pool ? a.K * channels : 0), factors(a.dropout.seed ? 2 * in.drawn() : 0);
    int64_t packed = -1;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t slot = t - first_tile;
      const int64_t first = tiles.first(t);
      const int64_t count = tiles.size(t);
      int64_t step;
      const C* x = in.tile(first, count, copy.data, step);
      C* du = gradient.rows(slot);
      C* dt = du + in.width;
      if (!in.recall(first, count, du, dt, gradient.out_width))
        in.project(x, step, count, du, dt, gradient.out_width);
      in.samples.of_rows(first, first + count, [&](int64_t b, int64_t r, int64_t last) {
        transpose(grad_scores.data, b, r, last, maps.data + (r - first) * in.maps);
      });
      gemm_tile<C, false>(count, a.A, a.K, maps.data, in.maps, {v_rows.data, 0}, hidden.data, in.width, false);
      with_activation(a.activation, [&](auto f) {
        with_flag(a.dropout.seed, [&](auto drop) {
          for (int64_t r = 0; r < count; ++r) {
            if (drop)
              in.draw(first + r, factors.data);
            differentiate<f.value, drop>(du + r * gradient.out_width, dt + r * gradient.out_width,
                                         hidden.data + r * in.width, in.bias_hidden(first + r), factors.data);
          }
        });
      });
      if (g.grad_v)
        gemm_tile<C, true>(a.K, a.A, count, maps.data, in.maps, {hidden.data, in.width}, grad_v.data + p * v_size(),
                           in.width, true);
      gradient.save(slot, count, x, step);
      if (!grad_image)
        continue;
      in.samples.of_rows(first, first + count, [&](int64_t b, int64_t r, int64_t last) {
        C* to = grad_rows.data + (r - first) * channels;
        if (grad_result && a.pool) {
          if (packed != b)
            pack<T>(
                a.K, a.D, [&](int64_t k) { return grad_result.row(b * a.K + k); }, grad_result.c, C(1),
                result_rows.data);
          packed = b;
          transpose(weights, b, r, last, maps.data);
          gemm_tile<C, false>(last - r, a.D, a.K, maps.data, in.maps, {result_rows.data, 0}, to, channels, false);
        } else {
          const C* w = weights + in.at(b, r);
          read_rows<T>(
              last - r, a.D,
              [&](int64_t i) -> const T* { return grad_result && w[i] != 0 ? grad_result.row(r + i) : nullptr; },
              grad_result.c, to);
          for (int64_t i = 0; i < last - r; ++i)
            for (int64_t c = 0; c < channels; c += lanes<C>)
              store(to + i * channels + c, load(to + i * channels + c) * w[i]);
        }
      });
      gemm_tile<C, false>(count, a.D, a.A, du, gradient.out_width, {weight_rows.data, 0}, grad_rows.data, channels,
                          true);
      if (a.w_gate.data)
        gemm_tile<C, false>(count, a.D, a.A, dt, gradient.out_width, {gate_rows.data, 0}, grad_rows.data, channels,
                            true);
      for (int64_t r = 0; r < count; ++r)
        write_row<T>(in.valid(first + r) ? grad_rows.data + r * channels : nullptr, a.D, C(1),
                     grad_image.row(first + r), grad_image.c);
    }
  }

  // A row of u, t and dh -> du, dt and h.
  template <Activation F, bool Drop>
  void differentiate(C* u, C* t, C* dh, const C* bias_hidden, const C* factors) const {
    for (int64_t c = 0; c < a.A; c += lanes<C>) {
      vec<C> slope, up = load(dh + c), h = activate<F, C>(in.with_bias(u, bias_hidden, c), slope);
      if constexpr (Drop) {
        const vec<C> factor = load_some(factors + c, a.A - c);
        h *= factor;
        slope *= factor;
      }
      if (a.w_gate.data) {
        vec<C> s = sigmoid<C>(in.with_bias(t, static_cast<const C*>(a.bias_gate), c));
        const vec<C> rest = C(1) - s;
        if constexpr (Drop)
          s *= load_some(factors + in.drawn() + c, a.A - c);
        store(t + c, up * h * s * rest);
        h *= s;
        up *= s;
      }
      store(u + c, up * slope);
      store(dh + c, h);
    }
  }
};

template <class T>
void backward(const AdditiveAttentionBackward& g, const Parallel& parallel) {
  using C = acc_t<T>;
  const AdditiveAttention& a = g.forward;
  const RowTiles tiles(samples_of(a).rows(), 6 * a.D * a.A, parallel);
  const int64_t parts = tiles.parts < 1 ? 1 : tiles.parts;
  const Inputs<T> in(a, parallel, parts);
  const Backward<T> work(g, in, parallel, parts);
  each_part(parallel, parts, [&](int64_t p) {
    work.find_grad_weights(tiles.first(tiles.count * p / parts), tiles.first(tiles.count * (p + 1) / parts));
  });
  each_part(parallel, parts,
            [&](int64_t p) { work.find_grad_scores(a.B * a.K * p / parts, a.B * a.K * (p + 1) / parts); });

  C* grad_bias_hidden = static_cast<C*>(g.grad_bias_hidden);
  C* grad_bias_gate = static_cast<C*>(g.grad_bias_gate);
  if (grad_bias_hidden)
    memset(grad_bias_hidden, 0, a.B * a.A * sizeof(C));
  if (grad_bias_gate)
    memset(grad_bias_gate, 0, a.A * sizeof(C));
  const int64_t out = a.w_gate.data ? in.width + a.A : a.A;
  const int64_t panel = WeightGradient<C>::panel(tiles, out, a.D);
  const WeightGradient<C> gradient(out, a.D, panel, g.grad_w_image || g.grad_w_gate);
  for (int64_t start = 0; start < tiles.count; start += panel) {
    const int64_t end = tiles.count - start < panel ? tiles.count : start + panel;
    const int64_t size = end - start;
    const int64_t first = tiles.first(start);
    const int64_t count = tiles.first(end) - first;
    each_part(parallel, parts, [&](int64_t p) {
      work.panel(p, start, start + size * p / parts, start + size * (p + 1) / parts, tiles, gradient);
    });
    gradient.add(first, count, parallel, parts, [&](int64_t begin, int64_t last, const C* du) {
      auto within = [](int64_t x, int64_t most) { return x < 0 ? int64_t(0) : x < most ? x : most; };
      if (grad_bias_hidden && begin < a.A)
        in.samples.of_rows(first, first + count, [&](int64_t b, int64_t r, int64_t to) {
          add_rows(grad_bias_hidden + b * a.A, du + (r - first) * gradient.out_width, to - r, gradient.out_width, begin,
                   within(last, a.A));
        });
      if (grad_bias_gate && last > in.width)
        add_rows(grad_bias_gate, du + in.width, count, gradient.out_width, within(begin - in.width, a.A),
                 within(last - in.width, a.A));
    });
  }
  if (!tiles.count && gradient.of_weight)
    memset(gradient.sums.data, 0, out * gradient.in_width * sizeof(C));
  if (g.grad_w_image)
    gradient.template write<T>(g.grad_w_image, 0, a.A, a.D);
  if (g.grad_w_gate)
    gradient.template write<T>(g.grad_w_gate, in.width, in.width + a.A, a.D);
  if (!g.grad_v)
    return;
  C* of_v = work.grad_v.data;
  for (int64_t p = 1; p < parts; ++p)
    add_rows(of_v, of_v + p * work.v_size(), 1, 0, 0, a.K * in.width);
  for (int64_t k = 0; k < a.K; ++k)
    write_row<T>(of_v + k * in.width, a.A, C(1), static_cast<T*>(g.grad_v) + k * a.A, 1);
}

}  // namespace
}  // namespace mmk
