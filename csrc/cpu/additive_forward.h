// Additive attention forward: a tile of rows goes through product, activation and gate to its scores, which feed an
// online softmax, and its rows the pooled sums; what several threads have a part of is merged in a fixed order.
#pragma once
#include "activation.h"
#include "additive.h"
#include "softmax.h"

namespace mmk {
namespace {

// Softmax over what was seen of a sample's positions, and the pooled sums; `rows` of them in a tile at a time. Lanes
// are maps.
template <class C>
struct State {
  C *top, *total, *sums;  // [maps], [maps], [K + slack, channels]
  static int64_t size(int64_t maps, int64_t K, int64_t channels) {
    return 2 * maps + (channels ? (K + slack) * channels : 0);
  }
  State(C* memory, int64_t maps) : top(memory), total(memory + maps), sums(memory + 2 * maps) {}

  void clear(int64_t maps, int64_t K, int64_t channels) const {
    for (int64_t k = 0; k < maps; ++k)
      top[k] = -infinity<C>, total[k] = 0;
    memset(sums, 0, (size(maps, K, channels) - 2 * maps) * sizeof(C));
  }
  // Brings top up to date; what was summed before is scaled.
  void raise(const C* now, int64_t maps, int64_t K, int64_t channels) const {
    for (int64_t k = 0; k < maps; ++k) {
      if (!(top[k] < now[k]))
        continue;
      const C factor = top[k] == -infinity<C> ? C(0) : exp(top[k] - now[k]);
      top[k] = now[k];
      total[k] *= factor;
      if (k < K)
        for (int64_t c = 0; c < channels; c += lanes<C>)
          store(sums + k * channels + c, load(sums + k * channels + c) * factor);
    }
  }
  // Scores [rows, maps] -> exponentials, summed.
  void add(C* scores, int64_t rows, int64_t maps, int64_t K, int64_t channels) const {
    Scratch<C> now(maps);
    for (int64_t k = 0; k < maps; k += lanes<C>) {
      vec<C> most = load(top + k);
      for (int64_t r = 0; r < rows; ++r)
        most = maximum<C>(most, load(scores + r * maps + k));
      store(now.data + k, most);
    }
    raise(now.data, maps, K, channels);
    for (int64_t k = 0; k < maps; k += lanes<C>) {
      const vec<C> most = load(top + k), base = most == -infinity<C> ? vec<C>{} : most;
      vec<C> sum = load(total + k);
      for (int64_t r = 0; r < rows; ++r) {
        const vec<C> e = exp(load(scores + r * maps + k) - base);
        store(scores + r * maps + k, e);
        sum += e;
      }
      store(total + k, sum);
    }
  }
  void merge(const State& other, int64_t maps, int64_t K, int64_t channels) const {
    raise(other.top, maps, K, channels);
    for (int64_t k = 0; k < maps; ++k) {
      const C factor = other.top[k] == -infinity<C> ? C(0) : exp(other.top[k] - top[k]);
      total[k] += other.total[k] * factor;
      if (k < K && factor != 0)
        for (int64_t c = 0; c < channels; c += lanes<C>)
          store(sums + k * channels + c, load(sums + k * channels + c) + load(other.sums + k * channels + c) * factor);
    }
  }
};

template <class T>
struct Forward {
  using C = acc_t<T>;
  const Inputs<T>& in;
  const AdditiveAttention& a;
  const int64_t channels;  // of the pooled sums, padded; 0 without pool
  const Source<T> result;
  Scratch<C> top, share;    // [B, maps]: what turns scores into weights
  Scratch<C> states;        // of samples that several parts share: a part's first and last
  Scratch<int64_t> shared;  // their samples, or -1
  C *const weights, *const scores;

  Forward(const Inputs<T>& in, int64_t parts)
      : in(in),
        a(in.a),
        channels(a.pool ? padded<C>(a.D) : 0),
        result(a.result, a.pool ? a.K : a.N),
        top(a.B * in.maps),
        share(a.B * in.maps),
        states(2 * parts * size()),
        shared(2 * parts),
        weights(static_cast<C*>(a.weights)),
        scores(static_cast<C*>(a.scores)) {
    for (int64_t i = 0; i < 2 * parts; ++i)
      shared.data[i] = -1;
  }
  int64_t size() const { return State<C>::size(in.maps, a.K, channels); }

  // The scores of a part's rows, and softmax and sums of its samples.
  void part(int64_t p, int64_t begin, int64_t end) {
    Scratch<C> copy((tile_rows + slack) * padded<C>(a.D)), hidden((tile_rows + slack) * in.width),
        gates(a.w_gate.data ? (tile_rows + slack) * in.width : 0), scores((tile_rows + slack) * in.maps),
        memory(size()), factors(a.dropout.seed ? 2 * in.drawn() : 0);
    const State<C> state(memory.data, in.maps);
    for (int64_t first = begin; first < end; first += tile_rows) {
      const int64_t count = end - first < tile_rows ? end - first : tile_rows;
      int64_t step;
      const C* x = in.tile(first, count, copy.data, step);
      in.project(x, step, count, hidden.data, gates.data, in.width);
      in.save(first, count, hidden.data, gates.data, in.width);
      with_activation(a.activation, [&](auto f) {
        with_flag(a.dropout.seed, [&](auto drop) {
          for (int64_t r = 0; r < count; ++r) {
            if (drop)
              in.draw(first + r, factors.data);
            activate_row<f.value, drop>(hidden.data + r * in.width, gates.data + r * in.width,
                                        in.bias_hidden(first + r), factors.data);
          }
        });
      });
      gemm_tile<C, false>(count, a.K, a.A, hidden.data, in.width, {in.v.data, 0}, scores.data, in.maps, false);
      in.samples.of_rows(first, first + count, [&](int64_t b, int64_t r, int64_t last) {
        C* s = scores.data + (r - first) * in.maps;
        if (r == in.samples.begin(b) || r == begin)
          state.clear(in.maps, a.K, channels);
        write_scores(b, r, last, s);
        state.add(s, last - r, in.maps, a.K, channels);
        if (a.pool)
          gemm_tile<C, true>(a.K, a.D, last - r, s, in.maps, {x + (r - first) * step, step}, state.sums, channels,
                             true);
        if (last != in.samples.end(b) && last != end)
          return;
        const bool starts = in.samples.begin(b) >= begin;
        const bool ends = in.samples.end(b) <= end;
        if (starts && ends)
          return finish(b, state);
        memcpy(states.data + (2 * p + starts) * size(), memory.data, size() * sizeof(C));
        shared.data[2 * p + starts] = b;
      });
    }
  }

  template <Activation F, bool Drop>
  void activate_row(C* hidden, const C* gates, const C* bias_hidden, const C* factors) const {
    for (int64_t c = 0; c < a.A; c += lanes<C>) {
      vec<C> h = activate<F, C>(in.with_bias(hidden, bias_hidden, c));
      if constexpr (Drop)
        h *= load_some(factors + c, a.A - c);
      if (a.w_gate.data) {
        vec<C> s = sigmoid<C>(in.with_bias(gates, static_cast<const C*>(a.bias_gate), c));
        if constexpr (Drop)
          s *= load_some(factors + in.drawn() + c, a.A - c);
        h *= s;
      }
      store(hidden + c, h);
    }
  }

  void write_scores(int64_t b, int64_t begin, int64_t end, C* scores) const {
    C* to = weights + in.at(b, begin);
    for (int64_t r = 0; r < end - begin; ++r) {
      if (!in.valid(begin + r))
        for (int64_t k = 0; k < in.maps; ++k)
          scores[r * in.maps + k] = -infinity<C>;
      for (int64_t k = 0; k < a.K; ++k)
        to[k * a.N + r] = scores[r * in.maps + k];
    }
  }

  void finish(int64_t b, const State<C>& state) {
    for (int64_t k = 0; k < a.K; ++k) {
      const C factor = state.total[k] != 0 ? 1 / state.total[k]
                       : in.any_valid(b)   ? C(__builtin_nan(""))
                                           : C(0);  // all -Inf: NaN, as softmax has it
      top.data[b * in.maps + k] = state.top[k] == -infinity<C> ? C(0) : state.top[k];
      share.data[b * in.maps + k] = factor;
      if (a.pool)
        write_row<T>(state.sums + k * channels, a.D, factor, result.row(b * a.K + k), result.c);
    }
  }

  void merge(int64_t parts) {
    C* first = nullptr;
    int64_t before = -1;
    for (int64_t i = 0; i < 2 * parts; ++i) {
      const int64_t b = shared.data[i];
      if (b < 0)
        continue;
      C* own = states.data + i * size();
      if (b == before)
        State<C>(first, in.maps).merge(State<C>(own, in.maps), in.maps, a.K, channels);
      else {
        if (first)
          finish(before, State<C>(first, in.maps));
        first = own;
        before = b;
      }
    }
    if (first)
      finish(before, State<C>(first, in.maps));
    if (!a.pool)
      return;
    for (int64_t b = 0; b < a.B; ++b)  // samples without rows
      if (in.samples.begin(b) == in.samples.end(b))
        for (int64_t k = 0; k < a.K; ++k)
          write_row<T, C>(nullptr, a.D, 0, result.row(b * a.K + k), result.c);
  }
  // Scores -> weights, and the product with the image.
  void weigh(int64_t first, int64_t count) const {
    in.samples.of_rows(first, first + count, [&](int64_t b, int64_t r, int64_t last) {
      for (int64_t k = 0; k < a.K; ++k) {
        C* w = weights + in.at(b, r) + k * a.N;
        if (scores)
          memcpy(scores + (w - weights), w, (last - r) * sizeof(C));
        const C factor = share.data[b * in.maps + k];
        exp_sum(w, last - r, top.data[b * in.maps + k]);
        multiply(w, last - r, factor);
        if (factor != factor)
          for (int64_t i = r; i < last; ++i)
            if (!in.valid(i))
              w[i - r] = 0;
      }
      if (a.pool)
        return;
      const C* w = weights + in.at(b, r);
      for (int64_t i = r; i < last; ++i)
        write_scaled(in.image.row(i), w[i - r], in.valid(i), result.row(i));
    });
  }
  void write_scaled(const T* x, C weight, bool valid, T* to) const {
    int64_t c = 0;
    if (valid && in.image.c == 1 && result.c == 1)
      for (; c + lanes<C> <= a.D; c += lanes<C>)
        store(to + c, load(x + c) * weight);
    for (; c < a.D; ++c)
      to[c * result.c] = from_acc<T>(valid ? to_acc(x[c * in.image.c]) * weight : C(0));
  }
};

template <class T>
void forward(const AdditiveAttention& a, const Parallel& parallel) {
  const RowTiles tiles(samples_of(a).rows(), 2 * a.D * a.A, parallel);
  const Inputs<T> in(a, parallel, tiles.parts);
  Forward<T> work(in, tiles.parts);
  auto begin = [&](int64_t p) { return tiles.first(tiles.begin(p)); };
  each_part(parallel, tiles.parts, [&](int64_t p) { work.part(p, begin(p), begin(p + 1)); });
  work.merge(tiles.parts);
  each_part(parallel, tiles.parts, [&](int64_t p) { work.weigh(begin(p), begin(p + 1) - begin(p)); });
}

}  // namespace
}  // namespace mmk
