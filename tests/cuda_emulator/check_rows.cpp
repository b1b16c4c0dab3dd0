// Runs the CUDA kernels of channel attention and of additive attention on random small arguments, cut into random
// panels of rows, and compares with plain loops in double: check_rows SEED CASES. Plain loops are the library's
// products, too. Built with ThreadSanitizer and AddressSanitizer, too: every tensor has memory of exactly its size.
// What takes no part is NaN.
#include "check_rows.h"

#include <climits>

#include "../../csrc/cuda/additive_attention.h"
#include "../../csrc/cuda/channel_attention.h"

namespace {

const char* channel() {
  const int64_t B = pick(1, 4);
  const int64_t N = pick(1, 50);
  const int64_t D = toss() ? pick(1, 80) : 4 * pick(1, 50);
  Rows image(B, N, D, true), result(B, N, D, false), weights(B, N, D, false), up(B, N, D, true),
      grad_weights(B, N, D, true), grad_image(B, N, D, false);
  Floats bias_hidden(B * D, true), layer(D * D, true), grad_bias_hidden(B * D);
  for (int64_t i = 0; i < D * D; ++i)
    layer[i] *= 0.2f;
  ChannelAttention a;
  a.dtype = dtype;
  a.B = B;
  a.N = N;
  a.D = D;
  a.image = image;
  a.bias_hidden = bias_hidden;
  a.result = result;
  if (toss())
    a.weights = weights;
  const cuda::SampledRows samples{B, N, B * N, nullptr};
  TRY(walk(samples, image, {}, [&](const cuda::Panel& panel, const float* x) {
    Floats scores(panel.rows * D);
    multiply(scores, x, layer, panel.rows, D, D, true);
    return cuda::channel_attention_weigh(a, panel, scores, nullptr);
  }));

  ChannelAttentionBackward g;
  g.forward = a;
  const int flows = pick(1, 3);
  if (flows & 1)
    g.grad_result = up;
  if (flows & 2)
    g.grad_weights = grad_weights;
  const bool of_image = toss();
  if (of_image)
    g.grad_image = grad_image;
  TRY(cuda::clear(grad_bias_hidden, B * D, nullptr));
  std::vector<double> ds(B * N * D);
  TRY(walk(samples, image, {}, [&](const cuda::Panel& panel, const float* x) -> const char* {
    const int64_t all = panel.rows * D;
    Floats scores(all), direct(of_image ? all : 0), through(all);
    multiply(scores, x, layer, panel.rows, D, D, true);
    std::unique_ptr<emulator::bf16[]> rounded(dtype == Dtype::float32 ? nullptr : new emulator::bf16[all]);
    TRY(cuda::channel_attention_differentiate(g, panel, scores, of_image ? static_cast<float*>(direct) : nullptr,
                                              rounded.get(), nullptr));
    for (int64_t i = 0; rounded && i < all; ++i)
      if (rounded[i].bits != emulator::bf16(scores[i]).bits)
        return "a score's gradient isn't rounded to the nearest";
    TRY(sum_columns(samples, panel, scores, D, D, grad_bias_hidden));
    for (int64_t i = 0; i < all; ++i)
      ds[panel.first * D + i] = scores[i];
    if (!of_image)
      return nullptr;
    multiply(through, scores, layer, panel.rows, D, D, false);
    return cuda::channel_attention_write(g, panel, direct, through, nullptr);
  }));

  for (int64_t b = 0; b < B; ++b) {
    std::vector<double> sum(D);
    for (int64_t n = 0; n < N; ++n) {
      std::vector<double> w(D), dw(D), s(D);
      double top = -INFINITY;
      double total = 0;
      double mean = 0;
      for (int64_t c = 0; c < D; ++c) {
        w[c] = bias_hidden[b * D + c];
        for (int64_t i = 0; i < D; ++i)
          w[c] += image.at(b, n, i) * layer[c * D + i];
        top = std::fmax(top, w[c]);
      }
      for (int64_t c = 0; c < D; ++c)
        w[c] = std::exp(w[c] - top), total += w[c];
      for (int64_t c = 0; c < D; ++c) {
        w[c] /= total;
        differ(w[c] * image.at(b, n, c), result.at(b, n, c));
        if (a.weights.data)
          differ(w[c], weights.at(b, n, c));
        dw[c] = (flows & 1 ? up.at(b, n, c) * image.at(b, n, c) : 0) + (flows & 2 ? grad_weights.at(b, n, c) : 0);
        mean += w[c] * dw[c];
      }
      for (int64_t c = 0; c < D; ++c)
        s[c] = w[c] * (dw[c] - mean), sum[c] += s[c], differ(s[c], ds[(b * N + n) * D + c]);
      for (int64_t c = 0; of_image && c < D; ++c) {
        double grad = flows & 1 ? w[c] * up.at(b, n, c) : 0;
        for (int64_t i = 0; i < D; ++i)
          grad += s[i] * layer[i * D + c];
        differ(grad, grad_image.at(b, n, c));
      }
    }
    for (int64_t c = 0; c < D; ++c)
      differ(sum[c], grad_bias_hidden[b * D + c]);
  }
  return nullptr;
}

double activate(Activation f, double x, double& slope) {
  if (f == Activation::tanh)
    return slope = 1 - std::tanh(x) * std::tanh(x), std::tanh(x);
  if (f == Activation::relu)
    return slope = x > 0, std::fmax(x, 0);
  const double phi = 0.5 * std::erfc(-x * std::sqrt(0.5));
  return slope = phi + x * std::exp(-0.5 * x * x) * 0.3989422804014327, x * phi;
}

// `wrong`: offsets that are no offsets, or no bags at all: nothing to compare, but nothing may be touched either.
const char* additive() {
  const bool packed = toss();
  const bool wrong = packed && pick(0, 3) == 0;
  const bool pool = toss();
  const bool gated = toss();
  const bool masked = toss();
  const int64_t D = pick(1, 50);
  const int64_t A = toss() ? pick(1, 70) : 4 * pick(1, 40);
  const int64_t K = pool ? pick(1, 6) : 1;
  const int64_t B = pick(wrong ? 0 : 1, 4);
  const int64_t N = toss() ? pick(0, 40) : pick(0, 300);
  std::vector<int64_t> offsets{0};
  for (int64_t b = 0; b < B; ++b)
    offsets.push_back(offsets.back() + (packed ? toss() ? pick(0, 9) : pick(0, 300) : N));
  const int64_t rows = wrong ? pick(1, 300) : offsets.back();
  const int64_t B_ = packed ? 1 : B;
  const int64_t N_ = packed ? rows : N;
  Rows image(B_, N_, D, true), grad_image(B_, N_, D, false), result(pool ? B : B_, pool ? K : N_, D, false),
      up(pool ? B : B_, pool ? K : N_, D, true);
  Floats weights(K * rows), given(K * rows), grad_weights(K * rows, true), grad_given(K * rows, true),
      bias_hidden(B * A, true), bias_gate(A, true), layer(A * D, true), gate(A * D, true), v(K * A, true);
  Floats grad_bias_hidden(B * A), grad_bias_gate(A), scores(rows * K), grad_scores(K * rows);
  for (int64_t i = 0; i < A * D; ++i)
    layer[i] *= 0.2f, gate[i] *= 0.2f;
  std::unique_ptr<bool[]> mask(new bool[rows]);
  for (int64_t i = 0; i < rows; ++i) {
    mask[i] = pick(0, 3);
    for (int64_t c = 0; masked && !mask[i] && c < D; ++c)
      image.put(image.index(i / N_, i % N_, c), NAN);
  }
  if (wrong)
    for (int64_t& o : offsets)
      o = toss() ? pick(-300, 900) : toss() ? INT64_MIN + pick(0, 9) : INT64_MAX - pick(0, 9);

  AdditiveAttention a;
  a.dtype = dtype;
  a.activation = Activation(pick(0, 2));
  a.B = B;
  a.N = N_;
  a.D = D;
  a.A = A;
  a.K = K;
  a.pool = pool;
  a.image = image;
  if (packed)
    a.offsets = offsets.data();
  const bool biased = toss();
  const bool biased_gate = gated && toss();
  if (biased)
    a.bias_hidden = bias_hidden;
  if (biased_gate)
    a.bias_gate = bias_gate;
  if (masked)
    a.mask = {mask.get(), packed ? 0 : N, 0, 1};
  a.result = result;
  a.weights = weights;
  if (toss())
    a.scores = given;
  const cuda::SampledRows samples = cuda::sampled_rows(a), all{1, samples.rows, samples.rows, nullptr};
  if (gated)
    a.w_gate.data = gate;
  const int64_t width = cuda::hidden_width(a);
  auto products = [&](const cuda::Panel& panel, const float* x, float* u) {
    Floats one(panel.rows * A);
    for (int64_t part = 0; part * A < width; ++part) {
      multiply(one, x, part ? gate : layer, panel.rows, D, A, true);
      for (int64_t i = 0; i < panel.rows * A; ++i)
        u[i / A * width + part * A + i % A] = one[i];
    }
  };
  TRY(walk(samples, image, a.mask, [&](const cuda::Panel& panel, const float* x) {
    Floats u(panel.rows * width);
    products(panel, x, u);
    return cuda::additive_attention_activate(a, panel, u, v, scores + panel.first * K, nullptr);
  }));
  Floats partial(cuda::additive_attention_scratch(a));
  TRY(cuda::additive_attention_finish(a, scores, partial, nullptr));

  AdditiveAttentionBackward g;
  g.forward = a;
  const int flows = pick(1, a.scores ? 7 : 3);
  if (flows & 1)
    g.grad_result = up;
  if (flows & 2)
    g.grad_weights = grad_weights;
  if (flows & 4)
    g.grad_scores = grad_given;
  const bool of_image = toss();
  if (of_image)
    g.grad_image = grad_image;
  Floats left(cuda::additive_attention_scores_scratch(a));
  TRY(cuda::additive_attention_scores(g, grad_scores, left, nullptr));
  TRY(cuda::clear(grad_bias_hidden, B * A, nullptr));
  TRY(cuda::clear(grad_bias_gate, A, nullptr));
  std::vector<double> grad_layer(A * D), grad_gate(A * D), grad_v(K * A);
  TRY(walk(samples, image, a.mask, [&](const cuda::Panel& panel, const float* x) -> const char* {
    const int64_t count = panel.rows;
    Floats u(count * width), h(count * A), through(count * D);
    std::unique_ptr<emulator::bf16[]> rounded(dtype == Dtype::float32 ? nullptr : new emulator::bf16[count * width]);
    products(panel, x, u);
    TRY(cuda::additive_attention_differentiate(a, panel, u, v, grad_scores, h, rounded.get(), nullptr));
    for (int64_t i = 0; rounded && i < count * width; ++i)
      if (rounded[i].bits != emulator::bf16(u[i]).bits)
        return "a gradient isn't rounded to the nearest";
    TRY(sum_columns(samples, panel, u, width, A, grad_bias_hidden));
    if (gated)
      TRY(sum_columns(all, panel, u + A, width, A, grad_bias_gate));
    for (int64_t r = 0; r < count; ++r)
      for (int64_t j = 0; j < A; ++j) {
        for (int64_t k = 0; k < K; ++k)
          grad_v[k * A + j] += double(grad_scores[k * samples.rows + panel.first + r]) * h[r * A + j];
        for (int64_t c = 0; c < D; ++c) {
          grad_layer[j * D + c] += double(u[r * width + j]) * x[r * D + c];
          if (gated)
            grad_gate[j * D + c] += double(u[r * width + A + j]) * x[r * D + c];
        }
      }
    if (!of_image)
      return nullptr;
    for (int64_t i = 0; i < count * D; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < A; ++j) {
        sum += double(u[i / D * width + j]) * layer[j * D + i % D];
        if (gated)
          sum += double(u[i / D * width + A + j]) * gate[j * D + i % D];
      }
      through[i] = float(sum);
    }
    return cuda::additive_attention_write(g, panel, through, nullptr);
  }));
  if (wrong)
    return nullptr;

  std::vector<double> of_layer(A * D), of_gate(A * D), of_v(K * A), of_bias_gate(A);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t first = offsets[b];
    const int64_t count = offsets[b + 1] - first;
    auto kept = [&](int64_t n) { return !masked || mask[first + n]; };
    auto at = [&](const Rows& t, int64_t n, int64_t c) { return packed ? t.at(0, first + n, c) : t.at(b, n, c); };
    auto weight_at = [&](int64_t k, int64_t n) { return packed ? k * rows + first + n : (b * K + k) * N + n; };
    std::vector<double> y(count * A), slope(count * A), s(count * A, 1), w(K * count), ds(K * count), of_bias_hidden(A);
    for (int64_t n = 0; n < count; ++n)
      for (int64_t j = 0; j < A && kept(n); ++j) {
        double p = biased ? bias_hidden[b * A + j] : 0;
        double q = biased_gate ? bias_gate[j] : 0;
        for (int64_t c = 0; c < D; ++c)
          p += at(image, n, c) * layer[j * D + c], q += at(image, n, c) * gate[j * D + c];
        y[n * A + j] = activate(a.activation, p, slope[n * A + j]);
        if (gated)
          s[n * A + j] = 1 / (1 + std::exp(-q));
      }
    for (int64_t k = 0; k < K; ++k) {
      double top = -INFINITY;
      double total = 0;
      double mean = 0;
      double* of = w.data() + k * count;
      std::vector<double> pooled(D), dw(count);
      for (int64_t n = 0; n < count; ++n) {
        for (int64_t j = 0; j < A; ++j)
          of[n] += v[k * A + j] * y[n * A + j] * s[n * A + j];
        if (kept(n))
          top = std::fmax(top, of[n]);
        if (a.scores && kept(n))
          differ(of[n], given[weight_at(k, n)]);
        else if (a.scores && given[weight_at(k, n)] != -INFINITY)
          return "a masked score isn't -Inf";
      }
      for (int64_t n = 0; n < count; ++n)
        of[n] = kept(n) ? std::exp(of[n] - top) : 0, total += of[n];
      for (int64_t n = 0; n < count; ++n) {
        if (total != 0)
          of[n] /= total;
        differ(of[n], weights[weight_at(k, n)]);
        for (int64_t c = 0; c < D; ++c) {
          const double x = kept(n) ? at(image, n, c) : 0;
          pooled[c] += of[n] * x;
          if (!pool)
            differ(of[n] * x, at(result, n, c));
          if (flows & 1)
            dw[n] += x * (pool ? up.at(b, k, c) : at(up, n, c));
        }
        if (flows & 2)
          dw[n] += grad_weights[weight_at(k, n)];
        mean += of[n] * dw[n];
      }
      for (int64_t c = 0; pool && c < D; ++c)
        differ(pooled[c], result.at(b, k, c));
      for (int64_t n = 0; n < count; ++n)
        ds[k * count + n] = of[n] * (dw[n] - mean) + (flows & 4 && kept(n) ? grad_given[weight_at(k, n)] : 0);
    }
    for (int64_t n = 0; n < count; ++n) {
      std::vector<double> grad(D);
      for (int64_t j = 0; j < A; ++j) {
        const int64_t i = n * A + j;
        double dh = 0;
        for (int64_t k = 0; k < K; ++k)
          dh += ds[k * count + n] * v[k * A + j], of_v[k * A + j] += ds[k * count + n] * y[i] * s[i];
        const double du = dh * s[i] * slope[i];
        const double dt = gated ? dh * y[i] * s[i] * (1 - s[i]) : 0;
        of_bias_hidden[j] += du;
        of_bias_gate[j] += dt;
        for (int64_t c = 0; c < D && kept(n); ++c) {
          grad[c] += du * layer[j * D + c] + dt * gate[j * D + c];
          of_layer[j * D + c] += du * at(image, n, c);
          of_gate[j * D + c] += dt * at(image, n, c);
        }
      }
      for (int64_t c = 0; of_image && c < D; ++c) {
        for (int64_t k = 0; k < K && flows & 1 && kept(n); ++k)
          grad[c] += w[k * count + n] * (pool ? up.at(b, k, c) : at(up, n, c));
        differ(grad[c], at(grad_image, n, c));
      }
    }
    for (int64_t j = 0; j < A; ++j)
      differ(of_bias_hidden[j], grad_bias_hidden[b * A + j]);
  }
  for (int64_t i = 0; i < A * D; ++i) {
    differ(of_layer[i], grad_layer[i]);
    if (gated)
      differ(of_gate[i], grad_gate[i]);
  }
  for (int64_t i = 0; i < K * A; ++i)
    differ(of_v[i], grad_v[i]);
  for (int64_t j = 0; gated && j < A; ++j)
    differ(of_bias_gate[j], grad_bias_gate[j]);
  return nullptr;
}

bool check(int number) {
  dtype = pick(0, 2) ? Dtype::float32 : Dtype::bfloat16;
  worst = 0;
  emulator::config.order = pick(0, 2);
  emulator::config.seed = unsigned(pick(0, 99));
  emulator::config.processors = toss() ? pick(1, 6) : pick(1, 200);
  const bool channels = pick(0, 2) == 0;
  const char* error = channels ? channel() : additive();
  const bool right = !error && worst <= (dtype == Dtype::float32 ? 2e-3 : 1e-2);
  if (!right)
    printf("case %d: %s: %s, off by %g\n", number, channels ? "channel" : "additive", error ? error : "wrong", worst);
  return right;
}

}  // namespace

int main(int, char** arguments) {
  const int seed = atoi(arguments[1]);
  const int cases = atoi(arguments[2]);
  bool right = true;
  for (int i = 0; i < cases; ++i) {
    engine.seed(seed + i);
    right = check(seed + i) && right;
  }
  printf("%d in panels\n", panels);
  return right ? 0 : 2;
}
