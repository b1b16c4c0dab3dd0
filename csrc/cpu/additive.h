// What both directions of additive attention know: the image's rows and who of them takes part, the packed layers, and
// the hidden products u and t of a tile of rows, some of which forward saves.
#pragma once
#include "../additive_attention.h"

#include "dropout.h"
#include "rows.h"

namespace mmk {
namespace {

template <class C>
inline vec<C> load_some(const C* p, int64_t count) {
  if (count >= lanes<C>)
    return load(p);
  vec<C> v = {};
  for (int64_t i = 0; i < count; ++i)
    v[i] = p[i];
  return v;
}

inline Samples samples_of(const AdditiveAttention& a) {
  return {a.B, a.N, a.offsets};
}

// What both directions know, and the packed layers.
template <class T>
struct Inputs {
  using C = acc_t<T>;
  const AdditiveAttention& a;
  const Samples samples;
  const Source<const T> image;
  const int64_t width, maps;   // of hidden vectors and scores, padded
  Scratch<C> weight, gate, v;  // B[D, A], B[D, A], B[A, K]

  Inputs(const AdditiveAttention& a, const Parallel& parallel, int64_t parts)
      : a(a),
        samples(samples_of(a)),
        image(a.image, a.N),
        width(padded<C>(a.A)),
        maps(padded<C>(a.K)),
        weight(a.D * width),
        gate(a.w_gate.data ? a.D * width : 0),
        v(a.A * maps) {
    pack_weight_transposed<T>(a.w_image, a.A, a.D, C(1), weight.data, parallel, parts);
    if (a.w_gate.data)
      pack_weight_transposed<T>(a.w_gate, a.A, a.D, C(1), gate.data, parallel, parts);
    const T* from = static_cast<const T*>(a.v.data);
    pack_transposed<T>(a.A, a.K, [&](int64_t k) { return from + k * a.v.row; }, a.v.column, C(1), v.data);
  }

  bool valid(int64_t row) const { return !a.mask.data || a.mask.data[row / a.N * a.mask.b + row % a.N * a.mask.x]; }
  bool any_valid(int64_t b) const {  // any of a sample's rows
    for (int64_t r = samples.begin(b); r < samples.end(b); ++r)
      if (valid(r))
        return true;
    return false;
  }
  const C* tile(int64_t first, int64_t count, C* copy, int64_t& step) const {
    return image_tile<T>(image, first, count, samples.rows(), a.D, copy, step, [&](int64_t r) { return valid(r); });
  }
  // Where a sample's row of [B, K, N] (packed: [K, rows]) is, for the first map; the others are a.N apart.
  int64_t at(int64_t b, int64_t row) const { return a.offsets ? row : b * a.K * a.N + row - b * a.N; }
  const C* bias_hidden(int64_t row) const {
    return a.bias_hidden ? static_cast<const C*>(a.bias_hidden) + samples.of(row) * a.A : nullptr;
  }

  // u and t of a tile, before biases and activation.
  void project(const C* x, int64_t step, int64_t count, C* hidden, C* gates, int64_t ld) const {
    gemm_tile<C, false>(count, a.A, a.D, x, step, {weight.data, 0}, hidden, ld, false);
    if (a.w_gate.data)
      gemm_tile<C, false>(count, a.A, a.D, x, step, {gate.data, 0}, gates, ld, false);
  }
  // The products of the first rows are saved by forward, and found by backward: false where a tile's aren't all there.
  C* saved(int64_t row) const { return static_cast<C*>(a.kept) + row * (a.w_gate.data ? 2 * a.A : a.A); }
  void save(int64_t first, int64_t count, const C* hidden, const C* gates, int64_t ld) const {
    for (int64_t r = 0; r < count && first + r < a.kept_rows; ++r) {
      memcpy(saved(first + r), hidden + r * ld, a.A * sizeof(C));
      if (a.w_gate.data)
        memcpy(saved(first + r) + a.A, gates + r * ld, a.A * sizeof(C));
    }
  }
  bool recall(int64_t first, int64_t count, C* hidden, C* gates, int64_t ld) const {
    if (first + count > a.kept_rows)
      return false;
    read_rows<C>(count, a.A, [&](int64_t r) -> const C* { return saved(first + r); }, 1, hidden, ld);
    if (a.w_gate.data)
      read_rows<C>(count, a.A, [&](int64_t r) -> const C* { return saved(first + r) + a.A; }, 1, gates, ld);
    return true;
  }
  // What dropout multiplies a row's hidden units with, 0 or the scale of what stays, and `drawn` further on its gates.
  int64_t drawn() const { return width + philox_words; }
  void draw(int64_t row, C* to) const {
    draw_factors(a.dropout, row, Dropped::hidden, a.A, to);
    if (a.w_gate.data)
      draw_factors(a.dropout, row, Dropped::gate, a.A, to + drawn());
  }
  vec<C> with_bias(const C* x, const C* bias, int64_t column) const {
    return bias ? load(x + column) + load_some(bias + column, a.A - column) : load(x + column);
  }
};

}  // namespace
}  // namespace mmk
