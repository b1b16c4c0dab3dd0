// Spatial attention's rows through registers, backward; see spatial_rows.h.
#pragma once
#include "spatial_backward.h"
#include "spatial_rows.h"

namespace mmk::cuda::spatial {

// Gradients of the block's rows, and of the text what they add to it. `mean`: of the weights' gradient, over all of the
// sample.
template <class T, int P>
MMK_DEVICE void rows_backward_finish(const Task& t, const Rows<T, P, true>& rows, float mean) {
  using Rows = spatial::Rows<T, P, true>;
  const Block<T>& b = rows.b;
  const bool image = t.grad_image.data;
  const bool features = image && t.grad_result.data;
  const bool pooled = image && t.grad_pooled.data;
  const bool of_text = t.grad_text.data;
  const int64_t at = b.weights_at(0);
  typename Rows::Row g[Rows::R] = {};
  if (image)
    rows.keep_text();
  if (pooled)
#pragma unroll
    for (int r = 0; r < Rows::R; ++r)
      rows.read(g[r], t.grad_pooled);
  float sums[P * Rows::V] = {};
  for (int64_t n0 = b.begin; n0 < b.end; n0 += rows.step()) {
    typename Rows::Row x[Rows::R];
    bool valid[Rows::R];
    float w[Rows::R];
    float ds[Rows::R];
    rows.find_valid(valid, n0);
#pragma unroll
    for (int r = 0; r < Rows::R; ++r) {
      const int64_t n = rows.row(n0, r);
      w[r] = valid[r] ? load(t.weights + at + n) : 0.f;
      ds[r] = valid[r] ? w[r] * (load(t.grad_scores + at + n) - mean) : 0.f;
      if (of_text)
        rows.read(x[r], t.image, n, valid[r]);
    }
    if (of_text)
#pragma unroll
      for (int r = 0; r < Rows::R; ++r)
#pragma unroll
        for (int i = 0; i < P * Rows::V; ++i)
          sums[i] = fmaf(ds[r], element(x[r], i / Rows::V, i % Rows::V), sums[i]);
    if (!image)
      continue;
    if (features)
#pragma unroll
      for (int r = 0; r < Rows::R; ++r)
        rows.read(g[r], t.grad_result, rows.row(n0, r), valid[r]);
#pragma unroll
    for (int r = 0; r < Rows::R; ++r) {
      Rows::unpack_again(g[r]);
      const int64_t n = rows.row(n0, r);
      const float scaled = float(t.scale) * ds[r];
      if (n < b.end)
        rows.write(t.grad_image, n, [&](int p, int e, const Pack<T>& text) {
          return valid[r] ? w[r] * element(g[r], p, e) + scaled * to_float(text.at[e]) : 0.f;
        });
    }
  }
  if (of_text)
    rows.sum_columns(sums, [&](int c, float sum) {
      if (b.chunks == 1)
        store(b.pointer(t.grad_text, c), from_float<T>(sum * float(t.scale)));
      else
        store(b.global_sum(b.k, 1, 0, c), sum);
    });
}

template <class T, int P>
MMK_DEVICE void rows_backward_first(const Task& t, unsigned char* shared) {
  using Rows = spatial::Rows<T, P, true>;
  const Block<T> b(t, shared, true, false);
  if (b.nothing())
    return;
  const Rows rows(b, shared);
  const bool features = t.grad_result.data;
  const bool pooled = t.grad_pooled.data;
  const int64_t at = b.weights_at(0);
  typename Rows::Row g[Rows::R] = {};
  if (pooled)
#pragma unroll
    for (int r = 0; r < Rows::R; ++r)
      rows.read(g[r], t.grad_pooled);
  float sum = 0;
  float mass = 0;
  for (int64_t n0 = b.begin; n0 < b.end; n0 += rows.step()) {
    typename Rows::Row x[Rows::R];
    bool valid[Rows::R];
    float dw[Rows::R];
    rows.find_valid(valid, n0);
#pragma unroll
    for (int r = 0; r < Rows::R; ++r) {
      if (features || pooled)
        rows.read(x[r], t.image, rows.row(n0, r), valid[r]);
      if (features)
        rows.read(g[r], t.grad_result, rows.row(n0, r), valid[r]);
    }
#pragma unroll
    for (int r = 0; r < Rows::R; ++r) {
      dw[r] = 0;
      Rows::unpack_again(g[r]);
      if (features || pooled)
#pragma unroll
        for (int i = 0; i < P * Rows::V; ++i)
          dw[r] = fmaf(element(x[r], i / Rows::V, i % Rows::V), element(g[r], i / Rows::V, i % Rows::V), dw[r]);
    }
    rows.sum_rows(dw);
#pragma unroll
    for (int r = 0; r < Rows::R; ++r) {
      if (!valid[r])
        continue;
      const int64_t n = rows.row(n0, r);
      const float w = load(t.weights + at + n);
      if (t.grad_weights)
        dw[r] += load(t.grad_weights + at + n);
      if (rows.lane == 0)
        store(t.grad_scores + at + n, dw[r]);
      sum += w * dw[r];
      mass += w;
    }
  }
  rows.tell(0, rows.over_groups(sum, Sum()));
  rows.tell(1, rows.over_groups(mass, Sum()));
  __syncthreads();  // dw, too, is there for the whole group
  sum = rows.over_warps(0, Sum());
  mass = rows.over_warps(1, Sum());
  const float mean = mass != 0 ? sum / mass : 0.f;
  if (b.chunks == 1) {
    rows_backward_finish(t, rows, mean);
  } else if (threadIdx.x == 0) {
    ChunkStats* to = b.stats_of(b.k, 0);
    store(&to->level, mean);
    store(&to->mass, mass);
  }
}

template <class T, int P>
MMK_DEVICE void rows_backward_second(const Task& t, unsigned char* shared) {
  const Block<T> b(t, shared, true, true);
  if (b.nothing() || b.chunks == 1)
    return;
  float* mean = MeanStats(b).sample_mean;
  merge_means(b, SavedMeans<T>{b}, mean);
  __syncthreads();
  rows_backward_finish(t, Rows<T, P, true>(b, shared), *mean);
}

// The text's gradient, from what the chunks have left.
template <class T>
MMK_DEVICE void rows_backward_third(const Task& t, unsigned char* shared) {
  const Block<T> b(t, shared, true, false);
  if (b.nothing() || b.chunks == 1)
    return;
  b.merge_sums([&](int64_t k, int c, int) { return load(b.global_sum(k, 1, 0, c)); },
               [&](int c, int, float sum) { store(b.pointer(t.grad_text, c), from_float<T>(sum * float(t.scale))); });
}

}  // namespace mmk::cuda::spatial
