// Forward: softmax and positions of a query's points, then the sum of four rows a point, in registers.
#pragma once
#include "deformable.h"

namespace mmk {
namespace {

// out = sum over points of weight * sample, which is the sum over its corners of share * row, for a block of packs.
// (Corners weighed one by one would cancel to NaN where the weight is Inf.)
template <class Pack, int Packs, class T, class R>
MMK_INLINE void weighted_rows(const Sampling<T>& sampling, int64_t lane, R rows, int64_t first, int64_t last, T* out) {
  using C = acc_t<T>;
  typename Pack::type total[Packs] = {};
  for (int64_t k = 0; k < sampling.a.K; ++k) {
    typename Pack::type sample[Packs] = {};
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const auto* row = rows[sampling.position_of(c, k, lane)];
      const C share = sampling.share_of(c, k, lane);
#pragma GCC unroll 4
      for (int v = 0; v < Packs; ++v)
        sample[v] += Pack::load(row + channel_of<Pack, Packs>(v, first, last)) * share;
    }
    const C weight = sampling.weight_of(k, lane);
#pragma GCC unroll 4
    for (int v = 0; v < Packs; ++v)
      total[v] += sample[v] * weight;
  }
#pragma GCC unroll 4
  for (int v = 0; v < Packs; ++v)
    Pack::store(out + channel_of<Pack, Packs>(v, first, last), total[v]);
}

template <class T>
struct DeformableForward {
  using C = acc_t<T>;
  const DeformableAttention& a;
  Sampling<T> sampling;

  template <class R>
  void run(R rows, int64_t b, int64_t h, int64_t first, int64_t last) {
    T* result = static_cast<T*>(a.result.data) + b * a.result.b + h * a.result.h;
    for (int64_t q = first; q < last; q += sampling.block) {
      sampling.set(b, h, q, last);
      sampling.weights();
      sampling.locate();
      for (int64_t lane = 0; lane < sampling.count; ++lane) {
        T* out = result + (q + lane) * a.result.q;
        each_block<typename R::element>(a.d, [&](auto pack, auto packs, int64_t begin, int64_t end) {
          weighted_rows<decltype(pack), packs.value>(sampling, lane, rows, begin, end, out);
        });
      }
    }
  }
};

template <class T>
void deformable_forward(const DeformableAttention& a, const Parallel& parallel) {
  const Points<acc_t<T>> points(a);
  const QueryParts parts{a, parallel, 8 * a.K * a.d};
  parts.run<T>([&] { return DeformableForward<T>{a, {a, points}}; });
}

}  // namespace
}  // namespace mmk
