// What attention over heads shares: how queries are cut into tiles and tiles shared out, which tokens take part,
// softmax along the columns of a tile of scores, and sums over tiles that several threads have parts of.
#pragma once
#include <type_traits>

#include "../parallel.h"
#include "../tensor.h"
#include "gemm.h"
#include "scratch.h"
#include "softmax.h"

namespace mmk {
namespace {

// What is masked out, and has a result of its own, counts as 0 where it holds NaN or Inf.
template <class C>
MMK_INLINE C finite_or_0(C x) {
  return x - x == 0 ? x : C(0);
}

// A head's rows, i.e. [N, C] of a [B, H, N, C] tensor.
template <class T>
struct Head {
  T* data;
  int64_t n, c;
  T* row(int64_t i) const { return data + i * n; }
  explicit operator bool() const { return data; }
};
template <class T>
inline Head<T> head(const HeadRows& t, int64_t b, int64_t h) {
  return {t.data ? static_cast<T*>(t.data) + b * t.b + h * t.h : nullptr, t.n, t.c};
}

// Of queries: every element of a packed panel is used so many times while it is close.
constexpr int64_t tile_rows = 96;
static_assert(tile_rows % whole_rows == 0);

// Queries of all heads in tiles of about the same height, shared out to the threads in one piece each: a thread
// prepares keys and values of every head that it meets once. One head of one sample uses all threads, and so do many.
struct Tiles {
  int64_t heads, rows, height, per_head, parts;

  Tiles(int64_t heads, int64_t rows, int64_t most, int64_t flops_per_row, const Parallel& parallel)
      : heads(heads), rows(rows) {
    int64_t count = (rows + most - 1) / most;
    height = count ? (rows + count - 1) / count : 0;
    height = to_whole_rows(height);
    per_head = height ? (rows + height - 1) / height : 0;
    parts = parallel.threads < heads * per_head ? parallel.threads : heads * per_head;
    if (heads * rows * flops_per_row < 1 << 20)
      parts = parts < 1 ? parts : 1;  // not worth waking another thread
  }
  int64_t begin(int64_t part) const { return heads * per_head * part / parts; }

  // f(part) for every part, on its thread.
  template <class F>
  void run(const Parallel& parallel, F f) const {
    if (parts == 0)
      return;
    Parallel limited{int(parts), parallel.run};
    parallel_for(limited, parts, [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p)
        f(p);
    });
  }
  // f(head, first tile, last tile + 1): a part's heads, and its tiles in each.
  template <class F>
  void of_part(int64_t p, F f) const {
    for (int64_t tile = begin(p), end = begin(p + 1); tile < end;) {
      int64_t h = tile / per_head;
      int64_t next = (h + 1) * per_head < end ? (h + 1) * per_head : end;
      f(h, tile - h * per_head, next - h * per_head);
      tile = next;
    }
  }
  int64_t first_row(int64_t tile) const { return tile * height; }
  int64_t count_from(int64_t row) const {
    return rows - row < height ? rows - row : height;
  }  // of a tile that begins there
  int64_t count(int64_t tile) const { return count_from(first_row(tile)); }
};

// The tokens of a head: those that take part in front, as only they are multiplied, and behind them the others where
// they are wanted, too.
struct Order {
  Scratch<int32_t> index;
  int64_t count = 0;  // how many take part

  explicit Order(int64_t tokens) : index(tokens) {}
  void find(const bool* mask, int64_t step, int64_t tokens, bool others) {
    count = 0;
    for (int64_t t = 0; t < tokens; ++t)
      if (!mask || mask[t * step])
        index.data[count++] = int32_t(t);
    if (!others || count == tokens)
      return;
    for (int64_t t = 0, i = count; t < tokens; ++t)
      if (!mask[t * step])
        index.data[i++] = int32_t(t);
  }
  int64_t operator[](int64_t i) const { return index.data[i]; }
};

// Tokens whose scores are in the works at a time: a tile of them stays in the second-level cache. More are taken block
// by block. A multiple of every vector's lanes and of every block's rows: no block of tokens reaches into the next.
constexpr int64_t token_block = 528;
static_assert(token_block % whole_rows == 0 && token_block % lanes<float> == 0);

inline int64_t blocks(int64_t tokens) {
  return (tokens + token_block - 1) / token_block;
}
inline int64_t block_tokens(int64_t tokens, int64_t block) {
  const int64_t rest = tokens - block * token_block;
  return rest < 0 ? 0 : rest < token_block ? rest : token_block;
}

// Rows of tokens, packed block by block: B[token, channel] at k * token_block * padded(channels). packed_size elements
// do for columns, too.
template <class C>
inline int64_t packed_size(int64_t tokens, int64_t channels) {
  return padded<C>(tokens) * channels + (tokens + 1) * padded<C>(channels);
}
template <class T, class C>
inline void pack_rows(Head<T> from, const Order& order, int64_t tokens, int64_t channels, C* to) {
  for (int64_t k = 0; k < blocks(tokens); ++k)
    pack<T>(
        block_tokens(tokens, k), channels, [&](int64_t i) { return from.row(order[k * token_block + i]); }, from.c,
        C(1), to + k * token_block * padded<C>(channels));
}

// Rows of tokens as the left side of a product: [tokens, padded(channels)].
template <class T, class C>
inline void read_tokens(Head<T> from, const Order& order, int64_t tokens, int64_t channels, C* to) {
  read_rows<T>(tokens, channels, [&](int64_t i) -> const T* { return from.row(order[i]); }, from.c, to);
}
// Rows of a tile of transposed scores, [token, query].
inline int64_t score_rows(int64_t tokens) {
  return (tokens < token_block ? tokens : token_block) + slack;
}

// Rows to be fetched; none where channels lie apart: too many lines.
template <class T>
inline void fetch_rows(Fetch& fetch, Head<T> from, int64_t first, int64_t rows, int64_t channels) {
  if (from && from.c == 1)
    fetch.add(from.row(first), from.n, channels, rows);
}

// What backward needs to find the weights of a softmax again, exp(score - top) share: the largest score, and one over
// the sum of exponentials; of `count` queries or tokens of a head, [2, count]. Where nothing takes part share is 0.
// They are two numbers as their logarithms' sum would be rounded: beside a top of 1e9, a mask's, nothing would be left
// of the sum. A weight that is exactly 1 is the only one: its score has no gradient, and rounding must not leave one.
template <class C>
struct SoftmaxRows {
  C *top, *share;
  SoftmaxRows() : top(nullptr), share(nullptr) {}
  SoftmaxRows(void* data, int64_t head, int64_t count)
      : top(static_cast<C*>(data) + 2 * head * count), share(top + count) {}
  void write(int64_t first, int64_t count, const C* most, const C* total) const {
    for (int64_t i = 0; i < count; ++i) {
      top[first + i] = most[i] == -infinity<C> ? C(0) : most[i];
      share[first + i] = total[i] == 0 ? C(0) : 1 / total[i];
    }
  }
  C base(int64_t i) const {
    return share[i] != 0 ? top[i] : infinity<C>;
  }  // what exponentials of scores less it are 0 where nothing takes part
  C certain(int64_t i) const {
    return share[i] == 1 ? C(1) : C(2);
  }  // the exponential whose weight is 1, if there is one
};

// Softmax along the columns of a tile of scores: scores -> exp(score - top of the column), 0 in rows that don't take
// part; top and total brought up to date: the largest score so far, and the sum of the exponentials. `factor` is what
// sums before this block are to be multiplied by. First block: top = -Inf, total = 0.
template <class C, class Keeps>
inline void softmax_columns(C* scores, int64_t rows, int64_t step, int64_t count, Keeps keeps, C* top, C* total,
                            C* factor) {
  for (int64_t i = 0; i < count; i += lanes<C>) {
    const vec<C> before = load(top + i);
    const vec<C> none = splat(-infinity<C>);
    vec<C> now = before;
    for (int64_t r = 0; r < rows; ++r)
      if (keeps(r))
        now = maximum<C>(now, load(scores + r * step + i));
    const vec<C> base = now == none ? vec<C>{} : now;
    vec<C> sum = {};
    for (int64_t r = 0; r < rows; ++r) {
      vec<C> e = {};
      if (keeps(r))
        e = exp_below(load(scores + r * step + i) - base);
      store(scores + r * step + i, e);
      sum += e;
    }
    const vec<C> f = before == none ? vec<C>{} : exp_below(before - base);
    store(factor + i, f);
    store(total + i, load(total + i) * f + sum);
    store(top + i, now);
  }
}

template <class C>
inline void scale_rows(C* x, int64_t rows, int64_t step, int64_t count, const C* factor) {
  for (int64_t r = 0; r < rows; ++r)
    if (factor[r] != 1)
      for (int64_t i = 0; i < count; i += lanes<C>)
        store(x + r * step + i, load(x + r * step + i) * factor[r]);
}

// The gradients of a softmax's scores add up to 0. Where their mean comes from results that were rounded they don't
// quite, and what is left over, times what keys have in common, may be larger than a query's gradient. So the mean is
// found again where a tile has all tokens. Else what keys have in common is taken from what is left over.

// sum(w x) / sum(w), 0 where all weights are.
template <class C>
inline C weighted_mean(const C* w, const C* x, int64_t count) {
  vec<C> totals = {};
  vec<C> sums = {};
  int64_t i = 0;
  for (; i + lanes<C> <= count; i += lanes<C>) {
    totals += load(w + i);
    sums += load(w + i) * load(x + i);
  }
  C total = sum<C>(totals);
  C found = sum<C>(sums);
  for (; i < count; ++i) {
    total += w[i];
    found += w[i] * x[i];
  }
  return total == 0 ? C(0) : found / total;
}
template <class C>
inline C sum_of(const C* x, int64_t count) {
  vec<C> sums = {};
  int64_t i = 0;
  for (; i + lanes<C> <= count; i += lanes<C>)
    sums += load(x + i);
  C total = sum<C>(sums);
  for (; i < count; ++i)
    total += x[i];
  return total;
}
// About what rows have in common: the mean of some of them. row(i) has `channels` `step` apart.
template <class C, class Row>
inline void find_centre(int64_t rows, Row row, int64_t step, int64_t channels, C* to) {
  constexpr int64_t most = 32;
  const int64_t apart = (rows + most - 1) / most;
  memset(to, 0, padded<C>(channels) * sizeof(C));
  int64_t found = 0;
  for (int64_t i = 0; i < rows; i += apart, ++found) {
    const auto* from = row(i);
    int64_t c = 0;
    for (; step == 1 && c + lanes<C> <= channels; c += lanes<C>)
      store(to + c, load(to + c) + load(from + c));
    for (; c < channels; ++c)
      to[c] += to_acc(from[c * step]);
  }
  multiply(to, channels, 1 / C(found ? found : 1));
}

// A head's gradient from the sums of its tokens, in their order; those without a sum get zeros.
template <class T, class C>
inline void write_tokens(const C* sums, int64_t step, int64_t columns, C factor, const Order& order, int64_t summed,
                         int64_t tokens, Head<T> to) {
  if (summed < tokens)
    for (int64_t t = 0; t < tokens; ++t)
      write_row<T, C>(nullptr, columns, factor, to.row(t), to.c);
  for (int64_t i = 0; i < summed; ++i)
    write_row<T>(sums + i * step, columns, factor, to.row(order[i]), to.c);
}

// Sums over the queries of a head when the tiles of a head may be shared by several parts: each leaves what it has of
// its first and of its last head here, and they are added in the order of the parts.
template <class C>
struct Shares {
  const Tiles& tiles;
  int64_t size;
  Scratch<C> data;
  Shares(const Tiles& tiles, int64_t size)
      : tiles(tiles), size(size), data(tiles.parts > 1 ? 2 * tiles.parts * size : 0) {}

  // Where a part puts its share of a head; null if no other part has one.
  C* of(int64_t part, int64_t head) const {
    const int64_t begin = tiles.begin(part);
    const int64_t end = tiles.begin(part + 1);
    const bool starts = head * tiles.per_head >= begin;
    const bool ends = (head + 1) * tiles.per_head <= end;
    return starts && ends ? nullptr : data.data + (2 * part + (starts ? 1 : 0)) * size;
  }
  // f(head, shares, count) for every head that was shared.
  template <class F>
  void merge(F f) const {
    Scratch<C*> found(tiles.parts);
    for (int64_t p = 0; p < tiles.parts; ++p) {
      // the part's last
      const int64_t head = (tiles.begin(p + 1) - 1) / tiles.per_head;
      const int64_t next = (head + 1) * tiles.per_head;
      if (head * tiles.per_head < tiles.begin(p) || next <= tiles.begin(p + 1))
        continue;  // doesn't start here, or isn't shared
      int64_t count = 0;
      for (int64_t q = p; q < tiles.parts && tiles.begin(q) < next; ++q)
        found.data[count++] = of(q, head);
      f(head, found.data, count);
    }
  }
};

// Backward over all heads, where every head has `size` sums over its tokens; 0: none is wanted. Work is what a thread
// has; write(head, sums, its tokens' order) writes their gradients, zeros where there are no queries.
template <class Work, class Inputs, class C, class Gradients, class Write>
inline void run_backward(const Gradients& g, const Tiles& tiles, int64_t size, const Parallel& parallel, Write write) {
  Shares<C> shares(tiles, size);
  tiles.run(parallel, [&](int64_t part) {
    Work work(g, tiles);
    tiles.of_part(part, [&](int64_t index, int64_t first, int64_t last) {
      work.start(index);
      for (int64_t tile = first; tile < last; ++tile)
        work.tile(tiles.first_row(tile), tiles.count(tile));
      if (!size)
        return;
      if (C* share = shares.of(part, index))
        memcpy(share, work.tokens.data, size * sizeof(C));
      else
        write(index, work.tokens.data, work.in.order);
    });
  });
  if (!size)
    return;

  Inputs in(g.forward);
  shares.merge([&](int64_t index, C** share, int64_t count) {
    for (int64_t k = 1; k < count; ++k)
      for (int64_t i = 0; i < size; ++i)
        share[0][i] += share[k][i];
    in.set(index);
    write(index, share[0], in.order);
  });
  if (tiles.rows)
    return;

  Scratch<C> nothing(size);
  memset(nothing.data, 0, size * sizeof(C));
  for (int64_t index = 0; index < tiles.heads; ++index) {
    in.set(index);
    write(index, nothing.data, in.order);
  }
}

}  // namespace
}  // namespace mmk
