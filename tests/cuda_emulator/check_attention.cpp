// Runs the CUDA kernels of gated cross-attention and of bidirectional attention on random small arguments and compares
// with plain loops in double: check_attention SEED CASES. Built with ThreadSanitizer and AddressSanitizer, too: every
// tensor has memory of exactly its size. What takes no part is NaN.
#include "../../csrc/cuda/bidirectional_attention.h"
#include "../../csrc/cuda/gated_cross_attention.h"
#include "check_heads.h"

namespace {

void pick_sizes(int64_t& N, int64_t& T) {
  B = pick(1, 2);
  H = pick(1, 2);
  d = pick(0, 3) ? pick(1, 40) : pick(1, 300);
  dv = pick(0, 3) ? pick(1, 40) : pick(1, 300);
  N = pick(0, 3) ? pick(0, 90) : pick(0, 400);
  T = pick(0, 3) ? pick(0, 40) : pick(0, 200);
  if (toss())
    std::swap(N, T);
  dtype = toss() ? Dtype::float32 : Dtype::bfloat16;
  emulator::config = {pick(0, 4), unsigned(pick(0, 99)), toss(), (pick(0, 2) ? pick(100, 230) : pick(40, 100)) * 1024,
                      pick(1, 40)};
}

const char* gated() {
  int64_t N, T;
  pick_sizes(N, T);
  Heads query(N, d, true), key(T, d, true), value(T, dv, true), gate(N, dv, true), result(N, dv, false),
      attended(N, dv, false), upstream(N, dv, true);
  Heads grad_query(N, d, false), grad_key(T, d, false), grad_value(T, dv, false), grad_gate(N, dv, false);
  Floats kept(2 * B * H * N), bias(B * H * N * T), grad_bias(B * H * N * T);
  Flags tokens(B * H * T), pairs(B * H * N * T);
  const int masks = pick(0, 3);  // none, tokens, pairs, bias
  const bool gates = toss();
  for (int64_t i = 0; i < B * H * N * T; ++i)
    bias[i] = normal();
  auto takes = [&](int64_t bh, int64_t n, int64_t t) {
    return masks == 1 ? tokens.data[bh * T + t] : masks == 2 ? pairs.data[(bh * N + n) * T + t] : true;
  };
  for (int64_t bh = 0; bh < B * H; ++bh) {
    for (int64_t t = 0; t < T; ++t) {
      bool any = masks != 2;
      if (masks == 2) {
        if (pick(0, 5) == 0)
          for (int64_t n = 0; n < N; ++n)
            pairs.data[(bh * N + n) * T + t] = false;
        for (int64_t n = 0; n < N; ++n)
          any = any || pairs.data[(bh * N + n) * T + t];
        tokens.data[bh * T + t] = any;
      }
      if ((masks == 1 || masks == 2) && !tokens.data[bh * T + t])
        key.forget(bh / H, bh % H, t), value.forget(bh / H, bh % H, t);
    }
    for (int64_t n = 0; masks == 2 && n < N; ++n) {
      bool any = false;
      for (int64_t t = 0; t < T; ++t)
        any = any || takes(bh, n, t);
      if (!any)
        query.forget(bh / H, bh % H, n), gate.forget(bh / H, bh % H, n);
    }
  }
  GatedCrossAttention a;
  a.dtype = dtype;
  a.B = B;
  a.H = H;
  a.N = N;
  a.T = T;
  a.d = d;
  a.dv = dv;
  a.scale = 0.2;
  a.query = query;
  a.key = key;
  a.value = value;
  a.result = result;
  a.softmax = kept;
  if (gates)
    a.gate = gate, a.attended = attended;
  if (masks == 1 || masks == 2)
    a.tokens = {tokens.data.get(), H * T, T, 1};
  if (masks == 2)
    a.pairs = {pairs.data.get(), H * N * T, N * T, T, 1};
  if (masks == 3)
    a.bias = {bias, H * N * T, N * T, T, 1};
  if (const char* error =
          run<GatedCrossAttention>(a, cuda::gated_cross_attention_forward, cuda::gated_cross_attention_scratch))
    return error;
  GatedCrossAttentionBackward g;
  g.forward = a;
  g.grad_result = upstream;
  if (!gates)
    g.forward.attended = result;
  const int wanted = pick(1, 31);
  if (wanted & 1)
    g.grad_query = grad_query;
  if (wanted & 2)
    g.grad_key = grad_key;
  if (wanted & 4)
    g.grad_value = grad_value;
  if (wanted & 8 && gates)
    g.grad_gate = grad_gate;
  if (wanted & 16 && masks == 3)
    g.grad_bias = grad_bias;
  if (const char* error = run<GatedCrossAttentionBackward>(g, cuda::gated_cross_attention_backward,
                                                           cuda::gated_cross_attention_scratch))
    return error;

  for (int64_t bh = 0; bh < B * H; ++bh) {
    const int64_t b = bh / H;
    const int64_t h = bh % H;
    auto known = [&](double x) { return x == x ? x : 0; };  // what is NaN takes no part
    Matrix s(N * T), dp(N * T), dq(N * d), dk(T * d), dval(T * dv);
    for (int64_t n = 0; n < N; ++n)
      for (int64_t t = 0; t < T; ++t) {
        for (int64_t c = 0; c < d; ++c)
          s[n * T + t] += a.scale * known(query.at(b, h, n, c)) * known(key.at(b, h, t, c));
        if (masks == 3)
          s[n * T + t] += bias[(bh * N + n) * T + t];
      }
    const Matrix w = softmax(s, N, T, [&](int64_t n, int64_t t) { return takes(bh, n, t); });
    for (int64_t n = 0; n < N; ++n)
      for (int64_t c = 0; c < dv; ++c) {
        double o = 0;
        for (int64_t t = 0; t < T; ++t)
          o += w[n * T + t] * known(value.at(b, h, t, c));
        const double factor = gates ? known(gate.at(b, h, n, c)) : 1;
        const double up = upstream.at(b, h, n, c);
        differ(factor * o, result.at(b, h, n, c));
        if (gates)
          differ(o, attended.at(b, h, n, c));
        if (g.grad_gate.data)
          differ(o * up, grad_gate.at(b, h, n, c));
        for (int64_t t = 0; t < T; ++t)
          dp[n * T + t] += up * factor * known(value.at(b, h, t, c)), dval[t * dv + c] += w[n * T + t] * up * factor;
      }
    through_softmax(w, dp, N, T);
    for (int64_t n = 0; n < N; ++n)
      for (int64_t t = 0; t < T; ++t) {
        if (g.grad_bias)
          differ(dp[n * T + t], grad_bias[(bh * N + n) * T + t]);
        for (int64_t c = 0; c < d; ++c) {
          dq[n * d + c] += a.scale * dp[n * T + t] * known(key.at(b, h, t, c));
          dk[t * d + c] += a.scale * dp[n * T + t] * known(query.at(b, h, n, c));
        }
      }
    for (int64_t n = 0; n < N; ++n)
      for (int64_t c = 0; c < d; ++c)
        if (wanted & 1)
          differ(dq[n * d + c], grad_query.at(b, h, n, c));
    for (int64_t t = 0; t < T; ++t)
      for (int64_t c = 0; c < d; ++c)
        if (wanted & 2)
          differ(dk[t * d + c], grad_key.at(b, h, t, c));
    for (int64_t t = 0; t < T; ++t)
      for (int64_t c = 0; c < dv; ++c)
        if (wanted & 4)
          differ(dval[t * dv + c], grad_value.at(b, h, t, c));
  }
  return nullptr;
}

const char* bidirectional() {
  int64_t N, T;
  pick_sizes(N, T);
  Heads query(N, d, true), key(T, d, true), image_value(N, dv, true), text_value(T, dv, true), image_out(N, dv, false),
      text_out(T, dv, false), unrounded(T, dv, false, H, Dtype::float32);
  Heads image_up(N, dv, true), text_up(T, dv, true), grad_query(N, d, false), grad_key(T, d, false),
      grad_image(N, dv, false), grad_text(T, dv, false);
  Floats image_kept(2 * B * H * N), text_kept(2 * B * H * T);
  Flags image_mask(B * N), text_mask(B * T);
  BidirectionalAttention a;
  a.dtype = dtype;
  a.B = B;
  a.H = H;
  a.N = N;
  a.T = T;
  a.d = d;
  a.dv = dv;
  a.scale = 0.2;
  if (toss())
    a.image_mask = {image_mask.data.get(), N, 0, 1};
  if (toss())
    a.text_mask = {text_mask.data.get(), T, 0, 1};
  for (int64_t bh = 0; bh < B * H; ++bh) {
    for (int64_t n = 0; n < N; ++n)
      if (a.image_mask.data && !image_mask.data[bh / H * N + n]) {
        image_value.forget(bh / H, bh % H, n);
        if (toss())
          query.forget(bh / H, bh % H, n);
      }
    for (int64_t t = 0; t < T; ++t)
      if (a.text_mask.data && !text_mask.data[bh / H * T + t]) {
        text_value.forget(bh / H, bh % H, t);
        if (toss())
          key.forget(bh / H, bh % H, t);
      }
  }
  a.image_query = query;
  a.text_key = key;
  a.image_value = image_value;
  a.text_value = text_value;
  a.image_out = image_out;
  a.text_out = text_out;
  a.image_softmax = image_kept;
  a.text_softmax = text_kept;
  if (dtype == Dtype::bfloat16)
    a.unrounded = unrounded;
  if (const char* error =
          run<BidirectionalAttention>(a, cuda::bidirectional_attention_forward, cuda::bidirectional_attention_scratch))
    return error;
  BidirectionalAttentionBackward g;
  g.forward = a;
  if (dtype == Dtype::float32)
    g.forward.unrounded = text_out;
  const int flows = pick(1, 3);
  const int wanted = pick(1, 15);
  if (flows & 1)
    g.grad_image_out = image_up;
  if (flows & 2)
    g.grad_text_out = text_up;
  if (wanted & 1)
    g.grad_image_query = grad_query;
  if (wanted & 2)
    g.grad_text_key = grad_key;
  if (wanted & 4)
    g.grad_image_value = grad_image;
  if (wanted & 8)
    g.grad_text_value = grad_text;
  if (const char* error = run<BidirectionalAttentionBackward>(g, cuda::bidirectional_attention_backward,
                                                              cuda::bidirectional_attention_scratch))
    return error;

  for (int64_t bh = 0; bh < B * H; ++bh) {
    const int64_t b = bh / H;
    const int64_t h = bh % H;
    auto known = [&](double x) { return x == x ? x : 0; };
    Matrix s(N * T), st(T * N), dp(N * T), dpt(T * N);
    for (int64_t n = 0; n < N; ++n)
      for (int64_t t = 0; t < T; ++t) {
        for (int64_t c = 0; c < d; ++c)
          s[n * T + t] += a.scale * known(query.at(b, h, n, c)) * known(key.at(b, h, t, c));
        st[t * N + n] = s[n * T + t];
      }
    const Matrix w =
        softmax(s, N, T, [&](int64_t, int64_t t) { return !a.text_mask.data || text_mask.data[b * T + t]; });
    const Matrix wt =
        softmax(st, T, N, [&](int64_t, int64_t n) { return !a.image_mask.data || image_mask.data[b * N + n]; });
    // One side: its result, and dp and the other side's values' gradient.
    auto side = [&](const Matrix& weights, int64_t rows, int64_t columns, const Heads& values, const Heads& out,
                    const Heads& up, bool flowing, Matrix& dp_, const Heads& grad_values, bool want) {
      Matrix grad(columns * dv);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < dv; ++c) {
          double o = 0;
          const double x = flowing ? up.at(b, h, i, c) : 0;
          for (int64_t j = 0; j < columns; ++j) {
            const double v = known(values.at(b, h, j, c));
            o += weights[i * columns + j] * v;
            dp_[i * columns + j] += x * v;
            grad[j * dv + c] += weights[i * columns + j] * x;
          }
          differ(o, out.at(b, h, i, c));
        }
      for (int64_t j = 0; want && j < columns; ++j)
        for (int64_t c = 0; c < dv; ++c)
          differ(grad[j * dv + c], grad_values.at(b, h, j, c));
      through_softmax(weights, dp_, rows, columns);
    };
    side(w, N, T, text_value, image_out, image_up, flows & 1, dp, grad_text, wanted & 8);
    side(wt, T, N, image_value, text_out, text_up, flows & 2, dpt, grad_image, wanted & 4);
    Matrix dq(N * d), dk(T * d);
    for (int64_t n = 0; n < N; ++n)
      for (int64_t t = 0; t < T; ++t)
        for (int64_t c = 0; c < d; ++c) {
          const double ds = a.scale * (dp[n * T + t] + dpt[t * N + n]);
          dq[n * d + c] += ds * known(key.at(b, h, t, c));
          dk[t * d + c] += ds * known(query.at(b, h, n, c));
        }
    for (int64_t n = 0; n < N; ++n)
      for (int64_t c = 0; c < d; ++c)
        if (wanted & 1)
          differ(query.at(b, h, n, c) == query.at(b, h, n, c) ? dq[n * d + c] : 0, grad_query.at(b, h, n, c));
    for (int64_t t = 0; t < T; ++t)
      for (int64_t c = 0; c < d; ++c)
        if (wanted & 2)
          differ(key.at(b, h, t, c) == key.at(b, h, t, c) ? dk[t * d + c] : 0, grad_key.at(b, h, t, c));
  }
  return nullptr;
}

}  // namespace

int main(int, char** arguments) {
  return check_cases(arguments, [] { return toss() ? gated() : bidirectional(); });
}
