// What checks of channel and of additive attention share: random numbers, tensors in memory of exactly their size, a
// plain product, and a walk over random panels of rows.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/cuda/rows.h"
#include "emulator.h"

using namespace mmk;

namespace {

std::mt19937 engine;
int pick(int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(engine);
}
bool toss() {
  return pick(0, 1);
}
float normal() {
  return std::normal_distribution<float>()(engine);
}

Dtype dtype;
double worst;
int panels;

void differ(double expected, double found) {
  const double off = std::fabs(expected - found) / (1 + std::fabs(expected));
  if (!(off <= worst))
    worst = off == off ? off : INFINITY;
}

struct Floats {
  std::unique_ptr<float[]> data;
  explicit Floats(int64_t n, bool random = false) : data(new float[n]) {
    for (int64_t i = 0; i < n; ++i)
      data[i] = random ? normal() : NAN;
  }
  operator float*() const { return data.get(); }
};

// [B, N, C] with channels or positions next to each other, aligned to 16 bytes or not.
struct Rows {
  int64_t B, N, C, lead;
  bool transposed;
  std::unique_ptr<float[]> floats;
  std::unique_ptr<emulator::bf16[]> halves;
  Rows(int64_t B, int64_t N, int64_t C, bool random)
      : B(B), N(N), C(C), lead(toss() ? 0 : pick(1, 3)), transposed(toss()) {
    const int64_t all = B * N * C;
    if (dtype == Dtype::float32)
      floats.reset(new float[all + lead]);
    else
      halves.reset(new emulator::bf16[all + lead]);
    for (int64_t i = 0; i < all; ++i)
      put(i, random ? normal() : NAN);
  }
  void put(int64_t i, float x) { floats ? floats[lead + i] = x : (halves[lead + i] = emulator::bf16(x), x); }
  int64_t index(int64_t b, int64_t n, int64_t c) const {
    return transposed ? (b * C + c) * N + n : (b * N + n) * C + c;
  }
  double at(int64_t b, int64_t n, int64_t c) const {
    return floats ? floats[lead + index(b, n, c)] : float(halves[lead + index(b, n, c)]);
  }
  void* from(int64_t i) const {
    return floats ? static_cast<void*>(floats.get() + lead + i) : static_cast<void*>(halves.get() + lead + i);
  }
  operator SampleRows() const { return {from(0), N * C, transposed ? 1 : C, transposed ? N : 1}; }
};

// a [rows, inner] times b: [inner, columns], or transposed, [columns, inner].
void multiply(float* to, const float* a, const float* b, int64_t rows, int64_t inner, int64_t columns,
              bool transposed) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      double sum = 0;
      for (int64_t i = 0; i < inner; ++i)
        sum += double(a[r * inner + i]) * b[transposed ? c * inner + i : i * columns + c];
      to[r * columns + c] = float(sum);
    }
}

// f(panel, its rows in float) -> error.
template <class F>
const char* walk(const cuda::SampledRows& samples, const Rows& image, const Mask& mask, F f) {
  const int64_t D = image.C;
  const int64_t size = toss() ? pick(1, 9) : pick(1, 90);
  const bool view = !mask.data && !image.transposed && toss();
  panels += samples.rows > size;
  for (int64_t first = 0; first < samples.rows; first += size) {
    const int64_t count = std::min(size, samples.rows - first);
    cuda::Panel panel = cuda::panel_of(samples, first, count);
    Rows own(1, count, D, false);
    own.transposed = false;
    if (view)
      panel.image = image.from(first * D);
    else {
      panel.image = own.from(0);
      if (const char* error = cuda::gather_rows(dtype, samples, panel, image, mask, D, own.from(0), nullptr))
        return error;
    }
    panel.n = D;
    panel.c = 1;
    Floats x(count * D);
    for (int64_t i = 0; i < count * D; ++i)
      x[i] = dtype == Dtype::float32 ? static_cast<const float*>(panel.image)[i]
                                     : float(static_cast<const emulator::bf16*>(panel.image)[i]);
    if (const char* error = f(panel, x))
      return error;
  }
  return nullptr;
}

const char* sum_columns(const cuda::SampledRows& samples, const cuda::Panel& panel, const float* rows, int64_t step,
                        int64_t C, float* to) {
  Floats partial(cuda::columns_scratch(C));
  return cuda::sum_columns(samples, panel.first, panel.rows, rows, step, C, to, partial, nullptr);
}

#define TRY(call)                \
  if (const char* error_ = call) \
  return error_

}  // namespace
