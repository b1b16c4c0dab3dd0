// Additive attention on the CPU. What must move: the image once (twice for "multiply", and once more backward), the
// weights [K, N], the result; the layers' weights stay in the caches. A tile of rows goes through product (gemm.h),
// activation, gate and v while its hidden vectors are in the second-level cache; its scores feed an online softmax, and
// its rows, still in that cache, the pooled sums. Threads share out the tiles; samples that several threads have a part
// of are merged in a fixed order. Backward, with w = weights, h = act(u) s, s = sigmoid(t), G = grad_result: dw_kn =
// <G_k, x_n> + grad_weights_kn (multiply: <G_n, x_n>);
//   ds_kn = w_kn (dw_kn - sum_n w_kn dw_kn);  dh_n = sum_k ds_kn v_k;  du = dh s act'(u);  dt = dh act(u) s (1 - s);
//   dx_n = sum_k w_kn G_k + W^T du_n + W_gate^T dt_n;  dW = du^T x;  dv_k = sum_n ds_kn h_n. Panels of u and t are
//   computed again, but for the
// first rows, whose u and t forward may keep.
#include "../additive_attention.h"

#include "activation.h"
#include "dispatch.h"
#include "rows.h"
#include "softmax.h"

namespace mmk {
namespace {

template <class C>
inline vec<C> load_some(const C* p, int64_t count) {
  if (count >= lanes<C>)
    return load(p);
  vec<C> v = {};
  for (int64_t i = 0; i < count; ++i)
    v[i] = p[i];
  return v;
}

inline Samples samples_of(const AdditiveAttention& a) {
  return {a.B, a.N, a.offsets};
}

// What both directions know, and the packed layers.
template <class T>
struct Inputs {
  using C = acc_t<T>;
  const AdditiveAttention& a;
  const Samples samples;
  const Source<const T> image;
  const int64_t width, maps;   // of hidden vectors and scores, padded
  Scratch<C> weight, gate, v;  // B[D, A], B[D, A], B[A, K]

  Inputs(const AdditiveAttention& a, const Parallel& parallel, int64_t parts)
      : a(a),
        samples(samples_of(a)),
        image(a.image, a.N),
        width(padded<C>(a.A)),
        maps(padded<C>(a.K)),
        weight(a.D * width),
        gate(a.w_gate.data ? a.D * width : 0),
        v(a.A * maps) {
    pack_weight_transposed<T>(a.w_image, a.A, a.D, C(1), weight.data, parallel, parts);
    if (a.w_gate.data)
      pack_weight_transposed<T>(a.w_gate, a.A, a.D, C(1), gate.data, parallel, parts);
    const T* from = static_cast<const T*>(a.v.data);
    pack_transposed<T>(a.A, a.K, [&](int64_t k) { return from + k * a.v.row; }, a.v.column, C(1), v.data);
  }

  bool keeps(int64_t row) const { return !a.mask.data || a.mask.data[row / a.N * a.mask.b + row % a.N * a.mask.x]; }
  bool takes_part(int64_t b) const {  // any of a sample's rows
    for (int64_t r = samples.begin(b); r < samples.end(b); ++r)
      if (keeps(r))
        return true;
    return false;
  }
  const C* tile(int64_t first, int64_t count, C* copy, int64_t& step) const {
    return image_tile<T>(image, first, count, samples.rows(), a.D, copy, step, [&](int64_t r) { return keeps(r); });
  }
  // Where a sample's row of [B, K, N] (packed: [K, rows]) is, for the first map; the others are a.N apart.
  int64_t at(int64_t b, int64_t row) const { return a.offsets ? row : b * a.K * a.N + row - b * a.N; }
  const C* shift(int64_t row) const {
    return a.shift ? static_cast<const C*>(a.shift) + samples.of(row) * a.A : nullptr;
  }

  // u and t of a tile, before shifts and activation.
  void project(const C* x, int64_t step, int64_t count, C* hidden, C* gates, int64_t ld) const {
    gemm_tile<C, false>(count, a.A, a.D, x, step, {weight.data, 0}, hidden, ld, false);
    if (a.w_gate.data)
      gemm_tile<C, false>(count, a.A, a.D, x, step, {gate.data, 0}, gates, ld, false);
  }
  // The products of the first rows are kept by forward, and found by backward: false where a tile's aren't all there.
  C* kept(int64_t row) const { return static_cast<C*>(a.kept) + row * (a.w_gate.data ? 2 * a.A : a.A); }
  void keep(int64_t first, int64_t count, const C* hidden, const C* gates, int64_t ld) const {
    for (int64_t r = 0; r < count && first + r < a.kept_rows; ++r) {
      memcpy(kept(first + r), hidden + r * ld, a.A * sizeof(C));
      if (a.w_gate.data)
        memcpy(kept(first + r) + a.A, gates + r * ld, a.A * sizeof(C));
    }
  }
  bool recall(int64_t first, int64_t count, C* hidden, C* gates, int64_t ld) const {
    if (first + count > a.kept_rows)
      return false;
    read_rows<C>(count, a.A, [&](int64_t r) -> const C* { return kept(first + r); }, 1, hidden, ld);
    if (a.w_gate.data)
      read_rows<C>(count, a.A, [&](int64_t r) -> const C* { return kept(first + r) + a.A; }, 1, gates, ld);
    return true;
  }
  vec<C> shifted(const C* x, const C* shift, int64_t column) const {
    return shift ? load(x + column) + load_some(shift + column, a.A - column) : load(x + column);
  }
};

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
  C* const weights;

  Forward(const Inputs<T>& in, int64_t parts)
      : in(in),
        a(in.a),
        channels(a.pool ? padded<C>(a.D) : 0),
        result(a.result, a.pool ? a.K : a.N),
        top(a.B * in.maps),
        share(a.B * in.maps),
        states(2 * parts * size()),
        shared(2 * parts),
        weights(static_cast<C*>(a.weights)) {
    for (int64_t i = 0; i < 2 * parts; ++i)
      shared.data[i] = -1;
  }
  int64_t size() const { return State<C>::size(in.maps, a.K, channels); }

  // The scores of a part's rows, and softmax and sums of its samples.
  void part(int64_t p, int64_t begin, int64_t end) {
    Scratch<C> copy((tile_rows + slack) * padded<C>(a.D)), hidden((tile_rows + slack) * in.width),
        gates(a.w_gate.data ? (tile_rows + slack) * in.width : 0), scores((tile_rows + slack) * in.maps),
        memory(size());
    const State<C> state(memory.data, in.maps);
    for (int64_t first = begin; first < end; first += tile_rows) {
      const int64_t count = end - first < tile_rows ? end - first : tile_rows;
      int64_t step;
      const C* x = in.tile(first, count, copy.data, step);
      in.project(x, step, count, hidden.data, gates.data, in.width);
      in.keep(first, count, hidden.data, gates.data, in.width);
      with_activation(a.activation, [&](auto f) {
        for (int64_t r = 0; r < count; ++r)
          activate_row<f.value>(hidden.data + r * in.width, gates.data + r * in.width, in.shift(first + r));
      });
      gemm_tile<C, false>(count, a.K, a.A, hidden.data, in.width, {in.v.data, 0}, scores.data, in.maps, false);
      in.samples.of_rows(first, first + count, [&](int64_t b, int64_t r, int64_t last) {
        C* s = scores.data + (r - first) * in.maps;
        if (r == in.samples.begin(b) || r == begin)
          state.clear(in.maps, a.K, channels);
        keep_scores(b, r, last, s);
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

  template <Activation F>
  void activate_row(C* hidden, const C* gates, const C* shift) const {
    for (int64_t c = 0; c < a.A; c += lanes<C>) {
      vec<C> h = activate<F, C>(in.shifted(hidden, shift, c));
      if (a.w_gate.data)
        h *= sigmoid<C>(in.shifted(gates, static_cast<const C*>(a.shift_gate), c));
      store(hidden + c, h);
    }
  }

  void keep_scores(int64_t b, int64_t begin, int64_t end, C* scores) const {
    C* to = weights + in.at(b, begin);
    for (int64_t r = 0; r < end - begin; ++r) {
      if (!in.keeps(begin + r))
        for (int64_t k = 0; k < in.maps; ++k)
          scores[r * in.maps + k] = -infinity<C>;
      for (int64_t k = 0; k < a.K; ++k)
        to[k * a.N + r] = scores[r * in.maps + k];
    }
  }

  void finish(int64_t b, const State<C>& state) {
    for (int64_t k = 0; k < a.K; ++k) {
      const C factor = state.total[k] != 0 ? 1 / state.total[k]
                       : in.takes_part(b)  ? C(__builtin_nan(""))
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
        const C factor = share.data[b * in.maps + k];
        exp_sum(w, last - r, top.data[b * in.maps + k]);
        multiply(w, last - r, factor);
        if (factor != factor)
          for (int64_t i = r; i < last; ++i)
            if (!in.keeps(i))
              w[i - r] = 0;
      }
      if (a.pool)
        return;
      const C* w = weights + in.at(b, r);
      for (int64_t i = r; i < last; ++i)
        write_scaled(in.image.row(i), w[i - r], in.keeps(i), result.row(i));
    });
  }
  void write_scaled(const T* x, C weight, bool keep, T* to) const {
    int64_t c = 0;
    if (keep && in.image.c == 1 && result.c == 1)
      for (; c + lanes<C> <= a.D; c += lanes<C>)
        store(to + c, load(x + c) * weight);
    for (; c < a.D; ++c)
      to[c * result.c] = from_acc<T>(keep ? to_acc(x[c * in.image.c]) * weight : C(0));
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
  void of_weights(int64_t begin, int64_t end) const {
    Scratch<C> copy((tile_rows + slack) * channels), upstream(grad_result && a.pool ? a.D * in.maps : 0),
        found((tile_rows + slack) * in.maps);
    const C* given = static_cast<const C*>(g.grad_weights);
    int64_t packed = -1;
    for (int64_t first = begin; first < end; first += tile_rows) {
      const int64_t count = end - first < tile_rows ? end - first : tile_rows;
      int64_t step = 0;
      const C* x = grad_result ? in.tile(first, count, copy.data, step) : nullptr;
      in.samples.of_rows(first, first + count, [&](int64_t b, int64_t r, int64_t last) {
        if (grad_result && a.pool) {
          if (packed != b)
            pack_transposed<T>(
                a.D, a.K, [&](int64_t k) { return grad_result.row(b * a.K + k); }, grad_result.c, C(1), upstream.data);
          packed = b;
          gemm_tile<C, false>(last - r, a.K, a.D, x + (r - first) * step, step, {upstream.data, 0}, found.data, in.maps,
                              false);
        } else if (grad_result) {
          for (int64_t i = r; i < last; ++i)
            found.data[(i - r) * in.maps] = product(x + (i - first) * step, grad_result.row(i));
        }
        const int64_t at = in.at(b, r);
        for (int64_t k = 0; k < a.K; ++k)
          for (int64_t i = 0; i < last - r; ++i)
            grad_scores.data[at + k * a.N + i] =
                (grad_result ? found.data[i * in.maps + k] : C(0)) + (given ? given[at + k * a.N + i] : C(0));
      });
    }
  }
  C product(const C* x, const T* up) const {
    vec<C> sums = {};
    C total = 0;
    int64_t c = 0;
    if (grad_result.c == 1)
      for (; c + lanes<C> <= a.D; c += lanes<C>)
        sums += load(x + c) * load(up + c);
    for (; c < a.D; ++c)
      total += x[c] * to_acc(up[c * grad_result.c]);
    return total + sum<C>(sums);
  }

  // dw -> ds, a sample's map at a time. Their mean is found twice, the second time of what is left: what all have in
  // common has to cancel. Where a weight is 0, masked positions among them, nothing arrives.
  void of_scores(int64_t begin, int64_t end) const {
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
  void turn(const C* from, int64_t b, int64_t begin, int64_t end, C* to) const {
    const int64_t at = in.at(b, begin);
    for (int64_t r = 0; r < end - begin; ++r)
      for (int64_t k = 0; k < in.maps; ++k)
        to[r * in.maps + k] = k < a.K ? from[at + k * a.N + r] : C(0);
  }

  // A part's tiles of a panel: gradients of u and t, into `gradient`, and the image's.
  void panel(int64_t p, int64_t first_tile, int64_t begin, int64_t end, const RowTiles& tiles,
             const WeightGradient<C>& gradient) const {
    Scratch<C> copy((tile_rows + slack) * channels), maps((tile_rows + slack) * in.maps),
        hidden((tile_rows + slack) * in.width), upstream(grad_image ? (tile_rows + slack) * channels : 0),
        result_rows(grad_image && a.pool ? a.K * channels : 0);
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
        turn(grad_scores.data, b, r, last, maps.data + (r - first) * in.maps);
      });
      gemm_tile<C, false>(count, a.A, a.K, maps.data, in.maps, {v_rows.data, 0}, hidden.data, in.width, false);
      with_activation(a.activation, [&](auto f) {
        for (int64_t r = 0; r < count; ++r)
          differentiate<f.value>(du + r * gradient.out_width, dt + r * gradient.out_width, hidden.data + r * in.width,
                                 in.shift(first + r));
      });
      if (g.grad_v)
        gemm_tile<C, true>(a.K, a.A, count, maps.data, in.maps, {hidden.data, in.width}, grad_v.data + p * v_size(),
                           in.width, true);
      gradient.keep(slot, count, x, step);
      if (!grad_image)
        continue;
      in.samples.of_rows(first, first + count, [&](int64_t b, int64_t r, int64_t last) {
        C* to = upstream.data + (r - first) * channels;
        if (grad_result && a.pool) {
          if (packed != b)
            pack<T>(
                a.K, a.D, [&](int64_t k) { return grad_result.row(b * a.K + k); }, grad_result.c, C(1),
                result_rows.data);
          packed = b;
          turn(weights, b, r, last, maps.data);
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
      gemm_tile<C, false>(count, a.D, a.A, du, gradient.out_width, {weight_rows.data, 0}, upstream.data, channels,
                          true);
      if (a.w_gate.data)
        gemm_tile<C, false>(count, a.D, a.A, dt, gradient.out_width, {gate_rows.data, 0}, upstream.data, channels,
                            true);
      for (int64_t r = 0; r < count; ++r)
        write_row<T>(in.keeps(first + r) ? upstream.data + r * channels : nullptr, a.D, C(1), grad_image.row(first + r),
                     grad_image.c);
    }
  }

  // A row of u, t and dh -> du, dt and h.
  template <Activation F>
  void differentiate(C* u, C* t, C* dh, const C* shift) const {
    for (int64_t c = 0; c < a.A; c += lanes<C>) {
      vec<C> slope, up = load(dh + c), h = activate<F, C>(in.shifted(u, shift, c), slope);
      if (a.w_gate.data) {
        const vec<C> s = sigmoid<C>(in.shifted(t, static_cast<const C*>(a.shift_gate), c));
        store(t + c, up * h * s * (C(1) - s));
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
    work.of_weights(tiles.first(tiles.count * p / parts), tiles.first(tiles.count * (p + 1) / parts));
  });
  each_part(parallel, parts, [&](int64_t p) { work.of_scores(a.B * a.K * p / parts, a.B * a.K * (p + 1) / parts); });

  C* grad_shift = static_cast<C*>(g.grad_shift);
  C* grad_shift_gate = static_cast<C*>(g.grad_shift_gate);
  if (grad_shift)
    memset(grad_shift, 0, a.B * a.A * sizeof(C));
  if (grad_shift_gate)
    memset(grad_shift_gate, 0, a.A * sizeof(C));
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
      if (grad_shift && begin < a.A)
        in.samples.of_rows(first, first + count, [&](int64_t b, int64_t r, int64_t to) {
          add_rows(grad_shift + b * a.A, du + (r - first) * gradient.out_width, to - r, gradient.out_width, begin,
                   within(last, a.A));
        });
      if (grad_shift_gate && last > in.width)
        add_rows(grad_shift_gate, du + in.width, count, gradient.out_width, within(begin - in.width, a.A),
                 within(last - in.width, a.A));
    });
  }
  if (!tiles.count && gradient.of_weight)
    memset(gradient.sums.data, 0, out * gradient.in_width * sizeof(C));
  if (g.grad_w_image)
    gradient.template write<T>(g.grad_w_image, 0, a.A);
  if (g.grad_w_gate)
    gradient.template write<T>(g.grad_w_gate, in.width, in.width + a.A);
  if (!g.grad_v)
    return;
  C* of_v = work.grad_v.data;
  for (int64_t p = 1; p < parts; ++p)
    add_rows(of_v, of_v + p * work.v_size(), 1, 0, 0, a.K * in.width);
  for (int64_t k = 0; k < a.K; ++k)
    write_row<T>(of_v + k * in.width, a.A, C(1), static_cast<T*>(g.grad_v) + k * a.A, 1);
}

}  // namespace

namespace MMK_ISA {
void additive_attention_forward(const AdditiveAttention& a, const Parallel& p) {
  with_type(a.dtype, [&](auto zero) { forward<decltype(zero)>(a, p); });
}
void additive_attention_backward(const AdditiveAttentionBackward& g, const Parallel& p) {
  with_type(g.forward.dtype, [&](auto zero) { backward<decltype(zero)>(g, p); });
}
}  // namespace MMK_ISA
}  // namespace mmk

#ifdef MMK_DEFINE_ENTRY
MMK_CPU_ENTRY(additive_attention_forward, AdditiveAttention)
MMK_CPU_ENTRY(additive_attention_backward, AdditiveAttentionBackward)
#endif
