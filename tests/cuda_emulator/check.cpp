// Runs the CUDA kernels of spatial attention on random small arguments and compares with plain loops in double: check
// SEED CASES. Built with ThreadSanitizer and AddressSanitizer, too: every tensor has memory of exactly its size.
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/cuda/spatial_attention.h"
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

struct Memory {  // of floats: not a byte more behind, and aligned to 16 bytes or not
  std::unique_ptr<float[]> data;
  int64_t lead;
  explicit Memory(int64_t n, bool random = false, int64_t lead = 0) : data(new float[n + lead]), lead(lead) {
    for (int64_t i = 0; i < n; ++i)
      data[lead + i] = random ? normal() : NAN;
  }
  operator float*() const { return data.get() + lead; }
};

bool check(int number) {
  const bool packed = pick(0, 2) == 0;
  const bool pool = toss();
  const bool planes = !packed && toss();
  const bool tiles = pick(0, 5);  // most
  const int64_t H = pick(0, 3) ? pick(1, 3) : pick(4, 20);
  const bool wide = pick(0, 3) == 0;  // rows of many packs
  const int64_t D = H * (wide ? 4 * pick(1, H > 3 ? 16 : 300) : pick(1, H > 3 ? 6 : 30));
  const int64_t B = pick(1, 4);
  emulator::config = {pick(0, 4),
                      unsigned(pick(0, 99)),
                      toss(),
                      (toss() ? pick(5, 10) : pick(10, 40)) * 1000,
                      toss() ? pick(1, 6) : pick(1, 60),
                      int64_t(1) << pick(0, 3),  // few processors: clusters are used
                      tiles};
  std::vector<int64_t> offsets{0};
  int64_t N = wide || (H < 4 && pick(0, 3)) ? pick(0, 40) : pick(0, 400);
  if (packed)
    for (int64_t b = 0; b < B; ++b)
      offsets.push_back(offsets.back() + (wide || toss() ? pick(0, 9) : pick(0, 200)));
  else
    for (int64_t b = 0; b < B; ++b)
      offsets.push_back(offsets.back() + N);
  const int64_t rows = offsets.back();

  SpatialAttention a;
  a.B = B;
  a.X = packed ? rows : N;
  a.D = D;
  a.H = H;
  a.scale = 0.3;
  a.pool = pool;
  a.rescale = toss();
  auto features = [&](float* data) {
    return planes ? Features{data, N * D, 0, 1, N} : Features{data, packed ? 0 : N * D, 0, D, 1};
  };
  const int64_t lead = toss() ? 0 : pick(1, 3);  // elements from a boundary of 16 bytes
  Memory image(rows * D, true, lead), text(B * D, true), weights(rows * H),
      result(pool ? B * D : rows * D, false, toss() ? lead : 0);
  std::unique_ptr<bool[]> mask(new bool[rows]);
  for (int64_t i = 0; i < rows; ++i)
    mask[i] = pick(0, 3);
  a.image = features(image), a.text = {text, D, 1};
  if (toss()) {
    a.mask = {mask.get(), packed ? 0 : N, 0, 1};
    for (int64_t i = 0; i < rows; ++i)  // what is masked is NaN
      for (int64_t d = 0; d < D && !mask[i]; ++d)
        image[planes ? (i / N * D + d) * N + i % N : i * D + d] = NAN;
  }
  if (packed)
    a.offsets = offsets.data();
  a.weights = weights;
  pool ? void(a.pooled = {result, D, 1}) : void(a.result = features(result));
  const char* error;
  {
    Memory scratch(cuda::spatial_attention_scratch(a));
    error = cuda::spatial_attention_forward(a, scratch, nullptr);
  }
  if (error && strstr(error, "beyond"))
    return true;  // so little shared memory has no device
  if (error)
    return printf("case %d: forward: %s\n", number, error), false;

  SpatialAttentionBackward g;
  Memory grad_output(pool ? B * D : rows * D, true, lead), grad_weights(rows * H, true), scores(rows * H),
      grad_image(rows * D, false, toss() ? lead : 0), grad_text(B * D);
  g.forward = a;
  const int flows = pick(1, 3);  // bit 0: a gradient of the result, bit 1: of the weights
  if (flows & 1)
    pool ? void(g.grad_pooled = {grad_output, D, 1}) : void(g.grad_result = features(grad_output));
  if (flows & 2)
    g.grad_weights = grad_weights;
  g.grad_scores = scores;
  const int wanted = pick(1, 3);
  if (wanted & 1)
    g.grad_image = features(grad_image);
  if (wanted & 2)
    g.grad_text = {grad_text, D, 1};
  {
    Memory scratch(cuda::spatial_attention_scratch(g));
    error = cuda::spatial_attention_backward(g, scratch, nullptr);
  }
  if (error && strstr(error, "beyond"))
    return true;
  if (error)
    return printf("case %d: backward: %s\n", number, error), false;

  if (packed &&
      pick(0, 3) == 0) {  // offsets that are no offsets: nothing to compare, but nothing may be touched either
    for (int64_t& o : offsets)
      o = toss() ? pick(-300, 900) : toss() ? INT64_MIN + pick(0, 9) : INT64_MAX - pick(0, 9);
    Memory scratch(cuda::spatial_attention_scratch(a)), other(cuda::spatial_attention_scratch(g));
    error = cuda::spatial_attention_forward(a, scratch, nullptr);
    if (!error)
      error = cuda::spatial_attention_backward(g, other, nullptr);
    if (error)
      printf("case %d: wrong offsets: %s\n", number, error);
    return !error;
  }

  double worst = 0;
  auto differ = [&](double expected, float found) {
    double off = std::fabs(expected - found);
    if (!(off <= worst))
      worst = off == off ? off : INFINITY;
  };
  const int64_t W = D / H;
  std::vector<double> pooled(B * D), dtext(B * D);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t first = offsets[b];
    const int64_t count = offsets[b + 1] - first;
    auto kept = [&](int64_t n) { return !a.mask.data || mask[first + n]; };
    auto at = [&](const float* data, int64_t n, int64_t d) {
      return data == image && !kept(n) ? 0 : double(planes ? data[(b * D + d) * N + n] : data[(first + n) * D + d]);
    };
    double positions = 0;
    for (int64_t n = 0; n < count; ++n)
      positions += kept(n);
    for (int64_t h = 0; h < H; ++h) {
      auto weight_at = [&](int64_t n) { return packed ? h * rows + first + n : (b * H + h) * N + n; };
      std::vector<double> w(count), dw(count);
      double top = -INFINITY;
      double total = 0;
      double mean = 0;
      double mass = 0;
      for (int64_t n = 0; n < count; ++n) {
        for (int64_t d = h * W; d < (h + 1) * W; ++d)
          w[n] += a.scale * at(image, n, d) * text[b * D + d];
        if (kept(n))
          top = std::fmax(top, w[n]);
      }
      for (int64_t n = 0; n < count; ++n)
        w[n] = kept(n) ? std::exp(w[n] - top) : 0, total += w[n];
      for (int64_t n = 0; n < count; ++n) {
        if (total != 0)
          w[n] *= (a.rescale ? positions : 1) / total;
        differ(w[n], weights[weight_at(n)]);
        for (int64_t d = h * W; d < (h + 1) * W; ++d) {
          pooled[b * D + d] += w[n] * at(image, n, d);
          if (!pool)
            differ(w[n] * at(image, n, d), float(at(result, n, d)));
          if (flows & 1)
            dw[n] += at(image, n, d) * (pool ? grad_output[b * D + d] : at(grad_output, n, d));
        }
        if (flows & 2)
          dw[n] += grad_weights[weight_at(n)];
        mean += w[n] * dw[n];
        mass += w[n];
      }
      if (mass != 0)
        mean /= mass;
      for (int64_t n = 0; n < count; ++n) {
        const double ds = w[n] * (dw[n] - mean);
        for (int64_t d = h * W; d < (h + 1) * W; ++d) {
          dtext[b * D + d] += a.scale * ds * at(image, n, d);
          const double up = !(flows & 1) ? 0 : pool ? grad_output[b * D + d] : at(grad_output, n, d);
          if (wanted & 1)
            differ((w[n] * up + a.scale * ds * text[b * D + d]) / (1 + mass), float(at(grad_image, n, d) / (1 + mass)));
        }
      }
      for (int64_t d = h * W; d < (h + 1) * W; ++d) {
        if (pool)
          differ(pooled[b * D + d], result[b * D + d]);
        if (wanted & 2)
          differ(dtext[b * D + d] / (1 + mass), float(grad_text[b * D + d] / (1 + mass)));
      }
    }
  }
  if (worst > 2e-3)
    return printf("case %d: off by %g\n", number, worst), false;
  return true;
}

}  // namespace

int main(int, char** arguments) {
  const int seed = atoi(arguments[1]);
  const int cases = atoi(arguments[2]);
  bool right = true;
  int clusters = 0;
  for (int i = 0; i < cases; ++i) {
    engine.seed(seed + i);
    right = check(seed + i) && right;
    clusters += emulator::counts.cluster > 1;
    emulator::counts = {};
  }
  printf("%d in clusters\n", clusters);
  return right ? 0 : 2;
}
