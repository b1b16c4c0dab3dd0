// Spatial attention, forward: the softmax of a tile, what a chunk leaves, its merge, and the results.
#pragma once
#include "spatial_block.h"

namespace mmk::cuda::spatial {

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

// What a block knows of its heads' softmax, in shared memory.
struct SoftmaxStats {
  int heads;
  float* maximum;      // [heads]: of the scores so far
  float* total;        // [heads]: the sum of exponentials
  float* decay;        // [heads]: what a tile makes older sums less by
  float* valid_count;  // [heads]: in decay's place, positions that take part, for the peers of a cluster
  float* factor;       // [heads]: of the weights

  template <class T>
  MMK_DEVICE explicit SoftmaxStats(const Block<T>& b) : heads(b.heads) {
    maximum = b.stats;
    total = maximum + b.t.heads;
    decay = total + b.t.heads;
    valid_count = decay;
    factor = decay + b.t.heads;
  }
  MMK_DEVICE void clear() const {
    for (int h = threadIdx.x; h < heads; h += blockDim.x) {
      maximum[h] = -INFINITY;
      total[h] = 0;
    }
  }
};

// Reads the softmax of chunk k: as the first launch has left it, or in a cluster from the block that has the chunk.
template <class T>
struct SavedSoftmax {
  const Block<T>& b;
  MMK_DEVICE float maximum(int64_t k, int h) const { return load(&b.stats_of(k, h)->level); }
  MMK_DEVICE float total(int64_t k, int h) const { return load(&b.stats_of(k, h)->mass); }
  MMK_DEVICE float valid_count(int64_t k, int) const { return load(b.valid_count_of(k)); }
};
struct PeersSoftmax {
  const SoftmaxStats& own;
  MMK_DEVICE float maximum(int64_t k, int h) const { return load_peer(own.maximum + h, k); }
  MMK_DEVICE float total(int64_t k, int h) const { return load_peer(own.total + h, k); }
  MMK_DEVICE float valid_count(int64_t k, int h) const { return load_peer(own.valid_count + h, k); }
};

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

// A tile's scores in p become exponentials below the running maximum.
template <class T>
MMK_DEVICE void softmax_tile(const Task& t, const Block<T>& b, const Teams& teams, int64_t n0, int positions,
                             bool save_scores) {
  const SoftmaxStats stats(b);
  const float scale = score_scale(t);
  for (int round = 0; round < b.heads; round += teams.count) {
    const int h = round + teams.index;
    const int size = h < b.heads ? positions : 0;
    float* p = b.p + h * b.tile;
    const float old = size && teams.thread == 0 ? stats.maximum[h] : -INFINITY;
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
      stats.decay[h] = old == -INFINITY ? 0.f : exponential(old - base(m));
      stats.maximum[h] = m;
      stats.total[h] = stats.total[h] * stats.decay[h] + l;
    }
  }
}

template <class T>
MMK_DEVICE void forward_first(const Task& t, unsigned char* shared) {
  const Block<T> b(t, shared, false, false);
  if (b.nothing())
    return;
  const SoftmaxStats stats(b);
  const bool alone = b.chunks == 1;
  const bool resident = alone && b.resident();
  const Teams teams(b.heads);
  float valid_count = 0;
  stats.clear();

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
                         sum += b.sum(1, 0, c) * stats.decay[h];
                       if (last && alone)
                         store(b.pointer(t.pooled, c), from_float<T>(sum * share(t, stats.total[h], valid_count)));
                       else
                         b.set_sum(1, 0, c, sum, last);
                     });
    });
  }
  __syncthreads();

  if (!alone) {
    for (int h = threadIdx.x; h < b.heads; h += blockDim.x) {
      ChunkStats* to = b.stats_of(b.k, h);
      store(&to->level, stats.maximum[h]);
      store(&to->mass, stats.total[h]);
    }
    if (threadIdx.x == 0)
      store(b.valid_count_of(b.k), valid_count);
    return;
  }
  if (t.pool && b.count == 0)
    for (int c = threadIdx.x; c < b.channels; c += blockDim.x)
      store(b.pointer(t.pooled, c), from_float<T>(0));
  for (int h = threadIdx.x; h < b.heads; h += blockDim.x)
    stats.factor[h] = share(t, stats.total[h], valid_count);
  forward_finish(t, b, stats.maximum, stats.factor, resident);
}

// store(h, the sample's maximum, its weights' factor) from those of the chunks, which `of` reads.
template <class T, class Of, class Store>
MMK_DEVICE void merge_softmax(const Task& t, const Block<T>& b, Of of, Store store) {
  const int lane = threadIdx.x % 32;
  for (int h = threadIdx.x / 32; h < b.heads; h += blockDim.x / 32) {
    float m = -INFINITY;
    float total = 0;
    float valid_count = 0;
    for (int64_t k = lane; k < b.chunks; k += 32)
      if (of.total(k, h) != 0)
        m = fmaxf(m, of.maximum(k, h));
    m = over_lanes(m, 32, Max());
    for (int64_t k = lane; k < b.chunks; k += 32) {
      const float l = of.total(k, h);
      if (l != 0)
        total += l * exponential(of.maximum(k, h) - m);
      valid_count += of.valid_count(k, h);
    }
    total = over_lanes(total, 32, Sum());
    valid_count = over_lanes(valid_count, 32, Sum());
    if (lane == 0)
      store(h, m, share(t, total, valid_count));
  }
}

// Merges what the chunks have left into `stats`, for all of the block, and their sums.
template <class T>
MMK_DEVICE void forward_merge(const Task& t, const Block<T>& b, const SoftmaxStats& stats) {
  merge_softmax(t, b, SavedSoftmax<T>{b}, [&](int h, float m, float factor) {
    stats.maximum[h] = m;
    stats.factor[h] = factor;
  });
  __syncthreads();
  if (t.pool)
    b.merge_sums(
        [&](int64_t k, int c, int h) {
          const float m = load(&b.stats_of(k, h)->level);
          return m == -INFINITY ? 0.f : load(b.global_sum(k, 1, 0, c)) * exponential(m - stats.maximum[h]);
        },
        [&](int c, int h, float sum) { store(b.pointer(t.pooled, c), from_float<T>(sum * stats.factor[h])); });
}

template <class T>
MMK_DEVICE void forward_second(const Task& t, unsigned char* shared) {
  const Block<T> b(t, shared, false, true);
  if (b.nothing() || b.chunks == 1)
    return;
  const SoftmaxStats stats(b);
  forward_merge(t, b, stats);
  forward_finish(t, b, stats.maximum, stats.factor, false);
}

// The blocks of a cluster have a sample's chunks, each in one tile that stays.
template <class T>
MMK_DEVICE void forward_cluster(const Task& t, unsigned char* shared) {
  const Block<T> b(t, shared, false, false);
  const SoftmaxStats stats(b);
  const int positions = int(most<int64_t>(b.end - b.begin, 0));  // the last blocks may have none, but peers read them
  stats.clear();
  const float valid_count = b.load_mask(b.begin, positions);
  b.stage(t.image, b.x, b.begin, positions, 0, b.channels);
  b.stage(t.text, b.v, 0, b.channels, text_scale(t));
  b.arrive();
  b.template score<true>(b.v, b.p, positions, 0, b.channels);
  __syncthreads();
  softmax_tile(t, b, Teams(b.heads), b.begin, positions, false);
  __syncthreads();  // its decay isn't needed: valid_count has that place
  for (int h = threadIdx.x; h < b.heads; h += blockDim.x)
    stats.valid_count[h] = valid_count;

  cluster_sync();
  merge_softmax(t, b, PeersSoftmax{stats}, [&](int h, float m, float factor) {
    stats.factor[h] = factor * exponential(stats.maximum[h] - base(m));
  });
  __syncthreads();
  if (t.pool) {
    b.weighted_sum(b.p, positions, 0, b.channels, [&](int c, int h, float sum) { b.sums[c] = sum * stats.factor[h]; });
    cluster_sync();
    b.merge_sums([&](int64_t k, int c, int) { return load_peer(b.sums + c, k); },
                 [&](int c, int, float sum) { store(b.pointer(t.pooled, c), from_float<T>(sum)); });
  }
  cluster_arrive();
  forward_finish(t, b, stats.maximum, stats.factor, true);
  cluster_wait();  // peers may still be reading from here
}

}  // namespace mmk::cuda::spatial
