// Checks csrc/cpu/simd.h and activation.h for the instruction set that they were compiled for: exp, exp_below and the
// activations over the floats (every STEP-th), and the conversions of bfloat16 and float16 in both directions. Prints
// what is wrong and exits with 1. argv[1]: STEP.
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "../../csrc/cpu/activation.h"

using namespace mmk;

static int failures = 0;
#define EXPECT(condition, ...) \
  if (!(condition)) {          \
    std::printf(__VA_ARGS__);  \
    if (++failures > 20)       \
      std::exit(1);            \
  }

static bool same(float a, float b) {
  return ((a != a) & (b != b)) | (bit_cast<uint32_t>(a) == bit_cast<uint32_t>(b));
}

// So near 0, which is two of five floats, the first terms of a series are all that a double holds; libm takes longer.
static bool tiny(double x) {
  return std::fabs(x) < 0x1p-26;
}

static double true_exp(double x) {
  return tiny(x) ? 1 + x : std::exp(x);
}

// exp of doubles that mostly lie close beside each other, as neighbouring floats do: a series from the last one that
// libm was asked for, to a double's last bits.
struct NearbyExp {
  double from = NAN;
  double exp_from = NAN;

  double operator()(double x) {
    const double d = x - from;
    if (!(std::fabs(d) < 0x1p-12)) {
      from = x;
      return exp_from = true_exp(x);
    }
    return exp_from * (1 + d * (1 + d / 2 * (1 + d / 3)));
  }
};

static void check_exp(uint64_t step) {
  double worst = 0;
  NearbyExp nearby;
  for (uint64_t u = 0; u < (1ull << 32); u += step * lanes<float>) {
    vec<float> x;
    for (int i = 0; i < lanes<float>; ++i)
      x[i] = bit_cast<float>(uint32_t(u + i * step));
    vec<float> y = exp(x);
    for (int i = 0; i < lanes<float>; ++i) {
      float xi = x[i];
      float yi = y[i];
      if (xi != xi) {
        EXPECT(yi != yi, "exp(NaN) = %g\n", yi);
        continue;
      }
      if (xi < -87.5f) {
        EXPECT(yi == 0, "exp(%a) = %a, expected 0\n", xi, yi);
        continue;
      }
      if (xi > 88.73f) {
        EXPECT(std::isinf(yi), "exp(%a) = %a, expected Inf\n", xi, yi);
        continue;
      }
      double truth = nearby(xi);
      if (truth < 0x1p-126) {
        EXPECT(yi == 0 || yi == 0x1p-126f, "exp(%a) = %a\n", xi, yi);
        continue;
      }
      if (truth > 0x1.fffffep127)
        continue;
      double error = std::fabs(yi - truth) / truth;
      worst = error > worst ? error : worst;
      EXPECT(error < 0x1p-22, "exp(%a) = %a, expected %a\n", xi, yi, truth);
    }
  }
  std::printf("exp: relative error %.3g\n", worst);
}

static void check_exp_below(uint64_t step) {
  double worst = 0;
  NearbyExp nearby;
  for (uint64_t u = 0; u < (1ull << 32); u += step * lanes<float>) {
    vec<float> x;
    for (int i = 0; i < lanes<float>; ++i) {
      x[i] = bit_cast<float>(uint32_t(u + i * step));
      if (x[i] >= 88)
        x[i] = -x[i];  // it is for x < 88
    }
    vec<float> y = exp_below(x);
    for (int i = 0; i < lanes<float>; ++i) {
      float xi = x[i];
      float yi = y[i];
      if (xi != xi) {
        EXPECT(yi != yi, "exp_below(NaN) = %g\n", yi);
        continue;
      }
      if (xi < -87.7f) {
        EXPECT(yi == 0, "exp_below(%a) = %a, expected 0\n", xi, yi);
        continue;
      }
      double truth = nearby(xi);
      double error = std::fabs(yi - truth) / truth;
      EXPECT(error < (std::fabs(xi) > 30 ? 0x1p-21 : 0x1p-22) || xi < -87.3f, "exp_below(%a) = %a, expected %a\n", xi,
             yi, truth);
      EXPECT(xi > 0 || yi <= 1, "exp_below(%a) = %a\n", xi, yi);
      EXPECT(xi != 0 || yi == 1, "exp_below(0) = %a\n", yi);
      if (xi > -87)
        worst = error > worst ? error : worst;
    }
    EXPECT(same(exp_below(float(x[0])), y[0]), "exp_below(%a) of one float differs\n", float(x[0]));
  }
  std::printf("exp_below: relative error %.3g\n", worst);
}

static void check_activations(uint64_t step) {
  struct {
    double tanh = 0;
    double sigmoid = 0;
    double gelu = 0;
    double slope = 0;
  } worst;
  auto raise = [](double& most, double error) { most = error > most ? error : most; };
  for (uint64_t u = 0; u < (1ull << 32); u += step * lanes<float>) {
    vec<float> x, slope;
    for (int i = 0; i < lanes<float>; ++i)
      x[i] = bit_cast<float>(uint32_t(u + i * step));
    const vec<float> t = tanh(x), s = sigmoid<float>(x), g = activate<Activation::gelu, float>(x, slope);
    for (int i = 0; i < lanes<float>; ++i) {
      const double v = x[i];
      if (v != v) {
        EXPECT(t[i] != t[i] && s[i] != s[i] && g[i] != g[i], "an activation of NaN isn't NaN\n");
        continue;
      }
      const double density = 0.3989422804014327 * true_exp(-v * v / 2);
      const double tail = tiny(v) ? 0.5 + v * density : 0.5 * std::erfc(-v * M_SQRT1_2);
      const double th = tiny(v) ? v : std::tanh(v);
      const double size = std::fabs(v);
      if (std::isinf(v) || size > 1e4) {
        EXPECT(std::fabs(t[i]) == 1 && (s[i] == 0 || s[i] == 1), "tanh, sigmoid of %a are %a, %a\n", v, t[i], s[i]);
        continue;
      }
      if (size > 1e-30)
        raise(worst.tanh, std::fabs(t[i] - th) / std::fabs(th));
      raise(worst.sigmoid, std::fabs(s[i] - 1 / (1 + true_exp(-v))));
      raise(worst.gelu, std::fabs(g[i] - v * tail) / (size > 1 ? size : 1));
      raise(worst.slope, std::fabs(slope[i] - (tail + v * density)));
    }
  }
  EXPECT(worst.tanh < 0x1p-22 && worst.sigmoid < 0x1p-22 && worst.gelu < 0x1p-22 && worst.slope < 0x1p-21,
         "an activation is off\n");
  std::printf("tanh: relative error %.3g; sigmoid, gelu, its slope: error %.3g, %.3g, %.3g\n", worst.tanh,
              worst.sigmoid, worst.gelu, worst.slope);
}

constexpr int BLOCK = 64;  // floats that are looked at together, in loops that the compiler makes vectors of

static void check_same(const char* what, const float* of, const float* found, const float* expected) {
  int equal = 0;
  for (int i = 0; i < BLOCK; ++i)
    equal += same(found[i], expected[i]);
  for (int i = 0; equal < BLOCK && i < BLOCK; ++i)
    EXPECT(same(found[i], expected[i]), "%s of %a is %a, expected %a\n", what, of[i], found[i], expected[i]);
}

// Single elements are what they should be, and vectors do as single elements do.
template <class T>
static void check_block(const char* const (&names)[3], const float* x, const float* expected) {
  T one[BLOCK], vectors[BLOCK];
  float narrowed[BLOCK], narrowed_together[BLOCK], widened_together[BLOCK];
  for (int i = 0; i < BLOCK; ++i) {
    one[i] = from_acc<T>(x[i]);
    narrowed[i] = to_acc(one[i]);
  }
  for (int i = 0; i < BLOCK; i += lanes<float>) {
    store(vectors + i, load(x + i));
    store(widened_together + i, load(static_cast<const T*>(vectors) + i));
  }
  for (int i = 0; i < BLOCK; ++i)
    narrowed_together[i] = to_acc(vectors[i]);
  check_same(names[0], x, narrowed, expected);
  check_same(names[1], x, narrowed_together, narrowed);
  check_same(names[2], x, widened_together, narrowed_together);
}

static void check_conversions(uint64_t step) {
  for (uint32_t u = 0; u < 65536; ++u) {
    _Float16 h = bit_cast<_Float16>(uint16_t(u));
    EXPECT(same(to_acc(f16{uint16_t(u)}), float(h)), "f16 %04x is %a, expected %a\n", u, to_acc(f16{uint16_t(u)}),
           float(h));
    EXPECT(same(to_acc(bf16{uint16_t(u)}), bit_cast<float>(u << 16)), "bf16 %04x\n", u);
  }
  float x[BLOCK], half[BLOCK], brain[BLOCK];
  for (uint64_t u = 0; u < (1ull << 32); u += step * BLOCK) {
    for (int i = 0; i < BLOCK; ++i) {
      const uint32_t bits = uint32_t(u + i * step);
      x[i] = bit_cast<float>(bits);
      half[i] = float(_Float16(x[i]));
      // bfloat16: the nearer neighbour, the even one of two; beyond the largest, Inf as if it were the next number.
      const uint32_t rest = bits & 0xffff;
      const bool up = rest > 0x8000 || (rest == 0x8000 && (bits >> 16 & 1));
      brain[i] = x[i] != x[i] ? x[i] : bit_cast<float>((bits & 0xffff0000u) + (up ? 0x10000u : 0));
    }
    check_block<f16>({"f16", "f16 vector", "f16 load"}, x, half);
    check_block<bf16>({"bf16", "bf16 vector", "bf16 load"}, x, brain);
  }
}

static void check_sums() {
  float a[4 * 16];
  double b[4 * 16];
  for (int i = 0; i < 64; ++i)
    a[i] = float(i * i % 37), b[i] = i * i % 41;
  auto check = [](auto* values) {
    using C = std::remove_reference_t<decltype(*values)>;
    vec<C> v[4];
    C sums[4];
    for (int i = 0; i < 4; ++i)
      v[i] = load(static_cast<const C*>(values) + i * lanes<C>);
    sum4<C>(v, sums);
    for (int i = 0; i < 4; ++i) {
      C expected = 0;
      for (int j = 0; j < lanes<C>; ++j)
        expected += values[i * lanes<C> + j];
      EXPECT(sums[i] == expected && sum<C>(v[i]) == expected, "sum %g %g, expected %g\n", double(sums[i]),
             double(sum<C>(v[i])), double(expected));
    }
  };
  check(a);
  check(b);
}

int main(int argc, char** argv) {
  uint64_t step = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  check_sums();
  check_exp(step);
  check_exp_below(step);
  check_activations(step == 1 ? 16 : step);  // libm takes its time
  check_conversions(step | 1);
  return failures != 0;
}
