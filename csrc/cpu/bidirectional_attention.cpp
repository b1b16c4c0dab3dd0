// Bidirectional attention on the CPU. What must move: image queries and values once, text keys and values once, both
// results once; never an N x T matrix. A tile of scores is computed once and feeds both softmaxes while it is in the
// second-level cache: over tokens, for the rows of image_out, and over positions, for text_out, whose sums grow tile by
// tile (an online softmax along the columns). Threads share out the positions; each has text sums of its own, merged by
// maximum and sum in a fixed order. Masked tokens cost the image nothing: tokens that take part come first, and only
// they are multiplied there. Backward, with P over tokens and R over positions (columns), G and F the gradients of
// image_out and text_out:
//   dS = P (G text_value^T - rowsum(G image_out)) + R (image_value F^T - rowsum(F text_out)^T);
//   dquery = scale dS key;  dkey = scale dS^T query;  dtext_value = P^T G;  dimage_value = R F.
#include "../bidirectional_attention.h"

#include "dispatch.h"
#include "heads.h"

namespace mmk {
namespace {

template <class C>
MMK_INLINE C finite_or_0(C x) {
  return x - x == 0 ? x : C(0);
}

// Rows of tokens, packed block by block as columns: B[channel, token] at k * token_block * channels; packed_size
// elements.
template <class T, class C>
inline void pack_columns(Head<T> from, const Order& order, int64_t tokens, int64_t channels, C factor, C* to) {
  for (int64_t k = 0; k < blocks(tokens); ++k)
    pack_transposed<T>(
        channels, block_tokens(tokens, k), [&](int64_t i) { return from.row(order[k * token_block + i]); }, from.c,
        factor, to + k * token_block * channels);
}

// Queries as they can be multiplied: where they lie, or a converted copy. Rows that a block reads too much must exist.
template <class T, class C>
inline const C* queries(Head<T> from, int64_t first, int64_t count, int64_t channels, C* copy, int64_t& step) {
  if constexpr (std::is_same<T, C>::value)
    if (from.c == 1 && count % whole_rows == 0)
      return step = from.n, from.row(first);
  step = padded<C>(channels);
  read_rows<T>(count, channels, [&](int64_t r) { return from.row(first + r); }, from.c, copy);
  return copy;
}

// -Inf in the lanes of the last vector that belong to no token.
template <class C>
inline vec<C> padding(int64_t count) {
  vec<C> v = {};
  for (int64_t i = 0; i < lanes<C>; ++i)
    v[i] = vectors<C>(count) * lanes<C> - lanes<C> + i < count ? C(0) : -infinity<C>;
  return v;
}

// Softmax over the rows of a tile of scores, brought up to date as softmax_columns does.
template <class C>
inline void softmax_rows(C* scores, int64_t rows, int64_t step, int64_t count, C* top, C* total, C* factor) {
  const int64_t last = vectors<C>(count) * lanes<C> - lanes<C>;
  const vec<C> none = padding<C>(count);
  for (int64_t r = 0; r < rows; ++r) {
    C* s = scores + r * step;
    vec<C> end = load(s + last);
    end = none == vec<C>{} ? end : none;  // not a sum: a query with NaN or Inf has NaN behind the last token
    vec<C> most = end;
    for (int64_t i = 0; i < last; i += lanes<C>)
      most = maximum<C>(most, load(s + i));
    const C before = top[r];
    const C now = maximum(before, max<C>(most));
    const C base = now == -infinity<C> ? C(0) : now;
    vec<C> sum = exp_below(end - base);
    store(s + last, sum);
    for (int64_t i = 0; i < last; i += lanes<C>) {
      vec<C> e = exp_below(load(s + i) - base);
      store(s + i, e);
      sum += e;
    }
    factor[r] = before == -infinity<C> ? C(0) : exp_below(before - base);
    total[r] = total[r] * factor[r] + mmk::sum<C>(sum);
    top[r] = now;
  }
}

// What both directions know of a head.
template <class T>
struct HeadInputs {
  using C = acc_t<T>;
  const BidirectionalAttention& a;
  Head<T> query, key, image_value, text_value, image_out, text_out;
  Head<const bool> image_mask{};  // one column
  SoftmaxRows<C> image_softmax, text_softmax;
  const Scale<C> scale;
  Order order;       // of the tokens
  Scratch<T> clean;  // keys, in that order, if masked ones must be cleaned

  explicit HeadInputs(const BidirectionalAttention& a)
      : a(a), scale(a.scale), order(a.T), clean(a.text_mask.data ? a.T * a.d : 0) {}

  void set(int64_t index) {
    const int64_t b = index / a.H;
    const int64_t h = index % a.H;
    query = head<T>(a.image_query, b, h);
    key = head<T>(a.text_key, b, h);
    image_value = head<T>(a.image_value, b, h);
    text_value = head<T>(a.text_value, b, h);
    image_out = head<T>(a.image_out, b, h);
    text_out = head<T>(a.text_out, b, h);
    image_mask = {a.image_mask.data ? a.image_mask.data + b * a.image_mask.b + h * a.image_mask.h : nullptr,
                  a.image_mask.t, 0};
    image_softmax = {a.image_softmax, index, a.N}, text_softmax = {a.text_softmax, index, a.T};
    order.find(a.text_mask.data ? a.text_mask.data + b * a.text_mask.b + h * a.text_mask.h : nullptr, a.text_mask.t,
               a.T, true);
    if (order.count == a.T)
      return;
    for (int64_t t = 0; t < a.T; ++t)
      for (int64_t c = 0; c < a.d; ++c) {
        const C x = to_acc(key.row(t)[c * key.c]);
        clean.data[t * a.d + c] = from_acc<T>(x - x == 0 ? x : C(0));
      }
    for (int64_t i = 0; i < order.count; ++i)
      for (int64_t c = 0; c < a.d; ++c)
        clean.data[order[i] * a.d + c] = key.row(order[i])[c * key.c];
    key = {clean.data, a.d, 1};
  }
  bool keeps(int64_t n) const { return !image_mask || *image_mask.row(n); }

  const C* queries(int64_t first, int64_t count, C* copy, int64_t& step) const {
    const C* q = mmk::queries<T, C>(query, first, count, a.d, copy, step);
    if (!image_mask)
      return q;
    read(first, count, copy);
    return step = padded<C>(a.d), copy;
  }
  void read(int64_t first, int64_t count, C* copy) const {
    const int64_t width = padded<C>(a.d);
    read_rows<T>(count, a.d, [&](int64_t r) { return query.row(first + r); }, query.c, copy);
    for (int64_t r = 0; r < count; ++r)
      if (!keeps(first + r))
        for (int64_t c = 0; c < a.d; ++c)
          copy[r * width + c] = finite_or_0(copy[r * width + c]);
  }
  void read_values(int64_t first, int64_t count, C* copy) const {
    read_rows<T>(
        count, a.dv, [&](int64_t r) -> const T* { return keeps(first + r) ? image_value.row(first + r) : nullptr; },
        image_value.c, copy);
  }
  int64_t taking_part(int64_t block) const { return block_tokens(order.count, block); }
};

// What the text side has so far, of one head: per token the largest score, the sum of exponentials, and the weighted
// sum of values.
template <class C>
struct TextSums {
  C *top, *total, *values;
  int64_t tokens, width;
  static int64_t size(const BidirectionalAttention& a) {
    return (padded<C>(a.T) + token_block) * 2 + (a.T + slack) * padded<C>(a.dv);
  }
  TextSums(C* data, const BidirectionalAttention& a)
      : top(data),
        total(top + padded<C>(a.T) + token_block),
        values(total + padded<C>(a.T) + token_block),
        tokens(a.T),
        width(padded<C>(a.dv)) {}
  void clear() const {
    for (int64_t t = 0; t < padded<C>(tokens); ++t)
      top[t] = -infinity<C>, total[t] = 0;
    memset(values, 0, (tokens + slack) * width * sizeof(C));
  }
  void add(const TextSums& other) const {
    for (int64_t t = 0; t < tokens; ++t) {
      if (other.top[t] == -infinity<C>)
        continue;
      const C now = maximum(top[t], other.top[t]);
      const C mine = top[t] == -infinity<C> ? C(0) : exp_below(top[t] - now);
      const C its = exp_below(other.top[t] - now);
      top[t] = now;
      total[t] = total[t] * mine + other.total[t] * its;
      for (int64_t c = 0; c < width; ++c)
        values[t * width + c] = values[t * width + c] * mine + other.values[t * width + c] * its;
    }
  }
  template <class T>
  void write(const HeadInputs<T>& in) const {
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t t = in.order[i];
      in.text_softmax.write(t, 1, top + i, total + i);
      const C share = in.text_softmax.share[t];
      write_row<T>(share != 0 ? values + i * width : nullptr, in.a.dv, share, in.text_out.row(t), in.text_out.c);
    }
  }
};

inline int64_t score_width(int64_t tokens, int64_t vector) {
  const int64_t n = tokens < token_block ? tokens : token_block;
  return (n + vector - 1) / vector * vector;
}

template <class T>
struct Forward {
  using C = acc_t<T>;
  const BidirectionalAttention& a;
  HeadInputs<T> in;
  const int64_t width, rows, value_width;
  Scratch<C> keys, values, query, image_values, scores, weights, sums, top, total, factor, column_factor, text;
  TextSums<C> of_text;

  Forward(const BidirectionalAttention& a, const Tiles& tiles)
      : a(a),
        in(a),
        width(score_width(a.T, lanes<C>)),
        rows(tiles.height + slack),
        value_width(padded<C>(a.dv)),
        keys(packed_size<C>(a.T, a.d)),
        values(packed_size<C>(a.T, a.dv)),
        query(rows * padded<C>(a.d)),
        image_values(rows * value_width),
        scores(rows * width + slack),
        weights(rows * width),
        sums(rows * value_width),
        top(rows),
        total(rows),
        factor(rows),
        column_factor(width),
        text(TextSums<C>::size(a)),
        of_text(text.data, a) {}

  void start(int64_t index) {
    in.set(index);
    pack_columns(in.key, in.order, a.T, a.d, in.scale.query, keys.data);
    pack_rows(in.text_value, in.order, in.order.count, a.dv, values.data);
    of_text.clear();
  }

  void tile(int64_t first, int64_t count) {
    int64_t step;
    const C* q = in.queries(first, count, query.data, step);
    in.read_values(first, count, image_values.data);
    for (int64_t r = 0; r < count; ++r)
      top.data[r] = -infinity<C>, total.data[r] = 0;
    for (int64_t k = 0; k < blocks(a.T); ++k) {
      const int64_t n = block_tokens(a.T, k);
      const int64_t part = in.taking_part(k);
      const int64_t t = k * token_block;
      gemm_tile<C, false>(count, n, a.d, q, step, {keys.data + t * a.d, 0}, scores.data, width, false);
      in.scale.apply(scores.data, count, width, padded<C>(n));
      if (part) {
        for (int64_t r = 0; r < count; ++r)
          memcpy(weights.data + r * width, scores.data + r * width, padded<C>(part) * sizeof(C));
        softmax_rows(weights.data, count, width, part, top.data, total.data, factor.data);
        if (k)
          scale_rows(sums.data, count, value_width, a.dv, factor.data);
        gemm_tile<C, false>(count, a.dv, part, weights.data, width, {values.data + t * value_width, 0}, sums.data,
                            value_width, k != 0);
      }
      softmax_columns(
          scores.data, count, width, n, [&](int64_t r) { return in.keeps(first + r); }, of_text.top + t,
          of_text.total + t, column_factor.data);
      scale_rows(of_text.values + t * value_width, n, value_width, a.dv, column_factor.data);
      gemm_tile<C, true>(n, a.dv, count, scores.data, width, {image_values.data, value_width},
                         of_text.values + t * value_width, value_width, true);
    }
    in.image_softmax.write(first, count, top.data, total.data);
    for (int64_t r = 0; r < count; ++r) {
      const C share = in.image_softmax.share[first + r];
      write_row<T>(share != 0 ? sums.data + r * value_width : nullptr, a.dv, share, in.image_out.row(first + r),
                   in.image_out.c);
    }
  }
};

template <class T>
struct Backward {
  using C = acc_t<T>;
  const BidirectionalAttentionBackward& g;
  const BidirectionalAttention& a;
  HeadInputs<T> in;
  Head<T> grad_image_out{}, grad_text_out{}, grad_query{}, grad_image_value{};
  const int64_t width, rows, query_width, value_width;
  const bool of_scores;  // a gradient of query or key is wanted
  Scratch<C> key_columns, key_rows, value_columns, upstream_columns, upstream_rows, query, image_values, upstream,
      scores, weights, grad_weights, grad_scores, query_sums, value_sums, image_mean, text_mean, text_base,
      text_certain, text_upstream, tokens;
  bool some_certain = false;  // a token's weight may be exactly 1

  Backward(const BidirectionalAttentionBackward& g, const Tiles& tiles)
      : g(g),
        a(g.forward),
        in(a),
        width(score_width(a.T, lanes<C>)),
        rows(tiles.height + slack),
        query_width(padded<C>(a.d)),
        value_width(padded<C>(a.dv)),
        of_scores(g.grad_image_query.data || g.grad_text_key.data),
        key_columns(packed_size<C>(a.T, a.d)),
        key_rows(packed_size<C>(a.T, a.d)),
        value_columns(packed_size<C>(a.T, a.dv)),
        upstream_columns(packed_size<C>(a.T, a.dv)),
        upstream_rows(packed_size<C>(a.T, a.dv)),
        query(rows * query_width),
        image_values(rows * value_width),
        upstream(rows * value_width),
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
        text_upstream(a.T * value_width),
        tokens(size(a)) {}

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
      const Head<C> upstream{text_upstream.data, value_width, 1};
      read_upstream(grad_text_out, in.text_softmax, 0, a.T, upstream.data);
      pack_columns(upstream, in.order, a.T, a.dv, C(1), upstream_columns.data);
      pack_rows(upstream, in.order, a.T, a.dv, upstream_rows.data);
    }
    some_certain = false;
    for (int64_t i = 0; i < padded<C>(a.T); ++i) {
      const int64_t t = i < a.T ? in.order[i] : -1;
      text_base.data[i] = t < 0 ? infinity<C> : in.text_softmax.base(t);
      text_certain.data[i] = t < 0 ? C(2) : in.text_softmax.certain(t);
      text_mean.data[i] = t < 0 || !grad_text_out ? C(0) : mean(grad_text_out, in.text_out, in.text_softmax, t);
      some_certain = some_certain || text_certain.data[i] == 1;
    }
    memset(tokens.data, 0, size(a) * sizeof(C));
  }
  // What arrives times the softmax's share, since the weights are a factor of all that has it. [count, value_width]
  void read_upstream(Head<T> from, const SoftmaxRows<C>& softmax, int64_t first, int64_t count, C* to) const {
    read_rows<T>(
        count, a.dv,
        [&](int64_t r) -> const T* { return softmax.share[first + r] != 0 ? from.row(first + r) : nullptr; }, from.c,
        to);
    scale_rows(to, count, value_width, value_width, softmax.share + first);
  }
  // Of the weights' gradient, times share, too.
  C mean(Head<T> upstream, Head<T> result, const SoftmaxRows<C>& softmax, int64_t n) const {
    if (softmax.share[n] == 0)
      return 0;
    C total = 0;
    for (int64_t c = 0; c < a.dv; ++c)
      total += to_acc(upstream.row(n)[c * upstream.c]) * to_acc(result.row(n)[c * result.c]);
    return total * softmax.share[n];
  }

  void tile(int64_t first, int64_t count) {
    in.read(first, count, query.data);
    in.read_values(first, count, image_values.data);
    if (grad_image_out) {
      read_upstream(grad_image_out, in.image_softmax, first, count, upstream.data);
      for (int64_t r = 0; r < count; ++r)
        image_mean.data[r] = mean(grad_image_out, in.image_out, in.image_softmax, first + r);
    }
    for (int64_t k = 0; k < blocks(a.T); ++k) {
      const int64_t n = block_tokens(a.T, k);
      const int64_t part = grad_image_out ? in.taking_part(k) : 0;
      const int64_t t = k * token_block;
      C* ds = grad_scores.data;
      gemm_tile<C, false>(count, n, a.d, query.data, query_width, {key_columns.data + t * a.d, 0}, scores.data, width,
                          false);
      in.scale.apply(scores.data, count, width, padded<C>(n));
      for (int64_t r = 0; r < count; ++r)
        memset(ds + r * width, 0, padded<C>(n) * sizeof(C));
      if (part) {
        if (of_scores)
          gemm_tile<C, false>(count, part, a.dv, upstream.data, value_width, {value_columns.data + t * a.dv, 0},
                              grad_weights.data, width, false);
        over_tokens(first, count, part);
        if (g.grad_text_value.data)
          gemm_tile<C, true>(part, a.dv, count, weights.data, width, {upstream.data, value_width},
                             text_value_sums() + t * value_width, value_width, true);
      }
      if (grad_text_out) {
        if (of_scores)
          gemm_tile<C, false>(count, n, a.dv, image_values.data, value_width, {upstream_columns.data + t * a.dv, 0},
                              grad_weights.data, width, false);
        over_positions(first, count, n, t);
        if (grad_image_value)
          gemm_tile<C, false>(count, a.dv, n, scores.data, width, {upstream_rows.data + t * value_width, 0},
                              value_sums.data, value_width, k != 0);
      }
      if (grad_query)
        gemm_tile<C, false>(count, a.d, n, ds, width, {key_rows.data + t * query_width, 0}, query_sums.data,
                            query_width, k != 0);
      if (g.grad_text_key.data)
        gemm_tile<C, true>(n, a.d, count, ds, width, {query.data, query_width}, key_sums() + t * query_width,
                           query_width, true);
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t n = first + r;
      if (grad_query)
        write_row<T>(a.T ? query_sums.data + r * query_width : nullptr, a.d, C(a.scale), grad_query.row(n),
                     grad_query.c);
      if (grad_image_value)
        write_row<T>(a.T && grad_text_out && in.keeps(n) ? value_sums.data + r * value_width : nullptr, a.dv, C(1),
                     grad_image_value.row(n), grad_image_value.c);
    }
  }

  // weights = exponentials, grad_scores += P (dP - mean). Lanes behind the last token that takes part get 0.
  void over_tokens(int64_t first, int64_t count, int64_t n) {
    const int64_t last = vectors<C>(n) * lanes<C> - lanes<C>;
    const vec<C> none = padding<C>(n);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = r * width;
      const C base = in.image_softmax.base(first + r);
      const C certain = in.image_softmax.certain(first + r);
      const C mean = image_mean.data[r];
      with_flag(certain == 1, [&](auto may_be) {
        for (int64_t i = 0; i <= last; i += lanes<C>) {
          vec<C> s = load(scores.data + at + i) - base;
          const vec<C> p = exp_below(i == last ? s + none : s);
          store(weights.data + at + i, p);
          if (!of_scores)
            continue;
          vec<C> d = p * (load(grad_weights.data + at + i) - mean);
          if (may_be.value)
            d = p == certain ? vec<C>{} : d;
          store(grad_scores.data + at + i, i == last ? (none == vec<C>{} ? d : vec<C>{}) : d);
        }
      });
    }
  }

  // scores = exponentials, grad_scores += R (dR - mean of the token). 0 in rows that don't take part.
  void over_positions(int64_t first, int64_t count, int64_t n, int64_t t) {
    with_flag(some_certain, [&](auto some) {
      for (int64_t r = 0; r < count; ++r) {
        C* s = scores.data + r * width;
        C* ds = grad_scores.data + r * width;
        if (!in.keeps(first + r)) {
          memset(s, 0, padded<C>(n) * sizeof(C));
          continue;
        }
        for (int64_t i = 0; i < n; i += lanes<C>) {
          const vec<C> p = exp_below(load(s + i) - load(text_base.data + t + i));
          store(s + i, p);
          if (!of_scores)
            continue;
          vec<C> d = p * (load(grad_weights.data + r * width + i) - load(text_mean.data + t + i));
          if (some.value)
            d = p == load(text_certain.data + t + i) ? vec<C>{} : d;
          store(ds + i, load(ds + i) + d);
        }
      }
    });
  }
};

template <class T>
void forward(const BidirectionalAttention& a, const Parallel& parallel) {
  using C = acc_t<T>;
  const Tiles tiles(a.B * a.H, a.N, tile_rows, 4 * a.T * (a.d + a.dv), parallel);
  const int64_t size = TextSums<C>::size(a);
  Shares<C> shares(tiles, size);
  tiles.run(parallel, [&](int64_t part) {
    Forward<T> work(a, tiles);
    tiles.of_part(part, [&](int64_t index, int64_t first, int64_t last) {
      work.start(index);
      for (int64_t tile = first; tile < last; ++tile)
        work.tile(tiles.first_row(tile), tiles.count(tile));
      if (C* share = shares.of(part, index))
        memcpy(share, work.text.data, size * sizeof(C));
      else
        work.of_text.write(work.in);
    });
  });
  HeadInputs<T> in(a);
  shares.merge([&](int64_t index, C** share, int64_t count) {
    const TextSums<C> total(share[0], a);
    for (int64_t k = 1; k < count; ++k)
      total.add(TextSums<C>(share[k], a));
    in.set(index);
    total.write(in);
  });
  if (a.N)
    return;
  Scratch<C> nothing(size);
  const TextSums<C> none(nothing.data, a);
  none.clear();
  for (int64_t index = 0; index < a.B * a.H; ++index)
    in.set(index), none.write(in);
}

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

namespace MMK_ISA {
void bidirectional_attention_forward(const BidirectionalAttention& a, const Parallel& p) {
  with_type(a.dtype, [&](auto zero) { forward<decltype(zero)>(a, p); });
}
void bidirectional_attention_backward(const BidirectionalAttentionBackward& g, const Parallel& p) {
  with_type(g.forward.dtype, [&](auto zero) { backward<decltype(zero)>(g, p); });
}
}  // namespace MMK_ISA
}  // namespace mmk

#ifdef MMK_DEFINE_ENTRY
MMK_CPU_ENTRY(bidirectional_attention_forward, BidirectionalAttention)
MMK_CPU_ENTRY(bidirectional_attention_backward, BidirectionalAttentionBackward)
#endif
