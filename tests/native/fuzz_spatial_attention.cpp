// Runs the CPU kernels of spatial attention on random shapes, strides, masks and bags, in memory that ends where the
// tensors do, for AddressSanitizer and UndefinedBehaviourSanitizer to watch; the forward result is compared with plain
// loops in double. argv: number of rounds, seed.
#include "../../csrc/cpu/spatial_attention.cpp"
#include "fuzz.h"

// A [B, Y, X, D] tensor in memory of its own: dimensions in random order, random gaps, nothing behind the last element.
template <class T>
struct Block {
  std::vector<T> memory;
  Features f;
  Block(int64_t B, int64_t Y, int64_t X, int64_t D) {
    int64_t size[4] = {B, Y, X, D}, stride[4], order[4] = {0, 1, 2, 3};
    if (draw(0, 2) == 0)
      std::shuffle(order, order + 4, source);
    else if (draw(0, 1))
      order[1] = 3, order[2] = 1, order[3] = 2;  // channels first
    int64_t step = draw(0, 3) ? 1 : 2;
    int64_t last = 0;
    for (int i = 3; i >= 0; --i) {
      stride[order[i]] = step;
      step = step * size[order[i]] + (draw(0, 3) ? 0 : draw(0, 5));
      last += (size[order[i]] - 1) * stride[order[i]];
    }
    memory.resize(B * Y * X * D ? last + 1 : 0);
    for (T& x : memory)
      x = from_acc<T>(acc_t<T>(draw(-1000, 1000)) / 500);
    f = {memory.data(), stride[0], stride[1], stride[2], stride[3]};
  }
  double at(int64_t b, int64_t y, int64_t x, int64_t d) const {
    return to_acc(static_cast<const T*>(f.data)[b * f.b + y * f.y + x * f.x + d * f.d]);
  }
};

template <class T>
static void round(Dtype dtype) {
  using C = acc_t<T>;
  SpatialAttention a;
  a.dtype = dtype;
  a.H = draw(0, 2) ? 1 : draw(1, 5);
  a.D = a.H * draw(1, draw(0, 3) ? 20 : 300);
  a.B = draw(0, 4);
  a.Y = draw(1, draw(0, 1) ? 1 : 9);
  a.X = draw(0, draw(0, 3) ? 40 : 1200);
  a.scale = 0.3;
  a.pool = draw(0, 1);
  a.rescale = draw(0, 1);
  a.nontemporal = draw(0, 1);
  std::vector<int64_t> offsets;
  const bool packed = draw(0, 2) == 0;
  int64_t images = a.B;
  if (packed) {
    a.Y = images = 1;
    for (int64_t b = 0; b + 1 < a.B; ++b)
      offsets.push_back(draw(0, a.X));
    offsets.push_back(0);
    if (a.B)
      offsets.push_back(a.X);
    else
      a.X = 0;
    std::sort(offsets.begin(), offsets.end());
    a.offsets = offsets.data();
  }
  const int64_t N = a.Y * a.X;
  Block<T> image(images, a.Y, a.X, a.D), text(a.B, 1, 1, a.D), result(images, a.Y, a.X, a.D), pooled(a.B, 1, 1, a.D),
      grad(images, a.Y, a.X, a.D), grad_pooled(a.B, 1, 1, a.D), grad_image(images, a.Y, a.X, a.D),
      grad_text(a.B, 1, 1, a.D);
  if (packed)
    for (Features* f : {&image.f, &result.f, &grad.f, &grad_image.f})
      f->b = 0;
  std::vector<C> weights(images * a.H * N), grad_weights(weights.size(), C(0.5)), scratch(weights.size());
  std::vector<unsigned char> mask(images * N);
  for (auto& m : mask)
    m = draw(0, 3) > 0;
  a.image = image.f;
  a.result = result.f;
  a.weights = weights.data();
  auto vectors = [](const Block<T>& v) { return Vectors{v.f.data, v.f.b, v.f.d}; };
  a.text = vectors(text);
  a.pooled = vectors(pooled);
  if (draw(0, 1))
    a.mask = {reinterpret_cast<const bool*>(mask.data()), packed ? 0 : N, a.X, 1};
  baseline::spatial_attention_forward(a, three);

  for (int64_t b = 0; b < a.B; ++b)
    for (int64_t h = 0; h < a.H; ++h) {
      const int64_t begin = packed ? offsets[b] : 0;
      const int64_t end = packed ? offsets[b + 1] : N;
      const int64_t width = a.D / a.H;
      const int64_t i = packed ? 0 : b;
      std::vector<double> w(end - begin);
      double top = -INFINITY;
      double total = 0;
      double kept = 0;
      double worst = 0;
      auto part = [&](int64_t n) { return !a.mask.data || mask[i * N + n]; };
      for (int64_t n = begin; n < end; ++n) {
        double s = 0;
        for (int64_t d = h * width; d < (h + 1) * width; ++d)
          s += image.at(i, n / a.X, n % a.X, d) * text.at(b, 0, 0, d);
        w[n - begin] = part(n) ? s * a.scale : -INFINITY;
        top = std::max(top, w[n - begin]);
        kept += part(n);
      }
      for (double& x : w)
        total += x = kept ? std::exp(x - top) : 0;
      for (double& x : w)
        x = kept ? x / total * (a.rescale ? kept : 1) : 0;
      const double unit = a.rescale ? kept + 1 : 1;
      for (int64_t n = begin; n < end; ++n)
        worst = std::max(worst, std::fabs(w[n - begin] - weights[(packed ? h * a.X : (b * a.H + h) * N) + n]) / unit);
      for (int64_t d = h * width; d < (h + 1) * width; ++d) {
        double sum = 0;
        for (int64_t n = begin; n < end; ++n) {
          double product = w[n - begin] * image.at(i, n / a.X, n % a.X, d);
          sum += product;
          if (!a.pool)
            worst = std::max(worst, std::fabs(product - result.at(i, n / a.X, n % a.X, d)) / unit / 4);
        }
        if (a.pool)
          worst = std::max(worst, std::fabs(sum - pooled.at(b, 0, 0, d)) / unit / 4);
      }
      if (!(worst < (sizeof(T) == 2 ? 1e-2 : 1e-4))) {
        std::printf("B %ld Y %ld X %ld D %ld H %ld packed %d pool %d: off by %g\n", long(a.B), long(a.Y), long(a.X),
                    long(a.D), long(a.H), packed, a.pool, worst);
        std::exit(1);
      }
    }

  SpatialAttentionBackward g;
  g.forward = a;
  if (draw(0, 3)) {
    if (a.pool)
      g.grad_pooled = vectors(grad_pooled);
    else
      g.grad_result = grad.f;
  }
  if (draw(0, 1))
    g.grad_weights = grad_weights.data();
  g.grad_scores = scratch.data();
  if (draw(0, 3))
    g.grad_image = grad_image.f;
  if (draw(0, 3))
    g.grad_text = vectors(grad_text);
  baseline::spatial_attention_backward(g, three);
  for (int64_t b = 0; b < a.B && g.grad_text.data; ++b)
    for (int64_t d = 0; d < a.D; ++d)
      if (!std::isfinite(grad_text.at(b, 0, 0, d)))
        std::printf("a text gradient isn't finite\n"), std::exit(1);
}

FUZZ_MAIN
