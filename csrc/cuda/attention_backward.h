// The gradients of both operations. A block of eight warps has a tile of 64 rows of one side and streams the other
// side as columns; either may be the image or the text. Scores are taken again from queries and keys, weights from them
// and from what is saved of the softmax.
//
//   Own    rows have a softmax over the columns:
//            p = exp(s - top[row]) share[row], dp = <grad[row], value[column]>
//   Other  columns have a softmax over the rows:
//            p' = exp(s - top[column]) share[column], dp' = <grad[column], value[row]>
// ds = p (dp - delta[row]) + p' (dp' - delta[column]), delta = <grad, result>. A weight that is exactly 1 is the only
// one: its score has no gradient, and rounding must not leave one.
//   grad_query[row] = scale sum ds key, grad_value[row] = sum p' grad[column].
//
// Gated cross-attention: Own with the image's rows gives grad_query and grad_bias, Other with the text's rows grad_key
// and grad_value (query and key change places). Bidirectional attention: Own and Other, once with each side's rows.
// Where all rows are in one tile (a short text) one launch does both: `whole`, the columns' gradients come from
// the same ds and p. Where few rows meet a long stream it is split; sums are left in scratch, and `backward_merge` adds
// them in a fixed order.
#pragma once
#include "attention.h"

namespace mmk::cuda {

struct BackwardTask {
  // Every field has 8 bytes.
  int64_t heads, count, rows, columns, d, dv;  //  0 count: heads of all samples
  int64_t tiles, splits, span, chunks,
      stages;                  //  6 row tiles of a head; splits of the columns, columns of one; channel chunks; buffers
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
};
static_assert(sizeof(BackwardTask) == 101 * 8, "every field has 8 bytes");

struct alignas(16) ColumnSide {  // of a column's softmax
  Exponential power;
  float share, delta;
};

template <class T, int C, bool Own, bool Other>
struct BackwardLayout {
  static constexpr int S = sizeof(T) == 4 || C > 128 || (C > 64 && Own && Other) ? 32 : 64;
  static constexpr int pitch = pitch_of<T, C>, weights = S + pad<T>, panels = 1 + Own + Other;
  int64_t rows, ds, other, own, side, valid, total;
  MMK_HOST_DEVICE BackwardLayout(int64_t stages, bool whole) {
    constexpr int64_t size = sizeof(T);
    constexpr int64_t weight_bytes = tile_rows * weights * size;
    rows = stages * panels * S * pitch * size;       // after the buffers of streamed tiles: T [panels][64][pitch]
    ds = rows + panels * tile_rows * pitch * size;   // T [64][weights]
    other = ds + weight_bytes;                       // p'
    own = other + (Other ? weight_bytes : 0);        // p, for the columns' gradients
    side = own + (Own && whole ? weight_bytes : 0);  // ColumnSide [stages][S]
    valid = side + (Other ? stages * S * int64_t(sizeof(ColumnSide)) : 0);  // bytes [stages][S]
    total = valid + round_up(stages * S, 16);
  }
};

// What both the kernel and the merge know of a task: where it takes part, and what is written there.
template <class T>
struct BackwardRows {
  const BackwardTask& t;
  int64_t bh, b, h;
  MMK_DEVICE BackwardRows(const BackwardTask& t, int64_t bh) : t(t), bh(bh), b(bh / t.heads), h(bh % t.heads) {}
  MMK_DEVICE bool row_valid(int64_t r) const {
    return !t.row_mask.data || load(t.row_mask.data + b * t.row_mask.b + h * t.row_mask.h + r * t.row_mask.t);
  }
  MMK_DEVICE bool column_valid(int64_t n) const {
    return !t.column_mask.data ||
           load(t.column_mask.data + b * t.column_mask.b + h * t.column_mask.h + n * t.column_mask.t);
  }
  MMK_DEVICE bool fully_masked(const float* softmax, int64_t rows, int64_t r) const {
    return softmax && share_of(softmax, bh, rows, r) == 0;
  }
  // The gradient of what counted as 0 because it takes no part and isn't finite is 0.
  MMK_DEVICE void put_input(const HeadRows& to, const HeadRows& input, int64_t r, int64_t c, float (&x)[8], int count,
                            bool valid, bool fully_masked) const {
    if (!valid && !t.drop) {
      float y[8];
      get<8>(y, head_of<T>(input, b, h) + r * input.n + c * input.c, input.c, count);
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (!(fabsf(y[e]) < INFINITY))
          x[e] = 0;
    }
#pragma unroll
    for (int e = 0; e < 8; ++e)
      x[e] = fully_masked || (!valid && t.drop) ? 0.f : x[e] * float(t.scale);
    put<8>(head_of<T>(to, b, h) + r * to.n + c * to.c, x, to.c, count);
  }
  MMK_DEVICE void put_value(const HeadRows& to, int64_t r, int64_t c, float (&x)[8], int count, bool valid) const {
#pragma unroll
    for (int e = 0; e < 8; ++e)
      x[e] = valid ? x[e] : 0.f;
    put<8>(head_of<T>(to, b, h) + r * to.n + c * to.c, x, to.c, count);
  }
  MMK_DEVICE void put_query(int64_t r, int64_t c, float (&x)[8], int count) const {
    put_input(t.grad_query, t.query, r, c, x, count, row_valid(r), t.drop && fully_masked(t.softmax, t.rows, r));
  }
};

template <class T, int C, bool Own, bool Other>
struct Backward : BackwardRows<T> {
  using Base = BackwardRows<T>;
  using Base::b, Base::bh, Base::h, Base::t;
  using Layout = BackwardLayout<T, C, Own, Other>;
  static constexpr int S = Layout::S;
  static constexpr int J = S / 16;
  static constexpr int W = C / 16;
  static constexpr int pitch = Layout::pitch;
  static constexpr int threads = 256;
  int chunk, split, first, begin, end;  // first row; columns
  T *buffers, *rows, *ds, *other, *own;
  ColumnSide* side;
  uint8_t* valid;
  int group, column_half;  // the warp's 16 rows, its half of the channels

  MMK_DEVICE Backward(const BackwardTask& t, unsigned char* shared)
      : Base(t, blockIdx.x / (t.chunks * t.splits * t.tiles)) {
    int64_t rest = blockIdx.x;
    chunk = int(rest % t.chunks);
    rest /= t.chunks;
    split = int(rest % t.splits);
    rest /= t.splits;
    first = int(rest % t.tiles * tile_rows);
    begin = int(split * t.span);
    end = int(least(begin + t.span, t.columns));
    const Layout at(t.stages, t.whole);
    buffers = reinterpret_cast<T*>(shared);
    rows = reinterpret_cast<T*>(shared + at.rows);
    ds = reinterpret_cast<T*>(shared + at.ds);
    other = reinterpret_cast<T*>(shared + at.other);
    own = reinterpret_cast<T*>(shared + at.own);
    side = reinterpret_cast<ColumnSide*>(shared + at.side);
    valid = shared + at.valid;
    group = threadIdx.x / 32 % 4;
    column_half = threadIdx.x / 128;
  }

  // Panels: query or key, then Own's, then Other's.
  MMK_DEVICE T* row_panel(int i) const { return rows + i * tile_rows * pitch; }
  MMK_DEVICE T* panel(int at, int i) const { return buffers + (at * Layout::panels + i) * S * pitch; }
  static constexpr int own_panel = 1;
  static constexpr int other_panel = 1 + Own;

  template <int Rows, class How>
  MMK_DEVICE void bring(T* to, const HeadRows& f, int row, int64_t all, int64_t channels, int slab, How how,
                        const HeadRows& by = HeadRows()) const {
    const T* from = head_of<T>(f, opaque(int(b)), opaque(int(h))) + row * f.n + slab * C * f.c;
    const T* factor = by.data ? head_of<T>(by, b, h) + row * by.n + slab * C * by.c : nullptr;
    stage<Rows, C>(to, from, f, f.data ? all - row : 0, channels - slab * C, how, threadIdx.x, threads, factor, by);
  }
  MMK_DEVICE void bring_query(int slab) const {
    bring<tile_rows>(row_panel(0), t.query, first, t.rows, t.d, slab, [&](int r) {
      return this->row_valid(first + r) ? Row::whole : t.drop ? Row::zeros : Row::finite;
    });
  }
  MMK_DEVICE void bring_row_values(int slab) const {
    if (Own)
      bring<tile_rows>(
          row_panel(own_panel), t.grad, first, t.rows, t.dv, slab,
          [&](int r) { return this->fully_masked(t.softmax, t.rows, first + r) ? Row::zeros : Row::whole; }, t.gate);
    if (Other)
      bring<tile_rows>(row_panel(other_panel), t.row_value, first, t.rows, t.dv, slab,
                       [&](int r) { return this->row_valid(first + r) ? Row::whole : Row::zeros; });
  }
  MMK_DEVICE void bring_key(int at, int n, int slab) const {
    bring<S>(panel(at, 0), t.key, n, end, t.d, slab, [&](int r) {
      if (t.drop)
        return this->column_valid(n + r) && !(Other && this->fully_masked(t.column_softmax, t.columns, n + r))
                   ? Row::whole
                   : Row::zeros;
      return this->column_valid(n + r) ? Row::whole : Row::finite;
    });
  }
  MMK_DEVICE void bring_column_values(int at, int n, int slab) const {
    if (Own)
      bring<S>(panel(at, own_panel), t.value, n, end, t.dv, slab,
               [&](int r) { return this->column_valid(n + r) ? Row::whole : Row::zeros; });
    if (Other)
      bring<S>(
          panel(at, other_panel), t.column_grad, n, end, t.dv, slab,
          [&](int r) { return this->fully_masked(t.column_softmax, t.columns, n + r) ? Row::zeros : Row::whole; },
          t.column_gate);
  }
  MMK_DEVICE void bring_side(int at, int n) const {
    for (int r = threadIdx.x; r < S; r += threads) {
      valid[at * S + r] = n + r < end && this->column_valid(n + r);
      if (Other) {
        const bool there = n + r < end && t.column_grad.data;
        ColumnSide& to = side[at * S + r];
        to.power = Exponential(there ? top_of(t.column_softmax, bh, t.columns, n + r) : 0.f);
        to.share = there ? share_of(t.column_softmax, bh, t.columns, n + r) : 0.f;
        to.delta = there ? load(t.column_delta + bh * t.columns + n + r) : 0.f;
      }
    }
  }

  // s += what this warp has of rows times columns, from one panel each.
  MMK_DEVICE void products(float (&s)[J][4], int at, int i, int depth) const {
    mma<J, false, false>(s, row_panel(i) + 16 * group * pitch, pitch, panel(at, i) + column_half * (S / 2) * pitch,
                         pitch, depth);
  }

  struct RowSide {
    Exponential power[2];
    float share[2], delta[2];
    bool valid[2];
  };

  // Weights and the scores' gradients, to shared memory.
  MMK_DEVICE void weigh(const float (&s)[J][4], const float (&dp)[J][4], const float (&dq)[J][4], const RowSide& mine,
                        int at, int n) const {
    const float scale = float(t.scale) * log4e;
#pragma unroll
    for (int j = 0; j < J; ++j) {
      const int column = column_half * (S / 2) + 8 * j + lane_column();
      ColumnSide its[2] = {};
      if (Other)
        its[0] = side[at * S + column], its[1] = side[at * S + column + 1];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i / 2;
        const int c = column + i % 2;
        const int r = first + 16 * group + lane_row() + 8 * half;
        const int k = n + c;
        bool attends = r < t.rows && k < end;
        float x = s[j][i] * scale;
        float p = 0;
        float q = 0;
        float d = 0;
        if (attends && t.pairs.data)
          attends = load(t.pairs.data + b * t.pairs.b + h * t.pairs.h + r * t.pairs.n + k * t.pairs.t);
        if (attends && t.bias.data)
          x = fmaf(
              load(static_cast<const float*>(t.bias.data) + b * t.bias.b + h * t.bias.h + r * t.bias.n + k * t.bias.t),
              log4e, x);
        if (Own && attends && valid[at * S + c] && mine.share[half] != 0) {
          p = mine.power[half](x) * mine.share[half];
          d = p == 1 ? 0.f : p * (dp[j][i] - mine.delta[half]);
        }
        if (Other && attends && mine.valid[half] && its[i % 2].share != 0) {
          q = its[i % 2].power(x) * its[i % 2].share;
          d += q == 1 ? 0.f : q * (dq[j][i] - its[i % 2].delta);
        }
        if (t.grad_bias && chunk == 0 && r < t.rows && k < end)
          store(t.grad_bias + bh * t.rows * t.columns + r * t.grad_bias_row + k * t.grad_bias_column, d);
        const int to = (16 * group + lane_row() + 8 * half) * Layout::weights + c;
        ds[to] = from_float<T>(d);
        if (Other)
          other[to] = from_float<T>(q);
        if (Own && t.whole)
          own[to] = from_float<T>(p);
      }
    }
  }

  // Gradients of the columns, from all rows.
  MMK_DEVICE void column_side(int n) const {
    constexpr int row_groups = S / 16;
    constexpr int width = 32;
    for (int item = threadIdx.x / 32; item < row_groups * (C / width); item += 8) {
      const int r0 = item % row_groups * 16;
      const int c0 = item / row_groups * width;
      float x[4][4];
      if (t.grad_key.data && c0 < t.d) {
        clear(x);
        mma<4, true, true>(x, ds + r0, Layout::weights, row_panel(0) + c0, pitch, tile_rows);
        emit_rows(x, [&](int r, int c, float (&v)[8]) {
          const int k = n + r0 + r;
          if (k >= end || c0 + c >= t.d)
            return;
          this->put_input(t.grad_key, t.key, k, c0 + c, v, int(least<int64_t>(8, t.d - c0 - c)), this->column_valid(k),
                          t.drop && this->fully_masked(t.column_softmax, t.columns, k));
        });
      }
      if (Own && t.grad_value.data && c0 < t.dv) {
        clear(x);
        mma<4, true, true>(x, own + r0, Layout::weights, row_panel(own_panel) + c0, pitch, tile_rows);
        emit_rows(x, [&](int r, int c, float (&v)[8]) {
          const int k = n + r0 + r;
          if (k < end && c0 + c < t.dv)
            this->put_value(t.grad_value, k, c0 + c, v, int(least<int64_t>(8, t.dv - c0 - c)), this->column_valid(k));
        });
      }
    }
  }

  MMK_DEVICE void run() const {
    const int slabs = int(ceil_div(t.d, C));
    const int value_slabs = int(ceil_div(t.dv, C));
    const bool once = slabs == 1 && value_slabs == 1;
    RowSide mine;
    for (int half = 0; half < 2; ++half) {
      const int r = first + 16 * group + lane_row() + 8 * half;
      const bool there = Own && r < t.rows && t.grad.data;
      mine.power[half] = Exponential(there ? top_of(t.softmax, bh, t.rows, r) : 0.f);
      mine.share[half] = there ? share_of(t.softmax, bh, t.rows, r) : 0.f;
      mine.delta[half] = there ? load(t.delta + bh * t.rows + r) : 0.f;
      mine.valid[half] = r < t.rows && this->row_valid(r);
    }
    float to_query[W][4], to_value[Other ? W : 1][4];
    clear(to_query), clear(to_value);
    const int ahead = once && t.stages > 1 ? S : 0;
    const int passes = once ? 1 : most(slabs, value_slabs) + 1;
    for (int n = begin - ahead; n < end; n += S) {  // one round more, to bring the first tile
      const int next = n + ahead;
      const int at = ahead ? int((n - begin) / S) & 1 : 0;
      const int into = ahead ? at ^ 1 : 0;
      float s[J][4], dp[J][4], dq[J][4];
      clear(s), clear(dp), clear(dq);
      for (int slab = 0; slab < passes; ++slab) {  // slab after slab; last the channels of this chunk
        const bool last = slab == passes - 1;
        const int of_columns = last ? chunk : slab;
        if (!once)
          __syncthreads();
        if (!once || next == begin)
          bring_query(slab), bring_row_values(slab);
        if (next < end) {
          bring_key(into, next, of_columns);
          bring_column_values(into, next, of_columns);
          if (last)
            bring_side(into, next);
        }
        copy_commit();
        if (n < begin)
          break;
        if (ahead)
          copy_wait<1>();
        else
          copy_wait<0>();
        __syncthreads();
        if (!once && last)
          break;
        const int depth = whole_depth(most<int64_t>(least<int64_t>(C, t.dv - slab * C), 0));
        products(s, at, 0, whole_depth(most<int64_t>(least<int64_t>(C, t.d - slab * C), 0)));
        if (Own)
          products(dp, at, own_panel, depth);
        if (Other)
          products(dq, at, other_panel, depth);
      }
      if (n < begin)
        continue;
      weigh(s, dp, dq, mine, at, n);
      __syncthreads();
      const T* weights = ds + 16 * group * Layout::weights;
      mma<W, false, true>(to_query, weights, Layout::weights, panel(at, 0) + column_half * (C / 2), pitch, S);
      if constexpr (Other)
        mma<W, false, true>(to_value, other + 16 * group * Layout::weights, Layout::weights,
                            panel(at, other_panel) + column_half * (C / 2), pitch, S);
      if (t.whole)
        column_side(n);
      __syncthreads();  // before the next tile takes its place
    }
    copy_wait<0>();

    const int channel = chunk * C + column_half * (C / 2);
    const int64_t partial_row = (bh * t.splits + split) * t.rows;
    float* memory =
        reinterpret_cast<float*>(rows) + threadIdx.x / 32 * 16 * (C / 2 + 4);  // all is free now; at least two panels
    __syncthreads();
    if (t.grad_query.data)
      emit_through<W>(memory, to_query, [&](int i, int c, float (&x)[8]) {
        const int r = first + 16 * group + i;
        const int count = int(least<int64_t>(8, t.d - channel - c));
        if (r >= t.rows || count <= 0)
          return;
        if (t.splits > 1)
          put<8>(t.partial_query + (partial_row + r) * t.d + channel + c, x, 1, count);
        else
          this->put_query(r, channel + c, x, count);
      });
    if constexpr (Other)
      if (t.grad_row_value.data)
        emit_through<W>(memory, to_value, [&](int i, int c, float (&x)[8]) {
          const int r = first + 16 * group + i;
          const int count = int(least<int64_t>(8, t.dv - channel - c));
          if (r >= t.rows || count <= 0)
            return;
          if (t.splits > 1)
            put<8>(t.partial_value + (partial_row + r) * t.dv + channel + c, x, 1, count);
          else
            this->put_value(t.grad_row_value, r, channel + c, x, count, this->row_valid(r));
        });
  }
};

// Adds what the splits of the stream have left: a thread 8 channels of a row. Grid (.., 1), block 128.
template <class T>
MMK_DEVICE void backward_merge(const BackwardTask& t) {
  const int64_t packs = ceil_div(t.d, 8);
  const int64_t value_packs = ceil_div(t.dv, 8);
  const int64_t item = int64_t(blockIdx.x) * 128 + threadIdx.x;
  const int64_t row = item / (packs + value_packs);
  const int64_t c = item % (packs + value_packs) * 8;
  if (row >= t.count * t.rows)
    return;
  const BackwardRows<T> on(t, row / t.rows);
  const int64_t r = row % t.rows;
  const int64_t v = c - packs * 8;
  const bool values = v >= 0;
  if (!(values ? t.grad_row_value : t.grad_query).data)
    return;
  const int64_t width = values ? t.dv : t.d;
  const int64_t channel = values ? v : c;
  const float* from = values ? t.partial_value : t.partial_query;
  const int count = int(least<int64_t>(8, width - channel));
  float sum[8] = {};
  for (int64_t s = 0; s < t.splits; ++s) {
    float x[8];
    get<8>(x, from + ((on.bh * t.splits + s) * t.rows + r) * width + channel, 1, count);
    for (int e = 0; e < 8; ++e)
      sum[e] += x[e];
  }
  if (values)
    on.put_value(t.grad_row_value, r, channel, sum, count, on.row_valid(r));
  else
    on.put_query(r, channel, sum, count);
}

// delta = <grad * gate, result> a row, and the gate's gradient, grad * result. A warp takes a few rows. Grid (rows / 4,
// 1), block 128.
struct DeltaTask {
  int64_t heads, count, rows, dv;          //  0 every field has 8 bytes
  HeadRows grad, gate, result, grad_gate;  //  4 gate, grad_gate: data null = none; result: before the gate
  const float* softmax;                    // 24 [b, h, 2, rows], share 0: the row takes no part, is 0
  float* delta;                            // 25 [b, h, rows]
};
static_assert(sizeof(DeltaTask) == 26 * 8, "every field has 8 bytes");

template <class T>
MMK_DEVICE void backward_delta(const DeltaTask& t) {
  const int lanes = least(32, power_of_two(int(least<int64_t>(ceil_div(t.dv, 8), 32))));
  const int lane = threadIdx.x % lanes;
  const int64_t row = (int64_t(blockIdx.x) * 128 + threadIdx.x) / lanes;
  const bool there = row < t.count * t.rows;
  const int64_t bh = there ? row / t.rows : 0;
  const int64_t r = there ? row % t.rows : 0;
  const int64_t b = bh / t.heads;
  const int64_t h = bh % t.heads;
  const bool fully_masked = there && share_of(t.softmax, bh, t.rows, r) == 0;
  float sum = 0;
  for (int64_t c = 8 * lane; there && c < t.dv; c += 8 * lanes) {
    const int count = int(least<int64_t>(8, t.dv - c));
    float g[8] = {}, x[8] = {}, y[8];
    if (!fully_masked) {
      get<8>(g, head_of<T>(t.grad, b, h) + r * t.grad.n + c * t.grad.c, t.grad.c, count);
      get<8>(x, head_of<T>(t.result, b, h) + r * t.result.n + c * t.result.c, t.result.c, count);
    }
    if (t.grad_gate.data) {
      for (int e = 0; e < 8; ++e)
        y[e] = g[e] * x[e];
      put<8>(head_of<T>(t.grad_gate, b, h) + r * t.grad_gate.n + c * t.grad_gate.c, y, t.grad_gate.c, count);
    }
    if (t.gate.data && !fully_masked) {
      get<8>(y, head_of<T>(t.gate, b, h) + r * t.gate.n + c * t.gate.c, t.gate.c, count);
      for (int e = 0; e < 8; ++e)
        g[e] = to_float(from_float<T>(g[e] * y[e]));  // as the other kernels have it
    }
    for (int e = 0; e < 8; ++e)
      sum += g[e] * x[e];
  }
  sum = over_lanes(sum, lanes, Sum());
  if (there && lane == 0)
    store(t.delta + row, sum);
}

// ---- host

using BackwardKernel = void (*)(BackwardTask);
using DeltaKernel = void (*)(DeltaTask);
struct BackwardPlan {
  int index;
  int64_t shared, step;
};  // class, or -1: too little shared memory

template <class T, bool Own, bool Other>
int64_t backward_shared(int index, int64_t stages, bool whole) {
  return index == 0   ? BackwardLayout<T, 64, Own, Other>(stages, whole).total
         : index == 1 ? BackwardLayout<T, 128, Own, Other>(stages, whole).total
                      : BackwardLayout<T, 256, Own, Other>(stages, whole).total;
}
template <class T, bool Own, bool Other>
int64_t backward_step(int index) {
  return index == 0   ? BackwardLayout<T, 64, Own, Other>::S
         : index == 1 ? BackwardLayout<T, 128, Own, Other>::S
                      : BackwardLayout<T, 256, Own, Other>::S;
}

// How a launch is cut. float32 has no class of 256: registers for it, but no shared memory.
template <bool Own, bool Other>
BackwardPlan backward_plan(BackwardTask& t, Dtype dtype, const Device& device, bool whole) {
  auto shared = [&](int index, int64_t stages) {
    return dtype == Dtype::float32 ? backward_shared<float, Own, Other>(index, stages, whole)
                                   : backward_shared<bf16, Own, Other>(index, stages, whole);
  };
  int index = dtype == Dtype::float32 ? 1 : 2;
  while (index > 0 && t.d <= class_channels[index - 1] && t.dv <= class_channels[index - 1])
    --index;
  while (index >= 0 && shared(index, 1) > device.shared)
    --index;
  if (index < 0)
    return {-1, 0, 0};
  const bool once = t.d <= class_channels[index] && t.dv <= class_channels[index];
  if (whole && (!once || t.rows < 1 || t.rows > tile_rows))
    return {-1, 0, 0};
  const int64_t step =
      dtype == Dtype::float32 ? backward_step<float, Own, Other>(index) : backward_step<bf16, Own, Other>(index);
  t.whole = whole;
  t.stages = once && shared(index, 2) <= device.shared ? 2 : 1;
  t.tiles = ceil_div(t.rows, tile_rows);
  t.chunks = ceil_div(t.d, class_channels[index]);
  if (Other && ceil_div(t.dv, class_channels[index]) > t.chunks)
    t.chunks = ceil_div(t.dv, class_channels[index]);
  const int64_t blocks = t.count * t.tiles * t.chunks;
  const int64_t wanted = 2 * device.processors;
  const int64_t tiles = ceil_div(t.columns, step);
  t.splits = 1;
  if (blocks > 0 && blocks < wanted && tiles > 4) {
    const int64_t wanted_splits = ceil_div(wanted, blocks);
    t.splits = wanted_splits < tiles / 4 ? wanted_splits : tiles / 4;
  }
  t.span = ceil_div(tiles, t.splits) * step;
  if (t.span > 0)
    t.splits = ceil_div(t.columns, t.span);
  if (t.splits < 1)
    t.splits = 1;
  return {index, shared(index, t.stages), step};
}

inline int64_t backward_scratch(BackwardTask& t, float* memory) {
  if (t.splits == 1)
    return 0;
  const int64_t rows = t.count * t.splits * t.rows;
  t.partial_query = memory;
  t.partial_value = memory + rows * t.d;
  return rows * (t.d + t.dv);
}

inline const char* backward_launch(const BackwardTask& t, const BackwardPlan& plan, BackwardKernel kernel,
                                   BackwardKernel merge, Stream stream) {
  const int64_t blocks = t.count * t.tiles * t.splits * t.chunks;
  const int64_t merging = ceil_div(t.count * t.rows * (ceil_div(t.d, 8) + ceil_div(t.dv, 8)), 128);
  const char* error = beyond("positions or tokens", t.rows < t.columns ? t.columns : t.rows, most_rows);
  if (error)
    return error;
  error = launch(kernel, blocks, 1, 1, 256, plan.shared, stream, t);
  return error || t.splits == 1 ? error : launch(merge, merging, 1, 1, 128, 0, stream, t);
}

inline const char* delta_launch(const DeltaTask& t, DeltaKernel kernel, Stream stream) {
  int64_t lanes = 1;
  while (lanes < 32 && 8 * lanes < t.dv)
    lanes *= 2;
  const int64_t blocks = ceil_div(t.count * t.rows * lanes, 128);
  return !t.grad.data ? nullptr : launch(kernel, blocks, 1, 1, 128, 0, stream, t);
}

}  // namespace mmk::cuda
