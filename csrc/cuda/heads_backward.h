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
// The ds of a softmax add up to 0, but for roundings to 16 bits: delta's, and theirs. Times what keys have in common
// that may be larger than a query's gradient, so it is taken away: sums of ds as they are multiplied, times `centre`,
// about the keys' mean.
//
// Gated cross-attention: Own with the image's rows gives grad_query and grad_bias, Other with the text's rows grad_key
// and grad_value (query and key change places). Bidirectional attention: Own and Other, once with each side's rows.
// Where all rows are in one tile (a short text) one launch does both: `whole`, the columns' gradients come from
// the same ds and p. Where few rows meet a long stream it is split; sums are left in scratch, and `backward_merge` adds
// them in a fixed order.
#pragma once
#include "heads_excess.h"
#include "stream_pipeline.h"

namespace mmk::cuda {

template <class T, int C, bool Own, bool Other>
struct Backward : BackwardExcess<T, C, Own, Other> {
  using Base = BackwardExcess<T, C, Own, Other>;
  using Base::b, Base::bh, Base::h, Base::t;
  using Base::centre, Base::chunk, Base::ds, Base::group, Base::other, Base::own, Base::S;
  using Layout = BackwardLayout<T, C, Own, Other>;
  static constexpr int J = S / 16;
  static constexpr int W = C / 16;
  static constexpr int pitch = Layout::pitch;
  static constexpr int threads = 256;
  int split, first, begin, end;  // first row; columns
  T *buffers, *rows;
  ColumnSide* side;
  uint8_t* valid;
  int column_half;  // the warp's half of the channels

  MMK_DEVICE Backward(const BackwardTask& t, unsigned char* shared)
      : Base(t, blockIdx.x / unsigned(t.chunks * t.splits * t.tiles)) {
    unsigned rest = blockIdx.x;  // 64-bit divisions take long
    chunk = int(rest % unsigned(t.chunks));
    rest /= unsigned(t.chunks);
    split = int(rest % unsigned(t.splits));
    rest /= unsigned(t.splits);
    first = int(rest % unsigned(t.tiles)) * tile_rows;
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
    centre = reinterpret_cast<float*>(shared + at.centre);
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
    stage<Rows, C, threads>(to, from, f, f.data ? all - row : 0, channels - slab * C, how, threadIdx.x, factor, by);
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

  // Two neighbouring columns, to shared memory.
  MMK_DEVICE static void put_pair(T* to, float low, float high) {
    if constexpr (sizeof(T) == 2)
      *reinterpret_cast<uint32_t*>(to) = pair_of<T>(low, high);
    else
      *reinterpret_cast<Two*>(to) = {{low, high}};
  }

  // Weights and the scores' gradients, to shared memory; excess: what the rows' add up to, as far as it should be 0,
  // column_excess: the columns', where both sides have a softmax. Plain: nothing is told or wanted a pair.
  template <bool Plain>
  MMK_DEVICE void weigh(const float (&s)[J][4], const float (&dp)[J][4], const float (&dq)[J][4], const RowSide& mine,
                        int at, int n, float (&excess)[2]) const {
    const float scale = float(t.scale) * log4e;
#pragma unroll
    for (int j = 0; j < J; ++j) {
      const int column = column_half * (S / 2) + 8 * j + lane_column();
      ColumnSide its[2] = {};
      float of_columns[2] = {};
      if (Other) {
        its[0] = side[at * S + column];
        its[1] = side[at * S + column + 1];
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = first + 16 * group + lane_row() + 8 * half;
        float p[2] = {};
        float q[2] = {};
        float d[2] = {};
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int i = 2 * half + c;
          const int k = n + column + c;
          float x = s[j][i] * scale;
          bool attends = true;  // Plain: rows and columns that aren't there have no share and aren't valid
          if (!Plain) {
            attends = r < t.rows && k < end;
            if (attends && t.pairs.data)
              attends = load(t.pairs.data + b * t.pairs.b + h * t.pairs.h + r * t.pairs.n + k * t.pairs.t);
            if (attends && t.bias.data)
              x = fmaf(load(static_cast<const float*>(t.bias.data) + b * t.bias.b + h * t.bias.h + r * t.bias.n +
                            k * t.bias.t),
                       log4e, x);
          }
          if (Own && attends && valid[at * S + column + c] && mine.share[half] != 0) {
            p[c] = mine.power[half](x) * mine.share[half];
            d[c] = p[c] == 1 ? 0.f : p[c] * (dp[j][i] - mine.delta[half]);
          }
          const float of_row = d[c];
          if (Other && attends && mine.valid[half] && its[c].share != 0) {
            q[c] = its[c].power(x) * its[c].share;
            const float of_column = q[c] == 1 ? 0.f : q[c] * (dq[j][i] - its[c].delta);
            d[c] += of_column;
            of_columns[c] += of_column;
          }
          if (Own)
            excess[half] += Other ? of_row : to_float(from_float<T>(d[c]));
          if (!Plain && t.grad_bias && chunk == 0 && r < t.rows && k < end)
            store(t.grad_bias + bh * t.rows * t.columns + r * t.grad_bias_row + k * t.grad_bias_column, d[c]);
        }
        const int to = (16 * group + lane_row() + 8 * half) * Layout::weights + column;
        put_pair(ds + to, d[0], d[1]);
        if (Other)
          put_pair(other + to, q[0], q[1]);
        if (Own && t.whole)
          put_pair(own + to, p[0], p[1]);
      }
      if (Own && Other && t.whole)
        this->put_column_excess(column, of_columns);
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
        float excess[4] = {};
        if (Other)
          this->excess_of_columns(excess, r0);
        clear(x);
        mma<4, true, true>(x, ds + r0, Layout::weights, row_panel(0) + c0, pitch, tile_rows);
        emit_rows(x, [&](int r, int c, float (&v)[8]) {
          const int k = n + r0 + r;
          if (k >= end || c0 + c >= t.d)
            return;
          if (Other)
            for (int e = 0; e < 8; ++e)
              v[e] -= excess[r < 8 ? 0 : 2] * this->row_centre(c0 + c + e);
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

  MMK_DEVICE RowSide row_side() const {
    RowSide mine;
    for (int half = 0; half < 2; ++half) {
      const int r = first + 16 * group + lane_row() + 8 * half;
      const bool there = Own && r < t.rows && t.grad.data;
      mine.power[half] = Exponential(there ? top_of(t.softmax, bh, t.rows, r) : 0.f);
      mine.share[half] = there ? share_of(t.softmax, bh, t.rows, r) : 0.f;
      mine.delta[half] = there ? load(t.delta + bh * t.rows + r) : 0.f;
      mine.valid[half] = r < t.rows && this->row_valid(r);
    }
    return mine;
  }

  // s += scores of the pipeline's tile, dp and dq the weights' gradients; false while it only brings the first one.
  // In slabs where channels are more than the class; then the last pass brings the channels of this chunk.
  MMK_DEVICE bool scores(float (&s)[J][4], float (&dp)[J][4], float (&dq)[J][4], const StreamPipeline<S>& tiles,
                         int passes) const {
    const bool once = passes == 1;
    for (int slab = 0; slab < passes; ++slab) {
      const bool last = slab == passes - 1;
      tiles.acquire();
      if (!once || tiles.starts()) {
        bring_query(slab);
        bring_row_values(slab);
      }
      if (tiles.brings()) {
        const int of_columns = last ? chunk : slab;
        bring_key(tiles.into(), tiles.next(), of_columns);
        bring_column_values(tiles.into(), tiles.next(), of_columns);
        if (last)
          bring_side(tiles.into(), tiles.next());
      }
      tiles.commit();
      if (tiles.filling())
        return false;
      tiles.wait();
      if (!once && last)
        break;
      const int depth = whole_depth(most<int64_t>(least<int64_t>(C, t.dv - slab * C), 0));
      products(s, tiles.at, 0, whole_depth(most<int64_t>(least<int64_t>(C, t.d - slab * C), 0)));
      if (Own)
        products(dp, tiles.at, own_panel, depth);
      if (Other)
        products(dq, tiles.at, other_panel, depth);
    }
    return true;
  }

  // The sums of the rows, to where they are wanted.
  MMK_DEVICE void finish(const float (&to_query)[W][4], const float (&to_value)[Other ? W : 1][4],
                         const float (&excess)[2]) const {
    const int channel = chunk * C + column_half * (C / 2);
    float* memory =
        reinterpret_cast<float*>(rows) + threadIdx.x / 32 * 16 * (C / 2 + 4);  // all is free now; at least two panels
    float* halves = reinterpret_cast<float*>(buffers);                         // of the rows' sums: [2][64]
    __syncthreads();
    if (Own) {
      for (int half = 0; half < 2; ++half) {
        const float sum = over_lanes(excess[half], 4, Sum());
        if (threadIdx.x % 4 == 0)
          halves[column_half * tile_rows + 16 * group + lane_row() + 8 * half] = sum;
      }
      __syncthreads();
    }
    if (t.grad_query.data)
      emit_through<W>(memory, to_query, [&](int i, int c, float (&x)[8]) {
        const int r = first + 16 * group + i;
        const int count = int(least<int64_t>(8, t.d - channel - c));
        if (r >= t.rows || count <= 0)
          return;
        if (Own) {
          const float sum = halves[16 * group + i] + halves[tile_rows + 16 * group + i];
          for (int e = 0; e < 8; ++e)
            x[e] -= sum * centre[column_half * (C / 2) + c + e];
        }
        if (t.splits > 1)
          put<8>(t.partial_query_of(bh, split, r) + channel + c, x, 1, count);
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
            put<8>(t.partial_value_of(bh, split, r) + channel + c, x, 1, count);
          else
            this->put_value(t.grad_row_value, r, channel + c, x, count, this->row_valid(r));
        });
  }

  MMK_DEVICE void run() const {
    const int slabs = int(ceil_div(most(t.d, t.dv), C));
    const int passes = slabs == 1 ? 1 : slabs + 1;
    const RowSide mine = row_side();
    float to_query[W][4], to_value[Other ? W : 1][4];
    float excess[2] = {};
    clear(to_query);
    clear(to_value);
    if (Own && threadIdx.x < C)
      this->find_centre(centre[threadIdx.x], threadIdx.x, t.key, t.columns,
                        [&](int64_t n) { return this->column_valid(n); });
    const int c = threads - 1 - threadIdx.x;  // other threads, where there are as many
    if (Other && t.whole && c < C)
      this->find_centre(this->row_centre(c), c, t.query, t.rows, [&](int64_t r) { return this->row_valid(r); });
    StreamPipeline<S> tiles(begin, end, t.stages, passes > 1, false);
    for (; tiles.more(); tiles.advance()) {
      float s[J][4], dp[J][4], dq[J][4];
      clear(s);
      clear(dp);
      clear(dq);
      if (!scores(s, dp, dq, tiles, passes))
        continue;
      if (t.pairs.data || t.bias.data || t.grad_bias)
        weigh<false>(s, dp, dq, mine, tiles.at, tiles.n, excess);
      else
        weigh<true>(s, dp, dq, mine, tiles.at, tiles.n, excess);
      __syncthreads();
      const T* weights = ds + 16 * group * Layout::weights;
      mma<W, false, true>(to_query, weights, Layout::weights, panel(tiles.at, 0) + column_half * (C / 2), pitch, S);
      if constexpr (Other)
        mma<W, false, true>(to_value, other + 16 * group * Layout::weights, Layout::weights,
                            panel(tiles.at, other_panel) + column_half * (C / 2), pitch, S);
      if (t.whole)
        column_side(tiles.n);
      tiles.release();
    }
    tiles.drain();
    finish(to_query, to_value, excess);
  }
};

}  // namespace mmk::cuda
