#include "../../csrc/cpu/bidirectional_attention.cpp"
#include "fuzz.h"

template <class T>
static void round(Dtype dtype) {
  using C = acc_t<T>;
  BidirectionalAttention a;
  a.dtype = dtype;
  a.scale = 0.2;
  a.B = draw(0, 3);
  a.H = draw(1, 3);
  a.N = draw(0, draw(0, 3) ? 40 : 400);
  a.T = draw(0, draw(0, 9) ? 90 : 1200);
  a.d = draw(1, draw(0, 2) ? 40 : 200);
  a.dv = draw(1, draw(0, 2) ? 40 : 200);
  const std::vector<int64_t> image{a.B, a.H, a.N, a.d}, text{a.B, a.H, a.T, a.d}, image_v{a.B, a.H, a.N, a.dv},
      text_v{a.B, a.H, a.T, a.dv};
  Tensor<T> query(image, true), key(text, true), image_value(image_v, true), text_value(text_v, true),
      image_out(image_v, false), text_out(text_v, false), grad_image_out(image_v, true), grad_text_out(text_v, true),
      grad_query(image, false), grad_key(text, false), grad_image_value(image_v, false), grad_text_value(text_v, false);
  Tensor<C> image_softmax({a.B, a.H, 2, a.N}, false, true), text_softmax({a.B, a.H, 2, a.T}, false, true);
  Tensor<C> unrounded(text_v, false);
  auto positions = random_mask(a.B * a.N);
  auto tokens = random_mask(a.B * a.T);
  a.image_query = head_rows(query);
  a.text_key = head_rows(key);
  a.image_value = head_rows(image_value);
  a.text_value = head_rows(text_value);
  a.image_out = head_rows(image_out);
  a.text_out = head_rows(text_out);
  a.image_softmax = image_softmax.data();
  a.text_softmax = text_softmax.data();
  if (sizeof(T) != sizeof(C))
    a.unrounded = head_rows(unrounded);
  if (draw(0, 1))
    a.image_mask = {reinterpret_cast<bool*>(positions.data()), a.N, 0, 1};
  if (draw(0, 1))
    a.text_mask = {reinterpret_cast<bool*>(tokens.data()), a.T, 0, 1};
  baseline::bidirectional_attention_forward(a, three);
  image_out.check("image_out"), text_out.check("text_out");
  if (a.unrounded.data)
    unrounded.check("unrounded");
  BidirectionalAttentionBackward g;
  g.forward = a;
  if (!a.unrounded.data)
    g.forward.unrounded = a.text_out;
  if (draw(0, 3))
    g.grad_image_out = head_rows(grad_image_out);
  if (draw(0, 3) || !g.grad_image_out.data)
    g.grad_text_out = head_rows(grad_text_out);
  if (draw(0, 3))
    g.grad_image_query = head_rows(grad_query);
  if (draw(0, 3))
    g.grad_text_key = head_rows(grad_key);
  if (draw(0, 3))
    g.grad_image_value = head_rows(grad_image_value);
  if (draw(0, 3))
    g.grad_text_value = head_rows(grad_text_value);
  baseline::bidirectional_attention_backward(g, three);
  if (g.grad_image_query.data)
    grad_query.check("grad_image_query");
  if (g.grad_text_key.data)
    grad_key.check("grad_text_key");
  if (g.grad_image_value.data)
    grad_image_value.check("grad_image_value");
  if (g.grad_text_value.data)
    grad_text_value.check("grad_text_value");
}

FUZZ_MAIN
