// The backward kernels of absorbed attention. Weights come from the scores, taken again, and what forward kept of both
// softmaxes: p of a position over tokens, q of a column over positions. With the gradients G of image_out and F of
// text_out,
//   ds = p (<G, value> - delta[position, head]) + q (<image, F> - delta[column]),
//   grad_image = ds key + q F, grad_key = ds^T image, grad_value = p^T G, grad_key_bias = colsum of ds's first half
// (a bias is the same for all positions, and cancels in a softmax over them). A weight that is exactly 1 is the only
// one: its score has no gradient, and rounding must not leave one.
//
// AbsorbedBackwardImage: a block has a tile of positions and goes through the columns; AbsorbedBackwardText: the other
// way round, for the merge. delta[position, head] = sum over tokens of p <G, value>: AbsorbedBackwardImage finds it
// where a tile has whole heads, else AbsorbedDelta. ds is as large as the values: what is rounded to 16 bits is ds over
// their largest scale.
#pragma once
#include "absorbed_block.h"

namespace mmk::cuda {

template <class T>
struct AbsorbedBackward : AbsorbedBlock<T> {
  using Base = AbsorbedBlock<T>;
  using Base::b, Base::columns, Base::sides, Base::t, Base::valid;
  using typename Base::Tile, typename Base::Layout, typename Base::Chunk;
  using AbsorbedBlock<T>::AbsorbedBlock;

  // <G, value>
  MMK_DEVICE void weight_gradients(Tile& dp, const typename Base::Rows& rows, int64_t of_tile) const {
    clear(dp);
    if (t.of_image_out)
      this->product(dp, rows, this->values(of_tile));
    this->each([&](int j, int i, int, int c) { dp[j][i] *= this->value_scale(c); });
  }
  // <image, F>
  MMK_DEVICE void gathered_gradients(Tile& dq, const typename Base::Rows& rows, int64_t of_tile) const {
    clear(dq);
    if (t.of_text_out)
      this->product(dq, rows, this->features(of_tile));
  }
  // Starts to bring what is held: all of a tile of columns; 64 positions and their gradient.
  MMK_DEVICE void hold_columns(int64_t of_tile) const {
    this->hold_keys(of_tile);
    if (t.of_image_out)
      this->hold_values(of_tile);
    if (t.of_text_out)
      this->hold(this->held_features(), this->features(of_tile), t.D);
  }
  MMK_DEVICE void hold_positions(int n) const {
    this->bring_tile(this->image_rows(n, true, this->held_image(0)));
    if (t.of_image_out)
      this->bring_tile(this->grad_rows(n, true, this->held_grad()));
  }
  MMK_DEVICE void hold_tile(int64_t of_tile, int n, bool fresh) const {
    hold_columns(of_tile);
    if (fresh)
      hold_positions(n);
    copy_commit();
    copy_wait<0>();
  }
  // The heads' sums over a tile's tokens, the group's k-th, of what a tile has, are added to their deltas.
  MMK_DEVICE void add_deltas(const Tile& s, int k) const {
    this->keep(s);
    __syncthreads();
    const int count = this->tokens_of(k);
    this->by_items(int(t.heads) * tile, [&](int item, int lane, int lanes) {
      const bool there = item < t.heads * tile;
      float sum = 0;
      for (int c = lane; there && c < count; c += lanes)
        sum += this->kept(item % tile, item / tile * int(t.T) + c);
      sum = over_lanes(sum, lanes, Sum());
      if (there && lane == 0)
        sides[item].delta += sum;
    });
    __syncthreads();
  }
  MMK_DEVICE void store_deltas(int64_t of_group, int n, int end) const {
    for (int item = threadIdx.x; item < t.heads * tile; item += absorbed_threads)
      if (n + item % tile < end && this->has_head(of_group, item / tile))
        store(t.delta + this->head_index(of_group, item / tile) * t.N + n + item % tile, sides[item].delta);
  }
  // p <G, value>, in place of `to`.
  MMK_DEVICE void weighted(Tile& to, const Tile& s, const Tile& dp) const {
    this->each([&](int j, int i, int r, int c) {
      const float p = this->weight(s[j][i], r, c);
      to[j][i] = p == 0 ? 0.f : p * dp[j][i];
    });
  }

  struct Weights {
    float p, q, through_tokens, ds;
  };
  MMK_DEVICE Weights weigh(float score, float dp, float dq, int r, int c) const {
    Weights w = {};
    const Column& column = columns[c];
    if (t.of_image_out) {
      w.p = this->weight(score, r, c);
      w.through_tokens = w.p == 0 || w.p == 1 ? 0.f : w.p * (dp - sides[column.slot * tile + r].delta);
    }
    if (t.of_text_out && valid[r] && column.share != 0) {
      w.q = column.power(score) * column.share;
      w.ds = w.q == 1 ? 0.f : w.q * (dq - column.delta);
    }
    w.ds += w.through_tokens;
    return w;
  }
};

template <class T>
struct AbsorbedDelta : AbsorbedBackward<T> {
  using Base = AbsorbedBackward<T>;
  using Base::sides, Base::t;
  using typename Base::Tile;

  // Grid: samples x tiles of positions.
  MMK_DEVICE AbsorbedDelta(const AbsorbedTask& t, unsigned char* shared) : Base(t, shared, blockIdx.x / t.positions) {}

  MMK_DEVICE void run() const {
    const int n = int(blockIdx.x % t.positions * tile);
    const int end = int(t.N);
    this->take_positions(n, end);
    for (int64_t g = 0; g < t.groups; ++g) {
      this->take_sides(g, n, end, false);
      for (int k = 0; k < t.tiles; ++k) {
        this->take_columns(g * t.tiles + k);
        if (t.resident)
          this->hold_tile(g * t.tiles + k, n, g == 0 && k == 0);
        __syncthreads();
        Tile s, dp;
        const bool fresh = g == 0 && k == 0 && !t.resident;
        this->score(s, this->image_rows(n, fresh, this->held_image(0)), this->keys(g * t.tiles + k));
        this->weight_gradients(dp, this->grad_rows(n, fresh, this->held_grad()), g * t.tiles + k);
        this->weighted(s, s, dp);
        this->add_deltas(s, k);
      }
      this->store_deltas(g, n, end);
      __syncthreads();
    }
  }
};

template <class T>
struct AbsorbedBackwardImage : AbsorbedBackward<T> {
  using Base = AbsorbedBackward<T>;
  using Base::b, Base::first, Base::group, Base::pitch, Base::quarter, Base::second, Base::t, Base::valid;
  using typename Base::Tile, typename Base::Layout, typename Base::Chunk;
  int chunk, n, end;

  // Grid: samples x tiles of positions x chunks, the last the fastest.
  MMK_DEVICE AbsorbedBackwardImage(const AbsorbedTask& t, unsigned char* shared)
      : Base(t, shared, blockIdx.x / (t.chunks * t.positions)) {
    chunk = int(blockIdx.x % t.chunks);
    n = int(blockIdx.x / t.chunks % t.positions * tile);
    end = int(t.N);
  }

  MMK_DEVICE void put_gradient(int r, int64_t channel, float scale, float (&x)[8]) const {
#pragma unroll
    for (int e = 0; e < 8; ++e)
      x[e] *= scale;
    if (n + r >= end || channel >= t.D)
      return;
    const int count = int(least<int64_t>(8, t.D - channel));
    if (!valid[r]) {  // what counted as 0 whatever it held
      float y[8];
      get<8>(y, static_cast<const T*>(t.image.data) + b * t.image.b + (n + r) * t.image.n + channel * t.image.c,
             t.image.c, count);
#pragma unroll
      for (int e = 0; e < 8; ++e)
        x[e] = fabsf(y[e]) < INFINITY ? x[e] : 0.f;
    }
    const HeadRows& to = t.grad_image;
    put<8>(static_cast<T*>(to.data) + b * to.b + (n + r) * to.n + channel * to.c, x, to.c, count);
  }

  MMK_DEVICE void run() const {
    Chunk sum;
    Base::clear_chunk(sum);
    const auto scales = this->largest_scales();
    const float scale = scales.key * scales.value;
    const float share = 1 / scale;
    this->take_positions(n, end);
    const bool own_deltas = t.of_image_out && t.tiles == 1;  // whole heads: their deltas are found here
    for (int64_t of_tile = 0; of_tile < t.all_tiles(); ++of_tile) {
      if (t.of_image_out && of_tile % t.tiles == 0)
        this->take_sides(of_tile / t.tiles, n, end, !own_deltas);
      this->take_columns(of_tile);
      if (t.resident)
        this->hold_tile(of_tile, n, of_tile == 0);
      __syncthreads();
      Tile s, dp, dq;
      const bool fresh = of_tile == 0 && !t.resident;
      this->score(s, this->image_rows(n, fresh, this->held_image(0)), this->keys(of_tile));
      this->weight_gradients(dp, this->grad_rows(n, fresh, this->held_grad()), of_tile);
      if (own_deltas) {
        this->weighted(dq, s, dp);
        this->add_deltas(dq, 0);
        if (chunk == 0)
          this->store_deltas(of_tile, n, end);
      }
      this->gathered_gradients(dq, this->image_rows(n, false, this->held_image(0)), of_tile);
      this->each([&](int j, int i, int r, int c) {
        const auto w = this->weigh(s[j][i], dp[j][i], dq[j][i], r, c);
        s[j][i] = w.ds * (this->key_scale(c) * share);
        dq[j][i] = w.q * share;
      });
      this->put_tile(first, s);
      this->put_tile(second, dq);
      const int at = 16 * group * Layout::weights;
      const int c = 8 * Base::W * quarter;
      const int count = Base::slabs_of_chunk(t.D, chunk);
      if (t.resident) {
        __syncthreads();
        mma_slabs<false>(sum, count, first + at, Layout::weights, this->held_keys() + c, Base::panel, pitch, tile);
        if (t.of_text_out)
          mma_slabs<false>(sum, count, second + at, Layout::weights, this->held_features() + c, Base::panel, pitch,
                           tile);
        __syncthreads();
        continue;
      }
      this->template stream<Base::slabs_at_once>(
          count,
          [&](int i, T* to) {
            this->bring_packed(to, this->keys_of(of_tile), t.width(), chunk * Base::slabs_at_once + i);
            if (t.of_text_out)
              this->bring_packed(to + Base::panel, this->features_of(of_tile), t.width(),
                                 chunk * Base::slabs_at_once + i);
          },
          [&](int i, const T* from) {
            mma<Base::W, false, true>(sum[i], first + at, Layout::weights, from + c, pitch, tile);
            if (t.of_text_out)
              mma<Base::W, false, true>(sum[i], second + at, Layout::weights, from + Base::panel + c, pitch, tile);
          });
    }
    __syncthreads();
    this->emit_chunk(sum, chunk, t.D,
                     [&](int r, int64_t channel, float (&x)[8]) { put_gradient(r, channel, scale, x); });
  }
};

template <class T>
struct AbsorbedBackwardText : AbsorbedBackward<T> {
  using Base = AbsorbedBackward<T>;
  using Base::first, Base::group, Base::quarter, Base::t, Base::total;
  using typename Base::Tile, typename Base::Layout, typename Base::Chunk;
  int chunk, split, begin, end;
  int64_t of_tile;

  // Grid: samples x tiles x splits x chunks of both, the last the fastest.
  MMK_DEVICE AbsorbedBackwardText(const AbsorbedTask& t, unsigned char* shared)
      : Base(t, shared, blockIdx.x / ((t.chunks + t.value_chunks) * t.splits * t.all_tiles())) {
    int64_t rest = blockIdx.x;
    chunk = int(rest % (t.chunks + t.value_chunks));
    rest /= t.chunks + t.value_chunks;
    split = int(rest % t.splits);
    rest /= t.splits;
    of_tile = rest % t.all_tiles();
    begin = int(split * t.span);
    end = int(least(begin + t.span, t.N));
  }

  // The sums of a lane's columns, over all positions, to shared memory; [4][64] floats, then added.
  MMK_DEVICE void leave_bias(const float (&bias)[Base::J][2], int64_t to) const {
    float* groups = this->scratch;
#pragma unroll
    for (int j = 0; j < Base::J; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float sum = bias[j][c];
        for (int lanes = 4; lanes < 32; lanes *= 2)
          sum += __shfl_xor_sync(all_lanes, sum, lanes);
        if (threadIdx.x % 32 < 4)
          groups[group * tile + 8 * (Base::J * quarter + j) + lane_column() + c] = sum;
      }
    __syncthreads();
    for (int c = threadIdx.x; c < tile; c += absorbed_threads)
      store(t.stats + 2 * (to + c), groups[c] + groups[tile + c] + groups[2 * tile + c] + groups[3 * tile + c]);
    __syncthreads();
  }

  MMK_DEVICE void run() const {
    const bool of_key = chunk < t.chunks;
    Chunk sum;
    Base::clear_chunk(sum);
    float bias[Base::J][2] = {};
    const float scale = of_key ? this->largest_scales().value : 1;
    const float share = 1 / scale;
    this->take_columns(of_tile);
    const bool flows = of_key || t.of_image_out;  // else the sums stay 0
    if (t.resident && flows && begin < end)
      this->hold_columns(of_tile);
    for (int n = begin; flows && n < end; n += tile) {
      this->take_positions(n, end);
      if (t.of_image_out)
        this->take_sides(of_tile / t.tiles, n, end, true);
      if (t.resident) {
        this->hold_positions(n);
        copy_commit();
        copy_wait<0>();
      }
      __syncthreads();
      Tile s, dp, dq;
      T* held = this->held_image(0);
      const auto grad = this->grad_rows(n, !t.resident, t.resident ? this->held_grad() : nullptr);
      this->score(s, this->image_rows(n, !t.resident, held), this->keys(of_tile));
      clear(dp);
      clear(dq);
      if (of_key) {
        this->weight_gradients(dp, grad, of_tile);
        this->gathered_gradients(dq, this->image_rows(n, false, held), of_tile);
      }
      this->each([&](int j, int i, int r, int c) {
        const auto w = this->weigh(s[j][i], dp[j][i], dq[j][i], r, c);
        bias[j][i % 2] += w.through_tokens;
        s[j][i] = of_key ? w.ds * share : w.p;
      });
      this->put_tile(first, s);
      if (of_key)
        this->to_columns(sum, first, nullptr, this->image_rows(n, false, held), chunk, false);
      else
        this->to_columns(sum, first, nullptr, grad, chunk - int(t.chunks), false);
    }
    __syncthreads();
    const int64_t to = t.left_at(this->b, of_tile, split);
    if (chunk == 0 && t.grad_key_bias)
      leave_bias(bias, to);
    if (of_key)
      this->leave(sum, t.partial + to * t.width(), t.width(), chunk, scale);
    else
      this->leave(sum, t.partial_value + to * t.value_width(), t.value_width(), chunk - int(t.chunks), 1);
  }
};

}  // namespace mmk::cuda
