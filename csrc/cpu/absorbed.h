// What both directions of absorbed attention know of a sample: its tokens of all heads as one list of columns, the keys
// and values that belong to them, and a tile of the image as products want it.
#pragma once
#include "../absorbed_attention.h"

#include "heads.h"

namespace mmk {
namespace {

// Heads are taken in groups, so that a group's scores of a tile stay in the second-level cache. A group's columns are
// its heads' tokens: first those that take part, of all its heads, then the others, which only the text's results want.
struct Groups {
  static constexpr int64_t most_columns = 512;
  int64_t heads, tokens, per_group, count;
  int64_t stride;  // columns from a group's to the next one's: blocks of a product may touch some behind the last

  Groups(int64_t heads, int64_t tokens) : heads(heads), tokens(tokens) {
    const int64_t fit = tokens ? most_columns / tokens : heads;
    const int64_t groups = fit < 1 ? heads : (heads + fit - 1) / fit;
    per_group = groups ? (heads + groups - 1) / groups : 0;
    count = per_group && tokens ? (heads + per_group - 1) / per_group : 0;
    stride = per_group * tokens + slack;
  }
  int64_t columns() const { return count * stride; }
  int64_t first_head(int64_t group) const { return group * per_group; }
  int64_t heads_of(int64_t group) const {
    return heads - first_head(group) < per_group ? heads - first_head(group) : per_group;
  }
};

// Positions of a tile: a tile of features, as rows and as columns, and a group's scores stay in the cache.
inline int64_t tile_positions(int64_t channels, int64_t tokens) {
  return channels > 768 || tokens > 1024 ? tile_rows / 2 : tile_rows;
}

template <class T>
struct AbsorbedInputs {
  using C = acc_t<T>;
  const AbsorbedAttention& a;
  const Groups groups;
  Order order;  // of the tokens
  int64_t sample = 0;
  const bool* positions = nullptr;  // which take part

  explicit AbsorbedInputs(const AbsorbedAttention& a) : a(a), groups(a.H, a.T), order(a.T) {}

  void set(int64_t index) {
    sample = index;
    positions = a.image_mask.data ? a.image_mask.data + index * a.image_mask.b : nullptr;
    order.find(a.text_mask.data ? a.text_mask.data + index * a.text_mask.b : nullptr, a.text_mask.t, a.T, true);
  }
  bool keeps(int64_t n) const { return !positions || positions[n * a.image_mask.t]; }

  // Columns of a group of which the image's result has something, and all that are wanted.
  int64_t attended(int64_t group) const { return groups.heads_of(group) * order.count; }
  int64_t columns(int64_t group) const { return groups.heads_of(group) * (a.pool ? a.T : order.count); }
  // f(column, head, token, whether it takes part)
  template <class F>
  void each_column(int64_t group, F f) const {
    const int64_t first = groups.first_head(group);
    const int64_t heads = groups.heads_of(group);
    int64_t column = 0;
    for (int64_t h = first; h < first + heads; ++h)
      for (int64_t i = 0; i < order.count; ++i)
        f(column++, h, order[i], true);
    if (a.pool)
      for (int64_t h = first; h < first + heads; ++h)
        for (int64_t i = order.count; i < a.T; ++i)
          f(column++, h, order[i], false);
  }

  template <class U>
  static U* row(const HeadRows& t, int64_t b, int64_t h, int64_t n) {
    return static_cast<U*>(t.data) + b * t.b + h * t.h + n * t.n;
  }

  // Rows of all columns, [columns, width]: converted, NaN and Inf of those that don't take part 0.
  void read_keys(C* to, int64_t width) const {
    with_flag(a.wide_text, [&](auto wide) {
      using U = std::conditional_t<wide.value, C, T>;
      for (int64_t g = 0; g < groups.count; ++g)
        each_column(g, [&](int64_t column, int64_t h, int64_t t, bool takes_part) {
          C* out = to + (g * groups.stride + column) * width;
          read_rows<U>(1, a.D, [&](int64_t) { return row<U>(a.key, sample, h, t); }, a.key.c, out, width);
          for (int64_t c = 0; !takes_part && c < a.D; ++c)
            out[c] = finite_or_0(out[c]);
        });
    });
  }
  void read_biases(C* to) const {
    for (int64_t g = 0; g < groups.count; ++g)
      each_column(g, [&](int64_t column, int64_t h, int64_t t, bool takes_part) {
        const C x = static_cast<const C*>(a.key_bias.data)[sample * a.key_bias.b + h * a.key_bias.h + t * a.key_bias.t];
        to[g * groups.stride + column] = takes_part ? x : finite_or_0(x);
      });
  }
  // Rows of values of the columns that take part.
  void read_values(C* to, int64_t width) const {
    with_flag(a.wide_text, [&](auto wide) {
      using U = std::conditional_t<wide.value, C, T>;
      for (int64_t g = 0; g < groups.count; ++g)
        each_column(g, [&](int64_t column, int64_t h, int64_t t, bool takes_part) {
          if (takes_part)
            read_rows<U>(
                1, a.Dv, [&](int64_t) { return row<U>(a.value, sample, h, t); }, a.value.c,
                to + (g * groups.stride + column) * width, width);
        });
    });
  }
  // Rows of columns, in panels a group: for products whose sum runs over columns.
  void pack_columns(const C* rows, int64_t width, int64_t channels, bool of_attended, C* to) const {
    for (int64_t g = 0; g < groups.count; ++g)
      pack<C>(
          of_attended ? attended(g) : columns(g), channels,
          [&](int64_t column) { return rows + (g * groups.stride + column) * width; }, 1, C(1),
          to + g * groups.stride * padded<C>(channels));
  }
};

// A tile of [B, N, channels] as products want it: rows, where they lie or a converted copy, and columns in panels.
template <class T>
struct Tile {
  using C = acc_t<T>;
  const int64_t channels, width;
  Scratch<C> copy, columns;
  const C* rows = nullptr;
  int64_t step = 0;  // from row to row

  Tile(int64_t positions, int64_t channels)
      : channels(channels),
        width(padded<C>(channels)),
        copy(positions * width),
        columns(padded<C>(positions) * channels) {}

  // keeps(n): not so, and what is NaN or Inf counts as 0.
  template <class Keeps>
  void read(const SampleRows& from, int64_t sample, int64_t first, int64_t count, bool masked, Keeps keeps) {
    const T* data = static_cast<const T*>(from.data) + sample * from.b + first * from.n;
    if constexpr (std::is_same<T, C>::value)
      if (from.c == 1 && from.n != 0 && channels == width && !masked) {  // a step of 0 would mean panels
        rows = data;
        step = from.n;
        return transpose(count);
      }
    read_rows<T>(count, channels, [&](int64_t r) { return data + r * from.n; }, from.c, copy.data, width);
    for (int64_t r = 0; masked && r < count; ++r)
      if (!keeps(first + r))
        for (int64_t c = 0; c < channels; ++c)
          copy.data[r * width + c] = finite_or_0(copy.data[r * width + c]);
    rows = copy.data;
    step = width;
    transpose(count);
  }

 private:
  void transpose(int64_t count) {
    pack_transposed<C>(channels, count, [&](int64_t r) { return rows + r * step; }, 1, C(1), columns.data);
  }
};

// 0 for the positions of a tile that take part, -Inf for the others and behind the last.
template <class C, class Keeps>
inline bool find_positions(int64_t first, int64_t count, int64_t width, Keeps keeps, C* to) {
  bool all = count == width;
  for (int64_t r = 0; r < width; ++r) {
    to[r] = r < count && keeps(first + r) ? C(0) : -infinity<C>;
    all = all && to[r] == 0;
  }
  return all;
}

}  // namespace
}  // namespace mmk
