// A block of spatial attention's kernels: which chunk and heads it has, and what it does with the tile in its shared
// memory, forward and backward. Every function is called by all threads of the block.
#pragma once
#include "spatial_task.h"

namespace mmk::cuda::spatial {

// A block's chunk and heads, and the tile in its shared memory.
template <class T>
struct Block {
  static constexpr int V = Pack<T>::size;
  const Task& t;
  int64_t sample, first, count;      // the sample, its first row when packed (else 0), its positions
  int64_t slot, k, chunks;           // the slot, the chunk's number, the sample's chunks
  int64_t begin, end;                // the chunk's positions
  int head, heads, width, channels;  // first head, heads, channels of a head, channels of the block
  int64_t channel;                   // the first channel
  bool planes;
  int pitch, tile;  // the tile's pitch; floats from a head to the next in p and q
  T *x, *y;
  float *v, *u, *p, *q, *sums, *stats, *scratch;
  uint8_t* valid;

  // The second launch goes backwards: what the first has read last is still in L2.
  MMK_DEVICE Block(const Task& t, unsigned char* shared, bool backward, bool second) : t(t) {
    slot = second ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    if (t.offsets) {
      // the last bag whose slots begin at or before this one
      int64_t low = 0;
      int64_t high = t.B;
      while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        (offset(middle) / t.chunk + middle <= slot ? low : high) = middle;
      }
      sample = low;
      first = offset(low);
      count = most<int64_t>(offset(low + 1) - first, 0);
      k = most<int64_t>(slot - (first / t.chunk + low), 0);
      chunks = most<int64_t>(ceil_div(count, t.chunk), 1);
    } else {
      sample = slot / t.chunks;
      first = 0;
      count = t.Y * t.X;
      k = slot % t.chunks;
      chunks = t.chunks;
    }
    begin = k * t.chunk;
    end = least(begin + t.chunk, count);
    head = int(blockIdx.y * t.heads);
    heads = int(least(t.heads, t.H - head));
    width = int(t.D / t.H);
    channel = int64_t(head) * width;
    channels = heads * width;
    planes = t.planes;
    Layout at(t, sizeof(T), backward);
    pitch = int(at.pitch);
    tile = int(round_up(t.tile, 8));
    x = reinterpret_cast<T*>(shared + at.x);
    y = reinterpret_cast<T*>(shared + at.y);
    v = reinterpret_cast<float*>(shared + at.v);
    u = reinterpret_cast<float*>(shared + at.u);
    p = reinterpret_cast<float*>(shared + at.p);
    q = reinterpret_cast<float*>(shared + at.q);
    sums = reinterpret_cast<float*>(shared + at.sums);
    stats = reinterpret_cast<float*>(shared + at.stats);
    scratch = reinterpret_cast<float*>(shared + at.scratch);
    valid = shared + at.valid;
  }

  MMK_DEVICE int64_t offset(int64_t b) const { return most<int64_t>(least(load(t.offsets + b), t.X), 0); }
  MMK_DEVICE bool nothing() const { return k >= chunks; }
  // The tile that was scored last is still in shared memory, all its channels: no need to read it again.
  MMK_DEVICE bool resident() const { return count <= t.tile && channels <= t.slab; }
  MMK_DEVICE int64_t slot_of(int64_t chunk) const { return slot - k + chunk; }
  MMK_DEVICE ChunkStats* stats_of(int64_t chunk, int h) const { return t.stats_of(slot_of(chunk), head + h); }
  MMK_DEVICE float* valid_count_of(int64_t chunk) const {
    return t.valid_count_of(slot_of(chunk), gridDim.y, blockIdx.y);
  }
  // Where weights and whatever is like them have head h's first position.
  MMK_DEVICE int64_t weights_at(int h) const {
    return t.offsets ? (head + h) * t.X + first : (sample * t.H + head + h) * (t.Y * t.X);
  }
  template <class F>
  MMK_DEVICE int64_t position(const F& f, int64_t n) const {
    return sample * f.b + (t.Y == 1 ? (first + n) * f.x : n / t.X * f.y + n % t.X * f.x);
  }
  MMK_DEVICE T* pointer(const Features& f, int64_t n, int64_t c) const {
    return static_cast<T*>(f.data) + position(f, n) + (channel + c) * f.d;
  }
  MMK_DEVICE T* pointer(const Vectors& f, int64_t c) const {
    return static_cast<T*>(f.data) + sample * f.b + (channel + c) * f.d;
  }

  // Reads which of the positions n0.. take part; how many do.
  MMK_DEVICE int load_mask(int64_t n0, int positions) const {
    int valid_count = 0;
    for (int i = threadIdx.x; i < round_up(positions, blockDim.x); i += blockDim.x) {
      bool takes_part = i < positions && (!t.mask.data || load(t.mask.data + position(t.mask, n0 + i)));
      if (i < positions)
        valid[i] = takes_part;
      valid_count += __syncthreads_count(takes_part);
    }
    return valid_count;
  }

  MMK_DEVICE bool wide(const Features& f, const T* from) const {
    constexpr int64_t size = sizeof(T);
    return aligned(from) && (planes ? f.x == 1 && t.Y == 1 && aligned(f.d * size)
                                    : f.d == 1 && aligned(f.x * size) && (t.Y == 1 || aligned(f.y * size)));
  }

  // Starts to copy positions n0.., channels c0.. of `f` to a tile, zeros where masked. To be followed by arrive().
  MMK_DEVICE void stage(const Features& f, T* to, int64_t n0, int positions, int c0, int count) const {
    const int outer = planes ? count : positions;
    const int inner = planes ? positions : count;
    const int packs = positions > 0 && wide(f, pointer(f, n0, c0)) ? inner / V : 0;
    const int rest = inner - packs * V;
    for (int i = threadIdx.x; i < outer * packs; i += blockDim.x) {
      const int o = i / packs;
      const int j = (i - o * packs) * V;
      T* into = to + o * pitch + j;
      if (planes) {
        bool all = true;
        bool any = false;
        for (int e = 0; e < V; ++e) {
          all = all && valid[j + e];
          any = any || valid[j + e];
        }
        if (all || !any)
          copy_async(into, pointer(f, n0 + j, c0 + o), any);
        else
          for (int e = 0; e < V; ++e)
            into[e] = valid[j + e] ? load(pointer(f, n0 + j + e, c0 + o)) : from_float<T>(0);
      } else {
        copy_async(into, pointer(f, n0 + o, c0 + j), valid[o]);
      }
    }
    for (int i = threadIdx.x; i < outer * rest; i += blockDim.x) {
      const int o = i / rest;
      const int j = packs * V + i - o * rest;
      const int n = planes ? j : o;
      const int c = planes ? o : j;
      to[o * pitch + j] = valid[n] ? load(pointer(f, n0 + n, c0 + c)) : from_float<T>(0);
    }
    copy_commit();
  }
  MMK_DEVICE void stage(const Vectors& f, float* to, int c0, int count, float factor) const {
    for (int c = threadIdx.x; c < count; c += blockDim.x)
      to[c] = to_float(load(pointer(f, c0 + c))) * factor;
  }
  MMK_DEVICE void arrive() const {
    copy_wait<0>();
    __syncthreads();
  }

  // Where head h's channels begin and end among channels c0..c0 + count of the block.
  MMK_DEVICE int head_begin(int h, int c0) const { return most(h * width - c0, 0); }
  MMK_DEVICE int head_end(int h, int c0, int count) const { return least((h + 1) * width - c0, count); }

  // to[h][n]: sum over head h's channels of x times y, or times a vector of channels that all positions share.
  template <bool Shared>
  MMK_DEVICE void score(const float* vector, float* to, int positions, int c0, int count) const {
    const int first_head = c0 / width;
    const int some = (c0 + count - 1) / width - first_head + 1;
    auto put = [&](int h, int n, float sum) { to[h * tile + n] = h * width >= c0 ? sum : to[h * tile + n] + sum; };
    if (planes) {
      auto partial = [&](int item, int s, int splits) {
        const int h = first_head + item / positions;
        const int n = item % positions;
        const int stop = head_end(h, c0, count);
        float sum = 0;
        for (int c = head_begin(h, c0) + s; c < stop; c += splits)
          sum += to_float(x[c * pitch + n]) * (Shared ? vector[c] : to_float(y[c * pitch + n]));
        return sum;
      };
      across(positions * some, scratch, partial,
             [&](int item, float sum) { put(first_head + item / positions, item % positions, sum); });
    } else {
      const bool packs = width % V == 0;
      auto partial = [&](int item, int lane, int lanes) {
        const int n = item / some;
        const int h = first_head + item - n * some;
        const int start = head_begin(h, c0);
        const int size = head_end(h, c0, count) - start;
        const T* row = x + n * pitch + start;
        return Shared ? dot(row, vector + start, size, lane, lanes, packs)
                      : dot(row, y + n * pitch + start, size, lane, lanes, packs);
      };
      along(positions * some, packs ? least(width, count) / V : least(width, count), partial,
            [&](int item, float sum) { put(first_head + item % some, item / some, sum); });
    }
  }

  // store(c, h, sum over positions of factor[h][n] * x[n][c]) for the tile's channels.
  template <class Store>
  MMK_DEVICE void weighted_sum(const float* factor, int positions, int c0, int count, Store store) const {
    auto of = [&](int c) { return heads == 1 ? 0 : (c0 + c) / width; };
    auto put = [&](int c, float sum) { store(c0 + c, of(c), sum); };
    if (planes) {
      along(
          count, ceil_div(positions, V),
          [&](int c, int lane, int lanes) {
            return dot(x + c * pitch, factor + of(c) * tile, positions, lane, lanes, true);
          },
          put);
    } else {
      across(
          count, scratch,
          [&](int c, int s, int splits) {
            const float* f = factor + of(c) * tile;
            float sum = 0;
            for (int n = s; n < positions; n += splits)
              sum += to_float(x[n * pitch + c]) * f[n];
            return sum;
          },
          put);
    }
  }

  // f[n][c] = value(from[n][c], n, c - c0, head) for a tile; `from` null: value gets 0.
  template <class Value>
  MMK_DEVICE void write(const Features& f, const T* from, int64_t n0, int positions, int c0, int count,
                        Value value) const {
    const int outer = planes ? count : positions;
    const int inner = planes ? positions : count;
    const int packs = wide(f, pointer(f, n0, c0)) ? inner / V : 0;
    const int rest = inner - packs * V;
    for (int i = threadIdx.x; i < outer * packs; i += blockDim.x) {
      const int o = i / packs;
      const int j = (i - o * packs) * V;
      // where the next head begins
      int h = heads == 1 ? 0 : (c0 + (planes ? o : j)) / width;
      int next = (h + 1) * width - c0;
      Pack<T> pack = {};
      if (from)
        pack = *reinterpret_cast<const Pack<T>*>(from + o * pitch + j);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const int n = planes ? j + e : o;
        const int c = planes ? o : j + e;
        if (c >= next) {
          ++h;
          next += width;
        }
        pack.at[e] = from_float<T>(value(to_float(pack.at[e]), n, c, h));
      }
      store(reinterpret_cast<Pack<T>*>(planes ? pointer(f, n0 + j, c0 + o) : pointer(f, n0 + o, c0 + j)), pack);
    }
    for (int i = threadIdx.x; i < outer * rest; i += blockDim.x) {
      const int o = i / rest;
      const int j = packs * V + i - o * rest;
      const int n = planes ? j : o;
      const int c = planes ? o : j;
      const float old = from ? to_float(from[o * pitch + j]) : 0.f;
      store(pointer(f, n0 + n, c0 + c), from_float<T>(value(old, n, c, heads == 1 ? 0 : (c0 + c) / width)));
    }
  }

  // The chunk's sum i of channel c, and where it goes: shared memory, or what the second launch reads.
  MMK_DEVICE float* global_sum(int64_t chunk, int sums_of_one, int i, int c) const {
    return t.sums_of(slot_of(chunk), sums_of_one, i) + channel + c;
  }
  MMK_DEVICE float sum(int sums_of_one, int i, int c) const {
    return t.local ? sums[i * channels + c] : load(global_sum(k, sums_of_one, i, c));
  }
  MMK_DEVICE void set_sum(int sums_of_one, int i, int c, float value, bool last) const {
    if (t.local && !last)
      sums[i * channels + c] = value;
    else
      store(global_sum(k, sums_of_one, i, c), value);
  }

  // body(c0, count) for the block's channels, a slab at a time.
  template <class Body>
  MMK_DEVICE void slabs(Body body) const {
    for (int c0 = 0; c0 < channels; c0 += int(t.slab))
      body(c0, least(int(t.slab), channels - c0));
  }

  // The channels of which this block merges the chunks' sums, body(item, c) each: a share of the block's.
  template <class Partial, class Store>
  MMK_DEVICE void merge_sums(Partial partial, Store store) const {
    const int share = int(most<int64_t>(round_up(ceil_div(channels, chunks), 32), 32));
    const int64_t from = k * share;
    if (from >= channels)
      return;
    const int c0 = int(from);
    const int items = least(share, channels - c0);
    across(
        items, scratch,
        [&](int item, int s, int splits) {
          const int c = c0 + item;
          const int h = c / width;
          float sum = 0;
          for (int64_t j = s; j < chunks; j += splits)
            sum += partial(j, c, h);
          return sum;
        },
        [&](int item, float sum) { store(c0 + item, (c0 + item) / width, sum); });
  }
};

}  // namespace mmk::cuda::spatial
