// A group of lanes takes a query and head; its points lie in shared memory, each worked out by one lane for all.
// Neighbouring groups have neighbouring queries of one head, which sample near each other.
#pragma once
#include "deformable_task.h"

namespace mmk::cuda::deformable {

// A place in a level's map: the four positions around it, left and right, then those below; -1 where there is none.
struct Place {
  Pack<int32_t> position = {{-1, -1, -1, -1}};
  // how far it is from the first of them; -1: it is outside
  float x = -1;
  float y = -1;

  MMK_DEVICE Place() {}
  MMK_DEVICE Place(const Level& level, float right, float down) {
    const float column = right * float(level.width) - 0.5f;
    const float row = down * float(level.height) - 0.5f;
    if (!(column >= -1 && column < float(level.width) && row >= -1 && row < float(level.height)))  // NaN, too
      return;
    const float left = floorf(column);
    const float above = floorf(row);
    x = column - left;
    y = row - above;
    // Without signs: what is negative is beyond every size, too.
    const uint32_t columns = uint32_t(level.width);
    const uint32_t c = uint32_t(int32_t(left));
    const uint32_t r = uint32_t(int32_t(above));
    const uint32_t first = uint32_t(level.begin) + r * columns + c;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i)
      if (c + i % 2 < columns && r + i / 2 < uint32_t(level.height))
        position.at[i] = int32_t(first + i % 2 + i / 2 * columns);
  }
  MMK_DEVICE void hide(const Task& t, int64_t b) {
    if (!t.mask.data)
      return;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (position.at[i] >= 0 && !load(t.mask.data + b * t.mask.b + position.at[i] * t.mask.t))
        position.at[i] = -1;
  }
};

// What each of the four has of a place's sample, times its weight.
MMK_DEVICE Pack<float> shares(float x, float y, float weight = 1) {
  return {{weight * ((1 - y) * (1 - x)), weight * ((1 - y) * x), weight * (y * (1 - x)), weight * (y * x)}};
}

// A point's terms in shared memory.
struct Terms {
  enum : int { x, y, weight, grad_weight };
};

// A query's and head's numbers.
template <class T>
struct Query {
  const Task& t;
  int64_t b, q, h;
  float top = 0;
  float inverse = 1;

  MMK_DEVICE Query(const Task& t, int64_t b, int64_t q, int64_t h) : t(t), b(b), q(q), h(h) {}
  MMK_DEVICE int64_t at(const QueryRows& rows) const { return b * rows.b + q * rows.q + h * rows.h; }
  MMK_DEVICE float score(int64_t k) const { return read_number<T>(t.scores.data, t.wide_scores, at(t.scores) + k); }
  MMK_DEVICE float weight(int64_t k) const { return t.softmax ? exponential(score(k) - top) * inverse : score(k); }
  MMK_DEVICE Place place(const Level& level, int64_t k) const {
    const int64_t from = at(t.locations) + 2 * k;
    return Place(level, read_number<T>(t.locations.data, t.wide_locations, from),
                 read_number<T>(t.locations.data, t.wide_locations, from + 1));
  }
  MMK_DEVICE float* softmax_row() const { return t.softmax_rows + ((b * t.Q + q) * t.H + h) * 2; }
  MMK_DEVICE void read_softmax() {
    if (!t.softmax)
      return;
    const float kept = load(softmax_row());
    top = kept == -INFINITY ? 0.f : kept;
    inverse = load(softmax_row() + 1);
  }
};

// A lane's group. All lanes of a warp go through the same loops, those without a query, too.
template <class T>
struct Group : Query<T> {
  int lanes, lane;
  bool there;

  MMK_DEVICE explicit Group(const Task& t) : Query<T>(t, 0, 0, 0), lanes(int(t.lanes)), lane(int(threadIdx.x) % lanes) {
    const uint32_t head = blockIdx.x / uint32_t(t.blocks);
    const uint32_t block = blockIdx.x % uint32_t(t.blocks);
    this->b = head / uint32_t(t.H);
    this->h = head % uint32_t(t.H);
    this->q = int64_t(block) * (blockDim.x / lanes) + threadIdx.x / lanes;
    there = this->q < t.Q;
  }
  MMK_DEVICE void find_softmax() {
    if (!this->t.softmax)
      return;
    Running own;
    for (int64_t k = lane; there && k < this->t.K; k += lanes)
      own.add(this->score(k));
    const float largest = over_lanes(own.top, lanes, Max());
    this->top = largest == -INFINITY ? 0.f : largest;
    const float total = over_lanes(own.below(this->top), lanes, Sum());
    this->inverse = total != 0 ? 1 / total : 0.f;
    if (there && lane == 0) {
      store(this->softmax_row(), largest);
      store(this->softmax_row() + 1, this->inverse);
    }
  }
  // Its own of the block's arrays in shared memory: an element a point, and one more, so that groups' begin in
  // different banks.
  template <class Element>
  MMK_DEVICE Element* array(unsigned char* memory, int index) const {
    const int64_t pitch = this->t.batch + 1;
    const int64_t groups = blockDim.x / lanes;
    return reinterpret_cast<Element*>(memory) + (groups * index + threadIdx.x / lanes) * pitch;
  }
  // f(k, its number in the batch) for this lane's points of those from `first` on.
  template <class F>
  MMK_DEVICE void own_points(int64_t first, F f) const {
    for (int i = lane; there && i < this->t.batch && first + i < this->t.K; i += lanes)
      f(first + i, i);
  }
};

inline int64_t lanes_for(int64_t vectors) {
  int64_t lanes = 1;
  while (lanes < 32 && lanes < vectors)
    lanes *= 2;
  return lanes;
}
inline int64_t shared_of(const Task& t, int threads, int arrays) {
  return threads / t.lanes * (t.batch + 1) * 16 * arrays;
}

}  // namespace mmk::cuda::deformable
