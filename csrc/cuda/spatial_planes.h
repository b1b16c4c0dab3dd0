// Spatial attention where positions lie together and channels apart: a lane has a position, the warps of a block share
// its channels, as many loads in flight as a thread takes at once. A block has 32 positions of one head, its chunk; see
// spatial_rows.h, whose third launch is this one's, too.
//
// One head a block: Task.heads is 1, tile and slab are 0.
#pragma once
#include "spatial_backward.h"
#include "spatial_forward.h"

namespace mmk::cuda::spatial {

constexpr int planes_chunk = 32;
constexpr int planes_at_once = 8;

// Bytes of shared memory behind Layout: what a warp has of each position; two vectors of the head's channels.
MMK_HOST_DEVICE int64_t planes_shared(int64_t width, int threads) {
  return 4 * (threads + 2 * width);
}

template <class T>
struct Planes {
  const Block<T>& b;
  int lane, warp, warps;
  int64_t n;     // the lane's position
  bool inside;   // of the chunk
  bool valid;    // it takes part
  float* parts;  // [warps][32]
  float *text, *pooled;

  MMK_DEVICE Planes(const Block<T>& b, unsigned char* shared, bool backward) : b(b) {
    lane = threadIdx.x % 32;
    warp = threadIdx.x / 32;
    warps = blockDim.x / 32;
    n = b.begin + lane;
    inside = n < b.end;
    valid = inside && (!b.t.mask.data || load(b.t.mask.data + b.position(b.t.mask, n)));
    parts = reinterpret_cast<float*>(shared + Layout(b.t, sizeof(T), backward).total);
    text = parts + blockDim.x;
    pooled = text + b.width;
  }

  MMK_DEVICE void keep(float* to, const Vectors& f, float factor) const {
    for (int c = threadIdx.x; c < b.width; c += blockDim.x)
      to[c] = to_float(load(b.pointer(f, c))) * factor;
  }
  // each(c, x, y) of the position's channels that are this warp's: elements of f and g, 0 where it takes no part or
  // they are null.
  template <class Each>
  MMK_DEVICE void channels(const Features& f, const Features& g, Each each) const {
    const int64_t at = inside ? n : b.begin;
    const T* x = f.data && valid ? b.pointer(f, at, 0) : nullptr;
    const T* y = g.data && valid ? b.pointer(g, at, 0) : nullptr;
    for (int c0 = warp; c0 < b.width; c0 += warps * planes_at_once) {
      T from_x[planes_at_once], from_y[planes_at_once];
#pragma unroll
      for (int i = 0; i < planes_at_once; ++i) {
        const int c = c0 + i * warps;
        from_x[i] = x && c < b.width ? load(x + c * f.d) : from_float<T>(0);
        from_y[i] = y && c < b.width ? load(y + c * g.d) : from_float<T>(0);
      }
#pragma unroll
      for (int i = 0; i < planes_at_once; ++i)
        if (c0 + i * warps < b.width)
          each(c0 + i * warps, to_float(from_x[i]), to_float(from_y[i]));
    }
  }
  // Of what the warps have of a position; all of them get it.
  MMK_DEVICE float over_warps(float x) const {
    parts[threadIdx.x] = x;
    __syncthreads();
    x = parts[lane];
    for (int w = 1; w < warps; ++w)
      x += parts[w * 32 + lane];
    return x;
  }
  // What the chunk adds to a channel: the whole result of the sample's only chunk, or for a later launch.
  MMK_DEVICE void leave(int c, float sum, const Vectors& to, float factor) const {
    if (lane != 0)
      return;
    if (b.chunks == 1)
      store(b.pointer(to, c), from_float<T>(sum * factor));
    else
      store(b.global_sum(b.k, 1, 0, c), sum);
  }
};

// Of the position's score: its weight, and what that multiplies.
template <class T>
MMK_DEVICE void planes_forward_finish(const Task& t, const Planes<T>& p, float score, float maximum, float factor) {
  const float w = p.valid ? exponential(score - base(maximum)) * factor : 0.f;
  if (p.inside && p.warp == 0)
    store(t.weights + p.b.weights_at(0) + p.n, w);
  if (t.pool)
    return;
  T* to = p.b.pointer(t.result, p.inside ? p.n : p.b.begin, 0);
  p.channels(t.image, Features(), [&](int c, float x, float) {
    if (p.inside)
      store(to + c * t.result.d, from_float<T>(w * x));
  });
}

template <class T>
MMK_DEVICE void planes_forward_first(const Task& t, unsigned char* shared) {
  const Block<T> b(t, shared, false, false);
  const Planes<T> p(b, shared, false);
  p.keep(p.text, t.text, text_scale(t));
  __syncthreads();
  float s = 0;
  p.channels(t.image, Features(), [&](int c, float x, float) { s = fmaf(x, p.text[c], s); });
  s = p.over_warps(s);
  s = p.valid ? s * score_scale(t) : -INFINITY;
  const float maximum = over_lanes(s, 32, Max());
  const float e = p.valid ? exponential(s - base(maximum)) : 0.f;
  const float total = over_lanes(e, 32, Sum());
  const float valid_count = over_lanes(p.valid ? 1.f : 0.f, 32, Sum());
  const float factor = share(t, total, valid_count);
  if (t.pool)
    p.channels(t.image, Features(),
               [&](int c, float x, float) { p.leave(c, over_lanes(e * x, 32, Sum()), t.pooled, factor); });
  if (b.chunks == 1)
    return planes_forward_finish(t, p, s, maximum, factor);
  if (p.valid && p.warp == 0)
    store(t.weights + b.weights_at(0) + p.n, s);
  if (threadIdx.x == 0) {
    ChunkStats* to = b.stats_of(b.k, 0);
    store(&to->level, maximum);
    store(&to->mass, total);
    store(b.valid_count_of(b.k), valid_count);
  }
}

template <class T>
MMK_DEVICE void planes_forward_second(const Task& t, unsigned char* shared) {
  const Block<T> b(t, shared, false, true);
  const Planes<T> p(b, shared, false);
  const SoftmaxStats stats(b);
  const float score = p.valid ? load(t.weights + b.weights_at(0) + p.n) : 0.f;
  forward_merge(t, b, stats);  // has a barrier: all warps have the score before the weight takes its place
  planes_forward_finish(t, p, score, stats.maximum[0], stats.factor[0]);
}

// Gradients of the chunk's positions, and what it adds to the text's. `mean`: of the weights' gradient, over the
// sample.
template <class T>
MMK_DEVICE void planes_backward_finish(const Task& t, const Planes<T>& p, float w, float dw, float mean) {
  const float ds = p.valid ? w * (dw - mean) : 0.f;
  if (t.grad_text.data)
    p.channels(t.image, Features(),
               [&](int c, float x, float) { p.leave(c, over_lanes(ds * x, 32, Sum()), t.grad_text, float(t.scale)); });
  if (!t.grad_image.data)
    return;
  T* to = p.b.pointer(t.grad_image, p.inside ? p.n : p.b.begin, 0);
  const float scaled = float(t.scale) * ds;
  p.channels(t.grad_result, Features(), [&](int c, float g, float) {
    const float own = t.grad_pooled.data ? p.pooled[c] : g;
    if (p.inside)
      store(to + c * t.grad_image.d, from_float<T>(p.valid ? w * own + scaled * p.text[c] : 0.f));
  });
}

template <class T>
MMK_DEVICE void planes_keep(const Task& t, const Planes<T>& p) {
  p.keep(p.text, t.text, 1);
  if (t.grad_pooled.data)
    p.keep(p.pooled, t.grad_pooled, 1);
  __syncthreads();
}

template <class T>
MMK_DEVICE void planes_backward_first(const Task& t, unsigned char* shared) {
  const Block<T> b(t, shared, true, false);
  const Planes<T> p(b, shared, true);
  const int64_t at = b.weights_at(0) + p.n;
  planes_keep(t, p);
  float dw = 0;
  if (t.grad_result.data)
    p.channels(t.image, t.grad_result, [&](int, float x, float g) { dw = fmaf(x, g, dw); });
  else if (t.grad_pooled.data)
    p.channels(t.image, Features(), [&](int c, float x, float) { dw = fmaf(x, p.pooled[c], dw); });
  dw = p.over_warps(dw);
  const float w = p.valid ? load(t.weights + at) : 0.f;
  dw = !p.valid ? 0.f : t.grad_weights ? dw + load(t.grad_weights + at) : dw;
  const float sum = over_lanes(p.valid ? w * dw : 0.f, 32, Sum());
  const float mass = over_lanes(w, 32, Sum());
  const float mean = mass != 0 ? sum / mass : 0.f;
  if (b.chunks == 1)
    return planes_backward_finish(t, p, w, dw, mean);
  if (p.valid && p.warp == 0)
    store(t.grad_scores + at, dw);
  if (threadIdx.x == 0) {
    ChunkStats* to = b.stats_of(b.k, 0);
    store(&to->level, mean);
    store(&to->mass, mass);
  }
}

template <class T>
MMK_DEVICE void planes_backward_second(const Task& t, unsigned char* shared) {
  const Block<T> b(t, shared, true, true);
  const Planes<T> p(b, shared, true);
  const int64_t at = b.weights_at(0) + p.n;
  planes_keep(t, p);
  float* mean = MeanStats(b).sample_mean;
  merge_means(b, SavedMeans<T>{b}, mean);
  __syncthreads();
  const float w = p.valid ? load(t.weights + at) : 0.f;
  const float dw = p.valid ? load(t.grad_scores + at) : 0.f;
  planes_backward_finish(t, p, w, dw, *mean);
}

}  // namespace mmk::cuda::spatial
