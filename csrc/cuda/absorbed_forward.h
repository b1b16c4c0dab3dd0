// The forward kernels of absorbed attention.
//
// AbsorbedPool: a block has a tile of columns and streams positions past them; their softmax is online over the tiles
// of positions (Milakov & Gimelshein 2018, arXiv:1805.02867), the features that they gather stay in registers, a chunk
// of channels a block, and are left in scratch for the merge. Where all columns are one tile (a short text) the same
// scores also give the image's result.
//
// AbsorbedAttend: else a block has a tile of positions and goes through the columns, group by group of heads, twice
// where a head has more than one tile: for the softmax's sums, and for the weights. The sum over heads stays in
// registers.
#pragma once
#include "absorbed_block.h"

namespace mmk::cuda {

template <class T>
struct AbsorbedForward : AbsorbedBlock<T> {
  using Base = AbsorbedBlock<T>;
  using Base::b, Base::columns, Base::pitch, Base::quarter, Base::sides, Base::t;
  using typename Base::Tile, typename Base::Layout, typename Base::Chunk;
  using AbsorbedBlock<T>::AbsorbedBlock;

  MMK_DEVICE void forget_sides() const {
    for (int item = threadIdx.x; item < t.heads * tile; item += absorbed_threads) {
      sides[item].delta = -INFINITY;
      sides[item].share = 0;
    }
  }
  // The softmax over tokens of the tile's heads, of each position, goes on through the group's k-th tile. The scores
  // were kept; between barriers.
  MMK_DEVICE void over_tokens(int k) const {
    const int count = this->tokens_of(k);
    this->by_items(int(t.heads) * tile, [&](int item, int lane, int lanes) {
      const bool there = item < t.heads * tile;
      const int r = item % tile;
      const int column = there ? item / tile * int(t.T) : 0;
      RowSide side = {};
      if (there)
        side = sides[item];
      Base::merge(side.delta, side.share, there ? count : 0, lane, lanes,
                  [&](int c) { return columns[column + c].takes ? this->kept(r, column + c) : -INFINITY; });
      __syncwarp();  // all have read
      if (there && lane == 0)
        sides[item] = side;
    });
  }
  // What was found becomes what weights are taken with; `keep`: and is kept for backward. Threads have the items that
  // they had.
  MMK_DEVICE void finish_sides(int64_t of_group, int n, int end, bool keep) const {
    for (int item = threadIdx.x; item < t.heads * tile; item += absorbed_threads) {
      RowSide& side = sides[item];
      const int r = n + item % tile;
      if (keep && r < end && this->has_head(of_group, item / tile))
        store_softmax(t.image_softmax, this->head_index(of_group, item / tile), t.N, r, side.delta, side.share);
      side.power = Exponential(side.delta);
      side.share = side.share == 0 ? 0.f : 1 / side.share;
    }
  }
  // score(j, i, r, c) of an element of the tile. Values are packed: their products' sums are to be multiplied by
  // `scale`.
  template <class Score>
  MMK_DEVICE void weigh_tokens(T* weights, float scale, Score score) const {
    const float share = 1 / scale;
    Tile w;
    this->each([&](int j, int i, int r, int c) {
      w[j][i] = this->weight(score(j, i, r, c), r, c) * (this->value_scale(c) * share);
    });
    this->put_tile(weights, w);
  }
  // Slab i of a tile's values, in all parts.
  MMK_DEVICE void bring_values(T* to, int64_t of_tile, int i) const {
    for (int part = 0; part < t.parts; ++part)
      this->bring_packed(to + (1 + part) * Base::panel,
                         this->values_of(of_tile) + part * t.all_columns() * t.value_width(), t.value_width(), i);
  }
  // Parts are `step` apart.
  MMK_DEVICE void times_values(float (&sum)[Base::W][4], const T* weights, const T* from, int step) const {
    for (int part = 0; part < t.parts; ++part)
      mma<Base::W, false, true>(sum, weights + 16 * this->group * Layout::weights, Layout::weights,
                                from + part * step + 8 * Base::W * quarter, pitch, tile);
  }
  MMK_DEVICE void put_image(int n, int end, int r, int64_t channel, float scale, float (&x)[8]) const {
    const HeadRows& to = t.image_out;
#pragma unroll
    for (int e = 0; e < 8; ++e)
      x[e] *= scale;
    if (n + r < end && channel < t.Dv)
      put<8>(static_cast<T*>(to.data) + b * to.b + (n + r) * to.n + channel * to.c, x, to.c,
             int(least<int64_t>(8, t.Dv - channel)));
  }
};

template <class T>
struct AbsorbedPool : AbsorbedForward<T> {
  using Base = AbsorbedForward<T>;
  using Base::columns, Base::factor, Base::first, Base::second, Base::t, Base::top, Base::total, Base::valid;
  using typename Base::Tile, typename Base::Layout, typename Base::Chunk;
  int chunk, split, begin, end;
  int64_t of_tile;

  // Grid: samples x tiles x splits x chunks, the last the fastest.
  MMK_DEVICE AbsorbedPool(const AbsorbedTask& t, unsigned char* shared)
      : Base(t, shared, blockIdx.x / (t.chunks * t.splits * t.all_tiles())) {
    int64_t rest = blockIdx.x;
    chunk = int(rest % t.chunks);
    rest /= t.chunks;
    split = int(rest % t.splits);
    rest /= t.splits;
    of_tile = rest % t.all_tiles();
    begin = int(split * t.span);
    end = int(least(begin + t.span, t.N));
  }

  // The columns' softmax over positions goes on through a tile; between barriers.
  MMK_DEVICE void over_positions() const {
    constexpr int lanes = absorbed_threads / tile;  // that share out a column
    constexpr int rows = tile / lanes;
    const int c = threadIdx.x / lanes;
    const int lane = threadIdx.x % lanes;
    const float before = top[c];
    float now = before;
    float x[rows];
#pragma unroll
    for (int k = 0; k < rows; ++k) {
      const int r = rows * lane + (k + lane / 4 * 4) % rows;  // the warp's lanes are in different banks
      x[k] = valid[r] ? this->kept(r, c) : -INFINITY;
      now = fmaxf(now, x[k]);
    }
    now = over_lanes(now, lanes, Max());
    const Exponential power(now);
    float more = 0;
#pragma unroll
    for (int k = 0; k < rows; ++k)
      more += power(x[k]);
    more = over_lanes(more, lanes, Sum());
    __syncwarp();  // all have read
    if (lane == 0) {
      top[c] = now;
      total[c] = total[c] * power(before) + more;
      factor[c] = power(before);
    }
  }
  // `fine`: the weights, and what they were rounded by.
  MMK_DEVICE void weigh_positions(const Tile& s) const {
    Tile w;
    this->each([&](int j, int i, int r, int c) { w[j][i] = valid[r] ? Exponential(top[c])(s[j][i]) : 0.f; });
    this->put_tile(first, w);
    if (!t.fine)
      return;
    this->each([&](int j, int i, int, int) { w[j][i] -= to_float(from_float<T>(w[j][i])); });
    this->put_tile(second, w);
  }
  // The image's result of these positions, with all columns.
  MMK_DEVICE void image_side(int n, const T* values, float scale) const {
    auto use = [&](int i, const T* from, int step) {
      float sum[Base::W][4];
      clear(sum);
      this->times_values(sum, second, from, step);
      this->emit_slab(sum, i * Base::K,
                      [&](int r, int64_t channel, float (&x)[8]) { this->put_image(n, end, r, channel, scale, x); });
    };
    const int count = Base::slabs(t.Dv);
    if (values) {
      __syncthreads();
      for (int i = 0; i < count; ++i)
        use(i, values + i * Base::panel, count * Base::panel);
      __syncthreads();
    } else {
      this->template stream<0>(
          count, [&](int i, T* to) { this->bring_values(to, of_tile, i); },
          [&](int i, const T* from) { use(i, from + Base::panel, Base::panel); });
    }
  }

  // A tile of the image on its way to a buffer of its own.
  MMK_DEVICE void prefetch(int n, int buffer) const {
    if (n < end)
      this->bring_tile(this->image_rows(n, true, this->held_image(buffer)));
    copy_commit();
  }

  MMK_DEVICE void run() const {
    typename Base::Chunk sum;
    Base::clear_chunk(sum);
    this->take_columns(of_tile);
    for (int c = threadIdx.x; c < tile; c += absorbed_threads) {
      top[c] = -INFINITY;
      total[c] = 0;
    }
    const bool both = t.whole && chunk == 0;
    const float scale = both ? this->largest_scales().with_weights() : 1;
    if (t.resident) {
      this->hold_keys(of_tile);
      if (t.whole)
        this->hold_values(of_tile);
      prefetch(begin, 0);
    }
    int buffer = 0;
    for (int n = begin; n < end; n += tile) {
      this->take_positions(n, end);
      if (both)
        this->forget_sides();
      if (t.resident) {
        if (t.buffers == 2) {
          prefetch(n + tile, 1 - buffer);
          copy_wait<1>();
        } else {
          copy_wait<0>();
        }
      }
      __syncthreads();
      Tile s;
      this->score(s, this->image_rows(n, !t.resident, this->held_image(buffer)), this->keys(of_tile));
      this->keep(s);
      __syncthreads();
      over_positions();
      if (both)
        this->over_tokens(0);
      __syncthreads();
      weigh_positions(s);
      if (both)
        this->finish_sides(0, n, end, true);
      this->to_columns(sum, first, t.fine ? second : nullptr, this->image_rows(n, false, this->held_image(buffer)),
                       chunk, true);
      if (t.resident && t.buffers == 1)
        prefetch(n + tile, 0);
      if (both) {
        this->weigh_tokens(second, scale, [&](int, int, int r, int c) { return this->kept(r, c); });
        image_side(n, this->held_values(), scale);
      }
      if (t.buffers == 2)
        buffer = 1 - buffer;
    }
    copy_wait<0>();
    __syncthreads();
    const int64_t to = t.left_at(this->b, of_tile, split);
    this->leave(sum, t.partial + to * t.width(), t.width(), chunk, 1);
    for (int c = threadIdx.x; c < tile && chunk == 0; c += absorbed_threads) {
      store(t.stats + 2 * (to + c), top[c]);
      store(t.stats + 2 * (to + c) + 1, total[c]);
    }
  }
};

template <class T>
struct AbsorbedAttend : AbsorbedForward<T> {
  using Base = AbsorbedForward<T>;
  using Base::first, Base::group, Base::pitch, Base::quarter, Base::t;
  using typename Base::Tile, typename Base::Layout, typename Base::Chunk;
  int chunk, n, end;

  // Grid: samples x tiles of positions x chunks of values, the last the fastest.
  MMK_DEVICE AbsorbedAttend(const AbsorbedTask& t, unsigned char* shared)
      : Base(t, shared, blockIdx.x / (t.value_chunks * t.positions)) {
    chunk = int(blockIdx.x % t.value_chunks);
    n = int(blockIdx.x / t.value_chunks % t.positions * tile);
    end = int(t.N);
  }

  // Where all is held: a tile's keys are there once its values, if they are wanted, are on their way; and once all have
  // read the keys, the next tile's are.
  MMK_DEVICE void arrive(int64_t of_tile, bool values) const {
    if (values)
      this->hold_values(of_tile);
    copy_commit();
    copy_wait<1>();
  }
  MMK_DEVICE void leave_keys(int64_t next) const {
    __syncthreads();
    if (next < t.all_tiles())
      this->hold_keys(next);
    copy_commit();
  }

  MMK_DEVICE void run() const {
    Chunk sum;
    Base::clear_chunk(sum);
    const float scale = this->largest_scales().with_weights();
    this->take_positions(n, end);
    if (t.resident && t.all_tiles() > 0) {
      this->bring_tile(this->image_rows(n, true, this->held_image(0)));
      this->hold_keys(0);
      copy_commit();
    }
    for (int64_t g = 0; g < t.groups; ++g) {
      this->forget_sides();
      const int passes = t.tiles > 1 ? 2 : 1;
      for (int pass = 0; pass < passes; ++pass) {
        for (int k = 0; k < t.tiles; ++k) {
          const int64_t of_tile = g * t.tiles + k;
          this->take_columns(of_tile);
          if (t.resident)
            arrive(of_tile, pass + 1 == passes);
          __syncthreads();
          Tile s;
          const bool fresh = g == 0 && k == 0 && pass == 0 && !t.resident;
          this->score(s, this->image_rows(n, fresh, this->held_image(0)), this->keys(of_tile));
          if (t.resident)
            leave_keys(k + 1 < t.tiles ? of_tile + 1 : pass + 1 < passes ? g * t.tiles : of_tile + 1);
          if (pass == 0) {
            this->keep(s);
            __syncthreads();
            this->over_tokens(k);
            __syncthreads();
          }
          if (pass == 0 && k + 1 == t.tiles) {
            this->finish_sides(g, n, end, chunk == 0);
            __syncthreads();
          }
          if (pass + 1 < passes)
            continue;
          this->weigh_tokens(first, scale, [&](int j, int i, int, int) { return s[j][i]; });
          const int count = Base::slabs_of_chunk(t.Dv, chunk);
          if (t.resident) {
            copy_wait<1>();  // all but the next keys
            __syncthreads();
            for (int part = 0; part < t.parts; ++part)
              mma_slabs<false>(sum, count, first + 16 * group * Layout::weights, Layout::weights,
                               this->held_values() + part * count * Base::panel + 8 * Base::W * quarter, Base::panel,
                               pitch, tile);
            __syncthreads();
            continue;
          }
          this->template stream<Base::slabs_at_once>(
              count, [&](int i, T* to) { this->bring_values(to, of_tile, chunk * Base::slabs_at_once + i); },
              [&](int i, const T* from) { this->times_values(sum[i], first, from + Base::panel, Base::panel); });
        }
      }
      if (t.tiles == 0) {
        __syncthreads();
        this->finish_sides(g, n, end, chunk == 0);
        __syncthreads();
      }
    }
    copy_wait<0>();
    this->emit_chunk(sum, chunk, t.Dv,
                     [&](int r, int64_t channel, float (&x)[8]) { this->put_image(n, end, r, channel, scale, x); });
  }
};

}  // namespace mmk::cuda
