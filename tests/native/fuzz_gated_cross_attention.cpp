#include "../../csrc/cpu/gated_cross_attention.cpp"
#include "fuzz.h"

template <class T>
static void round(Dtype dtype) {
  using C = acc_t<T>;
  GatedCrossAttention a;
  a.dtype = dtype;
  a.scale = 0.2;
  a.nontemporal = draw(0, 1);
  a.B = draw(0, 3);
  a.H = draw(1, 3);
  a.N = draw(0, draw(0, 3) ? 40 : 400);
  a.T = draw(0, draw(0, 9) ? 90 : 1200);
  a.d = draw(1, draw(0, 2) ? 40 : 200);
  a.dv = draw(1, draw(0, 2) ? 40 : 200);
  Tensor<T> query({a.B, a.H, a.N, a.d}, true), key({a.B, a.H, a.T, a.d}, true), value({a.B, a.H, a.T, a.dv}, true),
      gate({a.B, a.H, a.N, a.dv}, true), grad({a.B, a.H, a.N, a.dv}, true), result({a.B, a.H, a.N, a.dv}, false),
      attended({a.B, a.H, a.N, a.dv}, false), grad_query({a.B, a.H, a.N, a.d}, false),
      grad_key({a.B, a.H, a.T, a.d}, false), grad_value({a.B, a.H, a.T, a.dv}, false),
      grad_gate({a.B, a.H, a.N, a.dv}, false);
  Tensor<C> softmax({a.B, a.H, 2, a.N}, false, true), bias({a.B, a.H, a.N, a.T}, true),
      grad_bias({a.B, a.H, a.N, a.T}, false, true);
  auto tokens = random_mask(a.B * a.T);
  auto pairs = random_mask(a.N * a.T);
  a.query = head_rows(query);
  a.key = head_rows(key);
  a.value = head_rows(value);
  a.result = head_rows(result);
  a.softmax = softmax.data();
  const bool gated = draw(0, 1);
  if (gated)
    a.gate = head_rows(gate);
  a.attended = head_rows(attended);
  const int64_t mask = draw(0, 3);
  if (mask == 1 || mask == 2)
    a.tokens = {reinterpret_cast<bool*>(tokens.data()), a.T, 0, 1};
  if (mask == 2)
    a.pairs = {reinterpret_cast<bool*>(pairs.data()), 0, 0, a.T, 1};
  if (mask == 3)
    a.bias = {bias.data(), bias.stride[0], bias.stride[1], bias.stride[2], bias.stride[3]};
  baseline::gated_cross_attention_forward(a, three);
  result.check("result"), attended.check("attended");
  GatedCrossAttentionBackward g;
  g.forward = a;
  g.grad_result = head_rows(grad);
  if (draw(0, 3))
    g.grad_query = head_rows(grad_query);
  if (draw(0, 3))
    g.grad_key = head_rows(grad_key);
  if (draw(0, 3))
    g.grad_value = head_rows(grad_value);
  if (gated && draw(0, 3))
    g.grad_gate = head_rows(grad_gate);
  if (mask == 3 && draw(0, 1))
    g.grad_bias = grad_bias.data();
  baseline::gated_cross_attention_backward(g, three);
  if (g.grad_query.data)
    grad_query.check("grad_query");
  if (g.grad_key.data)
    grad_key.check("grad_key");
  if (g.grad_value.data)
    grad_value.check("grad_value");
  if (g.grad_gate.data)
    grad_gate.check("grad_gate");
  if (g.grad_bias)
    grad_bias.check("grad_bias");
}

FUZZ_MAIN
