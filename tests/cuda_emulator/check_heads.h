// What the programs share that run attention over heads on random arguments: tensors in memory of exactly their size,
// and the plain loops.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/tensor.h"
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

int64_t B, H, d, dv;
Dtype dtype;
double worst;

void differ(double expected, double found) {
  const double off = std::fabs(expected - found) / (1 + std::fabs(expected));
  if (!(off <= worst))
    worst = off == off ? off : INFINITY;
}

// [B, H, n, c] in memory of exactly its size, in one of three layouts, aligned to 16 bytes or not.
struct Heads {
  int64_t n, c, lead, strides[4];
  std::unique_ptr<float[]> floats;
  std::unique_ptr<emulator::bf16[]> halves;
  Heads(int64_t n, int64_t c, bool random) : Heads(n, c, random, H, dtype) {}
  Heads(int64_t n, int64_t c, bool random, int64_t heads, Dtype type) : n(n), c(c), lead(pick(0, 2) ? 0 : pick(1, 3)) {
    const int layout = pick(0, 2);
    strides[0] = heads * n * c;
    strides[1] = layout == 1 ? c : n * c;
    strides[2] = layout == 0 ? c : layout == 1 ? heads * c : 1;
    strides[3] = layout == 2 ? n : 1;
    const int64_t all = B * heads * n * c;
    if (type == Dtype::float32)
      floats.reset(new float[all + lead]);
    else
      halves.reset(new emulator::bf16[all + lead]);
    for (int64_t i = 0; i < all; ++i)
      put(i, random ? normal() : NAN);
  }
  void put(int64_t i, float x) { floats ? floats[lead + i] = x : (halves[lead + i] = emulator::bf16(x), x); }
  double at(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const int64_t k = lead + b * strides[0] + h * strides[1] + i * strides[2] + j * strides[3];
    return floats ? floats[k] : float(halves[k]);
  }
  void forget(int64_t b, int64_t h, int64_t i) {
    for (int64_t j = 0; j < c; ++j)
      put(b * strides[0] + h * strides[1] + i * strides[2] + j * strides[3], NAN);
  }
  operator HeadRows() const {
    void* data = floats ? static_cast<void*>(floats.get() + lead) : static_cast<void*>(halves.get() + lead);
    return {data, strides[0], strides[1], strides[2], strides[3]};
  }
};

struct Floats {
  std::unique_ptr<float[]> data;
  explicit Floats(int64_t n) : data(new float[n]) {
    for (int64_t i = 0; i < n; ++i)
      data[i] = NAN;
  }
  operator float*() const { return data.get(); }
};

struct Flags {
  std::unique_ptr<bool[]> data;
  explicit Flags(int64_t n) : data(new bool[n]) {
    for (int64_t i = 0; i < n; ++i)
      data[i] = pick(0, 3);
  }
};

using Matrix = std::vector<double>;

// Weights of rows over columns; takes(i, j) tells who attends.
template <class Takes>
Matrix softmax(const Matrix& s, int64_t rows, int64_t columns, Takes takes) {
  Matrix w(rows * columns, 0);
  for (int64_t i = 0; i < rows; ++i) {
    double top = -INFINITY;
    double total = 0;
    for (int64_t j = 0; j < columns; ++j)
      if (takes(i, j))
        top = std::fmax(top, s[i * columns + j]);
    for (int64_t j = 0; j < columns; ++j)
      if (takes(i, j))
        total += w[i * columns + j] = std::exp(s[i * columns + j] - top);
    for (int64_t j = 0; j < columns; ++j)
      if (total > 0)
        w[i * columns + j] /= total;
  }
  return w;
}

template <class Arguments>
const char* run(const Arguments& a, const char* (*launch)(const Arguments&, float*, void*),
                int64_t (*floats)(const Arguments&)) {
  Floats scratch(floats(a));
  return launch(a, scratch, nullptr);
}

// Of one head: ds from weights and upstream, in place of dp.
void through_softmax(const Matrix& w, Matrix& dp, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < columns; ++j)
      sum += w[i * columns + j] * dp[i * columns + j];
    for (int64_t j = 0; j < columns; ++j)
      dp[i * columns + j] = w[i * columns + j] * (dp[i * columns + j] - sum);
  }
}

// Case by case; 2 where one is wrong. `attempt` returns null or what went wrong, and leaves `worst`.
template <class Attempt>
int check_cases(char** arguments, Attempt attempt) {
  const int seed = atoi(arguments[1]);
  const int cases = atoi(arguments[2]);
  bool right = true;
  int refused = 0;
  for (int i = seed; i < seed + cases; ++i) {
    engine.seed(i);
    worst = 0;
    const char* error = attempt();
    if (error && strstr(error, "too little"))
      ++refused;  // so little shared memory has no device
    else if (error)
      right = false, printf("case %d: %s\n", i, error);
    else if (worst > (dtype == Dtype::float32 ? 1e-3 : 0.1))
      right = false, printf("case %d: off by %g\n", i, worst);
  }
  printf("%llu blocks, %d cases refused\n", (unsigned long long)emulator::counts.blocks, refused);
  return right ? 0 : 2;
}

}  // namespace
