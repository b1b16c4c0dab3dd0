// What the programs share that run a CPU kernel on random arguments, in memory that ends where the tensors do, for
// AddressSanitizer and UndefinedBehaviourSanitizer to watch. The kernels' results are compared elsewhere; here they
// must be finite, and written everywhere.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../csrc/cpu/simd.h"
#include "../../csrc/parallel.h"
#include "../../csrc/tensor.h"

using namespace mmk;

static std::mt19937 source;
static int64_t draw(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(source);
}

// A tensor in memory of its own: dimensions in random order, random gaps (but none if dense), nothing behind the last
// element.
template <class T>
struct Tensor {
  std::vector<T> memory;
  std::vector<int64_t> size, stride;
  Tensor(std::vector<int64_t> sizes, bool fill, bool dense = false) : size(sizes), stride(sizes.size()) {
    std::vector<int64_t> order(size.size());
    for (size_t i = 0; i < order.size(); ++i)
      order[i] = int64_t(i);
    if (!dense && draw(0, 2) == 0)
      std::shuffle(order.begin(), order.end(), source);
    int64_t step = dense || draw(0, 3) ? 1 : 2;
    int64_t last = 0;
    int64_t count = 1;
    for (size_t i = order.size(); i-- > 0;) {
      stride[order[i]] = step;
      last += (size[order[i]] - 1) * step;
      count *= size[order[i]];
      step = step * size[order[i]] + (dense || draw(0, 3) ? 0 : draw(0, 5));
    }
    memory.resize(count ? last + 1 : 0);
    for (T& x : memory)
      x = from_acc<T>(fill ? acc_t<T>(draw(-1000, 1000)) / 500 : acc_t<T>(NAN));
  }
  T* data() { return memory.data(); }
  // Every element is finite; `name` is told where one isn't.
  void check(const char* name) const {
    std::vector<int64_t> index(size.size(), 0);
    for (int64_t n : size)
      if (!n)
        return;
    for (;;) {
      int64_t at = 0;
      for (size_t i = 0; i < index.size(); ++i)
        at += index[i] * stride[i];
      if (!std::isfinite(double(to_acc(memory[at]))))
        std::printf("%s has an element that isn't finite\n", name), std::exit(1);
      size_t i = index.size();
      while (i > 0 && ++index[i - 1] == size[i - 1])
        index[--i] = 0;
      if (!i)
        return;
    }
  }
};

template <class T>
HeadRows head_rows(Tensor<T>& t) {
  return {t.data(), t.stride[0], t.stride[1], t.stride[2], t.stride[3]};
}

static std::vector<unsigned char> random_mask(int64_t count) {
  std::vector<unsigned char> mask(count);
  for (auto& m : mask)
    m = draw(0, 3) > 0;
  return mask;
}

static const Parallel three{3, [](int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
                              for (int64_t part = 2; part >= 0; --part)
                                if (count * part / 3 < count * (part + 1) / 3)
                                  body(context, count * part / 3, count * (part + 1) / 3);
                            }};

// round<T>(dtype) of every dtype, argv[1] times; argv[2]: seed.
#define FUZZ_MAIN                                                 \
  int main(int argc, char** argv) {                               \
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 100;       \
    source.seed(argc > 2 ? std::atoi(argv[2]) : 0);               \
    for (int i = 0; i < rounds; ++i) {                            \
      round<float>(Dtype::float32), round<bf16>(Dtype::bfloat16); \
      round<f16>(Dtype::float16), round<double>(Dtype::float64);  \
    }                                                             \
    std::printf("%d rounds\n", rounds);                           \
  }
