// The backward pass of gated_by_tokens.h, with the formulas of gated_cross_attention.cpp.
#pragma once
#include "gated_by_tokens.h"

namespace mmk {
namespace {

template <class T>
struct BackwardByTokens {
  using C = acc_t<T>;
  const GatedCrossAttentionBackward& g;
  const GatedCrossAttention& a;
  HeadInputs<T> in;
  Head<T> grad_key{}, grad_value{};
  const bool single;
  const int64_t width, query_width, value_width;
  const bool scores_matter;  // anything but grad_value and grad_gate
  TokenRows<T> keys, values;
  Scratch<C> query, query_columns, upstream, upstream_columns, mean, base, certain, centre, excess, weights,
      grad_scores, key_sums, value_sums, sums;
  int64_t found = 0;  // queries of which a weight may be exactly 1

  BackwardByTokens(const GatedCrossAttentionBackward& g, const Tiles& tiles)
      : g(g),
        a(g.forward),
        in(a),
        single(a.N <= single_queries),
        width(single ? padded<C>(tiles.height) : padded<C>(a.N < tile_rows ? a.N : tile_rows)),
        query_width(padded<C>(a.d)),
        value_width(padded<C>(a.dv)),
        scores_matter(g.grad_query.data || g.grad_key.data || g.grad_bias),
        keys(in, tiles.height, a.d, true),
        values(in, tiles.height, a.dv, false),
        query(rows() * query_width),
        query_columns(single ? 0 : rows() * a.d),
        upstream(rows() * value_width),
        upstream_columns(single ? 0 : rows() * a.dv),
        mean(rows()),
        base(rows()),
        certain(rows()),
        centre(query_width),
        excess(rows()),
        weights((tiles.height + slack) * width + slack),
        grad_scores((tiles.height + slack) * width + slack),
        key_sums((tiles.height + slack) * query_width),
        value_sums((tiles.height + slack) * value_width),
        sums(size(g)) {}

  int64_t rows() const { return (a.N + tile_rows - 1) / tile_rows * tile_rows + slack; }
  // Of the queries' gradients, whose sums are over all tokens.
  static int64_t size(const GatedCrossAttentionBackward& g) {
    return g.grad_query.data ? (g.forward.N + slack) * padded<C>(g.forward.d) : 0;
  }

  // `begins`: no other part has the head's first tokens, nor writes what there is one of in a head.
  void start(int64_t index, bool begins) {
    const int64_t b = index / a.H;
    const int64_t h = index % a.H;
    in.set(index);
    grad_key = head<T>(g.grad_key, b, h);
    grad_value = head<T>(g.grad_value, b, h);
    const Head<T> grad_result = head<T>(g.grad_result, b, h);
    const Head<T> grad_gate = begins ? head<T>(g.grad_gate, b, h) : Head<T>{};
    read_rows<T>(a.N, a.d, [&](int64_t n) { return attending(in, n); }, in.query.c, query.data);
    multiply(query.data, a.N * query_width, in.scale.query);
    found = 0;
    for (int64_t n = 0; n < a.N; ++n) {
      mean.data[n] = read_upstream(in, grad_result, grad_gate, n, upstream.data + n * value_width);
      base.data[n] = in.softmax.base(n);
      certain.data[n] = in.softmax.certain(n);
      found += certain.data[n] == 1;
    }
    for (int64_t n = a.N; n < padded<C>(a.N); ++n) {
      mean.data[n] = 0;
      base.data[n] = infinity<C>;
      certain.data[n] = 2;
    }
    for (int64_t n = 0; n < a.N && !single; n += tile_rows) {
      pack_transposed<C>(
          a.d, queries(n), [&](int64_t r) { return query.data + (n + r) * query_width; }, 1, C(1),
          query_columns.data + n * a.d);
      if (scores_matter)
        pack_transposed<C>(
            a.dv, queries(n), [&](int64_t r) { return upstream.data + (n + r) * value_width; }, 1, C(1),
            upstream_columns.data + n * a.dv);
    }
    if (g.grad_query.data) {
      memset(sums.data, 0, size(g) * sizeof(C));
      // Of few: they are read for it alone.
      const int64_t count = in.order.count;
      const int64_t some = count < 8 ? count : 8;
      find_centre(some, [&](int64_t i) { return in.key.row(in.order[i * count / some]); }, in.key.c, a.d, centre.data);
    }
    if (!begins || in.order.count == a.T)
      return;
    for (int64_t t = 0; t < a.T; ++t) {  // those that take part are written over
      if (in.takes_part(t))
        continue;
      write_token(grad_key, a.d, nullptr, C(1), t);
      write_token(grad_value, a.dv, nullptr, C(1), t);
    }
  }
  int64_t queries(int64_t n) const { return a.N - n < tile_rows ? a.N - n : tile_rows; }
  static void write_token(Head<T> to, int64_t channels, const C* from, C factor, int64_t t) {
    if (to)
      write_row<T>(from, channels, factor, to.row(t), to.c);
  }

  void tile(int64_t first, int64_t count) {
    count = in.order.count - first < count ? in.order.count - first : count;
    if (count <= 0)
      return;
    if (single)
      one_by_one(first, count);
    else
      all_at_once(first, count);
    if (g.grad_query.data)
      for (int64_t n = 0; n < a.N; ++n)
        add_scaled(sums.data + n * query_width, centre.data, query_width, -excess.data[n]);
    if (single)
      return;
    for (int64_t i = 0; i < count; ++i) {
      write_token(grad_key, a.d, key_sums.data + i * query_width, in.scale.score, in.order[first + i]);
      write_token(grad_value, a.dv, value_sums.data + i * value_width, C(1), in.order[first + i]);
    }
  }

  void all_at_once(int64_t first, int64_t count) const {
    const bool few = a.N <= 24;
    const Matrix<C> k = g.grad_query.data ? keys.right(in.key, first, count, few) : Matrix<C>{};
    C* p = weights.data;
    C* ds = grad_scores.data;
    for (int64_t n = 0; n < a.N; n += tile_rows) {
      auto product = [&](const TokenRows<T>& rows, Head<T> from, const C* columns, C* to) {
        rows.left(from, first, count, [&](int64_t row, int64_t some, const C* left, int64_t step) {
          gemm_tile<C, false>(some, queries(n), rows.channels, left, step, {columns + n * rows.channels, 0},
                              to + row * width, width, false);
        });
      };
      product(keys, in.key, query_columns.data, p);
      in.finish(p, width, n, queries(n), first, count);
      if (scores_matter)
        product(values, in.value, upstream_columns.data, ds);
      Recovery<C>{base.data + n, certain.data + n, has_all(count) ? nullptr : mean.data + n, excess.data + n,
                  found > 0}(p, scores_matter ? ds : nullptr, width, padded<C>(queries(n)), count);
      if (g.grad_value.data)
        gemm_tile<C, false>(count, a.dv, queries(n), p, width, {upstream.data + n * value_width, value_width},
                            value_sums.data, value_width, n != 0);
      if (g.grad_bias)
        write_bias(in, static_cast<C*>(g.grad_bias), ds, width, n, queries(n), first, count);
      if (g.grad_query.data)
        gemm_tile<C, true>(queries(n), a.d, count, ds, width, k, sums.data + n * query_width, query_width, true);
      if (g.grad_key.data)
        gemm_tile<C, false>(count, a.d, queries(n), ds, width, {query.data + n * query_width, query_width},
                            key_sums.data, query_width, n != 0);
    }
  }

  // Scores are [query, token] here.
  void one_by_one(int64_t first, int64_t count) const {
    ask_for(in.value, first, count, a.dv);
    keys.along(in.key, first, count, [&](auto k) {
      for (int64_t n = 0; n < a.N; ++n)
        Lines::dot(k, Shared<C>{query.data + n * query_width}, count, Heads<C>{1, a.d}, weights.data + n * width, 0);
    });
    in.finish_rows(weights.data, width, first, count);
    if (scores_matter)
      values.along(in.value, first, count, [&](auto v) {
        for (int64_t n = 0; n < a.N; ++n)
          Lines::dot(v, Shared<C>{upstream.data + n * value_width}, count, Heads<C>{1, a.dv},
                     grad_scores.data + n * width, 0);
      });
    for (int64_t n = 0; n < a.N; ++n)
      recover(weights.data + n * width, grad_scores.data + n * width, count, n);
    if (g.grad_bias)
      for (int64_t n = 0; n < a.N; ++n)
        memcpy(static_cast<C*>(g.grad_bias) + (in.index * a.N + n) * a.T + first, grad_scores.data + n * width,
               count * sizeof(C));
    if (g.grad_query.data)
      keys.along(in.key, first, count, [&](auto k) {
        for (int64_t n = 0; n < a.N; ++n)
          Lines::weighted_sum(k, grad_scores.data + n * width, static_cast<const C*>(nullptr), count, Heads<C>{1, a.d},
                              0, sums.data + n * query_width, static_cast<C*>(nullptr));
      });
    if (grad_key)
      outer(grad_scores.data, query.data, query_width, in.scale.score, first, count, grad_key, a.d);
    if (grad_value)
      outer(weights.data, upstream.data, value_width, C(1), first, count, grad_value, a.dv);
  }
  bool has_all(int64_t count) const { return count == in.order.count; }
  void recover(C* p, C* ds, int64_t count, int64_t n) const {
    for (int64_t i = 0; i < count; i += lanes<C>)
      store(p + i, exp_below(load(p + i) - base.data[n]));
    if (!scores_matter)
      return;
    const C own = has_all(count) ? weighted_mean(p, ds, count) : mean.data[n];
    for (int64_t i = 0; i < count; i += lanes<C>) {
      const vec<C> w = load(p + i);
      store(ds + i, w == certain.data[n] ? vec<C>{} : w * (load(ds + i) - own));
    }
    excess.data[n] = sum_of(ds, count);
  }
  // to[token] = factor * sum over queries of coefficients[query, token] rows[query]
  void outer(const C* coefficients, const C* rows, int64_t step, C factor, int64_t first, int64_t count, Head<T> to,
             int64_t channels) const {
    for (int64_t i = 0; i < count; ++i) {
      T* row = to.row(in.order[first + i]);
      for (int64_t c = 0; c < channels; c += lanes<C>) {
        vec<C> sum = load(rows + c) * coefficients[i];
        for (int64_t n = 1; n < a.N; ++n)
          sum += load(rows + n * step + c) * coefficients[n * width + i];
        sum *= factor;
        if (to.c == 1 && c + lanes<C> <= channels)
          store(row + c, sum);
        else
          for (int64_t k = c; k < channels && k < c + lanes<C>; ++k)
            row[k * to.c] = from_acc<T>(sum[k - c]);
      }
    }
  }
};

template <class T>
void backward_by_tokens(const GatedCrossAttentionBackward& g, const Parallel& parallel) {
  using C = acc_t<T>;
  const GatedCrossAttention& a = g.forward;
  const Tiles tiles = token_tiles(a, 5, parallel);
  const int64_t size = BackwardByTokens<T>::size(g);
  Shares<C> shares(tiles, size);
  auto write = [&](int64_t index, const C* sums) {
    const Head<T> to = head<T>(g.grad_query, index / a.H, index % a.H);
    for (int64_t n = 0; n < a.N; ++n)
      write_row<T>(sums + n * padded<C>(a.d), a.d, C(a.scale), to.row(n), to.c);
  };
  tiles.run(parallel, [&](int64_t part) {
    BackwardByTokens<T> work(g, tiles);
    tiles.of_part(part, [&](int64_t index, int64_t first, int64_t last) {
      work.start(index, first == 0);
      for (int64_t tile = first; tile < last; ++tile)
        work.tile(tiles.first_row(tile), tiles.count(tile));
      if (!size)
        return;
      if (C* share = shares.of(part, index))
        memcpy(share, work.sums.data, size * sizeof(C));
      else
        write(index, work.sums.data);
    });
  });
  if (!size)
    return;
  shares.merge([&](int64_t index, C** share, int64_t count) {
    for (int64_t k = 1; k < count; ++k)
      add_scaled(share[0], share[k], size, C(1));
    write(index, share[0]);
  });
}

}  // namespace
}  // namespace mmk
