// The loops over image features that score -> softmax -> multiply operations are made of, for the two ways features
// lie:
//   Lines   the channels of a position are neighbours ([B, N, D], channels_last): vectors run along the channels;
//   Planes  the positions of a channel are neighbours (contiguous [B, D, Y, X]):  vectors run along the positions.
// Any other stride is right in both, gathered element by element. All calls work on a run: positions one stride apart.
//
// A coefficient array holds one number a head and position, the heads `head_stride` apart.
#pragma once
#include "simd.h"

#include <type_traits>  // compile-time constants only: nothing in it becomes code

namespace mmk {
namespace {

// One run of features, `position` and `channel` strides in elements.
template <class T>
struct Run {
  T* data;
  int64_t position, channel;
};

// The second factor of a score: another run (the gradient), or one vector for all positions (the text).
template <class C>
struct Shared {
  const C* data;
};

template <class C>
struct Heads {
  int64_t count, width;  // H, D / H
};

template <bool Unit>
struct Stride {
  int64_t value;
  MMK_INLINE operator int64_t() const { return Unit ? 1 : value; }
};

template <bool Unit, class T>
MMK_INLINE vec<acc_t<T>> load_along(const T* p, int64_t stride) {
  if constexpr (Unit)
    return load(p);
  else
    return gather(p, stride);
}

constexpr uintptr_t cache_line = 64;

enum class Write { cached, streamed, scattered };

template <Write W, class T>
MMK_INLINE void store_along(T* p, int64_t stride, vec<acc_t<T>> v) {
  if constexpr (W == Write::cached)
    store(p, v);
  else if constexpr (W == Write::streamed)
    stream(p, v);
  else
    scatter(p, stride, v);
}

// Picks how vectors `step` elements apart may be written.
template <class F>
MMK_INLINE void with_write(bool streamed, int64_t step, F f) {
  if (step != 1)
    f(std::integral_constant<Write, Write::scattered>{});
  else if (streamed)
    f(std::integral_constant<Write, Write::streamed>{});
  else
    f(std::integral_constant<Write, Write::cached>{});
}

}  // namespace
}  // namespace mmk
