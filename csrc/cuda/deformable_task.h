// What the kernels of deformable attention are told, and how they find a point's level.
#pragma once
#include "../deformable_attention.h"
#include "block.h"

namespace mmk::cuda::deformable {

struct Level {
  int32_t height;
  int32_t width;
  int32_t begin;   // its first position
  int32_t point;   // its first point
  int32_t points;  // how many it has
  int32_t band;    // its first band of positions (see deformable_ordered.h)
};

// Levels that a task has room for; of more there is a table in global memory.
constexpr int task_levels = 16;

struct Task {
  // Offsets in bytes are 8 times a field's number.
  int64_t B, S, H, d, Q, K;               //  0 as in DeformableAttention
  int64_t softmax;                        //  6 0: scores are the weights
  int64_t wide_locations, wide_scores;    //  7 1: float
  int64_t lanes;                          //  9 lanes of a query and head, a power of two up to 32
  int64_t batch;                          // 10 points that they hold at a time: a multiple of lanes
  int64_t blocks;                         // 11 blocks of a head's queries
  HeadRows value;                         // 12 data, b, h, n, c
  QueryRows locations;                    // 17 data, b, q, h
  QueryRows scores;                       // 21 data, b, q, h
  TokenMask mask;                         // 25 data (null: none), b, h, t
  QueryRows result;                       // 29 data, b, q, h
  float* softmax_rows;                    // 33 [B, Q, H, 2]
  QueryRows grad_result;                  // 34 data, b, q, h
  QueryRows grad_locations, grad_scores;  // 38 data (null: not wanted), b, q, h
  float* sums;                            // 46 the gradient of value, [B, S, H, d]
  void* grad_value;                       // 47 the same, rounded
  int64_t band, bands, chunks;            // 48 positions of a band; bands; chunks of 32 channels
  int64_t L;                              // 51
  const Level* table;                     // 52 null: all levels are in `level`
  Level level[task_levels];               // 53
};
static_assert(sizeof(Task) == 53 * 8 + task_levels * sizeof(Level), "every field has 8 bytes");

// The last level that begins at or before `at`, as `begin` tells it: a level without points begins with the next.
template <int32_t Level::* begin>
MMK_DEVICE Level level_of(const Task& t, int32_t at) {
  if (!t.table) {
    Level found = t.level[0];
    for (int i = 1; i < t.L; ++i)
      if (t.level[i].*begin <= at)
        found = t.level[i];
    return found;
  }
  int64_t low = 0;
  int64_t high = t.L - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (load(&(t.table[middle].*begin)) <= at)
      low = middle;
    else
      high = middle - 1;
  }
  return load(t.table + low);
}

// Elements of type T or, where they are wide, float.
template <class T>
MMK_DEVICE float read_number(const void* from, bool wide, int64_t at) {
  return wide ? load(static_cast<const float*>(from) + at) : to_float(load(static_cast<const T*>(from) + at));
}
template <class T>
MMK_DEVICE void write_number(void* to, bool wide, int64_t at, float x) {
  if (wide)
    store(static_cast<float*>(to) + at, x);
  else
    store(static_cast<T*>(to) + at, from_float<T>(x));
}

// Of consecutive channels as many as one load has: 16 bytes' or one.
template <int V>
struct Channels {
  float at[V] = {};
  template <class T>
  MMK_DEVICE void read(const T* from) {
    if constexpr (V == 1) {
      at[0] = to_float(load(from));
    } else {
      const Pack<T> x = load(reinterpret_cast<const Pack<T>*>(from));
#pragma unroll
      for (int i = 0; i < V; ++i)
        at[i] = to_float(x.at[i]);
    }
  }
  template <class T>
  MMK_DEVICE void write(T* to) const {
    if constexpr (V == 1) {
      store(to, from_float<T>(at[0]));
    } else {
      Pack<T> x;
#pragma unroll
      for (int i = 0; i < V; ++i)
        x.at[i] = from_float<T>(at[i]);
      store(reinterpret_cast<Pack<T>*>(to), x);
    }
  }
};

}  // namespace mmk::cuda::deformable
