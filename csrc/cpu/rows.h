// What channel and additive attention share: all samples' rows as one matrix, cut into tiles whatever sample they
// belong to; a layer's weight packed once for all threads; and the gradient of a layer's weight, the one sum over all
// rows.
#pragma once
#include "../parallel.h"
#include "../tensor.h"
#include "gemm.h"
#include "scratch.h"

namespace mmk {
namespace {

constexpr int64_t tile_rows = 96;
static_assert(tile_rows % whole_rows == 0);

// The rows of [B, N, C], or of packed [N, C] (b = 0), one after another.
template <class T>
struct Source {
  T* data;
  int64_t b, n, c, N;
  Source(const SampleRows& r, int64_t N) : data(static_cast<T*>(r.data)), b(r.b), n(r.n), c(r.c), N(N) {}
  T* row(int64_t r) const { return data + r / N * b + r % N * n; }
  bool even(int64_t first, int64_t count) const { return b == N * n || first / N == (first + count - 1) / N; }
  explicit operator bool() const { return data; }
};

// Rows of a sample; `starts` are the bags' first rows.
struct Samples {
  int64_t count, N;
  const int64_t* starts;  // null: N rows each
  int64_t begin(int64_t b) const { return starts ? starts[b] : b * N; }
  int64_t end(int64_t b) const { return begin(b + 1); }
  int64_t rows() const { return begin(count); }
  int64_t of(int64_t row) const {  // the sample that has a row
    if (!starts)
      return row / N;
    int64_t low = 0;
    int64_t high = count - 1;
    while (low < high) {
      int64_t middle = (low + high + 1) / 2;
      starts[middle] <= row ? low = middle : high = middle - 1;
    }
    return low;
  }
  // f(sample, first row, last row + 1) for what every sample has of some rows.
  template <class F>
  void of_rows(int64_t first, int64_t last, F f) const {
    for (int64_t r = first; r < last;) {
      const int64_t b = of(r);
      const int64_t next = end(b) < last ? end(b) : last;
      f(b, r, next);
      r = next;
    }
  }
};

// Tiles of rows, shared out to threads in one piece each.
struct RowTiles {
  int64_t rows, count, parts;
  RowTiles(int64_t rows, int64_t flops_per_row, const Parallel& parallel)
      : rows(rows), count((rows + tile_rows - 1) / tile_rows) {
    parts = parallel.threads < count ? parallel.threads : count;
    if (rows * flops_per_row < 1 << 20)
      parts = parts < 1 ? parts : 1;  // not worth waking another thread
  }
  int64_t begin(int64_t part) const { return count * part / parts; }
  int64_t first(int64_t tile) const {
    return tile * tile_rows < rows ? tile * tile_rows : rows;
  }  // of the tile behind the last: the end
  int64_t size(int64_t tile) const { return first(tile + 1) - first(tile); }
};

// A tile of image rows as it is multiplied: in place where every row that a block reads exists, of whole vectors. Rows
// that aren't valid(r) are zeros. `rows` is how many there are in all.
template <class T, class C, class Valid>
inline const C* image_tile(const Source<const T>& image, int64_t first, int64_t count, int64_t rows, int64_t channels,
                           C* copy, int64_t& step, Valid valid) {
  bool all = true;
  for (int64_t r = first; all && r < first + count; ++r)
    all = valid(r);
  if constexpr (std::is_same<T, C>::value)
    if (all && image.c == 1 && channels % lanes<C> == 0 && first + count + slack <= rows &&
        image.even(first, count + slack))
      return step = image.n, image.row(first);
  step = padded<C>(channels);
  read_rows<T>(
      count, channels, [&](int64_t r) -> const T* { return valid(first + r) ? image.row(first + r) : nullptr; },
      image.c, copy);
  return copy;
}

// Rows from `first` on, of `rows` in all, to be fetched while the tile before is multiplied.
template <class T>
inline void fetch_tile(Fetch& fetch, const Source<T>& from, int64_t first, int64_t rows, int64_t channels) {
  const int64_t count = rows - first < tile_rows ? rows - first : tile_rows;
  if (from && count > 0 && from.c == 1 && from.even(first, count))
    fetch.add(from.row(first), from.n, channels, count);
}

// A weight [out, in] as B: of rows * weight^T (B[in, out], times a factor) or of rows * weight (B[out, in]). Needs in *
// padded(out), out * padded(in).
template <class T, class C>
inline void pack_weight_transposed(const Projection& w, int64_t out, int64_t in, C factor, C* to,
                                   const Parallel& parallel, int64_t parts) {
  const int64_t all = panels<C>(out);
  const T* data = static_cast<const T*>(w.data);
  each_part(parallel, parts, [&](int64_t p) {
    pack_transposed<T>(
        in, out, [&](int64_t i) { return data + i * w.row; }, w.column, factor, to, all * p / parts,
        all * (p + 1) / parts);
  });
}
template <class T, class C>
inline void pack_weight(const Projection& w, int64_t out, int64_t in, C* to, const Parallel& parallel, int64_t parts) {
  const int64_t all = panels<C>(in);
  const T* data = static_cast<const T*>(w.data);
  each_part(parallel, parts, [&](int64_t p) {
    pack<T>(
        out, in, [&](int64_t i) { return data + i * w.row; }, w.column, C(1), to, all * p / parts,
        all * (p + 1) / parts);
  });
}

// to[c] += sum of rows[r][c] for columns from `begin` to `end`; tile by tile, which keeps long sums exact.
template <class C>
inline void add_rows(C* to, const C* rows, int64_t count, int64_t step, int64_t begin, int64_t end) {
  for (int64_t first = 0; first < count; first += tile_rows) {
    const int64_t last = count - first < tile_rows ? count : first + tile_rows;
    int64_t c = begin;
    for (; c + lanes<C> <= end; c += lanes<C>) {
      vec<C> sum = {};
      for (int64_t r = first; r < last; ++r)
        sum += load(rows + r * step + c);
      store(to + c, load(to + c) + sum);
    }
    for (; c < end; ++c) {
      C sum = 0;
      for (int64_t r = first; r < last; ++r)
        sum += rows[r * step + c];
      to[c] += sum;
    }
  }
}

// sum over rows of G[row]^T X[row]: the gradient of a weight from the scores' gradients and the layer's input, and sums
// of G alone, a sample each. Rows come panel by panel: every tile leaves its G and X here, then threads share out the
// columns of G, so that no thread needs a copy of the sums, and rows are added in their order.
template <class C>
struct WeightGradient {
  int64_t out, in, out_width, in_width, tiles;  // columns of G and X, with their padding, and tiles in a panel
  bool of_weight;
  Scratch<C> grad_output, input, sums;

  WeightGradient(int64_t out, int64_t in, int64_t tiles, bool of_weight)
      : out(out),
        in(in),
        out_width(spaced<C>(out)),
        in_width(padded<C>(in)),
        tiles(tiles),
        of_weight(of_weight),
        grad_output(tiles * tile_rows * out_width + slack * out_width),
        input(of_weight ? tiles * tile_rows * in_width : 0),
        sums(of_weight ? (out + slack) * in_width : 0) {}

  // Tiles in a panel: some for every thread, and enough work between two meetings of all threads.
  static int64_t panel(const RowTiles& tiles, int64_t out, int64_t in) {
    const int64_t enough = (2 << 20) / (tile_rows * (padded<C>(out) + padded<C>(in)) * int64_t(sizeof(C)));
    const int64_t most = 4 * tiles.parts < enough ? enough : 4 * tiles.parts;
    return most < tiles.count ? most : tiles.count;
  }
  C* rows(int64_t slot) const { return grad_output.data + slot * tile_rows * out_width; }  // G of a panel's tile
  void save(int64_t slot, int64_t count, const C* x, int64_t step) const {                 // X of a panel's tile
    if (of_weight)
      pack<C>(
          count, in, [&](int64_t r) { return x + r * step; }, 1, C(1), input.data, 0, INT64_MAX, slot * tile_rows,
          tiles * tile_rows);
  }

  // Adds a panel of `count` rows, the first one of all `first`. columns(begin, end, G): what else a thread does with
  // its columns.
  template <class F>
  void add(int64_t first, int64_t count, const Parallel& parallel, int64_t parts, F columns) const {
    const int64_t blocks = to_whole_rows(out) / whole_rows;  // no block of a share reaches into the next one
    each_part(parallel, parts, [&](int64_t p) {
      const int64_t begin = blocks * p / parts * whole_rows;
      const int64_t last = blocks * (p + 1) / parts * whole_rows;
      const int64_t end = last < out ? last : out;
      if (begin >= end)
        return;
      columns(begin, end, grad_output.data);
      if (!of_weight)
        return;
      gemm_tile<C, true>(end - begin, in, count, grad_output.data + begin, out_width,
                         {input.data, 0, tiles * tile_rows}, sums.data + begin * in_width, in_width, first > 0);
    });
  }
  template <class T>
  void write(void* to, int64_t begin, int64_t end, int64_t step) const {  // rows of the gradient, `step` apart
    for (int64_t i = begin; i < end; ++i)
      write_row<T>(sums.data + i * in_width, in, C(1), static_cast<T*>(to) + (i - begin) * step, 1);
  }
};

}  // namespace
}  // namespace mmk
