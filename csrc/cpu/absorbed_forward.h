// Absorbed attention's forward pass over a part's tiles; see absorbed_attention.cpp.
#pragma once
#include "absorbed.h"

namespace mmk {
namespace {

// What the text side has so far of one sample: per column the largest score, the sum of exponentials, and the weighted
// sum of features.
template <class C>
struct Pooled {
  int64_t columns, width;
  C *features, *top, *total;
  static int64_t size(const AbsorbedAttention& a) {
    return a.pool ? Groups(a.H, a.T).columns() * (2 + padded<C>(a.D)) : 0;
  }
  Pooled(C* data, const AbsorbedAttention& a)
      : columns(a.pool ? Groups(a.H, a.T).columns() : 0), width(padded<C>(a.D)) {
    features = data;  // first, as rows of whole cache lines
    top = features + columns * width;
    total = top + columns;
  }
  void clear() const {
    memset(features, 0, columns * width * sizeof(C));
    for (int64_t j = 0; j < columns; ++j) {
      top[j] = -infinity<C>;
      total[j] = 0;
    }
  }
  void add(const Pooled& other) const {
    for (int64_t j = 0; j < columns; ++j) {
      if (other.top[j] == -infinity<C>)
        continue;
      const C now = maximum(top[j], other.top[j]);
      const C mine = top[j] == -infinity<C> ? C(0) : exp_below(top[j] - now);
      const C its = exp_below(other.top[j] - now);
      top[j] = now;
      total[j] = total[j] * mine + other.total[j] * its;
      multiply(features + j * width, width, mine);
      add_scaled(features + j * width, other.features + j * width, width, its);
    }
  }
  template <class T>
  void write(const AbsorbedInputs<T>& in) const {
    const AbsorbedAttention& a = in.a;
    for (int64_t g = 0; g < in.groups.count; ++g)
      in.each_column(g, [&](int64_t column, int64_t h, int64_t t, bool) {
        const int64_t j = g * in.groups.stride + column;
        const SoftmaxRows<C> softmax(a.text_softmax, in.sample * a.H + h, a.T);
        softmax.write(t, 1, top + j, total + j);
        const C share = softmax.share[t];
        const C* sums = share != 0 ? features + j * width : nullptr;
        write_row<T>(sums, a.D, share, in.template row<T>(a.text_out, in.sample, h, t), a.text_out.c);
        if (a.unrounded.data)
          write_row<C>(sums, a.D, share, in.template row<C>(a.unrounded, in.sample, h, t), a.unrounded.c);
      });
  }
};

template <class T>
struct AbsorbedForward {
  using C = acc_t<T>;
  const AbsorbedAttention& a;
  AbsorbedInputs<T> in;
  const Groups& groups;
  const int64_t height, width, key_width, value_width;
  Tile<T> image;
  Scratch<C> keys, biases, values, value_rows, scores, weights, sums, excluded, top, share, text;
  Pooled<C> pooled;

  AbsorbedForward(const AbsorbedAttention& a, const Tiles& tiles)
      : a(a),
        in(a),
        groups(in.groups),
        height(tiles.height + slack),
        width(padded<C>(tiles.height)),
        key_width(padded<C>(a.D)),
        value_width(padded<C>(a.Dv)),
        image(height, a.D),
        keys(groups.columns() * key_width),
        biases(groups.columns()),
        values(groups.columns() * value_width),
        value_rows(groups.columns() * value_width),
        scores(groups.stride * width + slack),
        weights(groups.stride * width + slack),
        sums(height * value_width),
        excluded(width),
        top(width),
        share(width),
        text(Pooled<C>::size(a)),
        pooled(text.data, a) {}

  void start(int64_t index) {
    in.set(index);
    in.read_keys(keys.data, key_width);
    if (a.key_bias.data)
      in.read_biases(biases.data);
    if (a.Dv) {
      in.read_values(value_rows.data, value_width);
      in.pack_columns(value_rows.data, value_width, a.Dv, true, values.data);
    }
    pooled.clear();
  }

  void tile(int64_t first, int64_t count) {
    image.read(a.image, in.sample, first, count, a.image_mask.data, [&](int64_t n) { return in.keeps(n); });
    const int64_t used = padded<C>(count);
    const bool all = find_positions(first, count, used, [&](int64_t n) { return in.keeps(n); }, excluded.data);
    bool written = false;
    for (int64_t g = 0; g < groups.count; ++g) {
      const int64_t columns = in.columns(g);
      const int64_t attended = in.attended(g);
      const int64_t j = g * groups.stride;
      score(count, columns, keys.data + j * key_width, biases.data + j);
      if (attended && a.Dv) {
        for (int64_t h = 0; h < groups.heads_of(g); ++h)
          over_tokens(groups.first_head(g) + h, h * in.order.count * width, first, count);
        gemm_tile<C, true>(count, a.Dv, attended, weights.data, width, {values.data + j * value_width, 0}, sums.data,
                           value_width, written);
        written = true;
      }
      if (a.pool) {
        over_positions(columns, used, all, j);
        gemm_tile<C, false>(columns, a.D, count, scores.data, width, {image.rows, image.step},
                            pooled.features + j * key_width, key_width, true);
      }
    }
    if (!a.Dv)
      return;
    const SampleRows& out = a.image_out;
    for (int64_t r = 0; r < count; ++r)
      write_row<T>(written ? sums.data + r * value_width : nullptr, a.Dv, C(1),
                   static_cast<T*>(out.data) + in.sample * out.b + (first + r) * out.n, out.c);
    if (!written)
      for (int64_t h = 0; h < a.H; ++h)
        forget(h, first, count);
  }

  void score(int64_t count, int64_t columns, const C* of_keys, const C* of_biases) const {
    if (a.key_bias.data)
      for (int64_t j = 0; j < columns; ++j)
        for (int64_t i = 0; i < count; i += lanes<C>)
          store(scores.data + j * width + i, splat(of_biases[j]));
    gemm_tile<C, false>(columns, count, a.D, of_keys, key_width, {image.columns.data, 0}, scores.data, width,
                        a.key_bias.data);
  }

  // weights = softmax of a head's scores over its tokens, for every position of the tile.
  void over_tokens(int64_t h, int64_t at, int64_t first, int64_t count) const {
    for (int64_t i = 0; i < count; i += lanes<C>) {
      const C* s = scores.data + at + i;
      C* p = weights.data + at + i;
      vec<C> most = splat(-infinity<C>);
      for (int64_t t = 0; t < in.order.count; ++t)
        most = maximum<C>(most, load(s + t * width));
      most = most == -infinity<C> ? vec<C>{} : most;
      vec<C> sum = {};
      for (int64_t t = 0; t < in.order.count; ++t) {
        const vec<C> e = exp_below(load(s + t * width) - most);
        store(p + t * width, e);
        sum += e;
      }
      const vec<C> factor = sum == 0 ? vec<C>{} : 1 / sum;
      for (int64_t t = 0; t < in.order.count; ++t)
        store(p + t * width, load(p + t * width) * factor);
      store(top.data + i, most);
      store(share.data + i, factor);
    }
    const SoftmaxRows<C> softmax(a.image_softmax, in.sample * a.H + h, a.N);
    memcpy(softmax.top + first, top.data, count * sizeof(C));
    memcpy(softmax.share + first, share.data, count * sizeof(C));
  }
  void forget(int64_t h, int64_t first, int64_t count) const {
    const SoftmaxRows<C> softmax(a.image_softmax, in.sample * a.H + h, a.N);
    memset(softmax.top + first, 0, count * sizeof(C));
    memset(softmax.share + first, 0, count * sizeof(C));
  }

  // scores = their exponentials, 0 where a position doesn't take part; what was pooled before is brought to the same
  // maximum.
  void over_positions(int64_t columns, int64_t used, bool all, int64_t j) const {
    const vec<C> none = splat(-infinity<C>);
    with_flag(all, [&](auto whole) {
      for (int64_t c = 0; c < columns; ++c) {
        C* s = scores.data + c * width;
        vec<C> most = none;
        for (int64_t i = 0; i < used; i += lanes<C>)
          most = maximum<C>(most, taking_part(whole, s, i));
        const C before = pooled.top[j + c];
        const C now = maximum(before, max<C>(most));
        const C base = now == -infinity<C> ? C(0) : now;
        vec<C> sum = {};
        for (int64_t i = 0; i < used; i += lanes<C>) {
          const vec<C> e = exp_below(taking_part(whole, s, i) - base);
          store(s + i, e);
          sum += e;
        }
        const C factor = before == -infinity<C> ? C(0) : exp_below(before - base);
        pooled.total[j + c] = pooled.total[j + c] * factor + mmk::sum<C>(sum);
        pooled.top[j + c] = now;
        if (factor != 1)
          multiply(pooled.features + (j + c) * key_width, key_width, factor);
      }
    });
  }
  template <class Whole>
  MMK_INLINE vec<C> taking_part(Whole whole, const C* s, int64_t i) const {
    const vec<C> x = load(s + i);
    if (whole.value)
      return x;
    const vec<C> out = load(excluded.data + i);
    return out == 0 ? x : out;
  }
};

template <class T>
void absorbed_forward(const AbsorbedAttention& a, const Parallel& parallel) {
  using C = acc_t<T>;
  const int64_t columns = a.H * a.T;
  const Tiles tiles(a.B, a.N, tile_positions(a.D, a.T), 2 * columns * (2 * a.D + a.Dv), parallel);
  const int64_t size = Pooled<C>::size(a);
  Shares<C> shares(tiles, size);
  tiles.run(parallel, [&](int64_t part) {
    AbsorbedForward<T> work(a, tiles);
    tiles.of_part(part, [&](int64_t index, int64_t first, int64_t last) {
      work.start(index);
      for (int64_t tile = first; tile < last; ++tile)
        work.tile(tiles.first_row(tile), tiles.count(tile));
      if (!a.pool)
        return;
      if (C* share = shares.of(part, index))
        memcpy(share, work.text.data, size * sizeof(C));
      else
        work.pooled.write(work.in);
    });
  });
  if (!a.pool)
    return;
  AbsorbedInputs<T> in(a);
  shares.merge([&](int64_t index, C** share, int64_t count) {
    const Pooled<C> total(share[0], a);
    for (int64_t k = 1; k < count; ++k)
      total.add(Pooled<C>(share[k], a));
    in.set(index);
    total.write(in);
  });
  if (a.N)
    return;
  Scratch<C> nothing(size);
  const Pooled<C> none(nothing.data, a);
  none.clear();
  for (int64_t index = 0; index < a.B; ++index) {
    in.set(index);
    none.write(in);
  }
}

}  // namespace
}  // namespace mmk
