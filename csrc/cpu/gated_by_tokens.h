// Gated cross-attention token by token, for queries that are few beside the tokens: a part has some of a head's tokens,
// reads their keys and values once, where they lie if it can, and takes all queries to them; what the queries have of
// each part is merged by maximum and sum, in the order of the parts. The other order copies keys and values for every
// part that has queries of the head, and leaves threads without work where there are few. Backward a token's gradients
// are complete as its part is done with it, and only those of the queries are sums over parts.
#pragma once
#include "features.h"
#include "gated.h"

namespace mmk {
namespace {

// So few queries are taken one by one: dot products and weighted sums of rows, nothing is copied.
constexpr int64_t single_queries = 4;

// Whether it is the better order.
inline bool by_tokens(const GatedCrossAttention& a, const Parallel& parallel) {
  if (a.N == 0 || a.T == 0)
    return false;
  const bool idle = a.B * a.H * ((a.N + tile_rows - 1) / tile_rows) < parallel.threads && a.T > tile_rows;
  return a.N <= 24 || 8 * a.N <= a.T || idle;
}

inline Tiles token_tiles(const GatedCrossAttention& a, int64_t products, const Parallel& parallel) {
  return Tiles(a.B * a.H, a.T, token_block, products * a.N * (a.d + a.dv), parallel);
}

// Asks for the first rows, up to a part of the first-level cache, so that they come while others are multiplied: of a
// few queries the multiplications are over before the memory's own prefetching has begun.
template <class T>
inline void ask_for(Head<T> from, int64_t first, int64_t count, int64_t channels) {
  constexpr int64_t most = 16 << 10;
  if (!from || from.c != 1)
    return;
  const int64_t line = 64 / sizeof(T);
  for (int64_t i = 0, asked = 0; i < count && asked < most; ++i)
    for (int64_t c = 0; c < channels; c += line, asked += 64)
      __builtin_prefetch(from.row(first + i) + c, 0, 2);
}

// A part's tokens of a tile, as products want them.
template <class T>
struct TokenRows {
  using C = acc_t<T>;
  const HeadInputs<T>& in;
  const int64_t channels, width;
  Scratch<C> copy, panels;

  TokenRows(const HeadInputs<T>& in, int64_t rows, int64_t channels, bool of_panels)
      : in(in),
        channels(channels),
        width(padded<C>(channels)),
        copy((rows + slack) * width),
        panels(of_panels ? rows * width : 0) {}

  bool all() const { return in.order.count == in.a.T; }

  // product(row, count, rows, step) for rows as the left side of a product: where they lie, as far as blocks don't
  // reach behind them, and copies.
  template <class F>
  void left(Head<T> from, int64_t first, int64_t count, F product) const {
    int64_t done = 0;
    if constexpr (std::is_same<T, C>::value)
      if (all() && from.c == 1) {
        done = count - count % whole_rows;
        product(int64_t(0), done, static_cast<const C*>(from.row(first)), from.n);
      }
    if (done < count)
      product(done, count - done, static_cast<const C*>(read(from, first + done, count - done)), width);
  }
  // As the right side: where they lie if few rows of the other multiply them, or in panels.
  Matrix<C> right(Head<T> from, int64_t first, int64_t count, bool used_once) const {
    if constexpr (std::is_same<T, C>::value)
      if (used_once && all() && from.c == 1 && from.n != 0 && channels == width)
        return {from.row(first), from.n};
    pack<T>(count, channels, [&](int64_t i) { return from.row(in.order[first + i]); }, from.c, C(1), panels.data);
    return {panels.data, 0};
  }
  // Rows one stride apart.
  template <class F>
  void along(Head<T> from, int64_t first, int64_t count, F f) const {
    if (all())
      f(Run<T>{from.row(first), from.n, from.c});
    else
      f(Run<C>{read(from, first, count), width, 1});
  }

 private:
  C* read(Head<T> from, int64_t first, int64_t count) const {
    read_rows<T>(
        count, channels, [&](int64_t i) -> const T* { return from.row(in.order[first + i]); }, from.c, copy.data);
    return copy.data;
  }
};

// What the queries of a head have so far: the largest score, the sum of exponentials, the weighted sum of values.
template <class C>
struct QuerySums {
  int64_t queries, width;
  C *values, *top, *total;
  static int64_t further(const GatedCrossAttention& a) { return a.N <= single_queries ? 0 : slack; }  // rows
  static int64_t size(const GatedCrossAttention& a) {
    return (a.N + further(a)) * padded<C>(a.dv) + 2 * (padded<C>(a.N) + lanes<C>);
  }
  QuerySums(C* data, const GatedCrossAttention& a)
      : queries(a.N),
        width(padded<C>(a.dv)),
        values(data),
        top(values + (a.N + further(a)) * width),
        total(top + padded<C>(a.N) + lanes<C>) {}
  void clear() const {
    memset(values, 0, (top - values) * sizeof(C));
    for (int64_t r = 0; r < padded<C>(queries); ++r) {
      top[r] = -infinity<C>;
      total[r] = 0;
    }
  }
  void add(const QuerySums& other) const {
    for (int64_t r = 0; r < queries; ++r) {
      if (other.top[r] == -infinity<C> && other.total[r] == 0)
        continue;
      const C now = maximum(top[r], other.top[r]);
      const C mine = top[r] == -infinity<C> ? C(0) : exp_below(top[r] - now);
      const C its = exp_below(other.top[r] - now);
      top[r] = now;
      total[r] = total[r] * mine + other.total[r] * its;
      multiply(values + r * width, width, mine);
      add_scaled(values + r * width, other.values + r * width, width, its);
    }
  }
};

template <class T>
struct ForwardByTokens {
  using C = acc_t<T>;
  const GatedCrossAttention& a;
  HeadInputs<T> in;
  const int64_t width, key_width;
  TokenRows<T> keys, values;
  Scratch<C> query, scores, factor, sums;
  QuerySums<C> of_queries;

  ForwardByTokens(const GatedCrossAttention& a, const Tiles& tiles)
      : a(a),
        in(a),
        width(a.N <= single_queries ? padded<C>(tiles.height) : padded<C>(a.N < tile_rows ? a.N : tile_rows)),
        key_width(padded<C>(a.d)),
        keys(in, tiles.height, a.d, false),
        values(in, tiles.height, a.dv, true),
        query(a.N <= single_queries ? a.N * key_width : (a.N + tile_rows) / tile_rows * a.d * width),
        scores((tiles.height + slack) * width + slack),
        factor(width),
        sums(QuerySums<C>::size(a)),
        of_queries(sums.data, a) {}

  void start(int64_t index) {
    in.set(index);
    of_queries.clear();
    if (a.N <= single_queries) {
      read_rows<T>(a.N, a.d, [&](int64_t n) -> const T* { return in.query.row(n); }, in.query.c, query.data);
      multiply(query.data, a.N * key_width, in.scale.query);
      return;
    }
    for (int64_t n = 0; n < a.N; n += tile_rows)
      pack_transposed<T>(
          a.d, a.N - n < tile_rows ? a.N - n : tile_rows, [&](int64_t r) { return in.query.row(n + r); }, in.query.c,
          in.scale.query, query.data + n * a.d);
  }

  // Tokens `first` and on of those that take part.
  void tile(int64_t first, int64_t count) {
    count = in.order.count - first < count ? in.order.count - first : count;
    if (count <= 0)
      return;
    if (a.N <= single_queries)
      return one_by_one(first, count);
    const Matrix<C> v = values.right(in.value, first, count, a.N <= 24);
    for (int64_t n = 0; n < a.N; n += tile_rows) {
      const int64_t queries = a.N - n < tile_rows ? a.N - n : tile_rows;
      keys.left(in.key, first, count, [&](int64_t row, int64_t rows, const C* k, int64_t step) {
        gemm_tile<C, false>(rows, queries, a.d, k, step, {query.data + n * a.d, 0}, scores.data + row * width, width,
                            false);
      });
      in.finish(scores.data, width, n, queries, first, count);
      softmax_columns(
          scores.data, count, width, padded<C>(queries), [](int64_t) { return true; }, of_queries.top + n,
          of_queries.total + n, factor.data);
      scale_rows(of_queries.values + n * of_queries.width, queries, of_queries.width, a.dv, factor.data);
      gemm_tile<C, true>(queries, a.dv, count, scores.data, width, v, of_queries.values + n * of_queries.width,
                         of_queries.width, true);
    }
  }
  // Scores are [query, token] here.
  void one_by_one(int64_t first, int64_t count) {
    ask_for(in.value, first, count, a.dv);
    keys.along(in.key, first, count, [&](auto k) {
      for (int64_t n = 0; n < a.N; ++n)
        Lines::dot(k, Shared<C>{query.data + n * key_width}, count, Heads<C>{1, a.d}, scores.data + n * width, 0);
    });
    in.finish_rows(scores.data, width, first, count);
    for (int64_t n = 0; n < a.N; ++n) {
      C* s = scores.data + n * width;
      const C before = of_queries.top[n];
      const C now = maximum(before, max_of(s, count));
      const C base = now == -infinity<C> ? C(0) : now;
      const C factor = before == -infinity<C> ? C(0) : exp_below(before - base);
      of_queries.total[n] = of_queries.total[n] * factor + exp_sum(s, count, base);
      of_queries.top[n] = now;
      if (factor != 1)
        multiply(of_queries.values + n * of_queries.width, of_queries.width, factor);
    }
    if (first + count == in.order.count && in.index + 1 < a.B * a.H)
      ask_for(head<T>(a.key, (in.index + 1) / a.H, (in.index + 1) % a.H), 0, a.T, a.d);
    values.along(in.value, first, count, [&](auto v) {
      for (int64_t n = 0; n < a.N; ++n)
        Lines::weighted_sum(v, scores.data + n * width, static_cast<const C*>(nullptr), count, Heads<C>{1, a.dv}, 0,
                            of_queries.values + n * of_queries.width, static_cast<C*>(nullptr));
    });
  }
};

template <class T>
void forward_by_tokens(const GatedCrossAttention& a, const Parallel& parallel) {
  using C = acc_t<T>;
  const Tiles tiles = token_tiles(a, 2, parallel);
  const int64_t size = QuerySums<C>::size(a);
  Shares<C> shares(tiles, size);
  auto write = [&](const HeadInputs<T>& in, const QuerySums<C>& sums) {
    Results<T> results{a};
    results.set(in.index);
    results.write(in, 0, a.N, sums.values, sums.width, sums.top, sums.total);
  };
  tiles.run(parallel, [&](int64_t part) {
    ForwardByTokens<T> work(a, tiles);
    tiles.of_part(part, [&](int64_t index, int64_t first, int64_t last) {
      work.start(index);
      for (int64_t tile = first; tile < last; ++tile)
        work.tile(tiles.first_row(tile), tiles.count(tile));
      if (C* share = shares.of(part, index))
        memcpy(share, work.sums.data, size * sizeof(C));
      else
        write(work.in, work.of_queries);
    });
  });
  HeadInputs<T> in(a);
  shares.merge([&](int64_t index, C** share, int64_t count) {
    const QuerySums<C> total(share[0], a);
    for (int64_t k = 1; k < count; ++k)
      total.add(QuerySums<C>(share[k], a));
    in.set(index);
    write(in, total);
  });
}

}  // namespace
}  // namespace mmk
