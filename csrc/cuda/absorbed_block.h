// What the blocks of absorbed attention have in common. A block of sixteen warps takes tiles of 64 positions by 64
// columns: four times 16 positions, four quarters of the columns. Their scores, and what else is a product over
// channels, come by streams of slabs, or from what is held of up to 256 channels; weights go through shared memory,
// [position][column], to the products that give results, slab by slab of a chunk of channels that stays in registers.
#pragma once
#include "absorbed_products.h"
#include "absorbed_task.h"

namespace mmk::cuda {

template <class T>
struct AbsorbedBlock {
  using Layout = AbsorbedLayout<T>;
  static constexpr int K = Layout::K;
  static constexpr int pitch = Layout::pitch;
  static constexpr int panel = tile * pitch;
  static constexpr bool scaled = std::is_same_v<T, f16>;    // packed rows have scales
  static constexpr int J = tile / 8 / column_warps;         // a warp's 8 columns of a tile
  static constexpr int W = K / 8 / column_warps;            // of a slab
  static constexpr int slabs_at_once = absorbed_chunk / K;  // of a chunk
  using Tile = float[J][4];
  using Chunk = float[slabs_at_once][W][4];

  const AbsorbedTask& t;
  int64_t b;
  T *held, *buffers, *first, *second;  // first, second: weights
  float* scratch;
  Column* columns;
  RowSide* sides;
  float *top, *total, *factor;  // of the columns
  uint8_t* valid;               // of the positions
  int warp, group, quarter;

  MMK_DEVICE AbsorbedBlock(const AbsorbedTask& t, unsigned char* shared, int64_t b) : t(t), b(b) {
    const Layout at(t.held, t.stages, t.parts, t.heads);
    held = reinterpret_cast<T*>(shared);
    buffers = reinterpret_cast<T*>(shared + at.buffers);
    first = reinterpret_cast<T*>(shared + at.first);
    second = reinterpret_cast<T*>(shared + at.second);
    scratch = reinterpret_cast<float*>(shared + at.scratch);
    columns = reinterpret_cast<Column*>(shared + at.columns);
    sides = reinterpret_cast<RowSide*>(shared + at.sides);
    top = reinterpret_cast<float*>(shared + at.state);
    total = top + tile;
    factor = total + tile;
    valid = shared + at.valid;
    warp = threadIdx.x / 32;
    group = warp % 4;
    quarter = warp / 4;
  }

  // ---- streams

  // bring(i, buffer) and later use(i, buffer) for i < count; unrolled where there are at most Most.
  template <int Most, class Bring, class Use>
  MMK_DEVICE void stream(int count, Bring bring, Use use) const {
    const int buffered = int(t.stages);
    const int size = int(1 + t.parts) * panel;
    for (int i = 0; i < buffered - 1; ++i) {
      if (i < count)
        bring(i, buffers + i * size);
      copy_commit();
    }
    int into = buffered - 1;
    int at = 0;
    auto round = [&](int i) {
      if (buffered == 3)
        copy_wait<1>();
      else
        copy_wait<0>();
      __syncthreads();
      if (i + buffered - 1 < count)
        bring(i + buffered - 1, buffers + into * size);
      copy_commit();
      use(i, buffers + at * size);
      at = at + 1 == buffered ? 0 : at + 1;
      into = into + 1 == buffered ? 0 : into + 1;
    };
    if constexpr (Most > 0) {
#pragma unroll
      for (int i = 0; i < Most; ++i)
        if (i < count)
          round(i);
    } else {
#pragma unroll 1
      for (int i = 0; i < count; ++i)
        round(i);
    }
    copy_wait<0>();
    __syncthreads();
  }

  // A slab of 64 rows that lie `step` apart, of which so many, and so many of its channels, are there: a thread has a
  // pack.
  MMK_DEVICE static void bring_whole(T* to, const T* from, int64_t step, int rows, int channels) {
    constexpr int packs = K / Pack<T>::size;
    static_assert(tile * packs == absorbed_threads);
    const int r = threadIdx.x / packs;
    const int c = threadIdx.x % packs * Pack<T>::size;
    const bool there = r < rows && c < channels;
    copy_async(to + r * pitch + c, there ? from + r * step + c : from, there);  // of nothing, too, the address is one
  }
  // Slab i of 64 packed rows.
  MMK_DEVICE static void bring_packed(T* to, const T* from, int64_t width, int i) {
    bring_whole(to, from + i * K, width, tile, K);
  }
  MMK_DEVICE static int slabs(int64_t channels) { return int(ceil_div(channels, K)); }
  MMK_DEVICE static int slabs_of_chunk(int64_t channels, int chunk) {
    return most(0, least(slabs_at_once, slabs(channels) - chunk * slabs_at_once));
  }

  // 64 positions of [B, N, channels], slab by slab. `held`: null, or memory for all of them, `bring`: where they aren't
  // yet.
  struct Rows {
    const HeadRows& f;
    int n;
    int64_t channels;
    bool masked;  // what takes no part isn't finite, or needn't be
    T* held;
    bool bring;
  };
  // 64 packed columns, the sum of so many parts. `held`: null, or where all are.
  struct Columns {
    const T* packed;
    int64_t width;
    int parts;
    const T* held;
  };
  MMK_DEVICE void bring_slab(T* to, const Rows& rows, int i) const {
    const HeadRows& f = rows.f;
    const TokenMask& m = t.image_mask;
    const T* from = static_cast<const T*>(f.data) + b * f.b + rows.n * f.n + i * K * f.c;
    const int count = int(least<int64_t>(tile, t.N - rows.n));
    const int channels = int(least<int64_t>(K, rows.channels - i * K));
    const bool all = !rows.masked || !m.data;
    if (all && f.c == 1 && aligned(from) && (f.n | channels) % Pack<T>::size == 0) {
      bring_whole(to, from, f.n, count, channels);
      return;
    }
    stage<tile, K, absorbed_threads>(
        to, from, f, count, channels,
        [&](int r) { return all || load(m.data + b * m.b + (rows.n + r) * m.t) ? Row::whole : Row::finite; },
        threadIdx.x);
  }
  MMK_DEVICE void bring_tile(const Rows& rows) const {
    for (int i = 0; i < slabs(rows.channels); ++i)
      bring_slab(rows.held + i * panel, rows, i);
  }
  MMK_DEVICE void hold(T* to, const Columns& columns, int64_t channels) const {
    const int count = slabs(channels);
    for (int part = 0; part < columns.parts; ++part)
      for (int i = 0; i < count; ++i)
        bring_packed(to + (part * count + i) * panel, columns.packed + part * t.all_columns() * columns.width,
                     columns.width, i);
  }

  // s += positions times columns, over all channels.
  MMK_DEVICE void product(Tile& s, const Rows& rows, const Columns& columns) const {
    const int count = slabs(rows.channels);
    auto use = [&](int i, const T* from) {
      const T* x = rows.held ? rows.held + i * panel : from;
      for (int part = 0; part < columns.parts; ++part)
        mma<J, false, false>(s, x + 16 * group * pitch, pitch,
                             (columns.held ? columns.held + (part * count + i) * panel : from + (1 + part) * panel) +
                                 8 * J * quarter * pitch,
                             pitch, K);
    };
    if (columns.held && !rows.bring) {
      for (int i = 0; i < count; ++i)
        use(i, nullptr);
      return;
    }
    stream<0>(
        count,
        [&](int i, T* to) {
          if (rows.bring)
            bring_slab(rows.held ? rows.held + i * panel : to, rows, i);
          for (int part = 0; part < columns.parts && !columns.held; ++part)
            bring_packed(to + (1 + part) * panel, columns.packed + part * t.all_columns() * columns.width,
                         columns.width, i);
        },
        use);
  }
  // A tile of the image, and of image_out's gradient; `fresh`: none of it was brought yet.
  MMK_DEVICE Rows image_rows(int n, bool fresh, T* held) const { return {t.image, n, t.D, true, held, fresh || !held}; }
  MMK_DEVICE Rows grad_rows(int n, bool fresh, T* held) const {
    return {t.grad_image_out, n, t.Dv, false, held, fresh || !held};
  }
  MMK_DEVICE T* held_image(int buffer) const { return t.image_slabs ? held + buffer * t.image_slabs * panel : nullptr; }
  MMK_DEVICE T* held_grad() const { return t.grad_slabs ? held + t.buffers * t.image_slabs * panel : nullptr; }
  MMK_DEVICE const T* keys_of(int64_t of_tile) const {
    return static_cast<const T*>(t.keys) + (b * t.parts * t.all_columns() + of_tile * tile) * t.width();
  }
  MMK_DEVICE const T* values_of(int64_t of_tile) const {
    return static_cast<const T*>(t.values) + (b * t.parts * t.all_columns() + of_tile * tile) * t.value_width();
  }
  MMK_DEVICE const T* features_of(int64_t of_tile) const {
    return static_cast<const T*>(t.features) + (b * t.all_columns() + of_tile * tile) * t.width();
  }
  // Where a tile of columns is, one after the other, if it is held.
  MMK_DEVICE T* held_keys() const {
    return t.resident ? held + (t.buffers * t.image_slabs + t.grad_slabs) * panel : nullptr;
  }
  MMK_DEVICE T* held_values() const { return t.resident ? held_keys() + t.parts * t.image_slabs * panel : nullptr; }
  MMK_DEVICE T* held_features() const { return t.resident ? held_values() + t.parts * t.grad_slabs * panel : nullptr; }
  MMK_DEVICE Columns keys(int64_t of_tile) const { return {keys_of(of_tile), t.width(), int(t.parts), held_keys()}; }
  MMK_DEVICE Columns values(int64_t of_tile) const {
    return {values_of(of_tile), t.value_width(), int(t.parts), held_values()};
  }
  MMK_DEVICE Columns features(int64_t of_tile) const { return {features_of(of_tile), t.width(), 1, held_features()}; }
  // Starts to bring what is held of a tile's keys; likewise values.
  MMK_DEVICE void hold_keys(int64_t of_tile) const { hold(held_keys(), keys(of_tile), t.D); }
  MMK_DEVICE void hold_values(int64_t of_tile) const { hold(held_values(), values(of_tile), t.Dv); }
  MMK_DEVICE void score(Tile& s, const Rows& rows, const Columns& of_keys) const {
    clear(s);
    product(s, rows, of_keys);
    each([&](int j, int i, int, int c) { s[j][i] = fmaf(s[j][i] * key_scale(c), log4e, columns[c].bias); });
  }

  // ---- tiles

  // f(j, i, position, column) for each of a warp's elements of a tile.
  template <class F>
  MMK_DEVICE void each(F f) const {
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        f(j, i, 16 * group + lane_row() + i / 2 * 8, 8 * (J * quarter + j) + lane_column() + i % 2);
  }
  MMK_DEVICE void keep(const Tile& s) const {
    each([&](int j, int i, int r, int c) { scratch[r * Layout::scores + c] = s[j][i]; });
  }
  MMK_DEVICE float kept(int r, int c) const { return scratch[r * Layout::scores + c]; }

  // A tile of weights to shared memory, [position][column].
  MMK_DEVICE void put_tile(T* to, const Tile& w) const {
#pragma unroll
    for (int j = 0; j < J; ++j)
#pragma unroll
      for (int low = 0; low < 2; ++low) {
        T* at = to + (16 * group + lane_row() + 8 * low) * Layout::weights + 8 * (J * quarter + j) + lane_column();
        if constexpr (sizeof(T) == 2)
          *reinterpret_cast<uint32_t*>(at) = pair_of<T>(w[j][2 * low], w[j][2 * low + 1]);
        else
          *reinterpret_cast<Two*>(at) = {{w[j][2 * low], w[j][2 * low + 1]}};
      }
  }

  // For items of which each has a row of elements: f(item, lane, lanes) by as many threads as there are. All lanes of a
  // warp are in step.
  template <class F>
  MMK_DEVICE void by_items(int items, F f) const {
    int lanes = 1;
    while (lanes < 32 && 2 * lanes * items <= absorbed_threads)
      lanes *= 2;
    const int at_once = absorbed_threads / lanes;
    for (int base = 0; base < items; base += at_once)
      f(base + int(threadIdx.x) / lanes, int(threadIdx.x) % lanes, lanes);
  }

  // `most_so_far` and `sum` brought up to date with count elements at(k): the largest, and the sum of exponentials
  // below it. Returns what sums so far are to be multiplied by.
  template <class At>
  MMK_DEVICE static float merge(float& most_so_far, float& sum, int count, int lane, int lanes, At at) {
    constexpr int ahead = 8;  // elements that a lane has at a time
    float own = most_so_far;  // the lane's largest, and its sum below that
    float more = 0;
    for (int base = lane; base < count; base += ahead * lanes) {
      float x[ahead];
      float largest = own;
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        x[i] = base + i * lanes < count ? at(base + i * lanes) : -INFINITY;
        largest = fmaxf(largest, x[i]);
      }
      const Exponential power(largest);
      more = more == 0 ? 0.f : more * power(own);
#pragma unroll
      for (int i = 0; i < ahead; ++i)
        more += power(x[i]);
      own = largest;
    }
    const float now = over_lanes(own, lanes, Max());
    const Exponential power(now);
    more = over_lanes(more == 0 ? 0.f : more * power(own), lanes, Sum());
    const float before = power(most_so_far);
    sum = sum * before + more;
    most_so_far = now;
    return before;
  }

  // ---- positions and columns

  // To be followed by a barrier.
  MMK_DEVICE void take_positions(int n, int end) const {
    const TokenMask& m = t.image_mask;
    for (int r = threadIdx.x; r < tile; r += absorbed_threads)
      valid[r] = n + r < end && (!m.data || load(m.data + b * m.b + (n + r) * m.t));
  }
  MMK_DEVICE void take_columns(int64_t of_tile) const {
    for (int c = threadIdx.x; c < tile; c += absorbed_threads)
      columns[c] = load(t.columns + b * t.all_columns() + of_tile * tile + c);
  }
  MMK_DEVICE float key_scale(int c) const { return scaled ? columns[c].key_scale : 1.f; }
  MMK_DEVICE float value_scale(int c) const { return scaled ? columns[c].value_scale : 1.f; }
  // The largest scales of a sample's keys and values: sums of products with packed rows are to be multiplied by them.
  struct Scales {
    float key = 1;
    float value = 1;
    // Of sums with weights, which are at most 1: what they are rounded to may be larger, and keeps more of their bits.
    MMK_DEVICE float with_weights() const { return value > 1 ? value * 0x1p-15f : 1.f; }
  };
  MMK_DEVICE Scales largest_scales() const {
    Scales found;
    if constexpr (scaled) {
      if (!t.bits)
        return found;
      for (int64_t c = threadIdx.x; c < t.all_columns(); c += absorbed_threads) {
        const Column* column = t.columns + b * t.all_columns() + c;
        found.key = fmaxf(found.key, load(&column->key_scale));
        found.value = fmaxf(found.value, load(&column->value_scale));
      }
      found.key = over_lanes(found.key, 32, Max());
      found.value = over_lanes(found.value, 32, Max());
      if (threadIdx.x % 32 == 0) {
        scratch[2 * warp] = found.key;
        scratch[2 * warp + 1] = found.value;
      }
      __syncthreads();
      for (int i = 0; i < absorbed_threads / 32; ++i) {
        found.key = fmaxf(found.key, scratch[2 * i]);
        found.value = fmaxf(found.value, scratch[2 * i + 1]);
      }
      __syncthreads();
    }
    return found;
  }
  // Columns of a head in a tile, its k-th of the group.
  MMK_DEVICE int tokens_of(int k) const { return int(least<int64_t>(t.T - k * tile, t.tiles > 1 ? tile : t.T)); }
  MMK_DEVICE bool has_head(int64_t of_group, int slot) const { return of_group * t.heads + slot < t.H; }
  MMK_DEVICE int64_t head_index(int64_t of_group, int slot) const { return b * t.H + of_group * t.heads + slot; }

  // The softmax over tokens of all heads of a group, as forward left it.
  MMK_DEVICE void take_sides(int64_t of_group, int n, int end, bool deltas) const {
    for (int item = threadIdx.x; item < t.heads * tile; item += absorbed_threads) {
      const int r = n + item % tile;
      const bool there = r < end && has_head(of_group, item / tile);
      const int64_t head = head_index(of_group, item / tile);
      RowSide& to = sides[item];
      to.power = Exponential(there ? top_of(t.image_softmax, head, t.N, r) : 0.f);
      to.share = there ? share_of(t.image_softmax, head, t.N, r) : 0.f;
      to.delta = there && deltas ? load(t.delta + head * t.N + r) : 0.f;
    }
  }
  MMK_DEVICE float weight(float score, int r, int c) const {
    if (!columns[c].takes)
      return 0.f;
    const RowSide& side = sides[columns[c].slot * tile + r];
    return side.share == 0 ? 0.f : side.power(score) * side.share;
  }

  // ---- results

  // emit(row, channel, x[8]) of a slab's product.
  template <class Emit>
  MMK_DEVICE void emit_slab(const float (&sum)[W][4], int64_t channel, Emit emit) const {
    emit_through<W>(scratch + warp * 16 * Layout::emitted, sum,
                    [&](int r, int c, float (&x)[8]) { emit(16 * group + r, channel + 8 * W * quarter + c, x); });
  }
  template <class Emit>
  MMK_DEVICE void emit_chunk(const Chunk& sum, int chunk, int64_t channels, Emit emit) const {
#pragma unroll
    for (int i = 0; i < slabs_at_once; ++i)
      if ((chunk * slabs_at_once + i) * K < channels)
        emit_slab(sum[i], int64_t(chunk * slabs_at_once + i) * K, emit);
  }
  MMK_DEVICE static void clear_chunk(Chunk& sum) {
#pragma unroll
    for (int i = 0; i < slabs_at_once; ++i)
      clear(sum[i]);
  }
  // sum += weights^T rows, a chunk of 64 positions' channels; `low`: null, or what the weights were rounded by;
  // `rescale`: sums so far times the columns' factors.
  MMK_DEVICE void to_columns(Chunk& sum, const T* weights, const T* low, const Rows& rows, int chunk,
                             bool rescale) const {
    auto scale = [&](int i) {
      const float by[2] = {factor[16 * group + lane_row()], factor[16 * group + lane_row() + 8]};
#pragma unroll
      for (int j = 0; j < W; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          sum[i][j][e] *= by[e / 2];
    };
    auto use = [&](int i, const T* from) {
      if (rescale)
        scale(i);
      mma<W, true, true>(sum[i], weights + 16 * group, Layout::weights, from + 8 * W * quarter, pitch, tile);
      if (low)
        mma<W, true, true>(sum[i], low + 16 * group, Layout::weights, from + 8 * W * quarter, pitch, tile);
    };
    const int count = slabs_of_chunk(rows.channels, chunk);
    if (rows.held) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < slabs_at_once; ++i)
        if (rescale && i < count)
          scale(i);
      const T* from = rows.held + 8 * W * quarter;
      mma_slabs<true>(sum, count, weights + 16 * group, Layout::weights, from, panel, pitch, tile);
      if (low)
        mma_slabs<true>(sum, count, low + 16 * group, Layout::weights, from, panel, pitch, tile);
      __syncthreads();
    } else {
      stream<slabs_at_once>(count, [&](int i, T* to) { bring_slab(to, rows, chunk * slabs_at_once + i); }, use);
    }
  }
  // What columns have gathered, times `scale`, to where the merge finds it.
  MMK_DEVICE void leave(const Chunk& sum, float* to, int64_t width, int chunk, float scale) const {
    emit_chunk(sum, chunk, width, [&](int c, int64_t channel, float (&x)[8]) {
#pragma unroll
      for (int e = 0; e < 8; ++e)
        x[e] *= scale;
      put<8>(to + c * width + channel, x, 1, 8);
    });
  }
};

}  // namespace mmk::cuda
