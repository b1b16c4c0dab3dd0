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
#include "dispatch.h"
#include "gated.h"
#include "gated_by_tokens_backward.h"

namespace mmk {
namespace {

template <class T>
struct Forward {
  using C = acc_t<T>;
  const GatedCrossAttention& a;
  const Tiles& tiles;
  HeadInputs<T> in;
  Results<T> results;
  const int64_t width, key_width, value_width;  // of tiles: of scores, of keys, of results
  Scratch<C> keys, values, query, scores, sums, top, total, factor;

  Forward(const GatedCrossAttention& a, const Tiles& tiles)
      : a(a),
        tiles(tiles),
        in(a),
        results{a},
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
    results.set(index);
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
      in.finish(scores.data, width, first, count, t, n);
      softmax_columns(scores.data, n, width, whole, [](int64_t) { return true; }, top.data, total.data, factor.data);
      if (k)
        scale_rows(sums.data, count, value_width, a.dv, factor.data);
      gemm_tile<C, true>(count, a.dv, n, scores.data, width, {values.data + t * value_width, 0}, sums.data, value_width,
                         k != 0, fetch);
    }
    results.write(in, first, count, sums.data, value_width, top.data, total.data);
  }

  // What the next tile needs: the head's next queries, or the next head.
  void ahead(Fetch& fetch, int64_t first) const {
    if (first < a.N)
      return fetch_rows(fetch, in.query, first, tiles.count_from(first), a.d);
    const int64_t index = in.index + 1;
    const int64_t b = index / a.H;
    const int64_t h = index % a.H;
    const bool small = a.T * (a.d + a.dv) * int64_t(sizeof(T)) <= 256 << 10;  // a part of the second-level cache
    if (b == a.B || a.tokens.data || !small)
      return;
    fetch_rows(fetch, head<T>(a.key, b, h), 0, a.T, a.d);
    fetch_rows(fetch, head<T>(a.value, b, h), 0, a.T, a.dv);
    fetch_rows(fetch, head<T>(a.query, b, h), 0, tiles.count_from(0), a.d);
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
      mean, base, certain, centre, excess, tokens;

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
        centre(query_width),
        excess(width),
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
    if (grad_query) {
      pack_rows(in.key, in.order, in.order.count, a.d, key_panels.data);
      find_centre(in.order.count, [&](int64_t i) { return keys.data + i * query_width; }, 1, a.d, centre.data);
    }
    memset(tokens.data, 0, size(a) * sizeof(C));
  }

  void tile(int64_t first, int64_t count) {
    read_rows<T>(count, a.d, [&](int64_t r) { return attending(in, first + r); }, in.query.c, query.data);
    pack_transposed<C>(
        a.d, count, [&](int64_t r) { return query.data + r * query_width; }, 1, in.scale.query, query_columns.data);
    for (int64_t r = 0; r < count; ++r)
      mean.data[r] = read_upstream(in, grad_result, grad_gate, first + r, upstream.data + r * value_width);
    if (scores_matter)
      pack_transposed<C>(
          a.dv, count, [&](int64_t r) { return upstream.data + r * value_width; }, 1, C(1), upstream_columns.data);
    int64_t found = 0;
    for (int64_t r = 0; r < count; ++r) {
      base.data[r] = in.softmax.base(first + r);
      certain.data[r] = in.softmax.certain(first + r);
      found += certain.data[r] == 1;
    }
    for (int64_t r = count; r < padded<C>(count); ++r)
      mean.data[r] = 0, base.data[r] = infinity<C>, certain.data[r] = 2;
    const bool all = blocks(in.order.count) == 1;
    const Recovery<C> recover{base.data, certain.data, all ? nullptr : mean.data, excess.data, found > 0};
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
      in.finish(p, width, first, count, t, n);
      if (scores_matter)
        gemm_tile<C, false>(n, count, a.dv, values.data + t * value_width, value_width, {upstream_columns.data, 0}, ds,
                            width, false, fetch);
      recover(p, scores_matter ? ds : nullptr, width, padded<C>(count), n);
      if (g.grad_value.data)
        gemm_tile<C, false>(n, a.dv, count, p, width, {upstream.data, value_width}, value_sums() + t * value_width,
                            value_width, true, fetch);
      if (g.grad_bias)
        write_bias(in, static_cast<C*>(g.grad_bias), ds, width, first, count, t, n);
      if (grad_query)
        gemm_tile<C, true>(count, a.d, n, ds, width, {key_panels.data + t * query_width, 0}, sums.data, query_width,
                           k != 0, fetch);
      for (int64_t r = 0; grad_query && r < count; ++r)
        add_scaled(sums.data + r * query_width, centre.data, query_width, -excess.data[r]);
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

  void write_query(int64_t first, int64_t count) {
    const bool nontemporal = a.nontemporal && grad_query.c == 1 && streamable(grad_query.row(first), a.d, grad_query.n);
    for (int64_t r = 0; r < count; ++r)
      write_row<T>(in.order.count ? sums.data + r * query_width : nullptr, a.d, C(a.scale), grad_query.row(first + r),
                   grad_query.c, nontemporal);
  }
};

template <class T>
void forward(const GatedCrossAttention& a, const Parallel& parallel) {
  if (by_tokens(a, parallel))
    return forward_by_tokens<T>(a, parallel);
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
  if (by_tokens(a, parallel))
    return backward_by_tokens<T>(g, parallel);
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
