// What both directions of bidirectional attention know of a head: its tensors, the tokens in the order in which they
// are multiplied, and how queries, values and tokens are read and packed.
#pragma once
#include "../bidirectional_attention.h"

#include "heads.h"

namespace mmk {
namespace {

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

// What both directions know of a head.
template <class T>
struct HeadInputs {
  using C = acc_t<T>;
  const BidirectionalAttention& a;
  Head<T> query, key, image_value, text_value, image_out, text_out;
  Head<C> unrounded;
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
    unrounded = head<C>(a.unrounded, b, h);
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
  bool valid(int64_t n) const { return !image_mask || *image_mask.row(n); }

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
      if (!valid(first + r))
        for (int64_t c = 0; c < a.d; ++c)
          copy[r * width + c] = finite_or_0(copy[r * width + c]);
  }
  void read_values(int64_t first, int64_t count, C* copy) const {
    read_rows<T>(
        count, a.dv, [&](int64_t r) -> const T* { return valid(first + r) ? image_value.row(first + r) : nullptr; },
        image_value.c, copy);
  }
  int64_t valid_tokens(int64_t block) const { return block_tokens(order.count, block); }
};

inline int64_t score_width(int64_t tokens, int64_t vector) {
  const int64_t n = tokens < token_block ? tokens : token_block;
  return (n + vector - 1) / vector * vector;
}

}  // namespace
}  // namespace mmk
