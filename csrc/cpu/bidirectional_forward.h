// Bidirectional attention forward: a tile of scores feeds the softmax over tokens, for its rows of image_out, and the
// online softmax over positions, for the sums of text_out, which threads merge in a fixed order.
#pragma once
#include "bidirectional.h"

namespace mmk {
namespace {

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
      const C* sums = share != 0 ? values + i * width : nullptr;
      write_row<T>(sums, in.a.dv, share, in.text_out.row(t), in.text_out.c);
      if (in.unrounded)
        write_row<C>(sums, in.a.dv, share, in.unrounded.row(t), in.unrounded.c);
    }
  }
};

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
      const int64_t valid = in.valid_tokens(k);
      const int64_t t = k * token_block;
      gemm_tile<C, false>(count, n, a.d, q, step, {keys.data + t * a.d, 0}, scores.data, width, false);
      in.scale.apply(scores.data, count, width, padded<C>(n));
      if (valid) {
        for (int64_t r = 0; r < count; ++r)
          memcpy(weights.data + r * width, scores.data + r * width, padded<C>(valid) * sizeof(C));
        softmax_rows(weights.data, count, width, valid, top.data, total.data, factor.data);
        if (k)
          scale_rows(sums.data, count, value_width, a.dv, factor.data);
        gemm_tile<C, false>(count, a.dv, valid, weights.data, width, {values.data + t * value_width, 0}, sums.data,
                            value_width, k != 0);
      }
      softmax_columns(
          scores.data, count, width, n, [&](int64_t r) { return in.valid(first + r); }, of_text.top + t,
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

}  // namespace
}  // namespace mmk
