// Runs the CUDA kernels of deformable attention on random small arguments and compares with plain loops in double:
// check_deformable SEED CASES. Built with ThreadSanitizer and AddressSanitizer, too: every tensor has memory of exactly
// its size. What takes no part is NaN; locations are anything.
#include "../../csrc/cuda/deformable_attention.h"
#include "check_heads.h"

namespace {

int ordered = 0;  // gradients of value without atomics

// Channels next to each other; `whole`: [B, n, H, c] contiguous.
std::unique_ptr<Heads> heads(int64_t n, int64_t c, bool random, bool whole = false) {
  for (;;) {
    auto found = std::make_unique<Heads>(n, c, random);
    if (found->strides[3] == 1 && (!whole || (found->strides[1] == c && found->strides[2] == H * c)))
      return found;
  }
}
QueryRows query_rows(const Heads& x) {
  const HeadRows rows = x;
  return {rows.data, rows.b, rows.n, rows.h};
}
float anywhere() {
  if (pick(0, 9))
    return float(pick(-300, 1300)) / 1000 + 1e-4f;
  const float odd[] = {NAN, INFINITY, -INFINITY, 1e30f, -1e30f, 0, 1};
  return odd[pick(0, 6)];
}

const char* deformable() {
  B = pick(1, 2);
  H = pick(1, 3);
  d = dv = pick(0, 3) ? pick(1, 40) : toss() ? 8 * pick(1, 12) : pick(1, 200);
  dtype = toss() ? Dtype::float32 : Dtype::bfloat16;
  emulator::config = {pick(0, 4), unsigned(pick(0, 99)), toss(), 163 << 10, pick(1, 40)};
  const int64_t Q = pick(0, 30);
  std::vector<int64_t> shapes, points;
  int64_t S = 0;
  int64_t K = 0;
  for (int64_t L = pick(0, 5) ? pick(1, 4) : pick(1, 40); L > 0; --L) {
    shapes.push_back(pick(1, 9));
    shapes.push_back(pick(1, 9));
    S += shapes.end()[-1] * shapes.end()[-2];
    points.push_back(pick(0, 3) ? pick(0, 5) : pick(0, 20));
    K += points.back();
  }
  auto value = heads(S, d, true), result = heads(Q, d, false), up = heads(Q, d, true),
       grad_value = heads(S, d, false, true);
  const int64_t all = B * Q * H;
  Floats locations(all * K * 2), scores(all * K), rows(all * 2), grad_locations(all * K * 2), grad_scores(all * K);
  Flags mask(B * S);
  for (int64_t i = 0; i < all * K; ++i) {
    locations[2 * i] = anywhere();
    locations[2 * i + 1] = anywhere();
    scores[i] = normal();
  }
  DeformableAttention a;
  a.dtype = dtype;
  a.wide_locations = a.wide_scores = dtype != Dtype::float32;
  a.softmax = toss();
  a.B = B;
  a.S = S;
  a.H = H;
  a.d = d;
  a.Q = Q;
  a.K = K;
  a.L = int64_t(points.size());
  a.shapes = shapes.data();
  a.points = points.data();
  a.value = *value;
  a.locations = {locations, Q * H * K * 2, H * K * 2, K * 2};
  a.scores = {scores, Q * H * K, H * K, K};
  if (toss()) {
    a.mask = {mask.data.get(), S, 0, 1};
    for (int64_t i = 0; i < B * S * H; ++i)
      if (!mask.data[i / (S * H) * S + i / H % S])
        value->forget(i / (S * H), i % H, i / H % S);
  }
  a.result = query_rows(*result);
  a.softmax_rows = a.softmax ? static_cast<float*>(rows) : nullptr;
  if (const char* error =
          run<DeformableAttention>(a, cuda::deformable_attention_forward, cuda::deformable_attention_scratch))
    return error;
  DeformableAttentionBackward g;
  g.forward = a;
  g.grad_result = query_rows(*up);
  g.deterministic = toss();
  const int wanted = pick(1, 7);
  if (wanted & 1) {
    g.grad_value = *grad_value;
    ordered += g.deterministic;
  }
  if (wanted & 2)
    g.grad_locations = {grad_locations, Q * H * K * 2, H * K * 2, K * 2};
  if (wanted & 4)
    g.grad_scores = {grad_scores, Q * H * K, H * K, K};
  if (const char* error =
          run<DeformableAttentionBackward>(g, cuda::deformable_attention_backward, cuda::deformable_attention_scratch))
    return error;

  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h) {
      Matrix of_value(S * d);
      for (int64_t q = 0; q < Q; ++q) {
        const int64_t at = ((b * Q + q) * H + h) * K;
        Matrix w(scores + at, scores + at + K);
        if (a.softmax)
          w = softmax(w, 1, K, [](int64_t, int64_t) { return true; });
        Matrix out(d), of_weight(K), of_x(K), of_y(K);
        int64_t k = 0;
        int64_t begin = 0;
        for (int64_t l = 0; l < a.L; begin += shapes[2 * l] * shapes[2 * l + 1], ++l)
          for (int64_t p = 0; p < points[l]; ++p, ++k) {
            const int64_t height = shapes[2 * l];
            const int64_t width = shapes[2 * l + 1];
            const float x = locations[2 * (at + k)] * float(width) - 0.5f;  // on which side of a kink: as the kernel
            const float y = locations[2 * (at + k) + 1] * float(height) - 0.5f;
            if (!(x >= -1 && x < width && y >= -1 && y < height))
              continue;
            for (int i = 0; i < 4; ++i) {
              const int64_t column = int64_t(std::floor(x)) + i % 2;
              const int64_t row = int64_t(std::floor(y)) + i / 2;
              const int64_t s = begin + row * width + column;
              if (column < 0 || column >= width || row < 0 || row >= height || (a.mask.data && !mask.data[b * S + s]))
                continue;
              const double of_column = 1 - std::fabs(double(x) - column);
              const double of_row = 1 - std::fabs(double(y) - row);
              for (int64_t c = 0; c < d; ++c) {
                const double v = value->at(b, h, s, c);
                const double grad = up->at(b, h, q, c);
                out[c] += w[k] * of_column * of_row * v;
                of_weight[k] += of_column * of_row * v * grad;
                of_x[k] += (i % 2 ? 1 : -1) * of_row * v * grad * w[k] * width;
                of_y[k] += (i / 2 ? 1 : -1) * of_column * v * grad * w[k] * height;
                of_value[s * d + c] += w[k] * of_column * of_row * grad;
              }
            }
          }
        for (int64_t c = 0; c < d; ++c)
          differ(out[c], result->at(b, h, q, c));
        if (a.softmax)
          through_softmax(w, of_weight, 1, K);
        for (k = 0; k < K; ++k) {
          if (g.grad_scores.data)
            differ(of_weight[k], grad_scores[at + k]);
          if (g.grad_locations.data) {
            differ(of_x[k], grad_locations[2 * (at + k)]);
            differ(of_y[k], grad_locations[2 * (at + k) + 1]);
          }
        }
      }
      for (int64_t s = 0; s < S && g.grad_value.data; ++s)
        for (int64_t c = 0; c < d; ++c)
          differ(of_value[s * d + c], grad_value->at(b, h, s, c));
    }
  return nullptr;
}

}  // namespace

int main(int, char** arguments) {
  const int status = check_cases(arguments, deformable);
  printf("%d gradients ordered\n", ordered);
  return status;
}
