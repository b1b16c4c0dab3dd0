// The gradient of value without atomics: the same bits every time. A warp owns some channels of a band of positions of
// one level; it goes through the points of that level, 32 at a time, and adds those that touch its band in their order.
#pragma once
#include "deformable_points.h"

namespace mmk::cuda::deformable {

constexpr int ordered_threads = 128;
constexpr int64_t ordered_warps = ordered_threads / 32;

// What one warp has in shared memory.
struct Band {
  // of a point that touches the band
  Pack<int32_t> row[32];  // in the band; -1: elsewhere
  Pack<float> share[32];
  int64_t query[32];
  // float sums[band][32] follow: a lane has a channel, and no other lane's sums
  MMK_DEVICE float* sums() { return reinterpret_cast<float*>(this + 1); }
  MMK_HOST_DEVICE static int64_t bytes(int64_t band) { return int64_t(sizeof(Band)) + band * 32 * 4; }
};

// A lane's point, its place among those of a level: 32 further each time, without a division.
struct Turn {
  int64_t q;
  int32_t k, points, queries, rest;
  MMK_DEVICE Turn(int lane, int32_t points)
      : q(lane / points), k(lane % points), points(points), queries(32 / points), rest(32 % points) {}
  MMK_DEVICE void next() {
    q += queries;
    k += rest;
    if (k >= points) {
      k -= points;
      ++q;
    }
  }
};

template <class T>
MMK_DEVICE void add_in_order(const Task& t) {
  MMK_DYNAMIC_SHARED(memory);
  Band& own = *reinterpret_cast<Band*>(memory + threadIdx.x / 32 * Band::bytes(t.band));
  float* sums = own.sums();
  const int lane = int(threadIdx.x % 32);
  const int64_t item = int64_t(blockIdx.x) * ordered_warps + threadIdx.x / 32;
  const uint32_t band = uint32_t(item % t.bands);
  const int64_t chunk = item / t.bands % t.chunks;
  const int64_t head = item / t.bands / t.chunks;
  const int64_t b = head / t.H;
  const int64_t h = head % t.H;
  if (b >= t.B)
    return;  // the whole warp
  const Level level = level_of<&Level::band>(t, int32_t(band));
  const int64_t begin = level.begin + (band - level.band) * t.band;
  const int64_t end = least(begin + t.band, level.begin + int64_t(level.height) * level.width);
  const int64_t channel = chunk * 32 + lane;
  const bool takes = channel < t.d;
  for (int64_t row = 0; row < end - begin; ++row)
    sums[row * 32 + lane] = 0;

  const int64_t rounds = level.points ? ceil_div(t.Q * level.points, 32) : 0;
  Turn turn(lane, most(level.points, 1));
  for (int64_t i = 0; i < rounds; ++i, turn.next()) {
    bool hit = false;
    if (turn.q < t.Q) {
      Query<T> query(t, b, turn.q, h);
      const int64_t k = level.point + turn.k;
      Place place = query.place(level, k);
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (place.position.at[c] < begin || place.position.at[c] >= end)
          place.position.at[c] = -1;
      hit = place.position.at[0] >= 0 || place.position.at[1] >= 0 || place.position.at[2] >= 0 ||
            place.position.at[3] >= 0;
      if (hit) {
        place.hide(t, b);
        query.read_softmax();
        own.share[lane] = shares(place.x, place.y, query.weight(k));
        own.query[lane] = turn.q;
#pragma unroll
        for (int c = 0; c < 4; ++c)
          own.row[lane].at[c] = place.position.at[c] < 0 ? -1 : int32_t(place.position.at[c] - begin);
      }
    }
    unsigned hits = __ballot_sync(all_lanes, hit);
    __syncwarp();
    for (; hits; hits &= hits - 1) {
      const int from = __ffs(int(hits)) - 1;
      if (!takes)
        continue;
      const Query<T> query(t, b, own.query[from], h);
      const float g = to_float(load(static_cast<const T*>(t.grad_result.data) + query.at(t.grad_result) + channel));
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (own.row[from].at[c] >= 0)
          sums[own.row[from].at[c] * 32 + lane] += own.share[from].at[c] * g;
    }
    __syncwarp();  // before the next points come
  }
  T* to = static_cast<T*>(t.grad_value) + ((b * t.S + begin) * t.H + h) * t.d + channel;
  for (int64_t row = 0; takes && row < end - begin; ++row)
    store(to + row * t.H * t.d, from_float<T>(sums[row * 32 + lane]));
}

}  // namespace mmk::cuda::deformable
