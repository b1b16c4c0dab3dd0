// torch.ops.mmkernels.channel_attention*: schema, checks, allocation, and the call of the device's launcher.
#include "../channel_attention.h"

#include <tuple>

#include "projection.h"
#include "rows.h"

#if defined(MMK_CUDA) || defined(MMK_EMULATED)
#include "../cuda/channel_attention.h"
#include "panels.h"
#endif

#ifdef MMK_EMULATED
#define MMK_OPERATION "channel_attention_emulated"
#else
#define MMK_OPERATION "channel_attention"
#endif

namespace mmk::binding {
namespace {

// What both directions check. The tensors that the kernels want contiguous are kept here.
struct Arguments {
  ChannelAttention a;
  const Anchor anchor;
  const TextProjection projection;
  const Tensor bias_hidden;
  std::vector<int64_t> kept_shape;

  Arguments(const Tensor& image, const Tensor& text, const Tensor& weight, const Optional& bias, int64_t kept_rows)
      : a(of_image(image)),
        anchor(image),
        projection(anchor, a.B, a.D, {text, weight, bias, a.D}),
        bias_hidden(*projection.bias_hidden()),
        kept_shape(kept_shape_of(kept_rows, a.B * a.N, a.D)) {
    a.bias_hidden = bias_hidden.data_ptr();
    a.weight = binding::projection(weight);
    a.kept_rows = kept_rows;
  }

  static ChannelAttention of_image(const Tensor& image) {
    ChannelAttention a;
    a.dtype = dtype_of(image, "image");
    STD_TORCH_CHECK(is_strided(image) && image.dim() == 3, "image must be a dense [B, N, D] tensor");
    a.B = image.size(0);
    a.N = image.size(1);
    a.D = image.size(2);
    STD_TORCH_CHECK(a.D >= 1, "image must have at least one channel");
    a.image = rows(image);
    return a;
  }
};

template <auto Launch>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& image, const Tensor& text, const Tensor& weight,
                                           const Optional& bias, bool need_weights, int64_t kept_rows) {
  Arguments all(image, text, weight, bias, kept_rows);
  Tensor kept = empty_tensor(image, all.kept_shape, accumulate_type(all.a.dtype));
  all.a.kept = kept.mutable_data_ptr();
  Tensor result = dense_gradient(image, true);
  Tensor weights = dense_gradient(image, need_weights);
  all.a.result = rows(result);
  all.a.nontemporal = too_large_for_cache(result);
  if (need_weights)
    all.a.weights = rows(weights);
  if (all.a.B > 0 && all.a.N > 0)
    Launch(all.a, image, weight);
  return {result, weights, kept};
}

template <auto Launch>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Optional& grad_result, const Optional& grad_weights,
                                                    const Tensor& image, const Tensor& text, const Tensor& weight,
                                                    const Optional& bias, const Tensor& given_kept, bool need_weights,
                                                    int64_t kept_rows, bool need_image_grad, bool need_text_grad,
                                                    bool need_weight_grad, bool need_bias_grad) {
  Arguments all(image, text, weight, bias, kept_rows);
  const Anchor& anchor = all.anchor;
  anchor.check(given_kept, "kept", accumulate_type(all.a.dtype), all.kept_shape);
  Tensor kept = dense(given_kept);
  all.a.kept = kept.mutable_data_ptr();
  ChannelAttentionBackward g;
  g.forward = all.a;
  if (grad_result)
    anchor.check(*grad_result, "grad_result", anchor.type, image.sizes()), g.grad_result = rows(*grad_result);
  if (need_weights && grad_weights)
    anchor.check(*grad_weights, "grad_weights", anchor.type, image.sizes()), g.grad_weights = rows(*grad_weights);
  const LayerNeeds needs = all.projection.needed(need_text_grad, need_weight_grad, need_bias_grad);
  Tensor grad_image = dense_gradient(image, need_image_grad);
  Tensor grad_bias_hidden = dense_gradient(all.bias_hidden, needs.any());
  Tensor grad_weight = dense_gradient(weight, need_weight_grad);
  if (need_image_grad)
    g.grad_image = rows(grad_image), g.forward.nontemporal = too_large_for_cache(grad_image);
  g.grad_bias_hidden = data_if(grad_bias_hidden, needs.any());
  g.grad_weight = data_if(grad_weight, need_weight_grad);
  g.grad_weight_row = weight.size(1);
  if (need_image_grad || needs.any())
    Launch(g, image, weight, grad_weight);
  LayerGradients of_layer = all.projection.gradients(grad_bias_hidden, needs, grad_weight);
  return {grad_image, of_layer.text, grad_weight, of_layer.bias};
}

#ifndef MMK_EMULATED
void cpu_forward(const ChannelAttention& a, const Tensor&, const Tensor&) {
  channel_attention_forward(a, torch_threads());
}
void cpu_backward(const ChannelAttentionBackward& g, const Tensor&, const Tensor&, Tensor&) {
  channel_attention_backward(g, torch_threads());
}

constexpr auto cpu = &forward<cpu_forward>;
constexpr auto cpu_back = &backward<cpu_backward>;
#endif

#if defined(MMK_CUDA) || defined(MMK_EMULATED)
cuda::SampledRows samples(const ChannelAttention& a) {
  return {a.B, a.N, a.B * a.N, nullptr};
}

// The columns that act on the image.
Tensor of_image(const Tensor& weight, int64_t D) {
  Tensor all = weight;
  return torch::stable::narrow(all, 1, 0, D);
}

void cuda_forward(const ChannelAttention& a, const Tensor& image, const Tensor& weight) {
  nothing_kept(a.kept_rows);
  on_stream(image, [&](void* stream) {
    const Tensor columns = transposed(of_image(weight, a.D));
    Panels(image, a.dtype, samples(a), {}, stream).each(a.D, [&](const cuda::Panel& panel, const Tensor& x) {
      Tensor scores = product(x, columns);
      check_launch(cuda::channel_attention_weigh(a, panel, floats(scores), stream));
    });
  });
}

void cuda_backward(const ChannelAttentionBackward& g, const Tensor& image, const Tensor& weight, Tensor& grad_weight) {
  const ChannelAttention& a = g.forward;
  nothing_kept(a.kept_rows);
  on_stream(image, [&](void* stream) {
    const Tensor layer = of_image(weight, a.D);
    const Tensor columns = transposed(layer);
    const WeightSum sum(image, a.D, a.D, g.grad_weight, stream);
    const ColumnSum of_bias_hidden(image, samples(a), a.D, g.grad_bias_hidden, stream);
    Panels(image, a.dtype, samples(a), {}, stream).each(a.D, [&](const cuda::Panel& panel, const Tensor& x) {
      Tensor scores = product(x, columns);
      Tensor direct = empty_tensor(scores, g.grad_image.data ? scores.sizes() : Shape{0});
      const bool is_float = a.dtype == Dtype::float32;
      Tensor rounded = is_float ? scores : empty_tensor(x, scores.sizes());
      check_launch(cuda::channel_attention_differentiate(g, panel, floats(scores),
                                                         g.grad_image.data ? floats(direct) : nullptr,
                                                         is_float ? nullptr : rounded.mutable_data_ptr(), stream));
      of_bias_hidden.add(panel, scores);  // not of what is rounded for the products: this sum cancels
      sum.add(rounded, x);
      if (!g.grad_image.data)
        return;
      Tensor through = product(rounded, layer);
      check_launch(cuda::channel_attention_write(g, panel, floats(direct), floats(through), stream));
    });
    if (g.grad_weight) {
      Tensor to = of_image(grad_weight, a.D);
      sum.write(to);
    }
  });
}

constexpr auto gpu = &forward<cuda_forward>;
constexpr auto gpu_back = &backward<cuda_backward>;
#endif

}  // namespace
}  // namespace mmk::binding

STABLE_TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(MMK_OPERATION
        "(Tensor image, Tensor text, Tensor weight, Tensor? bias, bool need_weights, SymInt kept_rows) -> (Tensor, "
        "Tensor, Tensor)");
  m.def(MMK_OPERATION
        "_backward(Tensor? grad_result, Tensor? grad_weights, Tensor image, Tensor text, Tensor weight, Tensor? bias, "
        "Tensor kept, bool need_weights, SymInt kept_rows, bool need_image_grad, bool need_text_grad, bool "
        "need_weight_grad, bool need_bias_grad) -> (Tensor, Tensor, Tensor, Tensor)");
}

MMK_IMPLEMENT_CPU("", cpu)
MMK_IMPLEMENT_CPU("_backward", cpu_back)
MMK_IMPLEMENT_GPU("", gpu)
MMK_IMPLEMENT_GPU("_backward", gpu_back)
