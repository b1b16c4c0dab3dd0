// Dropout's numbers in vectors: as many counters at once as a vector has 64-bit lanes.
#pragma once
#include "../dropout.h"

#include "simd.h"

namespace mmk {
namespace {

typedef uint32_t vec_half __attribute__((vector_size(MMK_VECTOR_BYTES / 2)));  // as many as a vec<uint64_t> has lanes

// Each lane's lower half times y.
MMK_INLINE vec<uint64_t> multiply_lower(vec<uint64_t> x, uint32_t y) {
#if defined(__AVX512F__) && MMK_VECTOR_BYTES == 64
  return vec<uint64_t>(_mm512_mul_epu32(__m512i(x), _mm512_set1_epi64(y)));
#elif defined(__AVX2__) && MMK_VECTOR_BYTES == 32
  return vec<uint64_t>(_mm256_mul_epu32(__m256i(x), _mm256_set1_epi64x(y)));
#elif defined(__SSE2__) && MMK_VECTOR_BYTES == 16
  return vec<uint64_t>(_mm_mul_epu32(__m128i(x), _mm_set1_epi64x(y)));
#else
  return (x & splat<uint64_t>(0xFFFFFFFFu)) * uint64_t(y);
#endif
}

// As philox of ../dropout.h, of lane i with counter + i; the words are the lanes' lower halves, the upper ones nothing.
MMK_INLINE void philox(uint64_t seed, uint32_t counter, uint64_t row, Dropped which,
                       vec<uint64_t> (&word)[philox_words]) {
  vec<uint64_t> a = splat<uint64_t>(counter), b = splat<uint64_t>(row), c = splat<uint64_t>(row >> 32);
  vec<uint64_t> d = splat<uint64_t>(uint64_t(which));
  for (int64_t i = 0; i < lanes<uint64_t>; ++i)
    a[i] += uint64_t(i);
  uint32_t k = uint32_t(seed), l = uint32_t(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const vec<uint64_t> p = multiply_lower(a, 0xD2511F53u);
    const vec<uint64_t> q = multiply_lower(c, 0xCD9E8D57u);
    a = (q >> 32) ^ b ^ splat<uint64_t>(k);
    c = (p >> 32) ^ d ^ splat<uint64_t>(l);
    b = q;
    d = p;
    k += 0x9E3779B9u;
    l += 0xBB67AE85u;
  }
  word[0] = a;
  word[1] = b;
  word[2] = c;
  word[3] = d;
}

// What a row's units are multiplied with, 0 or the scale of what stays; up to philox_words - 1 beyond them, too.
template <class C>
inline void draw_factors(const Dropout& dropout, int64_t row, Dropped which, int64_t units, C* to) {
  using bits = std::conditional_t<sizeof(C) == 8, uint64_t, uint32_t>;
  constexpr int64_t at_once = lanes<uint64_t>;
  const uint64_t seed = uint64_t(*dropout.seed);
  const int64_t quarter = quarter_of(units);
  const uint32_t threshold = dropout.threshold;
  const C scale = C(dropout.scale);
  const vec<int64_t> scale_bits = splat<int64_t>(int64_t(bit_cast<bits>(scale)));
  int64_t j = 0;
  for (; j + at_once <= quarter; j += at_once) {
    vec<uint64_t> word[philox_words];
    philox(seed, uint32_t(j), uint64_t(row), which, word);
    for (int64_t w = 0; w < philox_words; ++w) {
      const vec<int64_t> drawn = vec<int64_t>(word[w] & splat<uint64_t>(0xFFFFFFFFu));
      const vec<int64_t> factor = (drawn >= splat<int64_t>(threshold)) & scale_bits;
      if constexpr (sizeof(C) == 8) {
        memcpy(to + w * quarter + j, &factor, sizeof factor);
      } else {
        const vec_half narrow = __builtin_convertvector(factor, vec_half);
        memcpy(to + w * quarter + j, &narrow, sizeof narrow);
      }
    }
  }
  for (; j < quarter; ++j) {
    uint32_t word[philox_words];
    philox(seed, uint32_t(j), uint64_t(row), which, word);
    for (int64_t w = 0; w < philox_words; ++w)
      to[w * quarter + j] = word[w] < threshold ? C(0) : scale;
  }
}

}  // namespace
}  // namespace mmk
