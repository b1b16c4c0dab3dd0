#include "../../csrc/cpu/absorbed_attention.cpp"
#include "fuzz.h"

// Text that is wide has elements of type U, not of the image's T.
template <class T, class U>
static void round_of(Dtype dtype, bool wide) {
  using C = acc_t<T>;
  AbsorbedAttention a;
  a.dtype = dtype;
  a.wide_text = wide;
  a.B = draw(0, 3);
  a.H = draw(1, draw(0, 3) ? 3 : 20);
  a.N = draw(0, draw(0, 3) ? 40 : 300);
  a.T = draw(0, draw(0, 9) ? 60 : 800);
  a.D = draw(1, draw(0, 2) ? 40 : 200);
  const bool attend = draw(0, 2);
  const int64_t channels = draw(1, draw(0, 2) ? 40 : 200);
  a.Dv = attend ? channels : 0;
  a.pool = !attend || draw(0, 2);
  const std::vector<int64_t> features{a.B, a.N, a.D}, text{a.B, a.H, a.T, a.D}, values{a.B, a.H, a.T, channels},
      results{a.B, a.N, channels};
  Tensor<T> image(features, true), image_out(results, false), text_out(text, false), grad_image_out(results, true),
      grad_text_out(text, true), grad_image(features, false);
  Tensor<U> key(text, true), value(values, true), grad_key(text, false), grad_value(values, false);
  Tensor<C> key_bias({a.B, a.H, a.T}, true), grad_key_bias({a.B, a.H, a.T}, false, true);
  Tensor<C> image_softmax({a.B, a.H, 2, a.N}, false, true), text_softmax({a.B, a.H, 2, a.T}, false, true);
  Tensor<C> unrounded(text, false);
  auto positions = random_mask(a.B * a.N);
  auto tokens = random_mask(a.B * a.T);
  a.image = {image.data(), image.stride[0], image.stride[1], image.stride[2]};
  a.key = head_rows(key);
  if (draw(0, 1))
    a.key_bias = {key_bias.data(), key_bias.stride[0], key_bias.stride[1], 0, key_bias.stride[2]};
  if (attend) {
    a.value = head_rows(value);
    a.image_out = {image_out.data(), image_out.stride[0], image_out.stride[1], image_out.stride[2]};
    a.image_softmax = image_softmax.data();
  }
  if (a.pool) {
    a.text_out = head_rows(text_out);
    a.text_softmax = text_softmax.data();
    if (sizeof(T) == 2)
      a.unrounded = head_rows(unrounded);
  }
  if (draw(0, 1))
    a.image_mask = {reinterpret_cast<bool*>(positions.data()), a.N, 0, 1};
  if (draw(0, 1))
    a.text_mask = {reinterpret_cast<bool*>(tokens.data()), a.T, 0, 1};
  baseline::absorbed_attention_forward(a, three);
  if (attend)
    image_out.check("image_out");
  if (a.pool)
    text_out.check("text_out");
  if (a.unrounded.data)
    unrounded.check("unrounded");
  AbsorbedAttentionBackward g;
  g.forward = a;
  if (!a.unrounded.data)
    g.forward.unrounded = a.text_out;
  if (attend && draw(0, 3))
    g.grad_image_out = {grad_image_out.data(), grad_image_out.stride[0], grad_image_out.stride[1],
                        grad_image_out.stride[2]};
  if (a.pool && (draw(0, 3) || !g.grad_image_out.data))
    g.grad_text_out = head_rows(grad_text_out);
  if (draw(0, 3))
    g.grad_image = {grad_image.data(), grad_image.stride[0], grad_image.stride[1], grad_image.stride[2]};
  if (draw(0, 3))
    g.grad_key = head_rows(grad_key);
  if (a.key_bias.data && draw(0, 3))
    g.grad_key_bias = grad_key_bias.data();
  if (attend && draw(0, 3))
    g.grad_value = head_rows(grad_value);
  baseline::absorbed_attention_backward(g, three);
  if (g.grad_image.data)
    grad_image.check("grad_image");
  if (g.grad_key.data)
    grad_key.check("grad_key");
  if (g.grad_key_bias)
    grad_key_bias.check("grad_key_bias");
  if (g.grad_value.data)
    grad_value.check("grad_value");
}

template <class T>
static void round(Dtype dtype) {
  draw(0, 2) ? round_of<T, T>(dtype, false) : round_of<T, acc_t<T>>(dtype, true);
}

FUZZ_MAIN
