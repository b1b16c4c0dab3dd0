#include "../../csrc/cpu/channel_attention.cpp"
#include "fuzz.h"

template <class V>
static SampleRows rows(V& t) {
  return {t.data(), t.stride[0], t.stride[1], t.stride[2]};
}

template <class T>
static void round(Dtype dtype) {
  using C = acc_t<T>;
  ChannelAttention a;
  a.dtype = dtype;
  a.nontemporal = draw(0, 1);
  a.B = draw(0, 4);
  a.N = draw(0, draw(0, 3) ? 40 : 400);
  a.D = draw(1, draw(0, 2) ? 40 : 200);
  if (draw(0, 2) == 0)
    a.D = (a.D + 15) / 16 * 16;
  const std::vector<int64_t> sizes{a.B, a.N, a.D};
  const bool dense = draw(0, 1);
  Tensor<T> image(sizes, true, dense), weight({a.D, a.D}, true), result(sizes, false, true),
      weights(sizes, false, true), grad(sizes, true), grad_weights(sizes, true), grad_image(sizes, false, true),
      grad_weight({a.D, a.D}, false, true);
  Tensor<C> bias_hidden({a.B, a.D}, true, true), grad_bias_hidden({a.B, a.D}, false, true);
  a.image = rows(image), a.bias_hidden = bias_hidden.data(),
  a.weight = {weight.data(), weight.stride[0], weight.stride[1]}, a.result = rows(result);
  if (draw(0, 1))
    a.weights = rows(weights);
  a.kept_rows = draw(0, 1) ? draw(0, a.B * a.N) : 0;
  Tensor<C> kept({a.kept_rows, a.D}, false, true);
  a.kept = kept.data();
  if (a.B * a.N)
    baseline::channel_attention_forward(a, three);
  kept.check("kept");
  result.check("result");
  if (a.weights.data)
    weights.check("weights");
  ChannelAttentionBackward g;
  g.forward = a;
  if (draw(0, 3))
    g.grad_result = rows(grad);
  if (draw(0, 1))
    g.grad_weights = rows(grad_weights);
  if (draw(0, 3))
    g.grad_image = rows(grad_image);
  if (draw(0, 3))
    g.grad_bias_hidden = grad_bias_hidden.data();
  if (draw(0, 3))
    g.grad_weight = grad_weight.data();
  g.grad_weight_row = a.D;
  baseline::channel_attention_backward(g, three);
  if (g.grad_image.data)
    grad_image.check("grad_image");
  if (g.grad_bias_hidden)
    grad_bias_hidden.check("grad_bias_hidden");
  if (g.grad_weight)
    grad_weight.check("grad_weight");
}

FUZZ_MAIN
