// What moves along a point's corners: the weighted sum of samples, and its counterpart, the gradient that each row
// gets. Points are held a batch at a time; where channels are more than the lanes have, every round of them goes
// through the points again.
#pragma once
#include "deformable_points.h"

namespace mmk::cuda::deformable {

constexpr int forward_threads = 256;

// Positions and terms of a batch of points, in shared memory.
template <class T>
struct Corners {
  const Group<T>& group;
  Pack<int32_t>* position;
  Pack<float>* terms;
  MMK_DEVICE Corners(const Group<T>& group, unsigned char* memory)
      : group(group),
        position(group.template array<Pack<int32_t>>(memory, 0)),
        terms(group.template array<Pack<float>>(memory, 1)) {}
  MMK_DEVICE void find(int64_t first) const {
    __syncwarp();  // the last batch's readers are done
    group.own_points(first, [&](int64_t k, int i) {
      Place place = group.place(level_of<&Level::point>(group.t, int32_t(k)), k);
      place.hide(group.t, group.b);
      position[i] = place.position;
      terms[i] = {{place.x, place.y, group.weight(k), 0}};
    });
    __syncwarp();
  }
  // begin(channel), point(positions, terms, channel) for each of them, end(channel): for this lane's channels.
  template <int V, class Begin, class Point, class End>
  MMK_DEVICE void walk(Begin begin, Point point, End end) const {
    const Task& t = group.t;
    const int64_t round = int64_t(group.lanes) * V;
    for (int64_t first = 0; first < t.d; first += round) {
      const int64_t channel = first + group.lane * V;
      const bool takes = group.there && channel < t.d;
      if (takes)
        begin(channel);
      for (int64_t k = 0; k < t.K; k += t.batch) {
        if (first == 0 || t.K > t.batch)
          find(k);
        const int count = int(least(t.batch, t.K - k));
        for (int i = 0; takes && i < count; ++i)
          point(position[i], terms[i], channel);
      }
      if (takes)
        end(channel);
    }
  }
};

template <class T, int V>
MMK_DEVICE void forward(const Task& t) {
  MMK_DYNAMIC_SHARED(memory);
  Group<T> group(t);
  group.find_softmax();
  const Corners<T> corners(group, memory);
  const T* value = static_cast<const T*>(t.value.data) + group.b * t.value.b + group.h * t.value.h;
  T* result = static_cast<T*>(t.result.data) + group.at(t.result);
  Channels<V> sum;
  // Corners weighed one by one would cancel to NaN where the weight is Inf.
  corners.template walk<V>([&](int64_t) { sum = {}; },
                           [&](const Pack<int32_t>& position, const Pack<float>& term, int64_t channel) {
                             const Pack<float> share = shares(term.at[Terms::x], term.at[Terms::y]);
                             Channels<V> row[4];
#pragma unroll
                             for (int c = 0; c < 4; ++c)
                               if (position.at[c] >= 0)
                                 row[c].read(value + position.at[c] * t.value.n + channel);
#pragma unroll
                             for (int i = 0; i < V; ++i) {
                               float sample = 0;
#pragma unroll
                               for (int c = 0; c < 4; ++c)
                                 sample += share.at[c] * row[c].at[i];
                               sum.at[i] += term.at[Terms::weight] * sample;
                             }
                           },
                           [&](int64_t channel) { sum.write(result + channel); });
}

// The gradient of value by atomics: a lane a channel, so that a warp adds to whole lines.
template <class T>
MMK_DEVICE void scatter(const Task& t) {
  MMK_DYNAMIC_SHARED(memory);
  Group<T> group(t);
  if (group.there)
    group.read_softmax();
  const Corners<T> corners(group, memory);
  const T* grad = static_cast<const T*>(t.grad_result.data) + group.at(t.grad_result);
  float* sums = t.sums + (group.b * t.S * t.H + group.h) * t.d;
  float g = 0;
  corners.template walk<1>([&](int64_t channel) { g = to_float(load(grad + channel)); },
                           [&](const Pack<int32_t>& position, const Pack<float>& term, int64_t channel) {
                             const Pack<float> share =
                                 shares(term.at[Terms::x], term.at[Terms::y], term.at[Terms::weight]);
#pragma unroll
                             for (int c = 0; c < 4; ++c)
                               if (position.at[c] >= 0)
                                 add_atomically(sums + position.at[c] * t.H * t.d + channel, share.at[c] * g);
                           },
                           [](int64_t) {});
}

}  // namespace mmk::cuda::deformable
