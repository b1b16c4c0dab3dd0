// softmax(scale * query key^T) value for tiles of 64 query rows, keys and values streamed: the forward pass of both
// operations.
//
// A block of four warps has the rows of a tile, 16 a warp: scores, their online softmax (Milakov & Gimelshein 2018,
// arXiv:1805.02867) and the weighted sum of values stay in registers, as in FlashAttention-2 (Dao 2023,
// arXiv:2307.08691). Keys and values come in tiles by cp.async, two buffers in turn; where as many buffers as tiles fit
// in shared memory (a short text), they are read once and stay there while the block goes from one row tile to the
// next. Where few rows meet a long stream, it is split: blocks leave unnormalised sums in scratch, and `attend_merge`
// adds them in a fixed order.
//
// C, the class: channels that registers and shared memory are made for. More query channels are taken in slabs of C,
// more value channels by more blocks, each of which takes the scores again.
//
// Both (bidirectional attention, all text rows in one tile): the same scores also give the columns' softmax,
// which is complete in a tile, and its rows of the result.
#pragma once
#include "heads_task.h"
#include "stream_pipeline.h"

namespace mmk::cuda {

template <class T, int C, bool Both>
struct Attend {
  using Layout = AttendLayout<T, C>;
  static constexpr int S = Layout::S;
  static constexpr int J = S / 8;
  static constexpr int pitch = Layout::pitch;
  static constexpr int threads = 128;
  const AttendTask& t;
  int64_t bh;
  int b, h;                                  // the launch has fewer than 2^31 blocks
  int chunk, split, first_tile, begin, end;  // begin, end: of the columns
  T *buffers, *query, *gate, *p, *values, *q;
  float* reduce;
  uint8_t* valid;
  int warp, lane;

  MMK_DEVICE Attend(const AttendTask& t, unsigned char* shared) : t(t) {
    unsigned rest = blockIdx.x;  // 64-bit divisions would take as long as a tile
    const unsigned groups = (unsigned(t.tiles) + unsigned(t.group) - 1) / unsigned(t.group);
    chunk = int(rest % unsigned(t.chunks));
    rest /= unsigned(t.chunks);
    split = int(rest % unsigned(t.splits));
    rest /= unsigned(t.splits);
    first_tile = int(rest % groups) * int(t.group);
    rest /= groups;
    bh = rest;
    b = int(rest / unsigned(t.heads));
    h = int(rest % unsigned(t.heads));
    begin = int(split * t.span);
    end = int(least(begin + t.span, t.columns));
    const Layout at(t.stages, t.resident, Both);
    buffers = reinterpret_cast<T*>(shared);
    query = reinterpret_cast<T*>(shared + at.query);
    gate = reinterpret_cast<T*>(shared + at.gate);
    p = reinterpret_cast<T*>(shared + at.p);
    values = reinterpret_cast<T*>(shared + at.values);
    q = reinterpret_cast<T*>(shared + at.q);
    reduce = reinterpret_cast<float*>(shared + at.reduce);
    valid = shared + at.valid;
    warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
  }

  // The tile in use is the stream's last; it has half of its columns, or fewer.
  MMK_DEVICE bool last(const StreamPipeline<S>& tiles) const { return tiles.n + S >= end; }
  MMK_DEVICE bool few(const StreamPipeline<S>& tiles) const { return tiles.n + S / 2 >= end; }

  MMK_DEVICE T* key_tile(int stage) const { return buffers + 2 * stage * S * pitch; }
  MMK_DEVICE T* value_tile(int stage) const { return key_tile(stage) + S * pitch; }
  MMK_DEVICE bool row_valid(int64_t r) const {
    return !t.row_mask.data || load(t.row_mask.data + b * t.row_mask.b + h * t.row_mask.h + r * t.row_mask.t);
  }
  MMK_DEVICE bool column_valid(int64_t n) const {
    return !t.column_mask.data ||
           load(t.column_mask.data + b * t.column_mask.b + h * t.column_mask.h + n * t.column_mask.t);
  }

  MMK_DEVICE void bring_query(int row, int slab) const {  // a warp's 16 rows
    const T* from = head_of<T>(t.query, opaque(b), opaque(h)) + row * t.query.n + slab * C * t.query.c;
    stage<16, C, 32>(
        query + 16 * warp * pitch, from, t.query, t.rows - row, t.d - slab * C,
        [&](int r) { return row_valid(row + r) ? Row::whole : Row::finite; }, lane);
  }
  MMK_DEVICE void bring_gate(T* to, int row) const {  // of the same rows
    const T* from = head_of<T>(t.gate, opaque(b), opaque(h)) + row * t.gate.n + chunk * C * t.gate.c;
    stage<16, C, 32>(
        to + 16 * warp * pitch, from, t.gate, t.rows - row, t.dv - chunk * C, [](int) { return Row::whole; }, lane);
  }
  MMK_DEVICE void bring_key(int stage_index, int n, int slab) const {
    const T* from = head_of<T>(t.key, opaque(b), opaque(h)) + n * t.key.n + slab * C * t.key.c;
    stage<S, C, threads>(
        key_tile(stage_index), from, t.key, end - n, t.d - slab * C,
        [&](int r) { return column_valid(n + r) ? Row::whole
                            : Both              ? Row::finite
                                                : Row::zeros; }, threadIdx.x);
  }
  MMK_DEVICE void bring_value(int stage_index, int n) const {
    const T* from = head_of<T>(t.value, opaque(b), opaque(h)) + n * t.value.n + chunk * C * t.value.c;
    stage<S, C, threads>(
        value_tile(stage_index), from, t.value, end - n, t.dv - chunk * C,
        [&](int r) { return column_valid(n + r) ? Row::whole : Row::zeros; }, threadIdx.x);
    for (int r = threadIdx.x; r < S; r += threads)
      valid[stage_index * S + r] = n + r < end && column_valid(n + r);
  }

  // Scores with what is added to them a pair; -Inf where it doesn't attend.
  MMK_DEVICE void mask_pairs(float (&s)[J][4], int row, int n, const uint8_t* valid) const {
    if (t.pairs.data)
      each_pair(t.pairs.data, t.pairs, row, n, valid, [&](int j, int i, const bool* at) {
        if (!load(at))
          s[j][i] = -INFINITY;
      });
    else if (t.bias.data)
      each_pair(static_cast<const float*>(t.bias.data), t.bias, row, n, valid,
                [&](int j, int i, const float* at) { s[j][i] = fmaf(load(at), log4e, s[j][i]); });
  }
  template <class E, class Of, class Use>
  MMK_DEVICE void each_pair(const E* first, const Of& of, int row, int n, const uint8_t* valid, Use use) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t r = row + lane_row() + 8 * half;
      const E* at = first + b * of.b + h * of.h + r * of.n + (n + lane_column()) * of.t;
#pragma unroll
      for (int j = 0; j < J; ++j, at += 8 * of.t)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if (r < t.rows && valid[8 * j + lane_column() + c])
            use(j, 2 * half + c, at + c * of.t);
    }
  }
  template <int K>
  MMK_DEVICE void mask(float (&s)[J][4], int n, const uint8_t* valid) const {
    if (!t.column_mask.data && n + 8 * K <= end)
      return;
#pragma unroll
    for (int j = 0; j < K; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if (!valid[8 * j + lane_column() + c])
          s[j][c] = s[j][2 + c] = -INFINITY;
  }

  // The columns' own softmax, over all rows of this tile, and their result. s: scores, not masked.
  MMK_DEVICE void column_side(const float (&s)[J][4], int row, int n) const {
    float* most_of = reduce;
    float* sum_of = reduce + 4 * S;
    const int r = row + lane_row();
    const bool low = r < t.rows && row_valid(r);
    const bool high = r + 8 < t.rows && row_valid(r + 8);
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float m = fmaxf(low ? s[j][c] : -INFINITY, high ? s[j][2 + c] : -INFINITY);
        for (int lanes = 4; lanes < 32; lanes *= 2)
          m = fmaxf(m, __shfl_xor_sync(all_lanes, m, lanes));
        if (lane < 4)
          most_of[warp * S + 8 * j + lane_column() + c] = m;
      }
    __syncthreads();
    auto top = [&](int column) {
      return fmaxf(fmaxf(most_of[column], most_of[S + column]),
                   fmaxf(most_of[2 * S + column], most_of[3 * S + column]));
    };
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = 8 * j + lane_column() + c;
        const Exponential power(top(column));
        const float x = low ? power(s[j][c]) : 0.f;
        const float y = high ? power(s[j][2 + c]) : 0.f;
        T* to = q + (16 * warp + lane_row()) * Layout::weights + column;
        to[0] = from_float<T>(x);
        to[8 * Layout::weights] = from_float<T>(y);
        float sum = x + y;
        for (int lanes = 4; lanes < 32; lanes *= 2)
          sum += __shfl_xor_sync(all_lanes, sum, lanes);
        if (lane < 4)
          sum_of[warp * S + column] = sum;
      }
    __syncthreads();
    auto sum = [&](int column) {
      return sum_of[column] + sum_of[S + column] + sum_of[2 * S + column] + sum_of[3 * S + column];
    };
    for (int column = threadIdx.x; column < S; column += threads)
      if (n + column < end)
        store_softmax(t.column_softmax, bh, t.columns, n + column, top(column), sum(column));
    // a warp's columns at a time
    constexpr int row_groups = S / 16;
    constexpr int W = 4;
    constexpr int width = 8 * W;
    T* result = head_of<T>(t.column_result, b, h);
    for (int item = warp; item < row_groups * (C / width); item += 4) {
      const int r0 = item % row_groups * 16;
      const int c0 = item / row_groups * width;
      if (c0 >= t.dv)
        continue;
      float o[W][4];
      clear(o);
      mma<W, true, true>(o, q + r0, Layout::weights, values + c0, pitch, whole_depth(t.rows));
      emit_rows(o, [&](int r, int c, float (&x)[8]) {
        if (n + r0 + r >= end || c0 + c >= t.dv)
          return;
        const float total = sum(r0 + r);
        const float factor = total == 0 ? 0.f : 1 / total;
        for (int e = 0; e < 8; ++e)
          x[e] = total == 0 ? 0.f : x[e] * factor;
        put<8>(result + (n + r0 + r) * t.column_result.n + (c0 + c) * t.column_result.c, x, t.column_result.c,
               int(least<int64_t>(8, t.dv - c0 - c)));
      });
    }
  }

  MMK_DEVICE void finish(float (&o)[C / 8][4], const float (&m)[2], const float (&l)[2], int row, const T* gate) const {
    const int b = opaque(this->b);
    const int h = opaque(this->h);
    const int c_first = opaque(chunk) * C;
    if (chunk == 0 && lane % 4 == 0)
      for (int half = 0; half < 2; ++half) {
        const int r = row + lane_row() + 8 * half;
        if (r >= t.rows)
          continue;
        if (t.splits == 1) {
          store_softmax(t.softmax, bh, t.rows, r, m[half], l[half]);
        } else {
          float* stats = t.stats_of(bh, split, r);
          store(stats, m[half]);
          store(stats + 1, l[half]);
        }
      }
    unsigned fully_masked = 0;  // rows that attend to nothing: whatever their gate is
    for (int half = 0; half < 2; ++half) {
      unsigned bit = l[half] == 0 && lane % 4 == 0 ? 1u << (lane_row() + 8 * half) : 0u;
      for (int lanes = 16; lanes > 0; lanes /= 2)
        bit |= __shfl_xor_sync(all_lanes, bit, lanes);
      fully_masked |= bit;
    }
    float factor[2] = {1, 1};
    for (int half = 0; half < 2 && t.splits == 1; ++half)
      factor[half] = l[half] == 0 ? 0.f : 1 / l[half];
#pragma unroll
    for (int j = 0; j < C / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        o[j][i] *= factor[i / 2];
    float* memory = reinterpret_cast<float*>(query + 16 * warp * pitch);  // free now; room for half of the channels
    for (int half = 0; half < 2; ++half) {                                // unrolled: registers have no index
      auto emit = [&](int r, int c, float (&x)[8]) {
        const int at = row + r;
        const int channel = c_first + half * (C / 2) + c;
        const int count = int(least<int64_t>(8, t.dv - channel));
        if (at >= t.rows || count <= 0)
          return;
        if (t.splits > 1) {
          put<8>(t.partial_of(bh, split, at) + channel, x, 1, count);
          return;
        }
        if (t.attended.data)
          put<8>(head_of<T>(t.attended, b, h) + at * t.attended.n + channel * t.attended.c, x, t.attended.c, count);
        if (t.unrounded.data)
          put<8>(head_of<float>(t.unrounded, b, h) + at * t.unrounded.n + channel * t.unrounded.c, x, t.unrounded.c,
                 count);
        if (t.gate.data) {
          float y[8];
          if (gate)
            held(y, gate + (16 * warp + r) * pitch + channel - c_first);
          else
            get<8>(y, head_of<T>(t.gate, b, h) + at * t.gate.n + channel * t.gate.c, t.gate.c, count);
#pragma unroll
          for (int e = 0; e < 8; ++e)
            x[e] = fully_masked >> r & 1 ? 0.f : x[e] * y[e];
        }
        put<8>(head_of<T>(t.result, b, h) + at * t.result.n + channel * t.result.c, x, t.result.c, count);
      };
      if (half == 0)
        emit_through<C / 16>(memory, o, emit);
      else
        emit_through<C / 16>(memory, o + C / 16, emit);
    }
  }

  MMK_DEVICE static void held(float (&to)[8], const T* shared) {
#pragma unroll
    for (int i = 0; i < 8; i += Pack<T>::size) {
      const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(shared + i);
#pragma unroll
      for (int e = 0; e < Pack<T>::size; ++e)
        to[i + e] = to_float(pack.at[e]);
    }
  }

  // Where the gate of a row tile waits for the end: where nothing comes in the round that uses the last tile. Null: it
  // is read then.
  MMK_DEVICE T* gate_tile(const StreamPipeline<S>& tiles) const {
    if (Both || !t.gate.data || t.splits > 1)
      return nullptr;
    return t.resident ? gate : tiles.ahead ? key_tile(tiles.into()) : nullptr;
  }

  // The first 8 K columns of s += the scores of the pipeline's tile, of a warp that has rows.
  template <int K>
  MMK_DEVICE void product(float (&s)[J][4], const StreamPipeline<S>& tiles, int slab) const {
    mma<K, false, false>(s, query + 16 * warp * pitch, pitch, key_tile(tiles.at), pitch,
                         whole_depth(least<int64_t>(C, t.d - slab * C)));
  }

  // s: the scores of the pipeline's tile; false while it only brings the first one.
  MMK_DEVICE bool scores(float (&s)[J][4], const StreamPipeline<S>& tiles, int row) const {
    const int slabs = t.d > C ? int(ceil_div(t.d, C)) : 1;
    for (int slab = 0; slab < slabs; ++slab) {
      tiles.acquire();
      if (slabs > 1 || tiles.starts())
        bring_query(row, slab);
      if (tiles.brings()) {
        bring_key(tiles.into(), tiles.next(), slab);
        if (slab == 0)
          bring_value(tiles.into(), tiles.next());
      }
      tiles.commit();
      if (tiles.filling())
        return false;
      T* to = (t.resident ? tiles.n == begin : last(tiles)) ? gate_tile(tiles) : nullptr;
      if (to) {
        bring_gate(to, row);
        tiles.commit();
      }
      tiles.wait(to);
      if (slab == 0)
        clear(s);
      if (row >= t.rows)
        continue;
      if (few(tiles))
        product<J / 2>(s, tiles, slab);
      else
        product<J>(s, tiles, slab);
    }
    return true;
  }

  // Scores become exponentials below the running maximum m; the sums so far, l and o, are brought below it, too.
  template <int K>
  MMK_DEVICE void online_softmax(float (&s)[J][4], float (&o)[C / 8][4], float (&m)[2], float (&l)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = m[half];
#pragma unroll
      for (int j = 0; j < K; ++j)
        top = fmaxf(top, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(all_lanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(all_lanes, top, 2));
      const Exponential power(top);
      const float before = power(m[half]);
      m[half] = top;
      l[half] *= before;
#pragma unroll
      for (int j = 0; j < K; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float x = power(s[j][2 * half + c]);
          s[j][2 * half + c] = x;
          l[half] += x;
        }
#pragma unroll
      for (int j = 0; j < C / 8; ++j) {
        o[j][2 * half] *= before;
        o[j][2 * half + 1] *= before;
      }
    }
  }

  // The first 8 K columns of the tile, all that are there, join the sums.
  template <int K>
  MMK_DEVICE void join(float (&s)[J][4], float (&o)[C / 8][4], float (&m)[2], float (&l)[2],
                       const StreamPipeline<S>& tiles) const {
    mask<K>(s, tiles.n, valid + tiles.at * S);
    online_softmax<K>(s, o, m, l);
    mma_weights<K>(o, s, p + 16 * warp * Layout::weights, Layout::weights, value_tile(tiles.at), pitch);
  }

  MMK_DEVICE void run() const {
    const int last_tile = int(least(first_tile + t.group, t.tiles));
    if (Both)
      stage<tile_rows, C, threads>(
          values, head_of<T>(t.row_value, b, h), t.row_value, t.rows, t.dv,
          [&](int r) { return row_valid(r) ? Row::whole : Row::zeros; }, threadIdx.x);
    for (int tile = first_tile; tile < last_tile; ++tile) {
      const int row = tile * tile_rows + 16 * warp;
      float o[C / 8][4];
      float m[2] = {-INFINITY, -INFINITY};
      float l[2] = {0, 0};
      const T* gate = nullptr;
      clear(o);
      __syncwarp();  // the last tile's readers are done
      StreamPipeline<S> tiles(begin, end, t.stages, t.d > C, t.resident && tile > first_tile);
      for (; tiles.more(); tiles.advance()) {
        float s[J][4];
        if (!scores(s, tiles, row))
          continue;
#pragma unroll
        for (int j = 0; j < J; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            s[j][i] *= float(t.scale) * log4e;
        if (Both)
          column_side(s, row, tiles.n);
        else
          mask_pairs(s, row, tiles.n, valid + tiles.at * S);
        gate = last(tiles) ? gate_tile(tiles) : nullptr;
        if (row < t.rows && few(tiles))
          join<J / 2>(s, o, m, l, tiles);
        else if (row < t.rows)
          join<J>(s, o, m, l, tiles);
        tiles.release();
      }
      tiles.drain();
      if (row >= t.rows)
        continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        l[half] += __shfl_xor_sync(all_lanes, l[half], 1);
        l[half] += __shfl_xor_sync(all_lanes, l[half], 2);
      }
      finish(o, m, l, row, gate);
    }
  }
};

}  // namespace mmk::cuda
