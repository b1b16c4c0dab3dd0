// Gated cross-attention on the CPU. What must move: query, key, value and gate once, the result once; never an N x T matrix.
// Keys and values of a head are packed once, by every thread that has queries of it; a tile of queries then makes its scores, their
// softmax and the weighted sum of values in the second-level cache, and the gate is multiplied as the tile is written. More than
// `token_block` tokens are taken in blocks with an online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867).
// Backward, with P = weights, A = P value, G = grad_result * gate: the scores are recomputed from log_sum, then
//   dP = G value^T;  dS = P (dP - rowsum(G A));  dquery = scale dS key;  dkey = scale dS^T query;  dvalue = P^T G;  dgate = grad_result A.
// Scores are kept in base 2: keys are packed times scale / ln 2.
#include "../gated_cross_attention.h"

#include "attention.h"
#include "dispatch.h"

namespace mmk {
namespace {

// What both directions know of a head: its tensors, the tokens that take part, and keys and values packed in blocks of tokens.
template <class T> struct HeadInputs {
  using C = acc_t<T>;
  const GatedCrossAttention& a;
  Head<T> query, key, value, gate, attended;
  Head<const bool> pairs{};
  Head<const C> bias{};
  C* log_sum = nullptr;
  Order order;
  int64_t row = 0;                                  // of the head among all heads' rows

  explicit HeadInputs(const GatedCrossAttention& a) : a(a), order(a.T) {}

  void set(int64_t index) {
    const int64_t b = index / a.H, h = index % a.H;
    query = head<T>(a.query, b, h), key = head<T>(a.key, b, h), value = head<T>(a.value, b, h);
    gate = head<T>(a.gate, b, h), attended = head<T>(a.attended, b, h);
    pairs = {a.pairs.data ? a.pairs.data + b * a.pairs.b + h * a.pairs.h : nullptr, a.pairs.n, a.pairs.t};
    bias = {a.bias.data ? static_cast<const C*>(a.bias.data) + b * a.bias.b + h * a.bias.h : nullptr, a.bias.n, a.bias.t};
    log_sum = static_cast<C*>(a.log_sum) + index * a.N;
    row = index * a.N;
    order.find(a.tokens.data ? a.tokens.data + b * a.tokens.b + h * a.tokens.h : nullptr, a.tokens.t, a.T, false);
  }
  // Adds the bias to a tile of scores, and takes out the pairs that don't attend.
  void mask(C* scores, int64_t step, int64_t first, int64_t count, int64_t block) const {
    const int64_t n = block_tokens(order.count, block), t0 = block * token_block;
    for (int64_t r = 0; r < count; ++r) {
      C* s = scores + r * step;
      if (bias) {
        const C* add = bias.row(first + r);
        for (int64_t i = 0; i < n; ++i) s[i] += add[order[t0 + i] * bias.c] * log2_e<C>;
      }
      if (pairs) {
        const bool* keep = pairs.row(first + r);
        for (int64_t i = 0; i < n; ++i) s[i] = keep[order[t0 + i] * pairs.c] ? s[i] : -infinity<C>;
      }
    }
  }
  bool masked() const { return pairs || bias; }
};

template <class T> struct Forward {
  using C = acc_t<T>;
  const GatedCrossAttention& a;
  const Tiles& tiles;
  HeadInputs<T> in;
  Head<T> result{};
  const int64_t width, rows, value_width;           // of a tile of scores, of any tile, of a tile of results
  Scratch<C> keys, values, copy, scores, sums, top, total, factor;

  Forward(const GatedCrossAttention& a, const Tiles& tiles)
      : a(a), tiles(tiles), in(a), width(padded<C>(a.T < token_block ? a.T : token_block)), rows(tiles.height + slack), value_width(padded<C>(a.dv)),
        keys(packed_size<C>(a.T, a.d)), values(packed_size<C>(a.T, a.dv)), copy(rows * padded<C>(a.d)), scores(rows * width), sums(rows * value_width),
        top(rows), total(rows), factor(rows) {}

  void start(int64_t index) {
    in.set(index);
    result = head<T>(a.result, index / a.H, index % a.H);
    pack_columns(in.key, in.order, in.order.count, a.d, C(a.scale) * log2_e<C>, keys.data);
    pack_rows(in.value, in.order, in.order.count, a.dv, values.data);
  }

  void tile(int64_t first, int64_t count) {
    int64_t step;
    const C* q = queries<T, C>(in.query, first, count, a.d, copy.data, step);
    for (int64_t r = 0; r < count; ++r) top.data[r] = -infinity<C>, total.data[r] = 0;
    for (int64_t k = 0; k < blocks(in.order.count); ++k) {
      const int64_t n = block_tokens(in.order.count, k);
      multiply<C, false>(count, n, a.d, q, step, {keys.data + k * a.d * token_block, 0}, scores.data, width, false);
      if (in.masked()) in.mask(scores.data, width, first, count, k);
      softmax_rows(scores.data, count, width, n, top.data, total.data, factor.data);
      if (k) scale_rows(sums.data, count, value_width, a.dv, factor.data);
      multiply<C, false>(count, a.dv, n, scores.data, width, {values.data + k * token_block * value_width, 0}, sums.data, value_width, k != 0);
    }
    write(first, count);
  }

  void write(int64_t first, int64_t count) {
    const bool unit = result.c == 1 && (!in.gate || in.gate.c == 1) && (!in.attended || in.attended.c == 1);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t n = first + r;
      const C share = total.data[r] != 0 ? 1 / total.data[r] : C(0);
      in.log_sum[n] = total.data[r] != 0 ? top.data[r] + log_2(total.data[r]) : infinity<C>;
      const C* sum = sums.data + r * value_width;
      T *to = result.row(n), *before = in.attended ? in.attended.row(n) : nullptr;
      const T* gate = in.gate ? in.gate.row(n) : nullptr;
      if (share == 0) {                             // nothing to attend to: 0, whatever the gate is
        for (int64_t c = 0; c < a.dv; ++c) to[c * result.c] = from_acc<T>(C(0));
        if (before) for (int64_t c = 0; c < a.dv; ++c) before[c * in.attended.c] = from_acc<T>(C(0));
        continue;
      }
      int64_t c = 0;
      if (unit)
        for (; c + lanes<C> <= a.dv; c += lanes<C>) {
          const vec<C> x = load(sum + c) * share;
          if (before) store(before + c, x);
          store(to + c, gate ? x * load(gate + c) : x);
        }
      for (; c < a.dv; ++c) {
        const C x = sum[c] * share;
        if (before) before[c * in.attended.c] = from_acc<T>(x);
        to[c * result.c] = from_acc<T>(gate ? x * to_acc(gate[c * in.gate.c]) : x);
      }
    }
  }
};

template <class T> struct Backward {
  using C = acc_t<T>;
  const GatedCrossAttentionBackward& g;
  const GatedCrossAttention& a;
  const Tiles& tiles;
  HeadInputs<T> in;
  Head<T> grad_result{}, grad_query{}, grad_gate{};
  const int64_t width, rows, query_width, value_width;
  const bool scores_matter;                         // anything but grad_value and grad_gate
  Scratch<C> key_columns, key_rows, value_columns, query, upstream, weights, grad_scores, sums, mean, tokens;

  Backward(const GatedCrossAttentionBackward& g, const Tiles& tiles)
      : g(g), a(g.forward), tiles(tiles), in(a), width(padded<C>(a.T < token_block ? a.T : token_block)), rows(tiles.height + slack),
        query_width(padded<C>(a.d)), value_width(padded<C>(a.dv)),
        scores_matter(g.grad_query.data || g.grad_key.data || g.grad_bias),
        key_columns(packed_size<C>(a.T, a.d)), key_rows(g.grad_query.data ? packed_size<C>(a.T, a.d) : 0), value_columns(packed_size<C>(a.T, a.dv)),
        query(rows * query_width), upstream(rows * value_width), weights(rows * width + slack), grad_scores(rows * width + slack),
        sums(rows * query_width), mean(rows), tokens(size(a)) {}

  // Sums for the tokens of a head: of dkey, then of dvalue.
  static int64_t size(const GatedCrossAttention& a) { return (a.T + slack) * (padded<C>(a.d) + padded<C>(a.dv)); }
  C* key_sums() const { return tokens.data; }
  C* value_sums() const { return tokens.data + (a.T + slack) * query_width; }

  void start(int64_t index) {
    const int64_t b = index / a.H, h = index % a.H;
    in.set(index);
    grad_result = head<T>(g.grad_result, b, h), grad_query = head<T>(g.grad_query, b, h), grad_gate = head<T>(g.grad_gate, b, h);
    pack_columns(in.key, in.order, in.order.count, a.d, C(a.scale) * log2_e<C>, key_columns.data);
    if (scores_matter) pack_columns(in.value, in.order, in.order.count, a.dv, C(1), value_columns.data);
    if (grad_query) pack_rows(in.key, in.order, in.order.count, a.d, key_rows.data);
    memset(tokens.data, 0, size(a) * sizeof(C));
  }

  void tile(int64_t first, int64_t count) {
    // A query that attends to nothing (log_sum is Inf) may hold NaN: it is read as 0.
    auto attends = [&](int64_t r) { return in.log_sum[first + r] != infinity<C>; };
    read_rows<T>(count, a.d, [&](int64_t r) -> const T* { return attends(r) ? in.query.row(first + r) : nullptr; }, in.query.c, query.data);
    for (int64_t r = 0; r < count; ++r) read_upstream(first, r, attends(r));
    for (int64_t k = 0; k < blocks(in.order.count); ++k) {
      const int64_t n = block_tokens(in.order.count, k), t = k * token_block;
      C *p = weights.data, *ds = grad_scores.data;
      multiply<C, false>(count, n, a.d, query.data, query_width, {key_columns.data + t * a.d, 0}, p, width, false);
      if (in.masked()) in.mask(p, width, first, count, k);
      if (scores_matter) multiply<C, false>(count, n, a.dv, upstream.data, value_width, {value_columns.data + t * a.dv, 0}, ds, width, false);
      recover(first, count, n);
      if (g.grad_value.data) multiply<C, true>(n, a.dv, count, p, width, {upstream.data, value_width}, value_sums() + t * value_width, value_width, true);
      if (g.grad_bias) write_bias(first, count, k);
      if (grad_query) multiply<C, false>(count, a.d, n, ds, width, {key_rows.data + t * query_width, 0}, sums.data, query_width, k != 0);
      if (g.grad_key.data) multiply<C, true>(n, a.d, count, ds, width, {query.data, query_width}, key_sums() + t * query_width, query_width, true);
    }
    if (grad_query) write_query(first, count);
  }

  // G = grad_result * gate, its product with A, and the gate's gradient.
  void read_upstream(int64_t first, int64_t r, bool attends) {
    const int64_t n = first + r;
    C* to = upstream.data + r * value_width;
    const T *from = grad_result.row(n), *gate = in.gate ? in.gate.row(n) : nullptr, *before = in.attended.row(n);
    T* of_gate = grad_gate ? grad_gate.row(n) : nullptr;
    if (!attends) {
      memset(to, 0, value_width * sizeof(C));
      if (of_gate) for (int64_t c = 0; c < a.dv; ++c) of_gate[c * grad_gate.c] = from_acc<T>(C(0));
      mean.data[r] = 0;
      return;
    }
    const bool unit = grad_result.c == 1 && in.attended.c == 1 && (!gate || in.gate.c == 1) && (!of_gate || grad_gate.c == 1);
    vec<C> total = {};
    C rest = 0;
    int64_t c = 0;
    if (unit)
      for (; c + lanes<C> <= a.dv; c += lanes<C>) {
        const vec<C> up = load(from + c), x = load(before + c), scaled = gate ? up * load(gate + c) : up;
        if (of_gate) store(of_gate + c, up * x);
        store(to + c, scaled);
        total += scaled * x;
      }
    for (; c < a.dv; ++c) {
      const C up = to_acc(from[c * grad_result.c]), x = to_acc(before[c * in.attended.c]);
      const C scaled = gate ? up * to_acc(gate[c * in.gate.c]) : up;
      if (of_gate) of_gate[c * grad_gate.c] = from_acc<T>(up * x);
      to[c] = scaled;
      rest += scaled * x;
    }
    for (; c < value_width; ++c) to[c] = 0;
    mean.data[r] = sum<C>(total) + rest;
  }

  // Scores -> weights, and their gradient -> scale times that of the scores.
  void recover(int64_t first, int64_t count, int64_t n) {
    const vec<C> none = padding<C>(n);
    const int64_t last = vectors<C>(n) * lanes<C> - lanes<C>;
    for (int64_t r = 0; r < count; ++r) {
      C *p = weights.data + r * width, *ds = grad_scores.data + r * width;
      const C log_sum = in.log_sum[first + r], m = mean.data[r];
      store(p + last, load(p + last) + none);
      for (int64_t i = 0; i <= last; i += lanes<C>) {
        const vec<C> w = exp2(load(p + i) - log_sum);
        store(p + i, w);
        if (scores_matter) store(ds + i, w * (load(ds + i) - m));
      }
    }
  }

  void write_bias(int64_t first, int64_t count, int64_t block) {
    for (int64_t r = 0; r < count; ++r) {
      C* to = static_cast<C*>(g.grad_bias) + (in.row + first + r) * a.T + block * token_block;     // with a bias all tokens take part
      memcpy(to, grad_scores.data + r * width, block_tokens(in.order.count, block) * sizeof(C));
    }
  }

  void write_query(int64_t first, int64_t count) {
    for (int64_t r = 0; r < count; ++r)
      write_row<T>(in.order.count ? sums.data + r * query_width : nullptr, a.d, C(a.scale), grad_query.row(first + r), grad_query.c);
  }
};

template <class T> void forward(const GatedCrossAttention& a, const Parallel& parallel) {
  const Tiles tiles(a.B * a.H, a.N, tile_rows, 2 * a.T * (a.d + a.dv), parallel);
  tiles.run(parallel, [&](int64_t part) {
    Forward<T> work(a, tiles);
    tiles.of_part(part, [&](int64_t index, int64_t first, int64_t last) {
      work.start(index);
      for (int64_t tile = first; tile < last; ++tile) work.tile(tiles.first_row(tile), tiles.count(tile));
    });
  });
}

template <class T> void backward(const GatedCrossAttentionBackward& g, const Parallel& parallel) {
  using C = acc_t<T>;
  const GatedCrossAttention& a = g.forward;
  const Tiles tiles(a.B * a.H, a.N, tile_rows, 6 * a.T * (a.d + a.dv), parallel);
  const int64_t size = Backward<T>::size(a), value_sums = (a.T + slack) * padded<C>(a.d);     // behind those of the keys
  const bool of_tokens = g.grad_key.data || g.grad_value.data;
  Shares<C> shares(tiles, of_tokens ? size : 0);

  auto write = [&](int64_t index, const C* sums, const Order& order) {
    const int64_t b = index / a.H, h = index % a.H;
    if (g.grad_key.data) write_tokens(sums, padded<C>(a.d), a.d, C(a.scale), order, order.count, a.T, head<T>(g.grad_key, b, h));
    if (g.grad_value.data) write_tokens(sums + value_sums, padded<C>(a.dv), a.dv, C(1), order, order.count, a.T, head<T>(g.grad_value, b, h));
  };
  tiles.run(parallel, [&](int64_t part) {
    Backward<T> work(g, tiles);
    tiles.of_part(part, [&](int64_t index, int64_t first, int64_t last) {
      work.start(index);
      for (int64_t tile = first; tile < last; ++tile) work.tile(tiles.first_row(tile), tiles.count(tile));
      if (!of_tokens) return;
      if (C* share = shares.of(part, index)) memcpy(share, work.tokens.data, size * sizeof(C));
      else write(index, work.tokens.data, work.in.order);
    });
  });
  if (!of_tokens) return;
  HeadInputs<T> in(a);
  shares.merge([&](int64_t index, C** share, int64_t count) {
    for (int64_t k = 1; k < count; ++k)
      for (int64_t i = 0; i < size; ++i) share[0][i] += share[k][i];
    in.set(index);
    write(index, share[0], in.order);
  });
  if (a.N) return;
  Scratch<C> nothing(size);
  memset(nothing.data, 0, size * sizeof(C));
  for (int64_t index = 0; index < a.B * a.H; ++index) in.set(index), write(index, nothing.data, in.order);
}

}  // namespace

namespace MMK_ISA {
void gated_cross_attention_forward(const GatedCrossAttention& a, const Parallel& p) {
  with_type(a.dtype, [&](auto zero) { forward<decltype(zero)>(a, p); });
}
void gated_cross_attention_backward(const GatedCrossAttentionBackward& g, const Parallel& p) {
  with_type(g.forward.dtype, [&](auto zero) { backward<decltype(zero)>(g, p); });
}
}  // namespace MMK_ISA
}  // namespace mmk

#ifdef MMK_DEFINE_ENTRY
MMK_CPU_ENTRY(gated_cross_attention_forward, GatedCrossAttention)
MMK_CPU_ENTRY(gated_cross_attention_backward, GatedCrossAttentionBackward)
#endif
