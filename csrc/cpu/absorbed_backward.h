// Absorbed attention's backward pass, with the formulas of absorbed_attention.cpp.
#pragma once
#include "absorbed.h"

namespace mmk {
namespace {

// What is masked out and holds NaN or Inf counted as 0: there it has no gradient.
template <class U>
inline void clear_replaced(const U* x, int64_t step, U* grad, int64_t grad_step, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c)
    if (const acc_t<U> value = to_acc(x[c * step]); value - value != 0)
      grad[c * grad_step] = from_acc<U>(0);
}

template <class T>
struct AbsorbedBackward {
  using C = acc_t<T>;
  const AbsorbedAttentionBackward& g;
  const AbsorbedAttention& a;
  AbsorbedInputs<T> in;
  const Groups& groups;
  const int64_t height, width, key_width, value_width;
  const bool of_image_out, of_text_out;
  const bool of_scores;  // a gradient of image, key or key_bias is wanted
  Tile<T> image, grad_out;
  Scratch<C> keys, key_panels, biases, values, features, feature_panels, text_base, text_certain, text_mean, scores,
      weights, grad_scores, grad_weights, sums, excluded, top, share, tokens;

  AbsorbedBackward(const AbsorbedAttentionBackward& g, const Tiles& tiles)
      : g(g),
        a(g.forward),
        in(a),
        groups(in.groups),
        height(tiles.height + slack),
        width(padded<C>(tiles.height)),
        key_width(padded<C>(a.D)),
        value_width(padded<C>(a.Dv)),
        of_image_out(g.grad_image_out.data),
        of_text_out(g.grad_text_out.data),
        of_scores(g.grad_image.data || g.grad_key.data || g.grad_key_bias),
        image(height, a.D),
        grad_out(of_image_out ? height : 0, a.Dv),
        keys(groups.columns() * key_width),
        key_panels(g.grad_image.data ? groups.columns() * key_width : 0),
        biases(groups.columns()),
        values(of_image_out ? groups.columns() * value_width : 0),
        features(of_text_out ? groups.columns() * key_width : 0),
        feature_panels(of_text_out && g.grad_image.data ? groups.columns() * key_width : 0),
        text_base(groups.columns()),
        text_certain(groups.columns()),
        text_mean(groups.columns()),
        scores(groups.stride * width + slack),
        weights(groups.stride * width + slack),
        grad_scores(groups.stride * width + slack),
        grad_weights(groups.stride * width + slack),
        sums(g.grad_image.data ? height * key_width : 0),
        excluded(width),
        top(width),
        share(width),
        tokens(size(g)) {}

  // Sums over a sample's positions: of key, of value, of key_bias, and of what a softmax over positions gives the
  // scores, which is 0 but for rounding.
  static int64_t size(const AbsorbedAttentionBackward& g) {
    const Groups groups(g.forward.H, g.forward.T);
    return groups.columns() * (padded<C>(g.forward.D) + value_size(g) + 2);
  }
  static int64_t value_size(const AbsorbedAttentionBackward& g) {
    return g.grad_value.data ? padded<C>(g.forward.Dv) : 0;
  }
  C* value_sums() const { return tokens.data + groups.columns() * key_width; }
  C* bias_sums() const { return value_sums() + groups.columns() * value_size(g); }
  C* rests() const { return bias_sums() + groups.columns(); }

  void start(int64_t index) {
    in.set(index);
    in.read_keys(keys.data, key_width);
    if (g.grad_image.data)
      in.pack_columns(keys.data, key_width, a.D, false, key_panels.data);
    if (a.key_bias.data)
      in.read_biases(biases.data);
    if (of_image_out)
      in.read_values(values.data, value_width);
    if (of_text_out) {
      read_features();
      if (g.grad_image.data)
        in.pack_columns(features.data, key_width, a.D, false, feature_panels.data);
    }
    memset(tokens.data, 0, size(g) * sizeof(C));
  }
  // The gradients of text_out times the softmax's share, since the weights are a factor of all that has them.
  void read_features() const {
    Scratch<C> result(key_width);
    for (int64_t k = 0; k < groups.count; ++k)
      in.each_column(k, [&](int64_t column, int64_t h, int64_t t, bool) {
        const int64_t j = k * groups.stride + column;
        C* to = features.data + j * key_width;
        const SoftmaxRows<C> softmax(a.text_softmax, in.sample * a.H + h, a.T);
        text_base.data[j] = softmax.base(t);
        text_certain.data[j] = softmax.certain(t);
        if (softmax.share[t] == 0) {
          memset(to, 0, key_width * sizeof(C));
          text_mean.data[j] = 0;
          return;
        }
        const HeadRows& grad = g.grad_text_out;
        read_rows<T>(
            1, a.D, [&](int64_t) { return in.template row<const T>(grad, in.sample, h, t); }, grad.c, to, key_width);
        multiply(to, key_width, softmax.share[t]);
        const HeadRows& exact = a.unrounded;
        read_rows<C>(
            1, a.D, [&](int64_t) { return in.template row<const C>(exact, in.sample, h, t); }, exact.c, result.data,
            key_width);
        vec<C> sum = {};
        for (int64_t c = 0; c < key_width; c += lanes<C>)
          sum += load(to + c) * load(result.data + c);
        text_mean.data[j] = mmk::sum<C>(sum);
      });
  }

  void tile(int64_t first, int64_t count) {
    image.read(a.image, in.sample, first, count, a.image_mask.data, [&](int64_t n) { return in.keeps(n); });
    if (of_image_out)
      grad_out.read(g.grad_image_out, in.sample, first, count, false, [](int64_t) { return true; });
    const int64_t used = padded<C>(count);
    find_positions(first, count, used, [&](int64_t n) { return in.keeps(n); }, excluded.data);
    bool written = false;
    for (int64_t k = 0; k < groups.count; ++k) {
      const int64_t j = k * groups.stride;
      const int64_t attended = of_image_out ? in.attended(k) : 0;
      const int64_t columns = of_text_out ? in.columns(k) : attended;
      if (!columns)
        continue;
      score(count, columns, j);
      if (attended)
        through_tokens(k, first, count, attended);
      if (of_text_out)
        through_positions(j, count, columns, attended);
      if (!of_scores)
        continue;
      if (g.grad_image.data) {
        gemm_tile<C, true>(count, a.D, columns, grad_scores.data, width, {key_panels.data + j * key_width, 0},
                           sums.data, key_width, written);
        if (of_text_out)
          gemm_tile<C, true>(count, a.D, columns, scores.data, width, {feature_panels.data + j * key_width, 0},
                             sums.data, key_width, true);
        written = true;
      }
      if (g.grad_key.data)
        gemm_tile<C, false>(columns, a.D, count, grad_scores.data, width, {image.rows, image.step},
                            tokens.data + j * key_width, key_width, true);
    }
    if (g.grad_image.data)
      write_image(first, count, written);
  }

  void score(int64_t count, int64_t columns, int64_t j) const {
    if (a.key_bias.data)
      for (int64_t c = 0; c < columns; ++c)
        for (int64_t i = 0; i < count; i += lanes<C>)
          store(scores.data + c * width + i, splat(biases.data[j + c]));
    gemm_tile<C, false>(columns, count, a.D, keys.data + j * key_width, key_width, {image.columns.data, 0}, scores.data,
                        width, a.key_bias.data);
  }

  // grad_scores = P (dP - rowsum(P dP)), and what P multiplies.
  void through_tokens(int64_t k, int64_t first, int64_t count, int64_t attended) const {
    const int64_t j = k * groups.stride;
    gemm_tile<C, false>(attended, count, a.Dv, values.data + j * value_width, value_width, {grad_out.columns.data, 0},
                        grad_scores.data, width, false);
    for (int64_t h = 0; h < groups.heads_of(k); ++h) {
      const SoftmaxRows<C> softmax(a.image_softmax, in.sample * a.H + groups.first_head(k) + h, a.N);
      for (int64_t i = 0; i < width; ++i) {
        top.data[i] = i < count ? softmax.base(first + i) : infinity<C>;
        share.data[i] = i < count ? softmax.share[first + i] : C(0);
      }
      for (int64_t i = 0; i < count; i += lanes<C>)
        tokens_of(h * in.order.count * width + i, load(top.data + i), load(share.data + i));
    }
    // Only here: a bias is the same for all positions, and cancels in a softmax over them.
    for (int64_t c = 0; g.grad_key_bias && c < attended; ++c) {
      vec<C> sum = {};
      for (int64_t i = 0; i < count; i += lanes<C>)
        sum += load(grad_scores.data + c * width + i);
      bias_sums()[j + c] += mmk::sum<C>(sum);
    }
    if (g.grad_value.data)
      gemm_tile<C, false>(attended, a.Dv, count, weights.data, width, {grad_out.rows, grad_out.step},
                          value_sums() + j * value_width, value_width, true);
  }
  MMK_INLINE void tokens_of(int64_t at, vec<C> base, vec<C> factor) const {
    const C* s = scores.data + at;
    C* p = weights.data + at;
    C* d = grad_scores.data + at;
    vec<C> mean = {};
    for (int64_t t = 0; t < in.order.count; ++t) {
      const vec<C> weight = factor == 0 ? vec<C>{} : exp_below(load(s + t * width) - base) * factor;
      store(p + t * width, weight);
      mean += weight * load(d + t * width);
    }
    // A weight that is exactly 1 is the only one: its score has no gradient, and rounding must not leave one.
    vec<C> rest = {};
    for (int64_t t = 0; t < in.order.count; ++t) {
      const vec<C> weight = load(p + t * width);
      const vec<C> ds = weight == 1 ? vec<C>{} : weight * (load(d + t * width) - mean);
      store(d + t * width, ds);
      rest += ds;
    }
    // What is left of a sum of 0 would multiply what the keys have in common. 16 bits allow more than that.
    for (int64_t t = 0; sizeof(T) > 2 && t < in.order.count; ++t)
      store(d + t * width, load(d + t * width) - load(p + t * width) * rest);
  }

  // scores = exponentials, 0 where a position doesn't take part; grad_scores += R (dR - mean of the column), or = where
  // the image's result has nothing of a column.
  void through_positions(int64_t j, int64_t count, int64_t columns, int64_t attended) const {
    if (of_scores)
      gemm_tile<C, false>(columns, count, a.D, features.data + j * key_width, key_width, {image.columns.data, 0},
                          grad_weights.data, width, false);
    for (int64_t c = 0; c < columns; ++c) {
      C* s = scores.data + c * width;
      C* d = grad_scores.data + c * width;
      const C* dr = grad_weights.data + c * width;
      const C base = text_base.data[j + c];
      const C certain = text_certain.data[j + c];
      const C mean = text_mean.data[j + c];
      vec<C> rest = {};
      for (int64_t i = 0; i < count; i += lanes<C>) {
        const vec<C> e = load(excluded.data + i) == 0 ? exp_below(load(s + i) - base) : vec<C>{};
        store(s + i, e);
        if (!of_scores)
          continue;
        vec<C> x = e == certain ? vec<C>{} : e * (load(dr + i) - mean);
        x = e == 0 ? vec<C>{} : x;
        store(d + i, c < attended ? load(d + i) + x : x);
        rest += x;
      }
      if (of_scores)
        rests()[j + c] += mmk::sum<C>(rest);
    }
  }

  void write_image(int64_t first, int64_t count, bool written) const {
    const SampleRows& to = g.grad_image;
    const SampleRows& from = a.image;
    for (int64_t r = 0; r < count; ++r) {
      T* row = static_cast<T*>(to.data) + in.sample * to.b + (first + r) * to.n;
      write_row<T>(written ? sums.data + r * key_width : nullptr, a.D, C(1), row, to.c);
      if (in.keeps(first + r))
        continue;
      clear_replaced(static_cast<const T*>(from.data) + in.sample * from.b + (first + r) * from.n, from.c, row, to.c,
                     a.D);
    }
  }
};

// A sample's gradients from the sums over its positions; 0 where there is none.
// The scores' gradients by a softmax over positions add up to 0, rounded to a rest, which multiplies what all positions
// have in common: much more than the gradient where they have much. Shared out as the weights are it is no more, and
// the key's gradient has that much less of the weighted mean, text_out.
template <class T, class C>
void write_gradients(const AbsorbedAttentionBackward& g, int64_t index, const C* sums) {
  const AbsorbedAttention& a = g.forward;
  AbsorbedInputs<T> in(a);
  in.set(index);
  const int64_t key_width = padded<C>(a.D);
  const int64_t value_width = padded<C>(a.Dv);
  const C* value_sums = sums + in.groups.columns() * key_width;
  const C* bias_sums = value_sums + in.groups.columns() * AbsorbedBackward<T>::value_size(g);
  const C* rests = bias_sums + in.groups.columns();
  Scratch<C> key(key_width);
  Scratch<C> mean(key_width);
  C* biases = static_cast<C*>(g.grad_key_bias);
  with_flag(a.wide_text, [&](auto wide) {
    using U = std::conditional_t<wide.value, C, T>;
    auto write = [&](const HeadRows& to, int64_t h, int64_t t, const C* from, int64_t channels) {
      if (to.data)
        write_row<U>(from, channels, C(1), in.template row<U>(to, index, h, t), to.c);
    };
    auto write_all = [&](int64_t h, int64_t t, const C* key, const C* value, C bias) {
      write(g.grad_key, h, t, key, a.D);
      write(g.grad_value, h, t, value, a.Dv);
      if (biases)
        biases[(index * a.H + h) * a.T + t] = bias;
    };
    for (int64_t h = 0; h < a.H && !a.pool; ++h)
      for (int64_t i = in.order.count; i < a.T; ++i)
        write_all(h, in.order[i], nullptr, nullptr, C(0));
    for (int64_t k = 0; k < in.groups.count; ++k)
      in.each_column(k, [&](int64_t column, int64_t h, int64_t t, bool takes_part) {
        const int64_t j = k * in.groups.stride + column;
        // What a product may have left behind the last column that takes part is no sum.
        const C* key_sums = takes_part || g.grad_text_out.data ? sums + j * key_width : nullptr;
        if (g.grad_text_out.data && g.grad_key.data) {
          read_rows<C>(
              1, a.D, [&](int64_t) { return in.template row<const C>(a.unrounded, index, h, t); }, a.unrounded.c,
              mean.data, key_width);
          for (int64_t c = 0; c < key_width; c += lanes<C>)
            store(key.data + c, load(key_sums + c) - splat(rests[j]) * load(mean.data + c));
          key_sums = key.data;
        }
        write_all(h, t, key_sums, takes_part ? value_sums + j * value_width : nullptr, bias_sums[j]);
        if (!takes_part && g.grad_key.data)
          clear_replaced(in.template row<U>(a.key, index, h, t), a.key.c, in.template row<U>(g.grad_key, index, h, t),
                         g.grad_key.c, a.D);
      });
  });
}

template <class T>
void absorbed_backward(const AbsorbedAttentionBackward& g, const Parallel& parallel) {
  using C = acc_t<T>;
  const AbsorbedAttention& a = g.forward;
  const int64_t columns = a.H * a.T;
  const Tiles tiles(a.B, a.N, tile_positions(a.D, a.T), 2 * columns * (5 * a.D + 2 * a.Dv), parallel);
  const bool of_tokens = g.grad_key.data || g.grad_key_bias || g.grad_value.data;
  auto write = [&](int64_t index, const C* sums, const Order&) { write_gradients<T>(g, index, sums); };
  run_backward<AbsorbedBackward<T>, AbsorbedInputs<T>, C>(g, tiles, of_tokens ? AbsorbedBackward<T>::size(g) : 0,
                                                          parallel, write);
}

}  // namespace
}  // namespace mmk
