// Channel attention on the CPU. What must move: the image once, the result once, and the weight, which stays in the
// caches; the rest is matrix products. They are our own (gemm.h), faster here than the library's and free of its
// copies: a tile of rows is multiplied by the packed weight, and its scores turn into the result while they are in the
// second-level cache. No [B, N, D] scores exist. Backward, with P = weights, G = grad_result, H = grad_weights, the
// scores computed again (P of the first rows may be kept): dP = G X + H;
//   dS = P (dP - rowsum(P dP));  dX = G P + dS W;  dW = dS^T X;  dbias_hidden = sum over a sample's rows of dS.
#include "../channel_attention.h"

#include "dispatch.h"
#include "rows.h"
#include "softmax.h"

namespace mmk {
namespace {

template <class T>
struct Inputs {
  using C = acc_t<T>;
  const ChannelAttention& a;
  Source<const T> image;
  const Samples samples;
  const int64_t width;
  Scratch<C> weight;  // B[in, out]

  Inputs(const ChannelAttention& a, const Parallel& parallel, int64_t parts)
      : a(a), image(a.image, a.N), samples{a.B, a.N, nullptr}, width(spaced<C>(a.D)), weight(a.D * width) {
    pack_weight_transposed<T>(a.weight, a.D, a.D, C(1), weight.data, parallel, parts);
  }

  // Scores of a tile, with the bias: exponentials and one over their sum, a row each.
  void weigh(const C* x, int64_t step, int64_t first, int64_t count, C* scores, C* share, Fetch& fetch) const {
    fetch.spread(count * a.D * a.D);
    gemm_tile<C, false>(count, a.D, a.D, x, step, {weight.data, 0}, scores, width, false, fetch);
    for (int64_t r = 0; r < count; ++r) {
      const C* bias_hidden = static_cast<const C*>(a.bias_hidden) + samples.of(first + r) * a.D;
      C* s = scores + r * width;
      vec<C> most = splat(-infinity<C>);
      C top = -infinity<C>;
      int64_t c = 0;
      for (; c + lanes<C> <= a.D; c += lanes<C>) {
        const vec<C> x = load(s + c) + load(bias_hidden + c);
        store(s + c, x);
        most = maximum<C>(most, x);
      }
      for (; c < a.D; ++c)
        top = maximum(top, s[c] += bias_hidden[c]);
      share[r] = 1 / exp_sum(s, a.D, maximum(top, max<C>(most)));
    }
  }
};

template <class T>
void forward(const ChannelAttention& a, const Parallel& parallel) {
  using C = acc_t<T>;
  const RowTiles tiles(a.B * a.N, 2 * a.D * a.D, parallel);
  const Inputs<T> in(a, parallel, tiles.parts);
  const Source<T> result(a.result, a.N), weights(a.weights, a.N);
  each_part(parallel, tiles.parts, [&](int64_t part) {
    Scratch<C> copy((tile_rows + slack) * in.width), scores((tile_rows + slack) * in.width), share(tile_rows);
    for (int64_t tile = tiles.begin(part); tile < tiles.begin(part + 1); ++tile) {
      const int64_t first = tiles.first(tile);
      const int64_t count = tiles.size(tile);
      int64_t step;
      const C* x = image_tile<T>(in.image, first, count, a.B * a.N, a.D, copy.data, step, [](int64_t) { return true; });
      Fetch fetch;
      fetch_tile(fetch, in.image, first + count, tiles.rows, a.D);
      in.weigh(x, step, first, count, scores.data, share.data, fetch);
      for (int64_t r = 0; r < count; ++r) {
        const C* p = scores.data + r * in.width;
        const C* values = x + r * step;
        T* to = result.row(first + r);
        int64_t c = 0;
        auto along = [&](auto nontemporal) {
          for (; c + lanes<C> <= a.D; c += lanes<C>)
            store_or_stream<nontemporal.value>(to + c, load(p + c) * share.data[r] * load(values + c));
        };
        with_flag(a.nontemporal && streamable(to, a.D, result.n), along);
        for (; c < a.D; ++c)
          to[c] = from_acc<T>(p[c] * share.data[r] * values[c]);
        if (weights)
          write_row<T>(p, a.D, share.data[r], weights.row(first + r), 1);
        if (first + r < a.kept_rows)
          write_row<C>(p, a.D, share.data[r], static_cast<C*>(a.kept) + (first + r) * a.D, 1);
      }
    }
    if (a.nontemporal)
      fence();
  });
}

template <class T>
struct Backward {
  using C = acc_t<T>;
  const ChannelAttentionBackward& g;
  const ChannelAttention& a;
  const Inputs<T>& in;
  const WeightGradient<C>& gradient;
  const C* weight_rows;  // B[out, in]
  const Source<const T> grad_result, grad_weights;
  const Source<T> grad_image;
  Scratch<C> copy, grad_rows, share;

  Backward(const ChannelAttentionBackward& g, const Inputs<T>& in, const WeightGradient<C>& gradient,
           const C* weight_rows)
      : g(g),
        a(g.forward),
        in(in),
        gradient(gradient),
        weight_rows(weight_rows),
        grad_result(g.grad_result, a.N),
        grad_weights(g.grad_weights, a.N),
        grad_image(g.grad_image, a.N),
        copy((tile_rows + slack) * in.width),
        grad_rows((tile_rows + slack) * in.width),
        share(tile_rows) {}

  void tile(int64_t first, int64_t count, int64_t slot) {
    int64_t step;
    const C* x = image_tile<T>(in.image, first, count, a.B * a.N, a.D, copy.data, step, [](int64_t) { return true; });
    C* scores = gradient.rows(slot);
    Fetch fetch;
    fetch_tile(fetch, in.image, first + count, a.B * a.N, a.D);
    fetch_tile(fetch, grad_result, first + count, a.B * a.N, a.D);
    if (first + count <= a.kept_rows) {
      read_rows<C>(
          count, a.D, [&](int64_t r) { return static_cast<const C*>(a.kept) + (first + r) * a.D; }, 1, scores,
          in.width);
      for (int64_t r = 0; r < count; ++r)
        share.data[r] = 1;
    } else {
      in.weigh(x, step, first, count, scores, share.data, fetch);
    }
    if (grad_result)
      read_rows<T>(
          count, a.D, [&](int64_t r) { return grad_result.row(first + r); }, grad_result.c, grad_rows.data, in.width);
    for (int64_t r = 0; r < count; ++r)
      differentiate(scores + r * in.width, x + r * step, grad_rows.data + r * in.width, first + r, share.data[r]);
    gradient.save(slot, count, x, step);
    if (!grad_image)
      return;
    if (!grad_result)
      memset(grad_rows.data, 0, count * in.width * sizeof(C));
    gemm_tile<C, false>(count, a.D, a.D, scores, in.width, {weight_rows, 0}, grad_rows.data, in.width, true);
    for (int64_t r = 0; r < count; ++r) {
      T* to = grad_image.row(first + r);
      write_row<T>(grad_rows.data + r * in.width, a.D, C(1), to, 1, a.nontemporal && streamable(to, a.D, grad_image.n));
    }
    if (a.nontemporal)
      fence();
  }

  // A row: exponentials -> the scores' gradient, grad_result -> the image's direct part of its gradient. A weight of 1
  // is the only one: its score has no gradient, and rounding must not leave one.
  void differentiate(C* p, const C* x, C* up, int64_t row, C share) {
    const T* grad_weights_row = grad_weights ? grad_weights.row(row) : nullptr;
    const int64_t step = grad_weights.c;
    auto arriving = [&](int64_t c) {
      return (grad_result ? up[c] * x[c] : C(0)) + (grad_weights_row ? to_acc(grad_weights_row[c * step]) : C(0));
    };
    const int64_t whole = a.D / lanes<C> * lanes<C>;
    if (grad_weights_row || !grad_result) {  // rare: element by element, dP in place of the direct part first
      C total = 0;
      for (int64_t c = 0; c < a.D; ++c)
        total += (p[c] *= share) * arriving(c);
      for (int64_t c = 0; c < a.D; ++c) {
        const C weight = p[c];
        const C arrives = arriving(c);
        if (grad_result)
          up[c] *= weight;
        p[c] = weight == 1 ? C(0) : weight * (arrives - total);
      }
      return;
    }
    vec<C> sums = {};
    C total = 0;
    int64_t c = 0;
    for (; c < whole; c += lanes<C>) {
      const vec<C> direct = load(p + c) * share * load(up + c);
      store(up + c, direct);  // G P
      sums += direct * load(x + c);
    }
    for (; c < a.D; ++c)
      total += (up[c] *= p[c] * share) * x[c];
    total += sum<C>(sums);
    for (c = 0; c < whole; c += lanes<C>) {
      const vec<C> weight = load(p + c) * share;
      store(p + c, weight == C(1) ? vec<C>{} : load(up + c) * load(x + c) - weight * total);
    }
    for (; c < a.D; ++c) {
      const C weight = p[c] * share;
      p[c] = weight == 1 ? C(0) : up[c] * x[c] - weight * total;
    }
  }
};

template <class T>
void backward(const ChannelAttentionBackward& g, const Parallel& parallel) {
  using C = acc_t<T>;
  const ChannelAttention& a = g.forward;
  const RowTiles tiles(a.B * a.N, 6 * a.D * a.D, parallel);
  const int64_t parts = tiles.parts < 1 ? 1 : tiles.parts;
  C* grad_bias_hidden = static_cast<C*>(g.grad_bias_hidden);
  if (grad_bias_hidden)
    memset(grad_bias_hidden, 0, a.B * a.D * sizeof(C));
  if (tiles.count == 0) {
    for (int64_t i = 0; g.grad_weight && i < a.D; ++i)
      memset(static_cast<void*>(static_cast<T*>(g.grad_weight) + i * g.grad_weight_row), 0, a.D * sizeof(T));
    return;
  }
  const Inputs<T> in(a, parallel, parts);
  Scratch<C> weight_rows(g.grad_image.data ? a.D * in.width : 0);
  if (g.grad_image.data)
    pack_weight<T>(a.weight, a.D, a.D, weight_rows.data, parallel, parts);
  const int64_t panel = WeightGradient<C>::panel(tiles, a.D, a.D);
  const WeightGradient<C> gradient(a.D, a.D, panel, g.grad_weight);
  for (int64_t start = 0; start < tiles.count; start += panel) {
    const int64_t size = tiles.count - start < panel ? tiles.count - start : panel;
    const int64_t first = tiles.first(start);
    const int64_t count = tiles.first(start + size) - first;
    each_part(parallel, parts, [&](int64_t part) {
      Backward<T> work(g, in, gradient, weight_rows.data);
      for (int64_t t = size * part / parts; t < size * (part + 1) / parts; ++t)
        work.tile(tiles.first(start + t), tiles.size(start + t), t);
    });
    if (g.grad_weight || grad_bias_hidden)
      gradient.add(first, count, parallel, parts, [&](int64_t begin, int64_t end, const C* rows) {
        if (!grad_bias_hidden)
          return;
        in.samples.of_rows(first, first + count, [&](int64_t b, int64_t r, int64_t last) {
          add_rows(grad_bias_hidden + b * a.D, rows + (r - first) * in.width, last - r, in.width, begin, end);
        });
      });
  }
  if (g.grad_weight)
    gradient.template write<T>(g.grad_weight, 0, a.D, g.grad_weight_row);
}

}  // namespace

namespace MMK_ISA {
void channel_attention_forward(const ChannelAttention& a, const Parallel& p) {
  with_type(a.dtype, [&](auto zero) { forward<decltype(zero)>(a, p); });
}
void channel_attention_backward(const ChannelAttentionBackward& g, const Parallel& p) {
  with_type(g.forward.dtype, [&](auto zero) { backward<decltype(zero)>(g, p); });
}
}  // namespace MMK_ISA
}  // namespace mmk

#ifdef MMK_DEFINE_ENTRY
MMK_CPU_ENTRY(channel_attention_forward, ChannelAttention)
MMK_CPU_ENTRY(channel_attention_backward, ChannelAttentionBackward)
#endif
