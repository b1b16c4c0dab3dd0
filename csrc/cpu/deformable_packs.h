// How deformable attention walks the channels of a row: in blocks of packs.
#pragma once
#include "simd.h"

namespace mmk {
namespace {

// Channels are walked in packs: vectors; where a row is shorter, vectors of 16 bytes; where it is still shorter, single
// channels. Packs may overlap, of those that say so.
template <class C>
struct Wide {
  using type = vec<C>;
  static constexpr int64_t count = lanes<C>;
  static constexpr bool overlaps = true;
  template <class T>
  static MMK_INLINE type load(const T* p) {
    return mmk::load(p);
  }
  template <class T>
  static MMK_INLINE void store(T* p, type v) {
    mmk::store(p, v);
  }
  static MMK_INLINE void sum4(const type (&v)[4], C (&sums)[4]) { mmk::sum4<C>(v, sums); }
};
template <class C>
struct Narrow {
  typedef C type __attribute__((vector_size(16)));
  static constexpr int64_t count = 16 / sizeof(C);
  static constexpr bool overlaps = true;
  template <class T>
  static MMK_INLINE type load(const T* p) {
    type v;
    if constexpr (std::is_same<T, C>::value)
      memcpy(&v, p, sizeof v);
    else
      for (int64_t i = 0; i < count; ++i)
        v[i] = to_acc(p[i]);
    return v;
  }
  template <class T>
  static MMK_INLINE void store(T* p, type v) {
    if constexpr (std::is_same<T, C>::value)
      memcpy(p, &v, sizeof v);
    else
      for (int64_t i = 0; i < count; ++i)
        p[i] = from_acc<T>(v[i]);
  }
  static MMK_INLINE void sum4(const type (&v)[4], C (&sums)[4]) {
    for (int i = 0; i < 4; ++i) {
      sums[i] = v[i][0] + v[i][1];
      if constexpr (count == 4)
        sums[i] += v[i][2] + v[i][3];
    }
  }
};
template <class C>
struct Single {
  using type = C;
  static constexpr int64_t count = 1;
  static constexpr bool overlaps = false;
  template <class T>
  static MMK_INLINE type load(const T* p) {
    return to_acc(*p);
  }
  template <class T>
  static MMK_INLINE void store(T* p, type v) {
    *p = from_acc<T>(v);
  }
  static MMK_INLINE void sum4(const type (&v)[4], C (&sums)[4]) {
    for (int i = 0; i < 4; ++i)
      sums[i] = v[i];
  }
};

// Neighbours in bfloat16 share 32 bits: a shift and a mask make floats of both, where a vector of neighbours would have
// to be spread first.
struct Pairs {
  struct type {
    vec<float> even, odd;
    MMK_INLINE type operator*(float x) const { return {even * x, odd * x}; }
    MMK_INLINE type operator*(const type& x) const { return {even * x.even, odd * x.odd}; }
    MMK_INLINE type& operator+=(const type& x) {
      even += x.even;
      odd += x.odd;
      return *this;
    }
  };
  static constexpr int64_t count = 2 * lanes<float>;
  static constexpr bool overlaps = false;
  static MMK_INLINE type load(const bf16* p) {
    vec<uint32_t> both;
    memcpy(&both, p, sizeof both);
    return {bit_cast<vec<float>>(both << 16), bit_cast<vec<float>>(both & 0xffff0000u)};
  }
  static MMK_INLINE void store(bf16* p, const type& v) {
    const vec<uint32_t> both = widen(round_bf16(v.even)) | widen(round_bf16(v.odd)) << 16;
    memcpy(p, &both, sizeof both);
  }
  static MMK_INLINE void sum4(const type (&v)[4], float (&sums)[4]) {
    vec<float> added[4];
    for (int i = 0; i < 4; ++i)
      added[i] = v[i].even + v[i].odd;
    mmk::sum4<float>(added, sums);
  }
};

// f(Pack, constant number of packs, first channel, first channel of the last pack) for blocks that cover `channels` of
// rows of T: the last pack ends with them, and overlaps the one before where they aren't whole packs.
template <class T, class F>
MMK_INLINE void each_block(int64_t channels, F f) {
  using C = acc_t<T>;
  auto blocks = [&](auto pack) {
    constexpr int64_t width = decltype(pack)::count;
    const int64_t packs = (channels + width - 1) / width;
    for (int64_t first = 0; first < packs; first += 4) {
      const int64_t last = first + 4 < packs ? (first + 3) * width : channels - width;
      switch (packs - first) {
        case 1:
          f(pack, std::integral_constant<int, 1>{}, first * width, last);
          break;
        case 2:
          f(pack, std::integral_constant<int, 2>{}, first * width, last);
          break;
        case 3:
          f(pack, std::integral_constant<int, 3>{}, first * width, last);
          break;
        default:
          f(pack, std::integral_constant<int, 4>{}, first * width, last);
      }
    }
  };
  if constexpr (std::is_same<T, bf16>::value)
    if (channels % Pairs::count == 0)
      return blocks(Pairs{});
  if (channels >= lanes<C>)
    blocks(Wide<C>{});
  else if (channels >= Narrow<C>::count)
    blocks(Narrow<C>{});
  else
    blocks(Single<C>{});
}
// Where pack v of a block begins.
template <class Pack, int Packs>
MMK_INLINE int64_t channel_of(int v, int64_t first, int64_t last) {
  return v == Packs - 1 ? last : first + v * Pack::count;
}

}  // namespace
}  // namespace mmk
