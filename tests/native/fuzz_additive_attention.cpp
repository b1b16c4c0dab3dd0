#include "../../csrc/cpu/additive_attention.cpp"
#include "fuzz.h"

template <class V>
static Projection layer(V& t) {
  return {t.data(), t.stride[0], t.stride[1]};
}

template <class T>
static void round(Dtype dtype) {
  using C = acc_t<T>;
  AdditiveAttention a;
  a.dtype = dtype;
  a.activation = Activation(draw(0, 2));
  a.pool = draw(0, 2);
  a.B = draw(0, 4);
  a.N = draw(0, draw(0, 3) ? 40 : 400);
  a.D = draw(1, draw(0, 2) ? 40 : 200);
  a.A = draw(1, draw(0, 2) ? 30 : 120);
  a.K = a.pool ? draw(1, 20) : 1;
  if (draw(0, 2) == 0)
    a.D = (a.D + 15) / 16 * 16;
  std::vector<int64_t> offsets;
  const bool packed = draw(0, 2) == 0;
  const bool dense = draw(0, 1);
  if (packed) {
    for (int64_t b = 0; b + 1 < a.B; ++b)
      offsets.push_back(draw(0, a.N));
    offsets.push_back(0);
    if (a.B)
      offsets.push_back(a.N);
    else
      a.N = 0;
    std::sort(offsets.begin(), offsets.end());
    a.offsets = offsets.data();
  }
  const int64_t images = packed ? 1 : a.B;
  const std::vector<int64_t> like{images, a.N, a.D}, pooled{a.B, a.K, a.D}, &out = a.pool ? pooled : like;
  auto rows = [&](auto& t, bool own) {
    return SampleRows{t.data(), packed && own ? 0 : t.stride[0], t.stride[1], t.stride[2]};
  };
  Tensor<T> image(like, true, dense), w_image({a.A, a.D}, true), w_gate({a.A, a.D}, true), v({a.K, a.A}, true),
      result(out, false, true), grad(out, true), grad_image(like, false, true), grad_w_image({a.A, a.D}, false, true),
      grad_w_gate({a.A, a.D}, false, true), grad_v({a.K, a.A}, false, true);
  Tensor<C> bias_hidden({a.B, a.A}, true, true), bias_gate({a.A}, true, true), weights({images, a.K, a.N}, false, true),
      scores({images, a.K, a.N}, false, true), grad_weights({images, a.K, a.N}, true, true),
      grad_scores({images, a.K, a.N}, true, true), grad_bias_hidden({a.B, a.A}, false, true),
      grad_bias_gate({a.A}, false, true);
  auto mask = random_mask(images * a.N);
  const int64_t seed = draw(INT64_MIN, INT64_MAX);
  if (draw(0, 1))
    a.dropout = dropout_of(double(draw(1, 4)) / 4, &seed);
  a.image = rows(image, true);
  a.w_image = layer(w_image);
  a.v = layer(v);
  a.result = rows(result, !a.pool);
  a.weights = weights.data();
  if (draw(0, 1))
    a.scores = scores.data();
  if (draw(0, 1))
    a.bias_hidden = bias_hidden.data();
  const bool gated = draw(0, 1);
  if (gated)
    a.w_gate = layer(w_gate);
  if (gated && draw(0, 1))
    a.bias_gate = bias_gate.data();
  a.kept_rows = draw(0, 1) ? draw(0, images * a.N) : 0;
  Tensor<C> kept({a.kept_rows, gated ? 2 * a.A : a.A}, false, true);
  a.kept = kept.data();
  if (draw(0, 1)) {
    a.mask = {reinterpret_cast<bool*>(mask.data()), packed ? 0 : a.N, 0, 1};
    for (int64_t i = 0; i < images; ++i)  // what is masked out reaches nothing
      for (int64_t n = 0; n < a.N; ++n)
        if (!mask[i * a.N + n])
          image.memory[i * image.stride[0] + n * image.stride[1]] = from_acc<T>(acc_t<T>(NAN));
  }
  baseline::additive_attention_forward(a, three);
  kept.check("kept");
  result.check("result"), weights.check("weights");
  for (int64_t i = 0; a.scores && i < images * a.K * a.N; ++i)
    if (scores.data()[i] == -infinity<C>)  // masked
      scores.data()[i] = 0;
  if (a.scores)
    scores.check("scores");
  AdditiveAttentionBackward g;
  g.forward = a;
  if (draw(0, 3))
    g.grad_result = rows(grad, !a.pool);
  if (draw(0, 1))
    g.grad_weights = grad_weights.data();
  if (a.scores && draw(0, 1))
    g.grad_scores = grad_scores.data();
  if (draw(0, 3))
    g.grad_image = rows(grad_image, true);
  if (a.bias_hidden && draw(0, 3))
    g.grad_bias_hidden = grad_bias_hidden.data();
  if (draw(0, 3))
    g.grad_w_image = grad_w_image.data();
  if (draw(0, 3))
    g.grad_v = grad_v.data();
  if (gated && draw(0, 3))
    g.grad_w_gate = grad_w_gate.data();
  if (a.bias_gate && draw(0, 3))
    g.grad_bias_gate = grad_bias_gate.data();
  baseline::additive_attention_backward(g, three);
  if (g.grad_image.data)
    grad_image.check("grad_image");
  if (g.grad_bias_hidden)
    grad_bias_hidden.check("grad_bias_hidden");
  if (g.grad_w_image)
    grad_w_image.check("grad_w_image");
  if (g.grad_v)
    grad_v.check("grad_v");
  if (g.grad_w_gate)
    grad_w_gate.check("grad_w_gate");
  if (g.grad_bias_gate)
    grad_bias_gate.check("grad_bias_gate");
}

FUZZ_MAIN
