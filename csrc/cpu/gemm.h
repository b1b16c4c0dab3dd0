// Small matrix products for tiles of attention: C[m, n] = (or +=) sum_k A[m, k] B[k, n], with d, T of 16 to 256, where
// a library reaches a third of its own peak. A block of rows x vectors of C stays in registers while k runs: per k one
// load a vector of B and one broadcast a row of A. B comes in panels, so that what a block reads of it is contiguous
// and stays in the first-level cache. Rows of A beyond m up to the block's height are read (with Columns: elements
// behind a row), and rows of C written: they need `slack` more, unless m is a multiple of `whole_rows`.
#pragma once
#include "simd.h"

namespace mmk {
namespace {

// Registers: 32 of 64 bytes, else 16. The widest panel in vectors, and a block's rows for each width.
constexpr int panel_vectors = MMK_VECTOR_BYTES == 64 ? 4 : 3;
constexpr int block_rows(int vectors) {
  return MMK_VECTOR_BYTES == 64 ? (vectors <= 2   ? 12
                                   : vectors == 3 ? 8
                                                  : 6)
                                : (vectors == 1   ? 8
                                   : vectors == 2 ? 6
                                                  : 4);
}
constexpr bool every_block(bool (*holds)(int rows)) {
  for (int width = 1; width <= panel_vectors; ++width)
    if (!holds(block_rows(width)))
      return false;
  return true;
}

// Rows that may be touched behind the last: no block is higher.
constexpr int64_t slack = 12;
static_assert(every_block([](int rows) { return rows <= slack; }));

// So many rows, or a multiple, are cut into full blocks and at most one of half the height: none reaches beyond.
constexpr int64_t whole_rows = 12;
static_assert(every_block([](int rows) { return rows % 2 == 0 && rows > 2 && whole_rows % (rows / 2) == 0; }));
constexpr int64_t to_whole_rows(int64_t rows) {
  return (rows + whole_rows - 1) / whole_rows * whole_rows;
}

template <class C>
constexpr int64_t vectors(int64_t n) {
  return (n + lanes<C> - 1) / lanes<C>;
}
template <class C>
constexpr int64_t padded(int64_t n) {
  return vectors<C>(n) * lanes<C>;
}

// A width for wide rows that are read column by column: an odd number of cache lines, so that the rows of a column lie
// in all of a cache's sets.
template <class C>
constexpr int64_t spaced(int64_t n) {
  constexpr int64_t line = 64 / sizeof(C);
  return n < 8 * line ? padded<C>(n) : (n + line - 1) / line / 2 * 2 * line + line;
}

// The width of the next panel when `left` vectors are left: none too narrow to keep the multipliers busy, if it can be
// helped.
inline int64_t next_panel(int64_t left) {
  if constexpr (panel_vectors == 4)
    return left == 5 || left == 6 ? 3 : left < 4 ? left : 4;
  else
    return left % 3 == 0 ? 3 : left < 2 ? left : 2;
}

// One block. Columns: A is stored [k, m], lda apart; else [m, k]. I counts the rows, J the vectors: constants from the
// start, so that the sums never leave their registers.
template <class C, bool Columns, class Rows, class Vectors>
struct Block;
template <class C, bool Columns, size_t... I, size_t... J>
struct Block<C, Columns, std::index_sequence<I...>, std::index_sequence<J...>> {
  static constexpr size_t width = sizeof...(J);

  template <size_t R>
  static MMK_INLINE void multiply(vec<C>* sum, C a, const vec<C>* b) {
    const vec<C> x = splat(a);
    ((sum[R * width + J] += x * b[J]), ...);
  }
  template <size_t R>
  static MMK_INLINE void write(const vec<C>* sum, C* c, bool add) {
    if (add)
      (store(c + J * lanes<C>, load(c + J * lanes<C>) + sum[R * width + J]), ...);
    else
      (store(c + J * lanes<C>, sum[R * width + J]), ...);
  }
  static __attribute__((noinline)) void run(int64_t depth, const C* a, int64_t lda, const C* b, int64_t ldb, C* c,
                                            int64_t ldc, bool add) {
    vec<C> sum[sizeof...(I) * width] = {};
    for (int64_t k = 0; k < depth; ++k, b += ldb) {
      const vec<C> row[width] = {load(b + J * lanes<C>)...};
      (multiply<I>(sum, Columns ? a[k * lda + int64_t(I)] : a[int64_t(I) * lda + k], row), ...);
    }
    (write<I>(sum, c + int64_t(I) * ldc, add), ...);
  }
};

template <class C>
using BlockFunction = void (*)(int64_t, const C*, int64_t, const C*, int64_t, C*, int64_t, bool);

// The block of at most `left` rows (at most two below that), and its height.
template <class C, bool Columns, int Vectors>
inline BlockFunction<C> block(int64_t left, int64_t& rows) {
  constexpr int full = block_rows(Vectors);
  constexpr int half = full / 2;
  auto make = [](auto count) {
    return &Block<C, Columns, std::make_index_sequence<count.value>, std::make_index_sequence<Vectors>>::run;
  };
  if (left <= 2)
    return rows = 2, make(std::integral_constant<int, 2>{});
  if (left <= half)
    return rows = half, make(std::integral_constant<int, half>{});
  return rows = full, make(std::integral_constant<int, full>{});
}

template <class C, bool Columns>
inline BlockFunction<C> block(int64_t vectors, int64_t left, int64_t& rows) {
  switch (vectors) {
    case 1:
      return block<C, Columns, 1>(left, rows);
    case 2:
      return block<C, Columns, 2>(left, rows);
    case 3:
      return block<C, Columns, 3>(left, rows);
    default:
      return block<C, Columns, panel_vectors>(left, rows);
  }
}

// B: [depth, n], rows `step` apart (n then padded to whole vectors), or in panels one behind the other (step 0),
// `height` rows each, if that isn't depth.
template <class C>
struct Matrix {
  const C* data;
  int64_t step, height = 0;
};

// What a product does between its blocks: nothing, or fetch rows that are needed next into the second-level cache, a
// line every so many multiplications, so that memory and multipliers work side by side.
struct Nothing {
  void operator()(int64_t) const {}
};
class Fetch {
 public:
  template <class T>
  void add(const T* first, int64_t step, int64_t columns, int64_t rows) {  // of rows, `step` elements apart
    if (!first || rows <= 0 || columns <= 0)
      return;
    if (step == columns)
      columns *= rows, rows = 1;
    parts_[count_++] = {reinterpret_cast<const char*>(first), step * int64_t(sizeof(T)), columns * int64_t(sizeof(T)),
                        rows};
    lines_ += rows * ((columns * int64_t(sizeof(T)) + 63) / 64);
  }
  void spread(int64_t multiplications) { pace_ = lines_ ? multiplications / lines_ + 1 : 1; }  // over so many
  void operator()(int64_t multiplications) {
    for (ready_ += multiplications; at_ < count_ && ready_ >= pace_; ready_ -= pace_) {
      Rows& rows = parts_[at_];
      __builtin_prefetch(rows.data + byte_, 0, 2);
      if ((byte_ += 64) < rows.bytes)
        continue;
      byte_ = 0;
      rows.data += rows.step;
      if (--rows.count == 0)
        ++at_;
    }
  }

 private:
  struct Rows {
    const char* data;
    int64_t step, bytes, count;
  } parts_[4];
  int count_ = 0;
  int at_ = 0;
  int64_t byte_ = 0;
  int64_t lines_ = 0;
  int64_t pace_ = 1;
  int64_t ready_ = 0;
};

// C[m, n] (ldc apart, n padded to whole vectors) = or += A B.
template <class C, bool Columns, class Between = Nothing>
inline void gemm_tile(int64_t m, int64_t n, int64_t depth, const C* a, int64_t lda, Matrix<C> b, C* c, int64_t ldc,
                      bool add, Between&& between = {}) {
  constexpr int64_t most = MMK_VECTOR_BYTES == 64 ? 128 : 256;  // of k at a time: a panel of B is at most 32 KiB
  const int64_t all = vectors<C>(n);
  for (int64_t v = 0, width; v < all; v += width) {
    width = next_panel(all - v);
    const int64_t first = v * lanes<C>;
    const int64_t step = b.step ? b.step : width * lanes<C>;
    const C* panel = b.data + (b.step ? first : first * (b.height ? b.height : depth));
    int64_t pieces = (depth + most - 1) / most;
    int64_t piece = pieces ? (depth + pieces - 1) / pieces : 0;
    if (!depth && !add)
      for (int64_t i = 0; i < m; ++i)
        memset(c + i * ldc + first, 0, width * lanes<C> * sizeof(C));
    for (int64_t k = 0; k < depth; k += piece) {
      const int64_t count = depth - k < piece ? depth - k : piece;
      for (int64_t i = 0, rows; i < m; i += rows) {
        auto run = block<C, Columns>(width, m - i, rows);
        run(count, Columns ? a + k * lda + i : a + i * lda + k, lda, panel + k * step, step, c + i * ldc + first, ldc,
            add || k);
        between(count * rows * width * lanes<C>);
      }
    }
  }
}

// Panels that n columns are packed into.
template <class C>
inline int64_t panels(int64_t n) {
  int64_t count = 0;
  for (int64_t v = 0; v < vectors<C>(n); v += next_panel(vectors<C>(n) - v))
    ++count;
  return count;
}

// Packing: B in panels, converted, multiplied by `factor`, padded with zeros to whole vectors. `row(i)` gives the i-th
// of the source's rows, its elements `step` apart. Several threads can each pack some of the panels, from `begin` to
// `end`, or some of the rows, from `start` on, of panels that are `height` rows high.
template <class T, class C, class Row>
inline void pack(int64_t rows, int64_t columns, Row row, int64_t step, C factor, C* to, int64_t begin, int64_t end,
                 int64_t start, int64_t height) {  // B[k, n] = row(k)[n]
  const int64_t all = vectors<C>(columns);
  for (int64_t v = 0, width, panel = 0; v < all && panel < end; v += width, ++panel) {
    width = next_panel(all - v);
    if (panel < begin)
      continue;
    const int64_t first = v * lanes<C>;
    const int64_t size = width * lanes<C>;
    const int64_t count = columns - first < size ? columns - first : size;
    C* out = to + first * height + start * size;
    for (int64_t k = 0; k < rows; ++k, out += size) {
      const T* from = row(k) + first * step;
      int64_t i = 0;
      if (step == 1)
        for (; i + lanes<C> <= count; i += lanes<C>)
          store(out + i, load(from + i) * factor);
      for (; i < count; ++i)
        out[i] = to_acc(from[i * step]) * factor;
      for (; i < size; ++i)
        out[i] = 0;
    }
  }
}
template <class T, class C, class Row>
inline void pack(int64_t rows, int64_t columns, Row row, int64_t step, C factor, C* to, int64_t begin = 0,
                 int64_t end = INT64_MAX) {
  pack<T>(rows, columns, row, step, factor, to, begin, end, 0, rows);
}
template <class T, class C, class Row>
inline void pack_transposed(int64_t rows, int64_t columns, Row row, int64_t step, C factor, C* to, int64_t begin = 0,
                            int64_t end = INT64_MAX) {  // B[k, n] = row(n)[k]
  const int64_t all = vectors<C>(columns);
  for (int64_t v = 0, width, panel = 0; v < all && panel < end; v += width, ++panel) {
    width = next_panel(all - v);
    const int64_t size = width * lanes<C>;
    for (int64_t n = 0; panel >= begin && n < size;
         n += lanes<C>) {  // a vector's columns at a time: whole vectors are written
      const int64_t first = v * lanes<C> + n;
      const int64_t count = columns - first < lanes<C> ? columns - first : lanes<C>;
      const T* from[lanes<C>];
      for (int64_t i = 0; i < count; ++i)
        from[i] = row(first + i);
      int64_t k = 0;
      if (step == 1 && count == lanes<C>)
        for (; k + lanes<C> <= rows; k += lanes<C>) {
          vec<C> square[lanes<C>];
          for (int64_t i = 0; i < lanes<C>; ++i)
            square[i] = load(from[i] + k);
          transpose<C>(square);
          for (int64_t i = 0; i < lanes<C>; ++i)
            store(to + (k + i) * size + n, square[i] * factor);
        }
      for (; k < rows; ++k) {
        C* out = to + k * size + n;
        if (count == lanes<C>) {
          vec<C> x;
          for (int64_t i = 0; i < lanes<C>; ++i)
            x[i] = to_acc(from[i][k * step]);
          store(out, x * factor);
        } else {
          for (int64_t i = 0; i < lanes<C>; ++i)
            out[i] = i < count ? to_acc(from[i][k * step]) * factor : C(0);
        }
      }
    }
    to += rows * size;
  }
}

// A tile of rows as it is multiplied: [rows, width], padded(columns) of it written: converted, the padding 0. `row(i)`
// null: a row of zeros.
template <class T, class C, class Row>
inline void read_rows(int64_t rows, int64_t columns, Row row, int64_t step, C* to, int64_t width) {
  const int64_t size = padded<C>(columns);
  for (int64_t r = 0; r < rows; ++r, to += width) {
    const T* from = row(r);
    int64_t i = 0;
    if (from) {
      if (step == 1)
        for (; i + lanes<C> <= columns; i += lanes<C>)
          store(to + i, load(from + i));
      for (; i < columns; ++i)
        to[i] = to_acc(from[i * step]);
    }
    for (; i < size; ++i)
      to[i] = 0;
  }
}
template <class T, class C, class Row>
inline void read_rows(int64_t rows, int64_t columns, Row row, int64_t step, C* to) {
  read_rows<T>(rows, columns, row, step, to, padded<C>(columns));
}

// Whether rows, `step` apart, can be written past the cache: in whole vectors, and no line is left half written.
template <class T>
inline bool streamable(const T* row, int64_t columns, int64_t step) {
  constexpr uintptr_t vector = lanes<acc_t<T>> * sizeof(T);
  const uintptr_t bytes = columns * sizeof(T);
  const uintptr_t stride = step * sizeof(T);
  const uintptr_t at = reinterpret_cast<uintptr_t>(row);
  const uintptr_t unit = step == columns ? vector : 64;
  return bytes % unit == 0 && stride % unit == 0 && at % unit == 0;
}
template <bool Nontemporal, class T>
MMK_INLINE void store_or_stream(T* p, vec<acc_t<T>> v) {
  if constexpr (Nontemporal)
    stream(p, v);
  else
    store(p, v);
}

// to = sums * factor, converted; sums null: zeros. nontemporal: past the cache, as streamable() allows; end with
// fence().
template <class T, class C>
inline void write_row(const C* sums, int64_t columns, C factor, T* to, int64_t step, bool nontemporal = false) {
  int64_t c = 0;
  if (!sums) {
    for (; c < columns; ++c)
      to[c * step] = from_acc<T>(C(0));
    return;
  }
  if (nontemporal)
    for (; c < columns; c += lanes<C>)
      store_or_stream<true>(to + c, load(sums + c) * factor);
  if (step == 1)
    for (; c + lanes<C> <= columns; c += lanes<C>)
      store(to + c, load(sums + c) * factor);
  for (; c < columns; ++c)
    to[c * step] = from_acc<T>(sums[c] * factor);
}

}  // namespace
}  // namespace mmk
