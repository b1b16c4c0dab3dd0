// Bidirectional attention backward: a tile of scores is computed again and gives both softmaxes' weights, the tile's
// gradients of queries and image values, and its share of the tokens'.
#pragma once
#include "bidirectional.h"

namespace mmk {
namespace {

template <class T>
struct Backward {
  using C = acc_t<T>;
  const BidirectionalAttentionBackward& g;
  const BidirectionalAttention& a;
  HeadInputs<T> in;
  Head<T> grad_image_out{}, grad_text_out{}, grad_query{}, grad_image_value{};
  const int64_t width, rows, query_width, value_width;
  const bool need_grad_scores;  // a gradient of query or key is wanted
  Scratch<C> key_columns, key_rows, value_columns, grad_output_columns, grad_output_rows, query, image_values,
      grad_output, scores, weights, grad_weights, grad_scores, query_sums, value_sums, image_mean, text_mean, text_base,
      text_certain, text_grad_output, key_centre, query_centre, image_excess, text_excess, tokens;
  Order positions;
  bool some_certain = false;  // a token's weight may be exactly 1

  Backward(const BidirectionalAttentionBackward& g, const Tiles& tiles)
      : g(g),
        a(g.forward),
        in(a),
        width(score_width(a.T, lanes<C>)),
        rows(tiles.height + slack),
        query_width(padded<C>(a.d)),
        value_width(padded<C>(a.dv)),
        need_grad_scores(g.grad_image_query.data || g.grad_text_key.data),
        key_columns(packed_size<C>(a.T, a.d)),
        key_rows(packed_size<C>(a.T, a.d)),
        value_columns(packed_size<C>(a.T, a.dv)),
        grad_output_columns(packed_size<C>(a.T, a.dv)),
        grad_output_rows(packed_size<C>(a.T, a.dv)),
        query(rows * query_width),
        image_values(rows * value_width),
        grad_output(rows * value_width),
        scores(rows * width + slack),
        weights(rows * width + slack),
        grad_weights(rows * width + slack),
        grad_scores(rows * width + slack),
        query_sums(rows * query_width),
        value_sums(rows * value_width),
        image_mean(rows),
        text_mean(padded<C>(a.T) + token_block),
        text_base(padded<C>(a.T) + token_block),
        text_certain(padded<C>(a.T) + token_block),
        text_grad_output(a.T * value_width),
        key_centre(query_width),
        query_centre(query_width),
        image_excess(rows),
        text_excess(width),
        tokens(size(a)),
        positions(a.N) {}

  static int64_t size(const BidirectionalAttention& a) { return (a.T + slack) * (padded<C>(a.d) + padded<C>(a.dv)); }
  C* key_sums() const { return tokens.data; }
  C* text_value_sums() const { return tokens.data + (a.T + slack) * query_width; }

  void start(int64_t index) {
    const int64_t b = index / a.H;
    const int64_t h = index % a.H;
    in.set(index);
    grad_image_out = head<T>(g.grad_image_out, b, h);
    grad_text_out = head<T>(g.grad_text_out, b, h);
    grad_query = head<T>(g.grad_image_query, b, h);
    grad_image_value = head<T>(g.grad_image_value, b, h);
    pack_columns(in.key, in.order, a.T, a.d, in.scale.query, key_columns.data);
    pack_rows(in.key, in.order, a.T, a.d, key_rows.data);
    pack_columns(in.text_value, in.order, in.order.count, a.dv, C(1), value_columns.data);
    if (grad_text_out) {
      const Head<C> grad_output{text_grad_output.data, value_width, 1};
      read_grad_output(grad_text_out, in.text_softmax, 0, a.T, grad_output.data);
      pack_columns(grad_output, in.order, a.T, a.dv, C(1), grad_output_columns.data);
      pack_rows(grad_output, in.order, a.T, a.dv, grad_output_rows.data);
    }
    if (need_grad_scores)
      find_centres();
    some_certain = false;
    for (int64_t i = 0; i < padded<C>(a.T); ++i) {
      const int64_t t = i < a.T ? in.order[i] : -1;
      text_base.data[i] = t < 0 ? infinity<C> : in.text_softmax.base(t);
      text_certain.data[i] = t < 0 ? C(2) : in.text_softmax.certain(t);
      text_mean.data[i] = t < 0 || !grad_text_out ? C(0) : mean(grad_text_out, in.unrounded, in.text_softmax, t);
      some_certain = some_certain || text_certain.data[i] == 1;
    }
    memset(tokens.data, 0, size(a) * sizeof(C));
  }
  // Of those that take part.
  void find_centres() {
    find_centre(in.order.count, [&](int64_t i) { return in.key.row(in.order[i]); }, in.key.c, a.d, key_centre.data);
    positions.find(in.image_mask.data, in.image_mask.n, a.N, false);
    find_centre(
        positions.count, [&](int64_t i) { return in.query.row(positions[i]); }, in.query.c, a.d, query_centre.data);
  }
  // What arrives times the softmax's share, since the weights are a factor of all that has it. [count, value_width]
  void read_grad_output(Head<T> from, const SoftmaxRows<C>& softmax, int64_t first, int64_t count, C* to) const {
    read_rows<T>(
        count, a.dv,
        [&](int64_t r) -> const T* { return softmax.share[first + r] != 0 ? from.row(first + r) : nullptr; }, from.c,
        to);
    scale_rows(to, count, value_width, value_width, softmax.share + first);
  }
  // Of the weights' gradient, times share, too.
  template <class Result>
  C mean(Head<T> grad_output, Head<Result> result, const SoftmaxRows<C>& softmax, int64_t n) const {
    if (softmax.share[n] == 0)
      return 0;
    C total = 0;
    for (int64_t c = 0; c < a.dv; ++c)
      total += to_acc(grad_output.row(n)[c * grad_output.c]) * to_acc(result.row(n)[c * result.c]);
    return total * softmax.share[n];
  }

  void tile(int64_t first, int64_t count) {
    in.read(first, count, query.data);
    in.read_values(first, count, image_values.data);
    if (grad_image_out) {
      read_grad_output(grad_image_out, in.image_softmax, first, count, grad_output.data);
      for (int64_t r = 0; r < count; ++r)
        image_mean.data[r] = mean(grad_image_out, in.image_out, in.image_softmax, first + r);
    }
    for (int64_t k = 0; k < blocks(a.T); ++k) {
      const int64_t n = block_tokens(a.T, k);
      const int64_t valid = grad_image_out ? in.valid_tokens(k) : 0;
      const int64_t t = k * token_block;
      C* ds = grad_scores.data;
      gemm_tile<C, false>(count, n, a.d, query.data, query_width, {key_columns.data + t * a.d, 0}, scores.data, width,
                          false);
      in.scale.apply(scores.data, count, width, padded<C>(n));
      for (int64_t r = 0; r < count; ++r)
        memset(ds + r * width, 0, padded<C>(n) * sizeof(C));
      if (valid) {
        if (need_grad_scores)
          gemm_tile<C, false>(count, valid, a.dv, grad_output.data, value_width, {value_columns.data + t * a.dv, 0},
                              grad_weights.data, width, false);
        over_tokens(first, count, valid);
        if (g.grad_text_value.data)
          gemm_tile<C, true>(valid, a.dv, count, weights.data, width, {grad_output.data, value_width},
                             text_value_sums() + t * value_width, value_width, true);
      }
      if (grad_text_out) {
        if (need_grad_scores)
          gemm_tile<C, false>(count, n, a.dv, image_values.data, value_width, {grad_output_columns.data + t * a.dv, 0},
                              grad_weights.data, width, false);
        over_positions(first, count, n, t);
        if (grad_image_value)
          gemm_tile<C, false>(count, a.dv, n, scores.data, width, {grad_output_rows.data + t * value_width, 0},
                              value_sums.data, value_width, k != 0);
      }
      if (grad_query)
        gemm_tile<C, false>(count, a.d, n, ds, width, {key_rows.data + t * query_width, 0}, query_sums.data,
                            query_width, k != 0);
      for (int64_t r = 0; grad_query && valid && r < count; ++r)
        add_scaled(query_sums.data + r * query_width, key_centre.data, query_width, -image_excess.data[r]);
      if (!g.grad_text_key.data)
        continue;
      gemm_tile<C, true>(n, a.d, count, ds, width, {query.data, query_width}, key_sums() + t * query_width, query_width,
                         true);
      for (int64_t i = 0; grad_text_out && i < n; ++i)
        add_scaled(key_sums() + (t + i) * query_width, query_centre.data, query_width, -text_excess.data[i]);
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t n = first + r;
      if (grad_query)
        write_row<T>(a.T ? query_sums.data + r * query_width : nullptr, a.d, C(a.scale), grad_query.row(n),
                     grad_query.c);
      if (grad_image_value)
        write_row<T>(a.T && grad_text_out && in.valid(n) ? value_sums.data + r * value_width : nullptr, a.dv, C(1),
                     grad_image_value.row(n), grad_image_value.c);
    }
  }

  // weights = exponentials, grad_scores = P (dP - mean). Lanes behind the last token that takes part get 0.
  void over_tokens(int64_t first, int64_t count, int64_t n) {
    const int64_t last = vectors<C>(n) * lanes<C> - lanes<C>;
    const vec<C> none = padding<C>(n);
    const bool all = n == in.order.count;
    for (int64_t r = 0; r < count; ++r) {
      C* p = weights.data + r * width;
      C* ds = grad_scores.data + r * width;
      const C* s = scores.data + r * width;
      const C* dp = grad_weights.data + r * width;
      const C base = in.image_softmax.base(first + r);
      const C certain = in.image_softmax.certain(first + r);
      vec<C> total = {};
      vec<C> mean = {};
      for (int64_t i = 0; i <= last; i += lanes<C>) {
        const vec<C> x = load(s + i) - base;
        const vec<C> e = exp_below(i == last ? x + none : x);
        store(p + i, e);
        if (!need_grad_scores)
          continue;
        total += e;
        mean += e == 0 ? vec<C>{} : e * load(dp + i);
      }
      if (!need_grad_scores)
        continue;
      const C sum_of_weights = sum<C>(total);
      const C own = !all ? image_mean.data[r] : sum_of_weights == 0 ? C(0) : sum<C>(mean) / sum_of_weights;
      vec<C> left = {};
      with_flag(certain == 1, [&](auto may_be) {
        for (int64_t i = 0; i <= last; i += lanes<C>) {
          const vec<C> e = load(p + i);
          vec<C> d = e * (load(dp + i) - own);
          if (may_be.value)
            d = e == certain ? vec<C>{} : d;
          d = i == last ? (none == vec<C>{} ? d : vec<C>{}) : d;
          store(ds + i, d);
          left += d;
        }
      });
      image_excess.data[r] = sum<C>(left);
    }
  }

  // scores = exponentials, grad_scores += R (dR - mean of the token). 0 in rows that don't take part.
  void over_positions(int64_t first, int64_t count, int64_t n, int64_t t) {
    for (int64_t r = 0; r < count; ++r)
      if (!in.valid(first + r))
        memset(scores.data + r * width, 0, padded<C>(n) * sizeof(C));
    with_flag(some_certain, [&](auto some) {
      for (int64_t i = 0; i < n; i += lanes<C>) {
        const vec<C> base = load(text_base.data + t + i);
        const vec<C> certain = load(text_certain.data + t + i);
        const vec<C> mean = load(text_mean.data + t + i);
        vec<C> left = {};
        for (int64_t r = 0; r < count; ++r) {
          if (!in.valid(first + r))
            continue;
          C* s = scores.data + r * width + i;
          C* ds = grad_scores.data + r * width + i;
          const vec<C> p = exp_below(load(s) - base);
          store(s, p);
          if (!need_grad_scores)
            continue;
          vec<C> d = p * (load(grad_weights.data + r * width + i) - mean);
          if (some.value)
            d = p == certain ? vec<C>{} : d;
          store(ds, load(ds) + d);
          left += d;
        }
        store(text_excess.data + i, left);
      }
    });
  }
};

template <class T>
void backward(const BidirectionalAttentionBackward& g, const Parallel& parallel) {
  using C = acc_t<T>;
  const BidirectionalAttention& a = g.forward;
  const Tiles tiles(a.B * a.H, a.N, tile_rows, 10 * a.T * (a.d + a.dv), parallel);
  // behind those of the keys
  const int64_t size = Backward<T>::size(a);
  const int64_t text_value_sums = (a.T + slack) * padded<C>(a.d);
  const bool of_tokens = g.grad_text_key.data || g.grad_text_value.data;

  auto write = [&](int64_t index, const C* sums, const Order& order) {
    const int64_t b = index / a.H;
    const int64_t h = index % a.H;
    if (g.grad_text_key.data)
      write_tokens(sums, padded<C>(a.d), a.d, C(a.scale), order, a.T, a.T, head<T>(g.grad_text_key, b, h));
    if (g.grad_text_value.data)
      write_tokens(sums + text_value_sums, padded<C>(a.dv), a.dv, C(1), order, order.count, a.T,
                   head<T>(g.grad_text_value, b, h));
  };
  run_backward<Backward<T>, HeadInputs<T>, C>(g, tiles, of_tokens ? size : 0, parallel, write);
}

}  // namespace
}  // namespace mmk
