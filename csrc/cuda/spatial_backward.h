// Spatial attention, backward: the mean of the weights' gradient, what a chunk leaves, its merge, and the gradients.
#pragma once
#include "spatial_block.h"

namespace mmk::cuda::spatial {

// What a block knows of dw, the weights' gradient, in shared memory.
struct MeanStats {
  int heads;
  float* mean;         // [heads]: of dw so far
  float* mass;         // [heads]: the sum of weights
  float* shift;        // [heads]: by how much a tile lowers the mean
  float* sample_mean;  // [heads]: the mean for all of the sample, once it is merged

  template <class T>
  MMK_DEVICE explicit MeanStats(const Block<T>& b) : heads(b.heads) {
    mean = b.stats;
    mass = mean + b.t.heads;
    shift = mass + b.t.heads;
    sample_mean = shift + b.t.heads;
  }
  MMK_DEVICE void clear() const {
    for (int h = threadIdx.x; h < heads; h += blockDim.x) {
      mean[h] = 0;
      mass[h] = 0;
    }
  }
};

// Reads the mean of chunk k: as the first launch has left it, or in a cluster from the block that has the chunk.
template <class T>
struct SavedMeans {
  const Block<T>& b;
  MMK_DEVICE float mean(int64_t k, int h) const { return load(&b.stats_of(k, h)->level); }
  MMK_DEVICE float mass(int64_t k, int h) const { return load(&b.stats_of(k, h)->mass); }
};
struct PeersMeans {
  const MeanStats& own;
  MMK_DEVICE float mean(int64_t k, int h) const { return load_peer(own.mean + h, k); }
  MMK_DEVICE float mass(int64_t k, int h) const { return load_peer(own.mass + h, k); }
};

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

// A tile's weights into p, dw into q; the running mean of dw.
template <class T>
MMK_DEVICE void mean_tile(const Task& t, const Block<T>& b, const Teams& teams, int64_t n0, int positions,
                          bool save_scores) {
  const MeanStats stats(b);
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
      const float before = stats.mean[h];
      const float all = stats.mass[h] + weight;
      stats.mean[h] = all != 0 ? (before * stats.mass[h] + sum) / all : 0.f;
      stats.mass[h] = all;
      stats.shift[h] = before - stats.mean[h];
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
  const MeanStats stats(b);
  const bool alone = b.chunks == 1;
  const bool resident = alone && b.resident();
  const bool features = t.grad_result.data;
  const bool pooled = t.grad_pooled.data;
  const bool text = t.grad_text.data;
  const Teams teams(b.heads);
  stats.clear();

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
    center(b, stats.mean, positions);
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
          u += b.sum(2, 0, c) + stats.shift[h] * b.sum(2, 1, c);
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
      ChunkStats* to = b.stats_of(b.k, h);
      store(&to->level, stats.mean[h]);
      store(&to->mass, stats.mass[h]);
    }
    return;
  }
  if (text && b.count == 0)
    for (int c = threadIdx.x; c < b.channels; c += blockDim.x)
      store(b.pointer(t.grad_text, c), from_float<T>(0));
  backward_finish(t, b, stats.mean, resident);
}

// mean[h], of dw in all of the sample, from those of the chunks, which `of` reads.
template <class T, class Of>
MMK_DEVICE void merge_means(const Block<T>& b, Of of, float* mean) {
  const int lane = threadIdx.x % 32;
  for (int h = threadIdx.x / 32; h < b.heads; h += blockDim.x / 32) {
    float sum = 0;
    float weight = 0;
    for (int64_t k = lane; k < b.chunks; k += 32) {
      const float mass = of.mass(k, h);
      sum += of.mean(k, h) * mass;
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
  const float* mean = MeanStats(b).sample_mean;
  merge_means(b, SavedMeans<T>{b}, MeanStats(b).sample_mean);
  __syncthreads();
  if (t.grad_text.data)
    b.merge_sums(
        [&](int64_t k, int c, int h) {
          return load(b.global_sum(k, 2, 0, c)) +
                 (load(&b.stats_of(k, h)->level) - mean[h]) * load(b.global_sum(k, 2, 1, c));
        },
        [&](int c, int, float sum) { store(b.pointer(t.grad_text, c), from_float<T>(sum * float(t.scale))); });
  backward_finish(t, b, mean, false);
}

// As forward_cluster. The mean for all of the sample is known before the sum that needs it: no u and v.
template <class T>
MMK_DEVICE void backward_cluster(const Task& t, unsigned char* shared) {
  const Block<T> b(t, shared, true, false);
  const MeanStats stats(b);
  const bool features = t.grad_result.data;
  const bool pooled = t.grad_pooled.data;
  const bool text = t.grad_text.data;
  const int positions = int(most<int64_t>(b.end - b.begin, 0));
  stats.clear();
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
  merge_means(b, PeersMeans{stats}, stats.sample_mean);
  __syncthreads();
  center(b, stats.sample_mean, positions);
  if (text) {
    __syncthreads();
    b.weighted_sum(b.q, positions, 0, b.channels, [&](int c, int, float sum) { b.sums[c] = sum; });
    cluster_sync();
    b.merge_sums([&](int64_t k, int c, int) { return load_peer(b.sums + c, k); },
                 [&](int c, int, float sum) { store(b.pointer(t.grad_text, c), from_float<T>(sum * float(t.scale))); });
  }
  cluster_arrive();
  backward_finish(t, b, stats.sample_mean, true);
  cluster_wait();
}

}  // namespace mmk::cuda::spatial
