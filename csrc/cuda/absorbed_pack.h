// The text's side, before: what the tiles of columns are made of. A warp takes a column.
#pragma once
#include "absorbed_task.h"

namespace mmk::cuda {

struct ColumnPlace {
  int64_t b, column, h, token, slot;
  bool there;
  // The item-th of all samples' columns.
  MMK_DEVICE ColumnPlace(const AbsorbedTask& t, int64_t item) {
    b = item / t.all_columns();
    column = item % t.all_columns();
    const int64_t of_tile = column / tile;
    const int64_t c = column % tile;
    const int64_t group = of_tile / t.tiles;
    slot = t.tiles > 1 ? 0 : c / t.T;
    token = t.tiles > 1 ? of_tile % t.tiles * tile + c : c % t.T;
    h = group * t.heads + slot;
    there = b < t.B && slot < t.heads && h < t.H && token < t.T;
  }
};

MMK_DEVICE bool token_takes(const AbsorbedTask& t, int64_t b, int64_t token) {
  return !t.text_mask.data || load(t.text_mask.data + b * t.text_mask.b + token * t.text_mask.t);
}

// 8 channels of a row of U, zeros where not `there`.
template <class U>
MMK_DEVICE void get_channels(float (&x)[8], const HeadRows& f, const ColumnPlace& at, int64_t c, int64_t channels,
                             bool there) {
#pragma unroll
  for (int e = 0; e < 8; ++e)
    x[e] = 0;
  if (there && c < channels)
    get<8>(x, head_of<U>(f, at.b, at.h) + at.token * f.n + c * f.c, f.c, int(least<int64_t>(8, channels - c)));
}

// The power of two that float rows for float16 are packed over: 1, but for those beyond its range. Of these the largest
// is below 256, so that room is left for sums of their products. Both scales' product is finite.
template <class T, class U, class Clean>
MMK_DEVICE float scale_of_row(const AbsorbedTask& t, const ColumnPlace& at, const HeadRows& f, int64_t channels,
                              bool there, Clean clean) {
  float scale = 1;
  if constexpr (std::is_same_v<T, f16> && std::is_same_v<U, float>) {
    float largest = 0;
    for (int64_t c = threadIdx.x % 32 * 8; c < channels; c += 256) {
      float x[8];
      get_channels<U>(x, f, at, c, channels, there);
#pragma unroll
      for (int e = 0; e < 8; ++e)
        largest = fmaxf(largest, fabsf(clean(x[e])));
    }
    largest = over_lanes(largest, 32, Max());
    if (largest > 65504.f && largest < INFINITY)
      scale = ldexpf(1.f, least(ilogbf(largest) - 7, 60));
  }
  return scale;
}

// Returns the row's scale.
template <class T, class U>
MMK_DEVICE float pack_row(const AbsorbedTask& t, const ColumnPlace& at, const HeadRows& f, void* packed,
                          int64_t channels, Row how, int parts) {
  const int64_t width = round_up(channels, padded_channels);
  const bool there = how != Row::zeros;
  auto clean = [&](float x) { return how != Row::finite || fabsf(x) < INFINITY ? x : 0.f; };
  const float scale = scale_of_row<T, U>(t, at, f, channels, there, clean);
  const float share = 1 / scale;
  for (int64_t c = threadIdx.x % 32 * 8; c < width; c += 256) {
    float x[8];
    get_channels<U>(x, f, at, c, channels, there);
#pragma unroll
    for (int e = 0; e < 8; ++e)
      x[e] = clean(x[e]) * share;
    for (int part = 0; part < 2; ++part) {  // at most
      if (part == parts)
        break;
      put<8>(static_cast<T*>(packed) + ((at.b * parts + part) * t.all_columns() + at.column) * width + c, x, 1, 8);
#pragma unroll
      for (int e = 0; e < 8; ++e) {  // what is left of it
        const float high = to_float(from_float<T>(x[e]));
        x[e] = fabsf(high) < INFINITY ? x[e] - high : 0.f;
      }
    }
  }
  return scale;
}

template <class T, class U>
MMK_DEVICE void pack_text(const AbsorbedTask& t, const ColumnPlace& at, bool takes, Column& column) {
  const int parts = int(t.parts);
  column.key_scale = pack_row<T, U>(t, at, t.key, t.keys, t.D,
                                    !at.there ? Row::zeros
                                    : takes   ? Row::whole
                                              : Row::finite,
                                    parts);
  column.value_scale = 1;
  if (t.values)
    column.value_scale = pack_row<T, U>(t, at, t.value, t.values, t.Dv, takes ? Row::whole : Row::zeros, parts);
}

// Grid (columns of all samples / 4), block 128.
template <class T>
MMK_DEVICE void absorbed_pack(const AbsorbedTask& t) {
  const ColumnPlace at(t, int64_t(blockIdx.x) * 4 + threadIdx.x / 32);
  if (at.b >= t.B)
    return;
  const bool takes = at.there && token_takes(t, at.b, at.token);
  Column column = {};
  if (t.bits)
    pack_text<T, float>(t, at, takes, column);
  else
    pack_text<T, T>(t, at, takes, column);
  column.power = Exponential(0.f);
  column.head = at.there ? int(at.h) : -1;
  column.slot = int(least(at.slot, t.heads - 1));
  column.token = int(at.token);
  column.takes = takes;
  if (at.there && t.key_bias.data) {
    const float bias = load(static_cast<const float*>(t.key_bias.data) + at.b * t.key_bias.b + at.h * t.key_bias.h +
                            at.token * t.key_bias.t);
    column.bias = takes || fabsf(bias) < INFINITY ? bias * log4e : 0.f;
  }
  if (t.features) {
    const int64_t head = at.b * t.H + at.h;
    const bool gathers = at.there && share_of(t.text_softmax, head, t.T, at.token) != 0;
    pack_row<T, T>(t, at, t.grad_text_out, t.features, t.D, gathers ? Row::whole : Row::zeros, 1);
    float sum = 0;
    for (int64_t c = threadIdx.x % 32 * 8; c < t.D; c += 256) {
      float x[8], y[8];
      get_channels<T>(x, t.grad_text_out, at, c, t.D, gathers);
      get_channels<float>(y, t.unrounded, at, c, t.D, gathers);
#pragma unroll
      for (int e = 0; e < 8; ++e)
        sum += x[e] * y[e];
    }
    column.delta = over_lanes(sum, 32, Sum());
    if (gathers) {
      column.power = Exponential(top_of(t.text_softmax, head, t.T, at.token));
      column.share = share_of(t.text_softmax, head, t.T, at.token);
    }
  }
  if (threadIdx.x % 32 == 0)
    store(t.columns + at.b * t.all_columns() + at.column, column);
}

}  // namespace mmk::cuda
