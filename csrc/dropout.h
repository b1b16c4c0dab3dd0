// Dropout whose numbers are a function of where they are, so that backward, and every backend, draws them again
// (mmkernels/reference/dropout.py): hidden unit u of row r takes word u / quarter of Philox4x32-10's counter
// (u % quarter, r, which), quarter = a fourth of the units, rounded up; the key is the seed.
// Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3 (doi 10.1145/2063384.2063405).
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define MMK_ANYWHERE __host__ __device__ __forceinline__
#else
#define MMK_ANYWHERE inline __attribute__((always_inline))
#endif

namespace mmk {

struct Dropout {
  const int64_t* seed = nullptr;  // null: nothing is dropped
  uint32_t threshold = 0;         // words below it are
  double scale = 1;               // of what stays
};

// Which numbers: those of the activated hidden vector, or of the gate.
enum class Dropped : uint32_t { hidden, gate };

namespace {

// p from 0 to 1; of 1 nothing stays.
inline Dropout dropout_of(double p, const int64_t* seed) {
  const double threshold = p * 4294967296.0;
  return {seed, threshold < 4294967295.0 ? uint32_t(threshold) : 4294967295u, p < 1 ? 1 / (1 - p) : 0};
}

constexpr int64_t philox_words = 4;  // of a counter

MMK_ANYWHERE int64_t quarter_of(int64_t units) {
  return (units + philox_words - 1) / philox_words;
}

// A row's words of one counter.
MMK_ANYWHERE void philox(uint64_t seed, uint32_t counter, uint64_t row, Dropped which, uint32_t (&word)[philox_words]) {
  uint32_t a = counter, b = uint32_t(row), c = uint32_t(row >> 32), d = uint32_t(which);
  uint32_t k = uint32_t(seed), l = uint32_t(seed >> 32);
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p = uint64_t(a) * 0xD2511F53u;
    const uint64_t q = uint64_t(c) * 0xCD9E8D57u;
    a = uint32_t(q >> 32) ^ b ^ k;
    c = uint32_t(p >> 32) ^ d ^ l;
    b = uint32_t(q);
    d = uint32_t(p);
    k += 0x9E3779B9u;
    l += 0xBB67AE85u;
  }
  word[0] = a;
  word[1] = b;
  word[2] = c;
  word[3] = d;
}

}  // namespace
}  // namespace mmk
