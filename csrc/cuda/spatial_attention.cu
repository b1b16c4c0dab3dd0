// Spatial attention in CUDA C++. S = bytes of the image features. Moved:
//   multiply  read S, write S: a sample that fits in shared memory (or a cluster's, see below) is read once; a larger
//   one
//             twice, the second time from L2 where it fits there;
//   pool      read S;
//   backward  read S (image) + S (gradient), write S; a larger sample reads its gradient once more. Pool: read S, write
//   S.
// Beside that a few floats a position: mask, weights.
//
// Positions are cut into chunks, chunks into tiles; heads into groups of at most 64. A block takes a chunk and a group.
// It copies a tile to shared memory (cp.async where 16 bytes lie together and aligned, else one by one), takes its
// scores there, and its weighted sum (online softmax: running maximum and sum, Milakov & Gimelshein 2018,
// arXiv:1805.02867). A sample of one chunk is finished by the same block, else a second launch merges the chunks'
// maxima and sums and combines. A tile too wide for shared memory is taken in slabs of channels. Masked positions are
// zeros in the tile, and aren't read. Where the device has clusters (compute capability 9.0), a sample that fits in the
// shared memories of 2, 4 or 8 blocks is read once, too: each keeps a chunk of one tile, and they read each other's
// maxima and sums. Not when packed: a bag's size is known on the device only.
//
// Backward, with w = weights, g = the result's gradient and dw[n] = <g[n], x[n]> + the weights' own gradient:
//   ds[n] = w[n] (dw[n] - c), c = sum(w dw) / sum(w);  dx[n] = w[n] g[n] + scale ds[n] t;  dt = scale sum(ds[n] x[n]).
// c is known only at the end, so u = sum(w (dw - c_k) x) and v = sum(w x) are summed with what is known, c_k; whenever
// that changes, u += (c_k - c) v. No cancellation: c_k - c is a difference of means.
//
// Kernels, for T in f32, bf16, f16:
//   spatial_attention_forward_first_T, _forward_second_T, _forward_cluster_T, _backward_first_T, _backward_second_T,
//   _backward_cluster_T(Task)
// grid (task.slots, ceil(H / task.heads)); block: a multiple of 32 threads, at most 512; dynamic shared memory:
// Layout.total. The one parameter is Task, whose fields are all 8 bytes. _second is launched where a sample may have
// several chunks; _cluster instead of both where task.cluster > 1, with clusters of (task.cluster, 1, 1) blocks: a
// sample's chunks. Slots: dense, chunk k of sample b is slot b * chunks + k. Packed, sizes of bags are known on the
// device only: chunk k of bag b is slot offsets[b] / chunk + b + k; a slot without a chunk does nothing. There are rows
// / chunk + B slots.
#include "spatial_attention.h"

#include <initializer_list>

#include "block.h"

namespace mmk::cuda {
namespace {

struct Task {
  // Offsets in bytes are 8 times a field's number.
  int64_t B, Y, X, D, H;      //  0 as in SpatialAttention
  int64_t heads;              //  5 heads of a block
  int64_t tile, slab, chunk;  //  6 positions of a tile; channels of a tile; positions of a chunk: a multiple of tile
  int64_t chunks, slots;      //  9 chunks of a sample (packed: 0); slots
  int64_t planes;             // 11 1: positions lie together in a tile, 0: channels do
  int64_t pool, rescale;      // 12
  double scale;               // 14
  Features image;             // 15 data, b, y, x, d
  Vectors text;               // 20 data, b, d
  Mask mask;                  // 23 data (null: none), b, y, x
  const int64_t* offsets;     // 27 null: not packed
  float* weights;             // 28 forward writes (raw scores between the launches), backward reads
  Features result;            // 29 multiply
  Vectors pooled;             // 34 pool
  Features grad_result;       // 37 data null: none
  Vectors grad_pooled;        // 42 data null: none
  const float* grad_weights;  // 45 null: none
  float* grad_scores;         // 46 scratch like weights: dw between the launches
  Features grad_image;        // 47 data null: not wanted
  Vectors grad_text;          // 52 data null: not wanted
  float* stats;               // 55 [slots, H, 2]: maximum and sum of exponentials; backward: mean of dw and sum of w
  float* valid_counts;        // 56 [slots, head groups]: positions that take part
  float* sums;                // 57 forward, pool: [slots, D]; backward: u and v, [slots, 2, D]
  int64_t local;              // 58 1: while a chunk lasts, its sums are in shared memory
  int64_t cluster;            // 59 blocks of a cluster: the chunks of a sample, each of one tile; 1: no clusters
};
static_assert(sizeof(Task) == 60 * 8, "every field has 8 bytes");

// Where things lie in shared memory, in bytes. `pitch`: elements from a tile's outer index to the next.
struct Layout {
  int64_t pitch, x, y, v, u, p, q, sums, stats, scratch, valid, total;

  MMK_HOST_DEVICE Layout(const Task& t, int64_t element, bool backward) {
    const int64_t pack = 16 / element;
    const int64_t tile = round_up(t.tile, 8);
    pitch = round_up(t.planes ? tile : t.slab, pack);
    const int64_t features = round_up((t.planes ? t.slab : t.tile) * pitch * element, 16);
    x = 0;                                                    // T: the image's tile
    y = x + features;                                         // T: the gradient's
    v = y + (backward && t.grad_result.data ? features : 0);  // float [slab]: text
    u = v + round_up(t.slab * 4, 16);                         // float [slab]: the pooled result's gradient
    p = u + (backward ? round_up(t.slab * 4, 16) : 0);        // float [heads, tile]: scores, exponentials, weights
    q = p + t.heads * tile * 4;                               // float [heads, tile]: dw, ds
    sums = q + (backward ? t.heads * tile * 4 : 0);           // float [channels] or u and v, [2, channels]
    const int64_t both = backward && t.cluster == 1 ? 2 : 1;
    stats = sums + (t.local ? round_up(both * t.heads * (t.D / t.H) * 4, 16) : 0);  // float [4, heads]
    scratch = stats + round_up(4 * t.heads * 4, 16);                                // float [512]
    valid = scratch + 512 * 4;                                                      // bytes [tile]
    total = valid + round_up(tile, 16);
  }
};

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
  MMK_DEVICE float* stats_of(int64_t chunk, int h) const { return t.stats + 2 * (slot_of(chunk) * t.H + head + h); }
  MMK_DEVICE float* valid_count_of(int64_t chunk) const {
    return t.valid_counts + slot_of(chunk) * gridDim.y + blockIdx.y;
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
        for (int e = 0; e < V; ++e)
          all = all && valid[j + e], any = any || valid[j + e];
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
        if (c >= next)
          ++h, next += width;
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
    return t.sums + (sums_of_one * slot_of(chunk) + i) * t.D + channel + c;
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

// The maximum to subtract: scores that are all -Inf give exponentials 0, not NaN.
MMK_DEVICE float base(float maximum) {
  return maximum == -INFINITY ? 0.f : maximum;
}

// Scale, as a factor of the text; one beyond 1 is a factor of the scores: the text times it may be out of range where
// they aren't.
MMK_DEVICE float text_scale(const Task& t) {
  return fabsf(float(t.scale)) > 1 ? 1.f : float(t.scale);
}
MMK_DEVICE float score_scale(const Task& t) {
  return fabsf(float(t.scale)) > 1 ? float(t.scale) : 1.f;
}

// The weights' factor. Scores that are all -Inf though positions take part: NaN, as softmax has it. Nothing takes part:
// 0.
MMK_DEVICE float share(const Task& t, float total, float valid_count) {
  return total != 0 ? (t.rescale ? valid_count : 1.f) / total : valid_count != 0 ? NAN : 0.f;
}

// ---- forward

// Final weights, and what they multiply, of a chunk. `maximum` and `factor`: [heads], for all of the sample.
template <class T>
MMK_DEVICE void forward_finish(const Task& t, const Block<T>& b, const float* maximum, const float* factor,
                               bool resident) {
  for (int64_t n0 = b.begin; n0 < b.end; n0 += t.tile) {
    const int positions = int(least(t.tile, b.end - n0));
    __syncthreads();
    if (!resident)
      b.load_mask(n0, positions);
    for (int i = threadIdx.x; i < b.heads * positions; i += blockDim.x) {
      const int h = i / positions;
      const int n = i - h * positions;
      float* shared = b.p + h * b.tile + n;
      float* global = t.weights + b.weights_at(h) + n0 + n;
      float w = 0;
      if (b.valid[n])
        w = (resident ? *shared : exponential(load(global) - base(maximum[h]))) * factor[h];
      *shared = w;
      store(global, w);
    }
    if (t.pool)
      continue;
    b.slabs([&](int c0, int count) {
      if (!resident) {
        if (c0)
          __syncthreads();
        b.stage(t.image, b.x, n0, positions, c0, count);
      }
      b.arrive();
      b.write(t.result, b.x, n0, positions, c0, count,
              [&](float x, int n, int, int h) { return b.p[h * b.tile + n] * x; });
    });
  }
}

// A tile's scores in p become exponentials below the running maximum; maximum, sum and the older sums' factor: [3,
// heads] in stats.
template <class T>
MMK_DEVICE void softmax_tile(const Task& t, const Block<T>& b, const Teams& teams, int64_t n0, int positions,
                             bool save_scores) {
  float* maximum = b.stats;
  float* total = maximum + t.heads;
  float* factor = total + t.heads;
  const float scale = score_scale(t);
  for (int round = 0; round < b.heads; round += teams.count) {
    const int h = round + teams.index;
    const int size = h < b.heads ? positions : 0;
    float* p = b.p + h * b.tile;
    const float old = size && teams.thread == 0 ? maximum[h] : -INFINITY;
    float m = old;
    for (int n = teams.thread; n < size; n += teams.threads)
      if (b.valid[n]) {
        if (scale != 1)
          p[n] *= scale;
        m = fmaxf(m, p[n]);
      }
    m = teams.over(m, b.scratch, Max());
    float l = 0;
    for (int n = teams.thread; n < size; n += teams.threads) {
      if (save_scores && b.valid[n])
        store(t.weights + b.weights_at(h) + n0 + n, p[n]);
      p[n] = b.valid[n] ? exponential(p[n] - base(m)) : 0.f;
      l += p[n];
    }
    l = teams.over(l, b.scratch, Sum());
    if (size && teams.thread == 0) {
      factor[h] = old == -INFINITY ? 0.f : exponential(old - base(m));
      maximum[h] = m;
      total[h] = total[h] * factor[h] + l;
    }
  }
}

template <class T>
MMK_DEVICE void forward_first(const Task& t, unsigned char* shared) {
  const Block<T> b(t, shared, false, false);
  if (b.nothing())
    return;
  float* maximum = b.stats;
  float* total = maximum + t.heads;
  float* factor = total + t.heads;
  const bool alone = b.chunks == 1;
  const bool resident = alone && b.resident();
  const Teams teams(b.heads);
  float valid_count = 0;
  for (int h = threadIdx.x; h < b.heads; h += blockDim.x)
    maximum[h] = -INFINITY, total[h] = 0;

  for (int64_t n0 = b.begin; n0 < b.end; n0 += t.tile) {
    const int positions = int(least(t.tile, b.end - n0));
    __syncthreads();  // the last tile's readers are done
    valid_count += b.load_mask(n0, positions);
    b.slabs([&](int c0, int count) {
      if (c0)
        __syncthreads();
      b.stage(t.image, b.x, n0, positions, c0, count);
      if (n0 == b.begin || t.slab < b.channels)
        b.stage(t.text, b.v, c0, count, text_scale(t));
      b.arrive();
      b.template score<true>(b.v, b.p, positions, c0, count);
    });
    __syncthreads();

    softmax_tile(t, b, teams, n0, positions, !resident);
    if (!t.pool)
      continue;

    const bool last = n0 + positions == b.end;
    b.slabs([&](int c0, int count) {
      __syncthreads();
      if (t.slab < b.channels) {
        b.stage(t.image, b.x, n0, positions, c0, count);
        b.arrive();
      }
      b.weighted_sum(b.p, positions, c0, count,
                     [&](int c, int h, float sum) {  // the same thread has a channel each time
                       if (n0 != b.begin)
                         sum += b.sum(1, 0, c) * factor[h];
                       if (last && alone)
                         store(b.pointer(t.pooled, c), from_float<T>(sum * share(t, total[h], valid_count)));
                       else
                         b.set_sum(1, 0, c, sum, last);
                     });
    });
  }
  __syncthreads();

  if (!alone) {
    for (int h = threadIdx.x; h < b.heads; h += blockDim.x) {
      float* stats = b.stats_of(b.k, h);
      store(stats, maximum[h]), store(stats + 1, total[h]);
    }
    if (threadIdx.x == 0)
      store(b.valid_count_of(b.k), valid_count);
    return;
  }
  if (t.pool && b.count == 0)
    for (int c = threadIdx.x; c < b.channels; c += blockDim.x)
      store(b.pointer(t.pooled, c), from_float<T>(0));
  for (int h = threadIdx.x; h < b.heads; h += blockDim.x)
    factor[h] = share(t, total[h], valid_count);
  forward_finish(t, b, maximum, factor, resident);
}

// store(h, the sample's maximum, its weights' factor) from the chunks' of(k, h, i): maximum, sum, positions that take
// part.
template <class T, class Of, class Store>
MMK_DEVICE void merge_softmax(const Task& t, const Block<T>& b, Of of, Store store) {
  const int lane = threadIdx.x % 32;
  for (int h = threadIdx.x / 32; h < b.heads; h += blockDim.x / 32) {
    float m = -INFINITY;
    float total = 0;
    float valid_count = 0;
    for (int64_t k = lane; k < b.chunks; k += 32)
      if (of(k, h, 1) != 0)
        m = fmaxf(m, of(k, h, 0));
    m = over_lanes(m, 32, Max());
    for (int64_t k = lane; k < b.chunks; k += 32) {
      const float l = of(k, h, 1);
      if (l != 0)
        total += l * exponential(of(k, h, 0) - m);
      valid_count += of(k, h, 2);
    }
    total = over_lanes(total, 32, Sum());
    valid_count = over_lanes(valid_count, 32, Sum());
    if (lane == 0)
      store(h, m, share(t, total, valid_count));
  }
}

template <class T>
MMK_DEVICE void forward_second(const Task& t, unsigned char* shared) {
  const Block<T> b(t, shared, false, true);
  if (b.nothing() || b.chunks == 1)
    return;
  float* maximum = b.stats;
  float* factor = maximum + 2 * t.heads;
  merge_softmax(
      t, b, [&](int64_t k, int h, int i) { return load(i == 2 ? b.valid_count_of(k) : b.stats_of(k, h) + i); },
      [&](int h, float m, float f) { maximum[h] = m, factor[h] = f; });
  __syncthreads();
  if (t.pool)
    b.merge_sums(
        [&](int64_t k, int c, int h) {
          const float m = load(b.stats_of(k, h));
          return m == -INFINITY ? 0.f : load(b.global_sum(k, 1, 0, c)) * exponential(m - maximum[h]);
        },
        [&](int c, int h, float sum) { store(b.pointer(t.pooled, c), from_float<T>(sum * factor[h])); });
  forward_finish(t, b, maximum, factor, false);
}

// The blocks of a cluster have a sample's chunks, each in one tile that stays.
template <class T>
MMK_DEVICE void forward_cluster(const Task& t, unsigned char* shared) {
  const Block<T> b(t, shared, false, false);
  float* maximum = b.stats;
  float* counts = maximum + 2 * t.heads;
  float* factor = counts + t.heads;
  const int positions = int(most<int64_t>(b.end - b.begin, 0));  // the last blocks may have none, but peers read them
  for (int h = threadIdx.x; h < b.heads; h += blockDim.x)
    maximum[h] = -INFINITY, maximum[t.heads + h] = 0;
  const float valid_count = b.load_mask(b.begin, positions);
  b.stage(t.image, b.x, b.begin, positions, 0, b.channels);
  b.stage(t.text, b.v, 0, b.channels, text_scale(t));
  b.arrive();
  b.template score<true>(b.v, b.p, positions, 0, b.channels);
  __syncthreads();
  softmax_tile(t, b, Teams(b.heads), b.begin, positions, false);
  __syncthreads();  // its factors aren't needed: their place is the peers'
  for (int h = threadIdx.x; h < b.heads; h += blockDim.x)
    counts[h] = valid_count;

  cluster_sync();
  merge_softmax(
      t, b, [&](int64_t k, int h, int i) { return load_peer(maximum + i * t.heads + h, k); },
      [&](int h, float m, float f) { factor[h] = f * exponential(maximum[h] - base(m)); });
  __syncthreads();
  if (t.pool) {
    b.weighted_sum(b.p, positions, 0, b.channels, [&](int c, int h, float sum) { b.sums[c] = sum * factor[h]; });
    cluster_sync();
    b.merge_sums([&](int64_t k, int c, int) { return load_peer(b.sums + c, k); },
                 [&](int c, int, float sum) { store(b.pointer(t.pooled, c), from_float<T>(sum)); });
  }
  cluster_arrive();
  forward_finish(t, b, maximum, factor, true);
  cluster_wait();  // peers may still be reading from here
}

// ---- backward

// The image's gradient for a chunk. `mean`: [heads], c for all of the sample.
template <class T>
MMK_DEVICE void backward_finish(const Task& t, const Block<T>& b, const float* mean, bool resident) {
  if (!t.grad_image.data)
    return;
  const bool features = t.grad_result.data;
  const bool pooled = t.grad_pooled.data;
  for (int64_t n0 = b.begin; n0 < b.end; n0 += t.tile) {
    const int positions = int(least(t.tile, b.end - n0));
    __syncthreads();
    if (!resident)
      b.load_mask(n0, positions);
    for (int i = threadIdx.x; i < b.heads * positions; i += blockDim.x) {
      const int h = i / positions;
      const int n = i - h * positions;
      float* p = b.p + h * b.tile + n;
      float* q = b.q + h * b.tile + n;
      if (resident) {
        *q *= float(t.scale);
      } else {
        const int64_t at = b.weights_at(h) + n0 + n;
        *p = b.valid[n] ? load(t.weights + at) : 0.f;
        *q = b.valid[n] ? float(t.scale) * *p * (load(t.grad_scores + at) - mean[h]) : 0.f;
      }
    }
    b.slabs([&](int c0, int count) {
      if (c0)
        __syncthreads();
      if (!resident && features)
        b.stage(t.grad_result, b.y, n0, positions, c0, count);
      if (n0 == b.begin || t.slab < b.channels) {
        if (!resident && pooled)
          b.stage(t.grad_pooled, b.u, c0, count, 1);
        b.stage(t.text, b.v, c0, count, 1);
      }
      b.arrive();
      b.write(t.grad_image, features ? b.y : nullptr, n0, positions, c0, count, [&](float g, int n, int c, int h) {
        const int at = h * b.tile + n;
        return b.valid[n] ? b.p[at] * (pooled ? b.u[c] : g) + b.q[at] * b.v[c] : 0.f;
      });
    });
  }
}

// A tile's weights into p, dw into q; the running mean of dw, the sum of weights and the mean's change: [3, heads] in
// stats.
template <class T>
MMK_DEVICE void mean_tile(const Task& t, const Block<T>& b, const Teams& teams, int64_t n0, int positions,
                          bool save_scores) {
  float* mean = b.stats;
  float* mass = mean + t.heads;
  float* shift = mass + t.heads;
  for (int round = 0; round < b.heads; round += teams.count) {
    const int h = round + teams.index;
    const int size = h < b.heads ? positions : 0;
    float* p = b.p + h * b.tile;
    float* q = b.q + h * b.tile;
    float sum = 0;
    float weight = 0;
    for (int n = teams.thread; n < size; n += teams.threads) {
      const int64_t at = b.weights_at(h) + n0 + n;
      float w = 0;
      float dw = 0;
      if (b.valid[n]) {
        w = load(t.weights + at);
        dw = t.grad_result.data || t.grad_pooled.data ? q[n] : 0.f;
        if (t.grad_weights)
          dw += load(t.grad_weights + at);
        if (save_scores)
          store(t.grad_scores + at, dw);
        sum += w * dw;
        weight += w;
      }
      p[n] = w;
      q[n] = dw;
    }
    sum = teams.over(sum, b.scratch, Sum());
    weight = teams.over(weight, b.scratch, Sum());
    if (size && teams.thread == 0) {
      const float before = mean[h];
      const float all = mass[h] + weight;
      mean[h] = all != 0 ? (before * mass[h] + sum) / all : 0.f;
      mass[h] = all;
      shift[h] = before - mean[h];
    }
  }
}

// dw in q becomes w (dw - mean).
template <class T>
MMK_DEVICE void center(const Block<T>& b, const float* mean, int positions) {
  for (int i = threadIdx.x; i < b.heads * positions; i += blockDim.x) {
    const int h = i / positions;
    const int n = i - h * positions;
    const int at = h * b.tile + n;
    b.q[at] = b.valid[n] ? b.p[at] * (b.q[at] - mean[h]) : 0.f;
  }
}

template <class T>
MMK_DEVICE void backward_first(const Task& t, unsigned char* shared) {
  const Block<T> b(t, shared, true, false);
  if (b.nothing())
    return;
  float* mean = b.stats;
  float* mass = mean + t.heads;
  float* shift = mass + t.heads;
  const bool alone = b.chunks == 1;
  const bool resident = alone && b.resident();
  const bool features = t.grad_result.data;
  const bool pooled = t.grad_pooled.data;
  const bool text = t.grad_text.data;
  const Teams teams(b.heads);
  for (int h = threadIdx.x; h < b.heads; h += blockDim.x)
    mean[h] = mass[h] = 0;

  for (int64_t n0 = b.begin; n0 < b.end; n0 += t.tile) {
    const int positions = int(least(t.tile, b.end - n0));
    __syncthreads();  // the last tile's readers are done
    b.load_mask(n0, positions);
    b.slabs([&](int c0, int count) {
      if (c0)
        __syncthreads();
      if (features || pooled || text)
        b.stage(t.image, b.x, n0, positions, c0, count);
      if (features)
        b.stage(t.grad_result, b.y, n0, positions, c0, count);
      if (pooled && (n0 == b.begin || t.slab < b.channels))
        b.stage(t.grad_pooled, b.u, c0, count, 1);
      b.arrive();
      if (features)
        b.template score<false>(nullptr, b.q, positions, c0, count);
      else if (pooled)
        b.template score<true>(b.u, b.q, positions, c0, count);
    });
    __syncthreads();

    mean_tile(t, b, teams, n0, positions, !resident);
    __syncthreads();
    center(b, mean, positions);
    if (!text)
      continue;

    const bool last = n0 + positions == b.end;
    b.slabs([&](int c0, int count) {
      __syncthreads();
      if (t.slab < b.channels) {
        b.stage(t.image, b.x, n0, positions, c0, count);
        b.arrive();
      }
      b.weighted_sum(b.q, positions, c0, count, [&](int c, int h, float u) {  // the same thread has a channel each time
        if (n0 != b.begin)
          u += b.sum(2, 0, c) + shift[h] * b.sum(2, 1, c);
        if (last && alone)
          store(b.pointer(t.grad_text, c), from_float<T>(u * float(t.scale)));
        else
          b.set_sum(2, 0, c, u, last);
      });
      if (!last || !alone)
        b.weighted_sum(b.p, positions, c0, count, [&](int c, int, float v) {
          if (n0 != b.begin)
            v += b.sum(2, 1, c);
          b.set_sum(2, 1, c, v, last);
        });
    });
  }
  __syncthreads();

  if (!alone) {
    for (int h = threadIdx.x; h < b.heads; h += blockDim.x) {
      float* stats = b.stats_of(b.k, h);
      store(stats, mean[h]), store(stats + 1, mass[h]);
    }
    return;
  }
  if (text && b.count == 0)
    for (int c = threadIdx.x; c < b.channels; c += blockDim.x)
      store(b.pointer(t.grad_text, c), from_float<T>(0));
  backward_finish(t, b, mean, resident);
}

// mean[h], of dw in all of the sample, from the chunks' of(k, h, i): mean, sum of weights.
template <class T, class Of>
MMK_DEVICE void merge_means(const Block<T>& b, Of of, float* mean) {
  const int lane = threadIdx.x % 32;
  for (int h = threadIdx.x / 32; h < b.heads; h += blockDim.x / 32) {
    float sum = 0;
    float weight = 0;
    for (int64_t k = lane; k < b.chunks; k += 32) {
      const float mass = of(k, h, 1);
      sum += of(k, h, 0) * mass;
      weight += mass;
    }
    sum = over_lanes(sum, 32, Sum());
    weight = over_lanes(weight, 32, Sum());
    if (lane == 0)
      mean[h] = weight != 0 ? sum / weight : 0.f;
  }
}

template <class T>
MMK_DEVICE void backward_second(const Task& t, unsigned char* shared) {
  const Block<T> b(t, shared, true, true);
  if (b.nothing() || b.chunks == 1)
    return;
  float* mean = b.stats;
  merge_means(b, [&](int64_t k, int h, int i) { return load(b.stats_of(k, h) + i); }, mean);
  __syncthreads();
  if (t.grad_text.data)
    b.merge_sums(
        [&](int64_t k, int c, int h) {
          return load(b.global_sum(k, 2, 0, c)) + (load(b.stats_of(k, h)) - mean[h]) * load(b.global_sum(k, 2, 1, c));
        },
        [&](int c, int, float sum) { store(b.pointer(t.grad_text, c), from_float<T>(sum * float(t.scale))); });
  backward_finish(t, b, mean, false);
}

// As forward_cluster. The mean for all of the sample is known before the sum that needs it: no u and v.
template <class T>
MMK_DEVICE void backward_cluster(const Task& t, unsigned char* shared) {
  const Block<T> b(t, shared, true, false);
  float* own = b.stats;
  float* mean = own + 3 * t.heads;
  const bool features = t.grad_result.data;
  const bool pooled = t.grad_pooled.data;
  const bool text = t.grad_text.data;
  const int positions = int(most<int64_t>(b.end - b.begin, 0));
  for (int h = threadIdx.x; h < b.heads; h += blockDim.x)
    own[h] = own[t.heads + h] = 0;
  b.load_mask(b.begin, positions);
  if (features || pooled || text)
    b.stage(t.image, b.x, b.begin, positions, 0, b.channels);
  if (features)
    b.stage(t.grad_result, b.y, b.begin, positions, 0, b.channels);
  if (pooled)
    b.stage(t.grad_pooled, b.u, 0, b.channels, 1);
  b.arrive();
  if (features)
    b.template score<false>(nullptr, b.q, positions, 0, b.channels);
  else if (pooled)
    b.template score<true>(b.u, b.q, positions, 0, b.channels);
  __syncthreads();
  mean_tile(t, b, Teams(b.heads), b.begin, positions, false);

  cluster_sync();
  merge_means(b, [&](int64_t k, int h, int i) { return load_peer(own + i * t.heads + h, k); }, mean);
  __syncthreads();
  center(b, mean, positions);
  if (text) {
    __syncthreads();
    b.weighted_sum(b.q, positions, 0, b.channels, [&](int c, int, float sum) { b.sums[c] = sum; });
    cluster_sync();
    b.merge_sums([&](int64_t k, int c, int) { return load_peer(b.sums + c, k); },
                 [&](int c, int, float sum) { store(b.pointer(t.grad_text, c), from_float<T>(sum * float(t.scale))); });
  }
  cluster_arrive();
  backward_finish(t, b, mean, true);
  cluster_wait();
}

}  // namespace

#define MMK_KERNEL(name, T, suffix)                                                                           \
  extern "C" __global__ void __launch_bounds__(512, 1) spatial_attention_##name##_##suffix(const Task task) { \
    MMK_DYNAMIC_SHARED(shared);                                                                               \
    name<T>(task, shared);                                                                                    \
  }
#define MMK_KERNELS(T, suffix)           \
  MMK_KERNEL(forward_first, T, suffix)   \
  MMK_KERNEL(forward_second, T, suffix)  \
  MMK_KERNEL(forward_cluster, T, suffix) \
  MMK_KERNEL(backward_first, T, suffix)  \
  MMK_KERNEL(backward_second, T, suffix) \
  MMK_KERNEL(backward_cluster, T, suffix)
MMK_KERNELS(float, f32)
MMK_KERNELS(bf16, bf16)
MMK_KERNELS(f16, f16)

// ---- host

namespace {

int64_t element_size(Dtype dtype) {
  return dtype == Dtype::float32 ? 4 : 2;
}

Task task_of(const SpatialAttention& a) {
  Task t = {};
  t.B = a.B;
  t.Y = a.Y;
  t.X = a.X;
  t.D = a.D;
  t.H = a.H;
  t.planes = a.image.x == 1 && (a.image.d != 1 || a.D == 1);
  t.pool = a.pool;
  t.rescale = a.rescale;
  t.scale = a.scale;
  t.image = a.image;
  t.text = a.text;
  t.mask = a.mask;
  t.offsets = a.offsets;
  t.weights = static_cast<float*>(a.weights);
  t.result = a.result;
  t.pooled = a.pooled;
  return t;
}

Task task_of(const SpatialAttentionBackward& g) {
  Task t = task_of(g.forward);
  t.grad_result = g.grad_result;
  t.grad_pooled = g.grad_pooled;
  t.grad_weights = static_cast<const float*>(g.grad_weights);
  t.grad_scores = static_cast<float*>(g.grad_scores);
  t.grad_image = g.grad_image;
  t.grad_text = g.grad_text;
  return t;
}

// Sizes of tiles and chunks. It depends on shapes, layout and device only: whatever gradient is asked for, the same
// bits.
void plan(Task& t, const Device& device, int64_t element, bool backward) {
  const int64_t positions = t.Y * t.X;
  t.heads = t.H < 64 ? t.H : 64;
  t.local = 0;
  t.cluster = 1;
  const int64_t groups = ceil_div(t.H, t.heads);
  const int64_t channels = t.heads * (t.D / t.H);
  const int64_t samples = t.B * groups > 0 ? t.B * groups : 1;
  auto fits = [&](int64_t tile, int64_t slab, int64_t bytes) {
    t.tile = tile;
    t.slab = slab;
    return tile < (1 << 20) && Layout(t, element, backward).total <= bytes;
  };

  // A whole sample where that fits; bags may be twice as large as they are on average.
  int64_t whole = positions;
  if (t.offsets && t.B > 1 && 2 * ceil_div(positions, t.B) < positions)
    whole = 2 * ceil_div(positions, t.B);
  if (!fits(whole > 0 ? whole : 1, channels, device.shared)) {
    // Else in the blocks of a cluster, two on a processor rather than one: one loads while the other waits. At least
    // half of the processors must have work: a cluster's few can't draw what the memory gives, and a sample that is
    // split over all of them is faster though it is read twice.
    t.local = t.pool || backward;
    for (int64_t bytes : {device.shared / 2 - 1024, device.shared}) {
      for (t.cluster = 2; !t.offsets && t.cluster <= device.cluster; t.cluster *= 2) {
        const int64_t share = round_up(ceil_div(positions, t.cluster), t.planes ? 8 : 1);
        if (2 * samples * t.cluster < device.processors || !fits(share, channels, bytes))
          continue;
        t.chunk = share;
        t.chunks = t.cluster;
        t.slots = t.B * t.cluster;
        return;
      }
    }
    t.cluster = 1;
    // Else what leaves room for two blocks on a processor (each has 1 KiB that it doesn't see); a few positions at
    // least, in slabs of channels where they are too wide.
    const int64_t bytes = device.shared / 2 - 1024;
    const int64_t fewest = t.planes ? 32 : 2;
    const int64_t step = t.planes ? 8 : 1;
    int64_t tile = fewest;
    int64_t slab = channels;
    t.local = (t.pool || backward) && 8 * channels <= bytes / 4;
    if (fits(fewest, channels, bytes)) {
      // the largest tile that fits is in low..high - 1
      int64_t low = fewest / step;
      int64_t high = ceil_div(whole, step) + 1;
      while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (fits(middle * step, channels, bytes) ? low : high) = middle;
      }
      tile = low * step;
    } else {
      // as many channels, in eights
      int64_t low = 1;
      int64_t high = ceil_div(channels, 8);
      while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (fits(fewest, middle * 8, bytes) ? low : high) = middle;
      }
      slab = low * 8 < channels ? low * 8 : channels;
    }
    t.tile = tile;
    t.slab = slab;
  }

  // A sample is split where there are too few for two blocks a processor, then for four; not so far that the chunks'
  // sums, 4 or 8 bytes a channel, were much beside their features.
  const int64_t tiles = ceil_div(positions > 0 ? positions : 1, t.tile);
  const int64_t blocks = 4 * device.processors;
  const int64_t fewest = t.pool || backward ? ceil_div(16, t.tile) : 1;
  int64_t each;  // tiles of a chunk
  if (t.offsets) {
    each = ceil_div(tiles * groups, blocks);
  } else {
    const int64_t wanted = 2 * samples >= blocks ? 1 : ceil_div(blocks, samples);
    each = ceil_div(tiles, wanted < tiles ? wanted : tiles);
  }
  if (each < fewest)
    each = fewest < tiles ? fewest : tiles;
  t.chunk = t.tile * each;
  t.chunks = t.offsets ? 0 : ceil_div(tiles, each);
  t.slots = t.offsets ? positions / t.chunk + t.B : t.B * t.chunks;
}

// Scratch: stats, valid_counts, sums; none where a block or a cluster does it all.
int64_t scratch(Task& t, bool backward, float* memory) {
  if (t.cluster > 1)
    return 0;
  const bool once = !t.offsets && t.chunks == 1;
  const bool resident = once && t.Y * t.X <= t.tile;
  const bool sums = backward ? t.grad_text.data != nullptr : t.pool != 0;
  int64_t used = 0;
  auto take = [&](int64_t floats) {
    float* taken = memory + used;
    used += floats;
    return taken;
  };
  if (!once)
    t.stats = take(2 * t.slots * t.H), t.valid_counts = take(t.slots * ceil_div(t.H, t.heads));
  if (sums && !resident && !(once && t.local))
    t.sums = take((backward ? 2 : 1) * t.slots * t.D);
  return used;
}

using Kernel = void (*)(Task);
struct Kernels {
  Kernel first, second, cluster;
};  // of one dtype

const char* run(const Task& t, Dtype dtype, bool backward, const Device& device, Kernels f32, Kernels bf16, Kernels f16,
                Stream stream) {
  if (t.B == 0 || t.slots == 0)
    return nullptr;
  if (dtype == Dtype::float64)
    return "the CUDA kernels have no float64";
  const int64_t shared = Layout(t, element_size(dtype), backward).total;
  const int64_t groups = ceil_div(t.H, t.heads);
  if (const char* error = beyond("bytes of shared memory for a block", shared, device.shared))
    return error;
  const int threads = 2 * shared > device.shared ? 512 : 256;  // where a processor has room for one block, a larger one
  const Kernels& kernels = dtype == Dtype::float32 ? f32 : dtype == Dtype::bfloat16 ? bf16 : f16;
  if (t.cluster > 1)
    return launch(kernels.cluster, t.slots, groups, t.cluster, threads, shared, stream, t);
  const char* error = launch(kernels.first, t.slots, groups, 1, threads, shared, stream, t);
  const bool split = t.offsets ? t.X > t.chunk : t.chunks > 1;
  return error || !split ? error : launch(kernels.second, t.slots, groups, 1, threads, shared, stream, t);
}

Device device() {
  return current_device(spatial_attention_forward_cluster_f32);
}

template <class Arguments>
int64_t scratch_of(const Arguments& arguments, Dtype dtype, bool backward) {
  Task t = task_of(arguments);
  plan(t, device(), element_size(dtype), backward);
  return scratch(t, backward, nullptr);
}

}  // namespace

int64_t spatial_attention_scratch(const SpatialAttention& a) {
  return scratch_of(a, a.dtype, false);
}
int64_t spatial_attention_scratch(const SpatialAttentionBackward& g) {
  return scratch_of(g, g.forward.dtype, true);
}

#define MMK_KERNELS_OF(pass, suffix)                                                       \
  Kernels {                                                                                \
    spatial_attention_##pass##_first_##suffix, spatial_attention_##pass##_second_##suffix, \
        spatial_attention_##pass##_cluster_##suffix                                        \
  }

const char* spatial_attention_forward(const SpatialAttention& a, float* memory, void* stream) {
  Task t = task_of(a);
  const Device on = device();
  plan(t, on, element_size(a.dtype), false);
  scratch(t, false, memory);
  return run(t, a.dtype, false, on, MMK_KERNELS_OF(forward, f32), MMK_KERNELS_OF(forward, bf16),
             MMK_KERNELS_OF(forward, f16), static_cast<Stream>(stream));
}

const char* spatial_attention_backward(const SpatialAttentionBackward& g, float* memory, void* stream) {
  Task t = task_of(g);
  const Device on = device();
  plan(t, on, element_size(g.forward.dtype), true);
  scratch(t, true, memory);
  return run(t, g.forward.dtype, true, on, MMK_KERNELS_OF(backward, f32), MMK_KERNELS_OF(backward, bf16),
             MMK_KERNELS_OF(backward, f16), static_cast<Stream>(stream));
}

}  // namespace mmk::cuda
