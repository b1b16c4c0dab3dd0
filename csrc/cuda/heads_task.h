// What the kernels of attention over heads are told, and where their memory, shared and global, has what.
#pragma once
#include "heads.h"

namespace mmk::cuda {

// ---- forward

struct AttendTask {
  // Every field has 8 bytes.
  int64_t heads, rows, columns, d, dv;  //  0 rows of query; of key and value
  int64_t tiles, group;                 //  5 row tiles of a head; of a block
  int64_t splits, span, chunks;         //  7 splits of the columns, columns of one; channel chunks
  int64_t stages, resident;             // 10 buffers of streamed tiles; 1: all tiles have one of their own
  int64_t count;                        // 12 heads of all samples
  double scale;                         // 13
  HeadRows query, key, value, gate;     // 14 data, b, h, n, c each; gate null: none
  HeadRows result, attended;            // 34 attended null: not wanted
  TokenMask row_mask, column_mask;  // 44 data, b, h, t: which rows take part (Both; else: only what is NaN there is 0)
  PairMask pairs;                   // 52 data, b, h, n, t
  Bias bias;                        // 57
  float* softmax;                   // 62 [b, h, 2, rows]: store_softmax
  float *partial, *stats;           // 63 split: [b, h, split, rows, dv], [b, h, split, rows, 2]: maximum, sum
  HeadRows row_value, column_result;  // 65 Both: the rows' values, and what the columns get from them
  float* column_softmax;              // 75 Both: [b, h, 2, columns]
  HeadRows unrounded;                 // 76 result in float, null: not wanted

  // Where a split leaves a row's sums and [maximum, sum]; attend_scratch makes room for them.
  MMK_DEVICE float* partial_of(int64_t bh, int64_t split, int64_t r) const {
    return partial + ((bh * splits + split) * rows + r) * dv;
  }
  MMK_DEVICE float* stats_of(int64_t bh, int64_t split, int64_t r) const {
    return stats + 2 * ((bh * splits + split) * rows + r);
  }
};
static_assert(sizeof(AttendTask) == 81 * 8, "every field has 8 bytes");

// Blocks of 128 threads that a processor has registers for.
#define MMK_ATTEND_TOGETHER(T, C) (C > 128 ? 1 : C == 64 && sizeof(T) == 2 ? 3 : 2)

template <class T, int C>
struct AttendLayout {
  static constexpr int S = tile_columns<T, C>;
  static constexpr int pitch = pitch_of<T, C>;
  static constexpr int weights = S + pad<T>;  // the weights' pitch
  int64_t own, query, gate, p, values, q, reduce, valid, total;
  MMK_HOST_DEVICE AttendLayout(int64_t stages, bool resident, bool both) {
    constexpr int64_t size = sizeof(T);
    own = stages * 2 * S * pitch * size;                            // after the buffers of streamed tiles
    query = own;                                                    // T [64][pitch]
    gate = query + tile_rows * pitch * size;                        // resident: T [64][pitch]; else where no tile comes
    p = gate + (resident && !both ? tile_rows * pitch * size : 0);  // float32: weights on their way, [64][weights]
    values = p + (size == 4 ? tile_rows * weights * size : 0);      // Both: T [64][pitch]
    q = values + (both ? tile_rows * pitch * size : 0);             // Both: T [64][weights], the columns' weights
    reduce = q + (both ? tile_rows * weights * size : 0);           // Both: float [4][S] twice
    valid = reduce + (both ? 8 * S * 4 : 0);                        // bytes [stages][S]
    total = valid + round_up(stages * S, 16);
  }
};

// Cuts `memory` into partial sums and stats; nothing where the columns are not split. Returns floats.
inline int64_t attend_scratch(AttendTask& t, float* memory) {
  if (t.splits == 1)
    return 0;
  const int64_t rows = t.count * t.splits * t.rows;
  t.partial = memory;
  t.stats = memory + rows * t.dv;
  return rows * (t.dv + 2);
}

// ---- backward

struct BackwardTask {
  // Every field has 8 bytes.
  int64_t heads, count, rows, columns, d, dv;  //  0 count: heads of all samples
  int64_t tiles, splits, span;                 //  6 row tiles of a head; splits of the columns, columns of one
  int64_t chunks, stages;                      //  9 channel chunks; buffers of streamed tiles
  int64_t whole, drop;         // 11 1: columns' gradients, too; 1: gated: what takes no part counts as 0
  double scale;                // 13
  HeadRows query, key;         // 14 of the rows; streamed
  HeadRows grad, gate, value;  // 24 Own: of the rows; their factor; streamed
  HeadRows column_grad, column_gate, row_value;  // 39 Other: streamed; their factor; of the rows
  const float *softmax, *delta;                  // 54 Own: [b, h, 2, rows], store_softmax; [b, h, rows]
  const float *column_softmax, *column_delta;    // 56 Other: [b, h, 2, columns]; [b, h, columns]
  TokenMask row_mask, column_mask;               // 58
  PairMask pairs;                                // 66 n: of rows, t: of columns
  Bias bias;                                     // 71
  float* grad_bias;                              // 76 null: not wanted
  int64_t grad_bias_row, grad_bias_column;       // 77 its strides
  HeadRows grad_query, grad_row_value;           // 79 data null: not wanted
  HeadRows grad_key, grad_value;                 // 89 whole; grad_value: Own
  float *partial_query, *partial_value;          // 99 split: [b, h, split, rows, d], [b, h, split, rows, dv]

  // Where a split leaves a row's sums; backward_scratch makes room for them.
  MMK_DEVICE float* partial_query_of(int64_t bh, int64_t split, int64_t r) const {
    return partial_query + ((bh * splits + split) * rows + r) * d;
  }
  MMK_DEVICE float* partial_value_of(int64_t bh, int64_t split, int64_t r) const {
    return partial_value + ((bh * splits + split) * rows + r) * dv;
  }
};
static_assert(sizeof(BackwardTask) == 101 * 8, "every field has 8 bytes");

struct alignas(16) ColumnSide {  // of a column's softmax
  Exponential power;
  float share, delta;
};

template <class T, int C, bool Own, bool Other>
struct BackwardLayout {
  static constexpr int S = sizeof(T) == 4 || C > 128 || (C > 64 && Own && Other) ? 32 : 64;
  static constexpr int pitch = pitch_of<T, C>;
  static constexpr int weights = S + pad<T>;  // the weights' pitch
  static constexpr int panels = 1 + Own + Other;
  int64_t rows, ds, other, own, side, valid, centre, total;
  MMK_HOST_DEVICE BackwardLayout(int64_t stages, bool whole) {
    constexpr int64_t size = sizeof(T);
    constexpr int64_t weight_bytes = tile_rows * weights * size;
    rows = stages * panels * S * pitch * size;       // after the buffers of streamed tiles: T [panels][64][pitch]
    ds = rows + panels * tile_rows * pitch * size;   // T [64][weights]
    other = ds + weight_bytes;                       // p'
    own = other + (Other ? weight_bytes : 0);        // p, for the columns' gradients
    side = own + (Own && whole ? weight_bytes : 0);  // ColumnSide [stages][S]
    valid = side + (Other ? stages * S * int64_t(sizeof(ColumnSide)) : 0);  // bytes [stages][S]
    centre = valid + round_up(stages * S, 16);                              // float [C]
    total = centre + C * 4;
  }
};

// Cuts `memory` into partial sums; nothing where the columns are not split. Returns floats.
inline int64_t backward_scratch(BackwardTask& t, float* memory) {
  if (t.splits == 1)
    return 0;
  const int64_t rows = t.count * t.splits * t.rows;
  t.partial_query = memory;
  t.partial_value = memory + rows * t.d;
  return rows * (t.d + t.dv);
}

}  // namespace mmk::cuda
