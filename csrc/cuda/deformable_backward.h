// Gradients of scores and locations: products of the result's gradient with the four rows around each point. With
// sample s_k and weight w_k: dw_k = g . s_k, dscore_k = w_k (dw_k - sum w dw), dlocation_k = w_k g . ds_k/dlocation.
// Where a group can't hold all of its points at once, a first sweep finds the sum.
#pragma once
#include "deformable_points.h"

namespace mmk::cuda::deformable {

constexpr int backward_threads = 128;

template <class T, int V>
struct PointGradients {
  const Group<T>& group;
  const Task& t;
  Pack<int32_t>* position;
  Pack<float>* terms;
  Pack<float>* dots;  // the result's gradient times each of the four rows
  const T* value;
  const T* grad;
  Channels<V> own;  // of the result's gradient, this lane's first channels

  MMK_DEVICE PointGradients(const Group<T>& group, unsigned char* memory)
      : group(group),
        t(group.t),
        position(group.template array<Pack<int32_t>>(memory, 0)),
        terms(group.template array<Pack<float>>(memory, 1)),
        dots(group.template array<Pack<float>>(memory, 2)),
        value(static_cast<const T*>(t.value.data) + group.b * t.value.b + group.h * t.value.h),
        grad(static_cast<const T*>(t.grad_result.data) + group.at(t.grad_result)) {
    if (group.there && group.lane * V < t.d)
      own.read(grad + group.lane * V);
  }

  MMK_DEVICE void find(int64_t first) const {
    __syncwarp();  // the last batch's readers are done
    group.own_points(first, [&](int64_t k, int i) {
      Place place = group.place(level_of<&Level::point>(t, int32_t(k)), k);
      place.hide(t, group.b);
      position[i] = place.position;
      terms[i] = {{place.x, place.y, group.weight(k), 0}};
    });
    __syncwarp();
    const int count = int(least(t.batch, t.K - first));
    for (int i = 0; i < count; ++i) {
      float dot[4] = {};
      if (group.there)
        multiply(position[i], dot);
      sum_over_lanes(dot, dots[i]);
    }
    __syncwarp();
  }
  // This lane's part of sum w dw, over its points of the batch.
  MMK_DEVICE float weigh(int64_t first) const {
    float sum = 0;
    group.own_points(first, [&](int64_t, int i) {
      const Pack<float>& dot = dots[i];
      Pack<float>& term = terms[i];
      const Pack<float> share = shares(term.at[Terms::x], term.at[Terms::y]);
      float sample = 0;
#pragma unroll
      for (int c = 0; c < 4; ++c)
        sample += share.at[c] * dot.at[c];
      term.at[Terms::grad_weight] = sample;
      sum += term.at[Terms::weight] * term.at[Terms::grad_weight];
    });
    return sum;
  }
  MMK_DEVICE void write(int64_t first, float mean) const {
    group.own_points(first, [&](int64_t k, int i) {
      const Pack<float>& term = terms[i];
      if (t.grad_scores.data) {
        const float grad_weight = term.at[Terms::grad_weight];
        write_number<T>(t.grad_scores.data, t.wide_scores, group.at(t.grad_scores) + k,
                        t.softmax ? term.at[Terms::weight] * (grad_weight - mean) : grad_weight);
      }
      if (t.grad_locations.data)
        write_location(k, term, dots[i]);
    });
  }

 private:
  MMK_DEVICE void multiply(const Pack<int32_t>& at, float (&dot)[4]) const {
    for (int64_t channel = group.lane * V; channel < t.d; channel += int64_t(group.lanes) * V) {
      Channels<V> g = own;
      if (channel != group.lane * V)
        g.read(grad + channel);
      Channels<V> row[4];
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (at.at[c] >= 0)
          row[c].read(value + at.at[c] * t.value.n + channel);
#pragma unroll
      for (int c = 0; c < 4; ++c)
#pragma unroll
        for (int i = 0; i < V; ++i)
          dot[c] += row[c].at[i] * g.at[i];
    }
  }
  // Halves what each lane has of the four sums while it adds: half of the shuffles.
  MMK_DEVICE void sum_over_lanes(const float (&dot)[4], Pack<float>& to) const {
    if (group.lanes < 4) {
      Pack<float> all;
#pragma unroll
      for (int c = 0; c < 4; ++c)
        all.at[c] = over_lanes(dot[c], group.lanes, Sum());
      if (group.lane == 0)
        to = all;
      return;
    }
    const bool lower = group.lane % 2;
    const bool right = group.lane / 2 % 2;
    const float left = (lower ? dot[2] : dot[0]) + __shfl_xor_sync(all_lanes, lower ? dot[0] : dot[2], 1);
    const float other = (lower ? dot[3] : dot[1]) + __shfl_xor_sync(all_lanes, lower ? dot[1] : dot[3], 1);
    float sum = (right ? other : left) + __shfl_xor_sync(all_lanes, right ? left : other, 2);
    for (int offset = 4; offset < group.lanes; offset *= 2)
      sum += __shfl_xor_sync(all_lanes, sum, offset);
    if (group.lane < 4)
      to.at[2 * lower + right] = sum;
  }
  // What is outside is a constant, even where its weight is NaN.
  MMK_DEVICE void write_location(int64_t k, const Pack<float>& term, const Pack<float>& dot) const {
    const Level level = level_of<&Level::point>(t, int32_t(k));
    const float x = term.at[Terms::x];
    const float y = term.at[Terms::y];
    const float weight = term.at[Terms::weight];
    const float along_x = (1 - y) * (dot.at[1] - dot.at[0]) + y * (dot.at[3] - dot.at[2]);
    const float along_y = (1 - x) * (dot.at[2] - dot.at[0]) + x * (dot.at[3] - dot.at[1]);
    const int64_t to = group.at(t.grad_locations) + 2 * k;
    write_number<T>(t.grad_locations.data, t.wide_locations, to, x < 0 ? 0.f : weight * float(level.width) * along_x);
    write_number<T>(t.grad_locations.data, t.wide_locations, to + 1,
                    x < 0 ? 0.f : weight * float(level.height) * along_y);
  }
};

template <class T, int V>
MMK_DEVICE void differentiate(const Task& t) {
  MMK_DYNAMIC_SHARED(memory);
  Group<T> group(t);
  if (group.there)
    group.read_softmax();
  const PointGradients<T, V> gradients(group, memory);
  const bool twice = t.softmax && t.grad_scores.data && t.K > t.batch;
  float mean = 0;
  if (twice) {
    for (int64_t k = 0; k < t.K; k += t.batch) {
      gradients.find(k);
      mean += gradients.weigh(k);
    }
    mean = over_lanes(mean, group.lanes, Sum());
  }
  for (int64_t k = 0; k < t.K; k += t.batch) {
    gradients.find(k);
    const float sum = gradients.weigh(k);
    if (!twice)
      mean = over_lanes(sum, group.lanes, Sum());
    gradients.write(k, mean);
  }
}

}  // namespace mmk::cuda::deformable
