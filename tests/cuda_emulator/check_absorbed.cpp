// Runs the CUDA kernels of absorbed attention on random small arguments and compares with plain loops in double:
// check_absorbed SEED CASES. Built with ThreadSanitizer and AddressSanitizer, too: every tensor has memory of exactly
// its size. What takes no part is NaN.
#include "../../csrc/cuda/absorbed_attention.h"
#include "check_heads.h"

namespace {

SampleRows rows_of(const Heads& x) {
  const HeadRows rows = x;
  return {rows.data, rows.b, rows.n, rows.c};
}

const char* absorbed() {
  B = pick(1, 2);
  H = pick(0, 3) ? pick(1, 4) : pick(1, 20);
  d = pick(0, 3) ? pick(1, 40) : pick(1, 300);
  dv = pick(0, 3) ? pick(1, 40) : pick(1, 300);
  const int64_t N = pick(0, 3) ? pick(0, 90) : pick(0, 700);
  const int64_t T = pick(0, 3) ? pick(0, 20) : pick(0, 150);
  dtype = toss() ? Dtype::float32 : Dtype::bfloat16;
  emulator::config = {pick(0, 4), unsigned(pick(0, 99)), toss(), (pick(0, 2) ? pick(100, 230) : pick(60, 100)) * 1024,
                      pick(1, 40)};
  const bool attend = pick(0, 3);
  const bool pool = !attend || pick(0, 3);
  AbsorbedAttention a;
  a.dtype = dtype;
  a.wide_text = dtype == Dtype::bfloat16 && toss();
  const Dtype text = a.wide_text ? Dtype::float32 : dtype;
  Heads image(N, d, true, 1, dtype), key(T, d, true, H, text), value(T, dv, true, H, text),
      image_out(N, dv, false, 1, dtype), text_out(T, d, false, H, dtype), unrounded(T, d, false, H, Dtype::float32);
  Heads image_up(N, dv, true, 1, dtype), text_up(T, d, true, H, dtype), grad_image(N, d, false, 1, dtype),
      grad_key(T, d, false, H, text), grad_value(T, dv, false, H, text);
  Floats bias(B * H * T), grad_bias(B * H * T), image_kept(2 * B * H * N), text_kept(2 * B * H * T);
  Flags image_mask(B * N), text_mask(B * T);
  for (int64_t i = 0; i < B * H * T; ++i) {
    bias[i] = normal();
    for (int64_t c = 0; c < d; ++c)
      key.put(i * d + c, 0.2f * normal()), text_up.put(i * d + c, 0.2f * normal());
    for (int64_t c = 0; c < dv; ++c)
      value.put(i * dv + c, 0.2f * normal());
  }
  a.B = B;
  a.H = H;
  a.N = N;
  a.T = T;
  a.D = d;
  a.Dv = attend ? dv : 0;
  a.pool = pool;
  if (toss())
    a.image_mask = {image_mask.data.get(), N, 0, 1};
  if (toss())
    a.text_mask = {text_mask.data.get(), T, 0, 1};
  auto keeps = [&](int64_t b, int64_t n) { return !a.image_mask.data || image_mask.data[b * N + n]; };
  auto takes = [&](int64_t b, int64_t t) { return !a.text_mask.data || text_mask.data[b * T + t]; };
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t n = 0; n < N; ++n)
      if (!keeps(b, n) && toss())
        image.forget(b, 0, n);
    for (int64_t bh = b * H; bh < (b + 1) * H; ++bh)
      for (int64_t t = 0; t < T; ++t)
        if (!takes(b, t)) {
          value.forget(b, bh % H, t);
          if (toss())
            key.forget(b, bh % H, t), bias[bh * T + t] = NAN;
        }
  }
  a.image = rows_of(image);
  a.key = key;
  if (toss())
    a.key_bias = {bias, H * T, T, 0, 1};
  if (attend) {
    a.value = value;
    a.image_out = rows_of(image_out);
    a.image_softmax = image_kept;
  }
  if (pool) {
    a.text_out = text_out;
    a.text_softmax = text_kept;
    if (dtype == Dtype::bfloat16)
      a.unrounded = unrounded;
  }
  if (const char* error = run<AbsorbedAttention>(a, cuda::absorbed_attention_forward, cuda::absorbed_attention_scratch))
    return error;
  AbsorbedAttentionBackward g;
  g.forward = a;
  if (dtype == Dtype::float32)
    g.forward.unrounded = text_out;
  const int flows = pick(1, 3);
  const bool of_image_out = attend && (!pool || flows & 1);
  const bool of_text_out = pool && (!of_image_out || flows & 2);
  const int wanted = pick(1, 15);
  if (of_image_out)
    g.grad_image_out = rows_of(image_up);
  if (of_text_out)
    g.grad_text_out = text_up;
  if (wanted & 1)
    g.grad_image = rows_of(grad_image);
  if (wanted & 2)
    g.grad_key = grad_key;
  if (wanted & 4 && a.key_bias.data)
    g.grad_key_bias = grad_bias;
  if (wanted & 8 && attend)
    g.grad_value = grad_value;
  if (const char* error =
          run<AbsorbedAttentionBackward>(g, cuda::absorbed_attention_backward, cuda::absorbed_attention_scratch))
    return error;

  auto known = [](double x) { return x == x ? x : 0; };
  for (int64_t b = 0; b < B; ++b) {
    Matrix out(N * dv), dx(N * d);
    for (int64_t h = 0; h < H; ++h) {
      const int64_t bh = b * H + h;
      Matrix s(N * T), st(T * N), dp(N * T), dq(T * N), dk(T * d), dval(T * dv);
      for (int64_t n = 0; n < N; ++n)
        for (int64_t t = 0; t < T; ++t) {
          s[n * T + t] = a.key_bias.data ? known(bias[bh * T + t]) : 0;
          for (int64_t c = 0; c < d; ++c)
            s[n * T + t] += known(image.at(b, 0, n, c)) * known(key.at(b, h, t, c));
          st[t * N + n] = s[n * T + t];
        }
      const Matrix p = softmax(s, N, T, [&](int64_t, int64_t t) { return takes(b, t); });
      const Matrix q = softmax(st, T, N, [&](int64_t, int64_t n) { return keeps(b, n); });
      for (int64_t n = 0; n < N; ++n)
        for (int64_t t = 0; t < T; ++t)
          for (int64_t c = 0; c < dv; ++c) {
            const double v = takes(b, t) ? value.at(b, h, t, c) : 0;
            const double up = of_image_out ? image_up.at(b, 0, n, c) : 0;
            out[n * dv + c] += p[n * T + t] * v;
            dp[n * T + t] += up * v;
            dval[t * dv + c] += p[n * T + t] * up;
          }
      for (int64_t t = 0; t < T; ++t)
        for (int64_t c = 0; c < d; ++c) {
          double o = 0;
          const double up = of_text_out ? text_up.at(b, h, t, c) : 0;
          for (int64_t n = 0; n < N; ++n) {
            const double x = known(image.at(b, 0, n, c));
            o += q[t * N + n] * x;
            dq[t * N + n] += up * x;
            dx[n * d + c] += q[t * N + n] * up;
          }
          if (pool)
            differ(o, text_out.at(b, h, t, c));
        }
      through_softmax(p, dp, N, T);
      through_softmax(q, dq, T, N);
      for (int64_t t = 0; t < T; ++t) {
        double sum = 0;
        for (int64_t n = 0; n < N; ++n) {
          const double ds = dp[n * T + t] + dq[t * N + n];
          sum += dp[n * T + t];
          for (int64_t c = 0; c < d; ++c) {
            dk[t * d + c] += ds * known(image.at(b, 0, n, c));
            dx[n * d + c] += ds * known(key.at(b, h, t, c));
          }
        }
        if (g.grad_key_bias)
          differ(sum, grad_bias[bh * T + t]);
        for (int64_t c = 0; c < d && g.grad_key.data; ++c)
          differ(key.at(b, h, t, c) == key.at(b, h, t, c) ? dk[t * d + c] : 0, grad_key.at(b, h, t, c));
        for (int64_t c = 0; c < dv && g.grad_value.data; ++c)
          differ(takes(b, t) ? dval[t * dv + c] : 0, grad_value.at(b, h, t, c));
      }
    }
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t c = 0; c < dv && attend; ++c)
        differ(out[n * dv + c], image_out.at(b, 0, n, c));
      for (int64_t c = 0; c < d && g.grad_image.data; ++c)
        differ(image.at(b, 0, n, c) == image.at(b, 0, n, c) ? dx[n * d + c] : 0, grad_image.at(b, 0, n, c));
    }
  }
  return nullptr;
}

}  // namespace

int main(int, char** arguments) {
  return check_cases(arguments, absorbed);
}
