// Gated cross-attention on the CPU. What must move: query, key, value and gate once, the result once; never an N x T
// matrix. Keys and values of a head are copied once, by every thread that has queries of it; a tile of queries then
// makes its scores, their softmax and the weighted sum of values in the second-level cache, and the gate is multiplied
// as the tile is written. More than `token_block` tokens are taken in blocks with an online softmax (Milakov &
// Gimelshein 2018, arXiv:1805.02867). Scores are made transposed, [token, query]: vectors lie along the queries, so
// that a softmax needs no sum within a vector, and short texts no padding. A tile's queries are transposed for it,
// backward its G, too. Backward, with P = weights, A = P value, G = grad_result * gate: the scores are recomputed, P =
// exp(score - top) share, then
//   dP = G value^T;  dS = P (dP - rowsum(G A));  dquery = scale dS key;  dkey = scale dS^T query;  dvalue = P^T G;
//   dgate = grad_result A.
// G is multiplied by the query's share, as P is a factor of all that has G.
#include "../gated_cross_attention.h"

#include "dispatch.h"
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
  int64_t row = 0;  // of the head among all heads' rows

  explicit HeadInputs(const GatedCrossAttention& a) : a(a), order(a.T), scale(a.scale) {}

  void set(int64_t index) {
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
    row = index * a.N;
    order.find(a.tokens.data ? a.tokens.data + b * a.tokens.b + h * a.tokens.h : nullptr, a.tokens.t, a.T, false);
  }
  // A tile of products -> scores, [token, query]: scaled, with the bias, and -Inf for pairs that don't attend.
  void finish(C* scores, int64_t step, int64_t first, int64_t count, int64_t block) const {
    const int64_t n = block_tokens(order.count, block);
    const int64_t t0 = block * token_block;
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
};

template <class T>
struct Forward {
  using C = acc_t<T>;
  const GatedCrossAttention& a;
  const Tiles& tiles;
  HeadInputs<T> in;
  Head<T> result{};
  const int64_t width, key_width, value_width;  // of tiles: of scores, of keys, of results
  Scratch<C> keys, values, query, scores, sums, top, total, factor;

  Forward(const GatedCrossAttention& a, const Tiles& tiles)
      : a(a),
        tiles(tiles),
        in(a),
        width(padded<C>(tiles.height)),
        key_width(padded<C>(a.d)),
        value_width(padded<C>(a.dv)),
        keys((a.T + slack) * key_width),
        values(packed_size<C>(a.T, a.dv)),
        query(a.d * width),
        scores(score_rows(a.T) * width + slack),
        sums((tiles.height + slack) * value_width),
        top(width),
        total(width),
        factor(width) {}

  void start(int64_t index) {
    in.set(index);
    result = head<T>(a.result, index / a.H, index % a.H);
    read_tokens(in.key, in.order, in.order.count, a.d, keys.data);
    pack_rows(in.value, in.order, in.order.count, a.dv, values.data);
  }

  void tile(int64_t first, int64_t count) {
    const int64_t whole = padded<C>(count);
    pack_transposed<T>(
        a.d, count, [&](int64_t r) { return in.query.row(first + r); }, in.query.c, in.scale.query, query.data);
    for (int64_t r = 0; r < whole; ++r)
      top.data[r] = -infinity<C>, total.data[r] = 0;
    Fetch fetch;
    fetch_rows(fetch, in.gate, first, count, a.dv);
    ahead(fetch, first + count);
    fetch.spread(count * in.order.count * (a.d + a.dv));
    for (int64_t k = 0; k < blocks(in.order.count); ++k) {
      const int64_t n = block_tokens(in.order.count, k);
      const int64_t t = k * token_block;
      gemm_tile<C, false>(n, count, a.d, keys.data + t * key_width, key_width, {query.data, 0}, scores.data, width,
                          false, fetch);
      in.finish(scores.data, width, first, count, k);
      softmax_columns(scores.data, n, width, whole, [](int64_t) { return true; }, top.data, total.data, factor.data);
      if (k)
        scale_rows(sums.data, count, value_width, a.dv, factor.data);
      gemm_tile<C, true>(count, a.dv, n, scores.data, width, {values.data + t * value_width, 0}, sums.data, value_width,
                         k != 0, fetch);
    }
    write(first, count);
  }

  // What the next tile needs: the head's next queries, or the next head.
  void ahead(Fetch& fetch, int64_t first) const {
    if (first < a.N)
      return fetch_rows(fetch, in.query, first, tiles.count_from(first), a.d);
    const int64_t index = in.row / a.N + 1;
    const int64_t b = index / a.H;
    const int64_t h = index % a.H;
    const bool small = a.T * (a.d + a.dv) * int64_t(sizeof(T)) <= 256 << 10;  // a part of the second-level cache
    if (b == a.B || a.tokens.data || !small)
      return;
    fetch_rows(fetch, head<T>(a.key, b, h), 0, a.T, a.d);
    fetch_rows(fetch, head<T>(a.value, b, h), 0, a.T, a.dv);
    fetch_rows(fetch, head<T>(a.query, b, h), 0, tiles.count_from(0), a.d);
  }

  void write(int64_t first, int64_t count) {
    in.softmax.write(first, count, top.data, total.data);
    const C* share = in.softmax.share + first;
    const bool unit = result.c == 1 && (!in.gate || in.gate.c == 1) && (!in.attended || in.attended.c == 1);
    for (int64_t r = 0; r < count; ++r) {
      const C* sum = sums.data + r * value_width;
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

template <class T>
struct Backward {
  using C = acc_t<T>;
  const GatedCrossAttentionBackward& g;
  const GatedCrossAttention& a;
  const Tiles& tiles;
  HeadInputs<T> in;
  Head<T> grad_result{}, grad_query{}, grad_gate{};
  const int64_t width, query_width, value_width;
  const bool scores_matter;  // anything but grad_value and grad_gate
  Scratch<C> keys, key_panels, values, query, query_columns, upstream, upstream_columns, weights, grad_scores, sums,
      mean, base, certain, tokens;
  bool some_certain = false;  // a weight may be exactly 1

  Backward(const GatedCrossAttentionBackward& g, const Tiles& tiles)
      : g(g),
        a(g.forward),
        tiles(tiles),
        in(a),
        width(padded<C>(tiles.height)),
        query_width(padded<C>(a.d)),
        value_width(padded<C>(a.dv)),
        scores_matter(g.grad_query.data || g.grad_key.data || g.grad_bias),
        keys((a.T + slack) * query_width),
        key_panels(g.grad_query.data ? packed_size<C>(a.T, a.d) : 0),
        values(scores_matter ? (a.T + slack) * value_width : 0),
        query(width * query_width),
        query_columns(a.d * width),
        upstream(width * value_width),
        upstream_columns(scores_matter ? a.dv * width : 0),
        weights(score_rows(a.T) * width + slack),
        grad_scores(score_rows(a.T) * width + slack),
        sums((tiles.height + slack) * query_width),
        mean(width),
        base(width),
        certain(width),
        tokens(size(a)) {}

  // Sums for the tokens of a head: of dkey, then of dvalue.
  static int64_t size(const GatedCrossAttention& a) { return (a.T + slack) * (padded<C>(a.d) + padded<C>(a.dv)); }
  C* key_sums() const { return tokens.data; }
  C* value_sums() const { return tokens.data + (a.T + slack) * query_width; }

  void start(int64_t index) {
    const int64_t b = index / a.H;
    const int64_t h = index % a.H;
    in.set(index);
    grad_result = head<T>(g.grad_result, b, h);
    grad_query = head<T>(g.grad_query, b, h);
    grad_gate = head<T>(g.grad_gate, b, h);
    read_tokens(in.key, in.order, in.order.count, a.d, keys.data);
    if (scores_matter)
      read_tokens(in.value, in.order, in.order.count, a.dv, values.data);
    if (grad_query)
      pack_rows(in.key, in.order, in.order.count, a.d, key_panels.data);
    memset(tokens.data, 0, size(a) * sizeof(C));
  }

  void tile(int64_t first, int64_t count) {
    // A query that attends to nothing may hold NaN: it is read as 0.
    auto attends = [&](int64_t r) { return in.softmax.share[first + r] != 0; };
    read_rows<T>(
        count, a.d, [&](int64_t r) -> const T* { return attends(r) ? in.query.row(first + r) : nullptr; }, in.query.c,
        query.data);
    pack_transposed<C>(
        a.d, count, [&](int64_t r) { return query.data + r * query_width; }, 1, in.scale.query, query_columns.data);
    for (int64_t r = 0; r < count; ++r)
      read_upstream(first, r, attends(r));
    if (scores_matter)
      pack_transposed<C>(
          a.dv, count, [&](int64_t r) { return upstream.data + r * value_width; }, 1, C(1), upstream_columns.data);
    int64_t found = 0;
    for (int64_t r = 0; r < count; ++r) {
      base.data[r] = in.softmax.base(first + r);
      certain.data[r] = in.softmax.certain(first + r);
      found += certain.data[r] == 1;
    }
    some_certain = found > 0;
    for (int64_t r = count; r < padded<C>(count); ++r)
      mean.data[r] = 0, base.data[r] = infinity<C>, certain.data[r] = 2;
    Fetch fetch;
    ahead(fetch, first + count);
    fetch.spread(count * in.order.count * 2 * (a.d + a.dv));
    for (int64_t k = 0; k < blocks(in.order.count); ++k) {
      const int64_t n = block_tokens(in.order.count, k);
      const int64_t t = k * token_block;
      C* p = weights.data;
      C* ds = grad_scores.data;
      gemm_tile<C, false>(n, count, a.d, keys.data + t * query_width, query_width, {query_columns.data, 0}, p, width,
                          false, fetch);
      in.finish(p, width, first, count, k);
      if (scores_matter)
        gemm_tile<C, false>(n, count, a.dv, values.data + t * value_width, value_width, {upstream_columns.data, 0}, ds,
                            width, false, fetch);
      recover(padded<C>(count), n);
      if (g.grad_value.data)
        gemm_tile<C, false>(n, a.dv, count, p, width, {upstream.data, value_width}, value_sums() + t * value_width,
                            value_width, true, fetch);
      if (g.grad_bias)
        write_bias(first, count, k);
      if (grad_query)
        gemm_tile<C, true>(count, a.d, n, ds, width, {key_panels.data + t * query_width, 0}, sums.data, query_width,
                           k != 0, fetch);
      if (g.grad_key.data)
        gemm_tile<C, false>(n, a.d, count, ds, width, {query.data, query_width}, key_sums() + t * query_width,
                            query_width, true, fetch);
    }
    if (grad_query)
      write_query(first, count);
    if (a.nontemporal)
      fence();
  }
  // What the head's next tile needs.
  void ahead(Fetch& fetch, int64_t first) const {
    const int64_t rows = tiles.count_from(first);
    fetch_rows(fetch, in.query, first, rows, a.d);
    fetch_rows(fetch, grad_result, first, rows, a.dv);
    fetch_rows(fetch, in.attended, first, rows, a.dv);
    fetch_rows(fetch, in.gate, first, rows, a.dv);
  }

  // G = grad_result * gate * share, its product with A, and the gate's gradient.
  void read_upstream(int64_t first, int64_t r, bool attends) {
    const int64_t n = first + r;
    C* to = upstream.data + r * value_width;
    const T* from = grad_result.row(n);
    const T* gate = in.gate ? in.gate.row(n) : nullptr;
    const T* before = in.attended.row(n);
    T* of_gate = grad_gate ? grad_gate.row(n) : nullptr;
    if (!attends) {
      memset(to, 0, value_width * sizeof(C));
      if (of_gate)
        for (int64_t c = 0; c < a.dv; ++c)
          of_gate[c * grad_gate.c] = from_acc<T>(C(0));
      mean.data[r] = 0;
      return;
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
    mean.data[r] = sum<C>(total) + rest;
  }

  // Scores -> exponentials, and the weights' gradient -> that of the scores.
  void recover(int64_t count, int64_t n) {
    with_flag(some_certain, [&](auto some) {
      for (int64_t i = 0; i < n; ++i) {
        C* p = weights.data + i * width;
        C* ds = grad_scores.data + i * width;
        for (int64_t r = 0; r < count; r += lanes<C>) {
          const vec<C> w = exp_below(load(p + r) - load(base.data + r));
          store(p + r, w);
          if (!scores_matter)
            continue;
          const vec<C> d = w * (load(ds + r) - load(mean.data + r));
          store(ds + r, some.value && w == load(certain.data + r) ? vec<C>{} : d);
        }
      }
    });
  }

  void write_bias(int64_t first, int64_t count, int64_t block) {
    const int64_t n = block_tokens(in.order.count, block);
    for (int64_t r = 0; r < count; ++r) {
      C* to = static_cast<C*>(g.grad_bias) + (in.row + first + r) * a.T +
              block * token_block;  // with a bias all tokens take part
      for (int64_t i = 0; i < n; ++i)
        to[i] = grad_scores.data[i * width + r];
    }
  }

  void write_query(int64_t first, int64_t count) {
    const bool nontemporal = a.nontemporal && grad_query.c == 1 && streamable(grad_query.row(first), a.d, grad_query.n);
    for (int64_t r = 0; r < count; ++r)
      write_row<T>(in.order.count ? sums.data + r * query_width : nullptr, a.d, C(a.scale), grad_query.row(first + r),
                   grad_query.c, nontemporal);
  }
};

template <class T>
void forward(const GatedCrossAttention& a, const Parallel& parallel) {
  const Tiles tiles(a.B * a.H, a.N, tile_rows, 2 * a.T * (a.d + a.dv), parallel);
  tiles.run(parallel, [&](int64_t part) {
    Forward<T> work(a, tiles);
    tiles.of_part(part, [&](int64_t index, int64_t first, int64_t last) {
      work.start(index);
      for (int64_t tile = first; tile < last; ++tile)
        work.tile(tiles.first_row(tile), tiles.count(tile));
    });
  });
}

template <class T>
void backward(const GatedCrossAttentionBackward& g, const Parallel& parallel) {
  using C = acc_t<T>;
  const GatedCrossAttention& a = g.forward;
  const Tiles tiles(a.B * a.H, a.N, tile_rows, 6 * a.T * (a.d + a.dv), parallel);
  // behind those of the keys
  const int64_t size = Backward<T>::size(a);
  const int64_t value_sums = (a.T + slack) * padded<C>(a.d);
  const bool of_tokens = g.grad_key.data || g.grad_value.data;

  auto write = [&](int64_t index, const C* sums, const Order& order) {
    const int64_t b = index / a.H;
    const int64_t h = index % a.H;
    if (g.grad_key.data)
      write_tokens(sums, padded<C>(a.d), a.d, C(a.scale), order, order.count, a.T, head<T>(g.grad_key, b, h));
    if (g.grad_value.data)
      write_tokens(sums + value_sums, padded<C>(a.dv), a.dv, C(1), order, order.count, a.T,
                   head<T>(g.grad_value, b, h));
  };
  run_backward<Backward<T>, HeadInputs<T>, C>(g, tiles, of_tokens ? size : 0, parallel, write);
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
