// Vectors of MMK_VECTOR_BYTES bytes by GCC/Clang vector extensions, the dtypes, and exp. Everything has internal
// linkage: this header is compiled once per instruction set, and no copy may be picked by the linker for another.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>  // integral_constant only
#include <utility>      // index_sequence only
#if defined(__F16C__) || defined(__AVX512F__) || defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef MMK_VECTOR_BYTES
#define MMK_VECTOR_BYTES 16
#endif
#define MMK_INLINE inline __attribute__((always_inline))

namespace mmk {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The type that sums run in.
template <class T>
struct accumulate {
  using type = float;
};
template <>
struct accumulate<double> {
  using type = double;
};
template <class T>
using acc_t = typename accumulate<T>::type;

template <class C>
struct vector_of {
  typedef C type __attribute__((vector_size(MMK_VECTOR_BYTES)));
};
template <class C>
using vec = typename vector_of<C>::type;
template <class C>
constexpr int64_t lanes = MMK_VECTOR_BYTES / sizeof(C);
typedef uint16_t vec_u16 __attribute__((vector_size(MMK_VECTOR_BYTES / 2)));  // as many as a vec<float> has lanes

template <class To, class From>
MMK_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class C>
MMK_INLINE vec<C> splat(C value) {
  return value - vec<C>{};
}

// f of a constant.
template <class F>
MMK_INLINE void with_flag(bool flag, F f) {
  if (flag)
    f(std::true_type{});
  else
    f(std::false_type{});
}

// One element -------------------------------------------------------------------------------------------------------

MMK_INLINE float to_acc(float x) {
  return x;
}
MMK_INLINE double to_acc(double x) {
  return x;
}
MMK_INLINE float to_acc(bf16 x) {
  return bit_cast<float>(uint32_t(x.bits) << 16);
}
MMK_INLINE float to_acc(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Shift the exponent into place and let a multiplication rebias it, subnormals included; Inf and NaN apart.
  uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  float value = bit_cast<float>(magnitude) * 0x1p112f;
  uint32_t bits = magnitude >= (0x7c00u << 13) ? magnitude | 0x7f800000u : bit_cast<uint32_t>(value);
  return bit_cast<float>(bits | sign);
#endif
}

template <class T>
MMK_INLINE T from_acc(acc_t<T> x);
template <>
MMK_INLINE float from_acc<float>(float x) {
  return x;
}
template <>
MMK_INLINE double from_acc<double>(double x) {
  return x;
}
template <>
MMK_INLINE bf16 from_acc<bf16>(float x) {
  uint32_t u = bit_cast<uint32_t>(x);
  if (x != x)
    return {uint16_t((u >> 16) | 0x40)};
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
template <>
MMK_INLINE f16 from_acc<f16>(float x) {
#if defined(__F16C__)
  return {uint16_t(_cvtss_sh(x, 0))};
#else
  uint32_t u = bit_cast<uint32_t>(x), sign = (u >> 16) & 0x8000;
  u &= 0x7fffffff;
  if (u > 0x7f800000)
    return {uint16_t(sign | 0x7e00)};
  if (u >= 0x477ff000)
    return {uint16_t(sign | 0x7c00)};
  if (u < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded integer in the low bits
    float shifted = bit_cast<float>(u) + 0.5f;
    return {uint16_t(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000))};
  }
  return {uint16_t(sign | ((u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13))};
#endif
}

// A vector of consecutive elements ------------------------------------------------------------------------------------

template <class C>
MMK_INLINE vec<C> load(const C* p) {
  vec<C> v;
  memcpy(&v, p, sizeof v);
  return v;
}
MMK_INLINE vec<uint32_t> widen(vec_u16 h) {
#if defined(__AVX512F__) && MMK_VECTOR_BYTES == 64
  return bit_cast<vec<uint32_t>>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(h)));  // GCC alone takes seven instructions
#elif defined(__AVX2__) && MMK_VECTOR_BYTES == 32
  return bit_cast<vec<uint32_t>>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(h)));
#else
  return __builtin_convertvector(h, vec<uint32_t>);
#endif
}
MMK_INLINE vec<float> load(const bf16* p) {
  vec_u16 h;
  memcpy(&h, p, sizeof h);
  return bit_cast<vec<float>>(widen(h) << 16);
}
MMK_INLINE vec<float> load(const f16* p) {
#if defined(__AVX512F__) && MMK_VECTOR_BYTES == 64
  return bit_cast<vec<float>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__) && MMK_VECTOR_BYTES == 32
  return bit_cast<vec<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  vec<float> v;
  for (int i = 0; i < lanes<float>; ++i)
    v[i] = to_acc(p[i]);
  return v;
#endif
}

template <class C>
MMK_INLINE void store(C* p, vec<C> v) {
  memcpy(p, &v, sizeof v);
}
MMK_INLINE vec_u16 round_bf16(vec<float> v) {
  vec<uint32_t> u = bit_cast<vec<uint32_t>>(v);
  vec<uint32_t> rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  rounded = v == v ? rounded : ((u >> 16) | 0x40);
  return __builtin_convertvector(rounded, vec_u16);
}
MMK_INLINE void store(bf16* p, vec<float> v) {
  vec_u16 h = round_bf16(v);
  memcpy(p, &h, sizeof h);
}
MMK_INLINE void store(f16* p, vec<float> v) {
#if defined(__AVX512F__) && MMK_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(bit_cast<__m512>(v), 0));
#elif defined(__F16C__) && MMK_VECTOR_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(bit_cast<__m256>(v), 0));
#else
  for (int i = 0; i < lanes<float>; ++i)
    p[i] = from_acc<f16>(v[i]);
#endif
}

// Writes past the cache: the line is neither fetched nor kept. p must be aligned to lanes * sizeof(T); end with
// fence().
template <class T>
MMK_INLINE void stream(T* p, vec<acc_t<T>> v) {
  constexpr int bytes = lanes<acc_t<T>> * sizeof(T);
  alignas(64) char buffer[bytes];
  store(reinterpret_cast<T*>(buffer), v);
  (void)buffer;
#if defined(__AVX512F__) && MMK_VECTOR_BYTES == 64
  if constexpr (bytes == 64)
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), *reinterpret_cast<__m512i*>(buffer));
#endif
#if defined(__AVX__)
  if constexpr (bytes == 32)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), *reinterpret_cast<__m256i*>(buffer));
#endif
#if defined(__SSE2__)
  if constexpr (bytes == 16)
    return _mm_stream_si128(reinterpret_cast<__m128i*>(p), *reinterpret_cast<__m128i*>(buffer));
#endif
  memcpy(p, buffer, bytes);
}
MMK_INLINE void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Elements `stride` apart; the loop over a known number of lanes becomes inserts.
template <class T>
MMK_INLINE vec<acc_t<T>> gather(const T* p, int64_t stride) {
  vec<acc_t<T>> v;
  for (int64_t i = 0; i < lanes<acc_t<T>>; ++i)
    v[i] = to_acc(p[i * stride]);
  return v;
}
template <class T>
MMK_INLINE void scatter(T* p, int64_t stride, vec<acc_t<T>> v) {
  for (int64_t i = 0; i < lanes<acc_t<T>>; ++i)
    p[i * stride] = from_acc<T>(v[i]);
}

// A square of vectors, transposed: in each step neighbours `Distance` apart exchange the halves of their parts.
// Recursion: the indices have to be constants.
template <int64_t Distance, class V, size_t... I>
MMK_INLINE void exchange(V& a, V& b, std::index_sequence<I...>) {
  constexpr int64_t n = sizeof...(I);
  const V low = __builtin_shufflevector(a, b, (int64_t(I) & Distance ? int64_t(I) - Distance + n : int64_t(I))...);
  b = __builtin_shufflevector(a, b, (int64_t(I) & Distance ? int64_t(I) + n : int64_t(I) + Distance)...);
  a = low;
}
template <class C, int64_t Distance = lanes<C> / 2>
MMK_INLINE void transpose(vec<C>* square) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < lanes<C>; ++i)
    if (!(i & Distance))
      exchange<Distance>(square[i], square[i + Distance], std::make_index_sequence<lanes<C>>{});
  if constexpr (Distance > 1)
    transpose<C, Distance / 2>(square);
}

// Reductions: halves are added, always in the same order.
// -----------------------------------------------------------------

// a and b cut into parts of `Part` lanes: the even parts of both plus their odd parts. Half of the lanes are then a's,
// half b's.
template <int64_t Part, class V, size_t... I>
MMK_INLINE V fold_pair(V a, V b, std::index_sequence<I...>) {
  constexpr int64_t n = sizeof...(I);
  V even = __builtin_shufflevector(
      a, b, (int64_t(I) / Part * 2 * Part % n + int64_t(I) % Part + (int64_t(I) >= n / 2 ? n : 0))...);
  V odd = __builtin_shufflevector(
      a, b, (int64_t(I) / Part * 2 * Part % n + int64_t(I) % Part + Part + (int64_t(I) >= n / 2 ? n : 0))...);
  return even + odd;
}

// The lanes `Distance` away, within each part of twice that.
template <int64_t Distance, class V, size_t... I>
MMK_INLINE V fold_within(V v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, (int64_t(I) ^ Distance)...);
}

template <class C>
MMK_INLINE C sum(vec<C> v) {
  constexpr auto all = std::make_index_sequence<lanes<C>>{};
  if constexpr (lanes<C> >= 16)
    v += fold_within<8>(v, all);
  if constexpr (lanes<C> >= 8)
    v += fold_within<4>(v, all);
  if constexpr (lanes<C> >= 4)
    v += fold_within<2>(v, all);
  return v[0] + v[1];
}

// The sums of four vectors with half the shuffles of four sums.
template <class C>
MMK_INLINE void sum4(const vec<C> (&v)[4], C (&sums)[4]) {
  constexpr int64_t n = lanes<C>;
  if constexpr (n < 4) {
    for (int i = 0; i < 4; ++i)
      sums[i] = sum<C>(v[i]);
  } else {
    constexpr auto all = std::make_index_sequence<n>{};
    vec<C> w = fold_pair<n / 4>(fold_pair<n / 2>(v[0], v[1], all), fold_pair<n / 2>(v[2], v[3], all), all);
    if constexpr (n >= 16)
      w += fold_within<2>(w, all);
    if constexpr (n >= 8)
      w += fold_within<1>(w, all);
    for (int i = 0; i < 4; ++i)
      sums[i] = w[i * (n / 4)];
  }
}
template <class C>
MMK_INLINE C maximum(C a, C b) {
  return a < b ? b : a;
}
template <class C>
MMK_INLINE vec<C> maximum(vec<C> a, vec<C> b) {
  return a < b ? b : a;
}
template <int64_t Distance, class C, size_t... I>
MMK_INLINE vec<C> max_within(vec<C> v, std::index_sequence<I...> all) {
  v = maximum<C>(v, __builtin_shufflevector(v, v, (int64_t(I) ^ Distance)...));
  if constexpr (Distance > 1)
    return max_within<Distance / 2, C>(v, all);
  else
    return v;
}
template <class C>
MMK_INLINE C max(vec<C> v) {
  return max_within<lanes<C> / 2, C>(v, std::make_index_sequence<lanes<C>>{})[0];
}

// exp ---------------------------------------------------------------------------------------------------------------
// x = n ln 2 + r, |r| <= ln 2 / 2; a polynomial in r, then 2^n in two factors so that every n is exact. Relative error
// below 2^-22 where the result is normal; results under 2^-126 are 0; +Inf, -Inf and NaN give +Inf, 0 and NaN.
// tests/native checks every float.
MMK_INLINE vec<float> exp(vec<float> x) {
  const vec<float> shifter = splat(0x1.8p23f);
  vec<float> clamped = x > 89.f ? splat(89.f) : x < -104.f ? splat(-104.f) : x;
  vec<float> n = (clamped * 0x1.715476p0f + shifter) - shifter;
  vec<float> r = clamped - n * 0x1.62e4p-1f;  // ln 2 in two parts: n times the first one is exact
  r = r - n * 0x1.7f7d1cp-20f;
  vec<float> p = splat(0x1.6a2434p-10f);  // minimax for (exp(r) - 1 - r) / r^2, relative error 2^-28
  p = p * r + 0x1.1239e2p-7f;
  p = p * r + 0x1.5558f2p-5f;
  p = p * r + 0x1.555492p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = (p * r) * r + r;  // exp(r) - 1
  p = p + 1.f;
  vec<int32_t> k = __builtin_convertvector(n == n ? n : vec<float>{}, vec<int32_t>);
  vec<int32_t> half = k >> 1;
  vec<float> y = p * bit_cast<vec<float>>((half + 127) << 23) * bit_cast<vec<float>>((k - half + 127) << 23);
  return y < 0x1p-126f ? vec<float>{} : y;
}
MMK_INLINE vec<double> exp(vec<double> x) {  // few are needed, libm's are right to the last bit
  vec<double> y;
  for (int64_t i = 0; i < lanes<double>; ++i)
    y[i] = __builtin_exp(x[i]);
  return y;
}

// e^x for x < 88, what softmax needs of scores below their maximum: exact for 0, relative error below 2^-22, beyond 30
// 2^-21; below -87.7 it is 0; -Inf and NaN give 0 and NaN. As many instructions as a power of 2. tests/native checks
// every float.
MMK_INLINE vec<float> exp_below(vec<float> x) {
  const vec<float> shifter = splat(0x1.8p23f);
  x = x < -88.f ? splat(-88.f) : x;                  // there the power below is 0
  vec<float> shifted = x * 0x1.715476p0f + shifter;  // its last bits are n, the whole number next to x / ln 2
  vec<float> n = shifted - shifter;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  vec<float> r = x - n * 0x1.62e43p-1f;  // not rounded in between
#else
  vec<float> r = x - n * 0x1.62e4p-1f;  // ln 2 in two parts: n times the first one is exact
  r = r - n * 0x1.7f7d1cp-20f;
#endif
  vec<float> p = splat(0x1.0fa7d8p-7f);  // minimax for (exp(r) - 1) / r, |r| <= ln 2 / 2, relative error of exp 2^-23.3
  p = p * r + 0x1.573adp-5f;
  p = p * r + 0x1.555a72p-3f;
  p = p * r + 0x1.fffdc4p-2f;
  p = p * r + 0x1.fffff6p-1f;
  p = p * r + 1.f;
  return p * bit_cast<vec<float>>((bit_cast<vec<uint32_t>>(shifted) << 23) + (127u << 23));
}
MMK_INLINE vec<double> exp_below(vec<double> x) {
  return exp(x);
}
MMK_INLINE double exp_below(double x) {
  return __builtin_exp(x);
}
MMK_INLINE float exp_below(float x) {
  return exp_below(splat(x))[0];
}

MMK_INLINE double exp(double x) {
  return __builtin_exp(x);
}
MMK_INLINE float exp(float x) {
  return exp(splat(x))[0];
}

}  // namespace
}  // namespace mmk
