// torch.ops.mmkernels.bidirectional_attention*: schema, checks, allocation, and the call of the device's launcher.
#include "../bidirectional_attention.h"

#include <tuple>

#include "heads.h"

#if defined(MMK_CUDA) || defined(MMK_EMULATED)
#include "cuda.h"
#include "../cuda/bidirectional_attention.h"
#endif

#ifdef MMK_EMULATED
#define MMK_OPERATION "bidirectional_attention_emulated"
#else
#define MMK_OPERATION "bidirectional_attention"
#endif

namespace mmk::binding {
namespace {

using Optional = std::optional<Tensor>;

BidirectionalAttention arguments(const Tensor& image_query, const Tensor& text_key, const Tensor& image_value,
                                 const Tensor& text_value, const Optional& image_mask, const Optional& text_mask,
                                 double scale) {
  BidirectionalAttention a;
  a.dtype = dtype_of(image_query, "image_query");
  const Anchor anchor(image_query);
  STD_TORCH_CHECK(is_strided(image_query) && image_query.dim() == 4, "image_query must be a dense [B, H, N, d] tensor");
  STD_TORCH_CHECK(text_key.dim() == 4 && image_value.dim() == 4,
                  "text_key and image_value must be [B, H, T, d] and [B, H, N, dv]");
  a.B = image_query.size(0);
  a.H = image_query.size(1);
  a.N = image_query.size(2);
  a.d = image_query.size(3);
  a.T = text_key.size(2);
  a.dv = image_value.size(3);
  STD_TORCH_CHECK(a.d >= 1 && a.dv >= 1, "image_query and image_value must have at least one channel");
  a.scale = scale;
  anchor.check(text_key, "text_key", anchor.type, {a.B, a.H, a.T, a.d});
  anchor.check(image_value, "image_value", anchor.type, {a.B, a.H, a.N, a.dv});
  anchor.check(text_value, "text_value", anchor.type, {a.B, a.H, a.T, a.dv});
  a.image_query = head_rows(image_query);
  a.text_key = head_rows(text_key);
  a.image_value = head_rows(image_value);
  a.text_value = head_rows(text_value);
  if (image_mask)
    anchor.check(*image_mask, "image_mask", ScalarType::Bool, {a.B, a.N}), a.image_mask = token_mask(*image_mask);
  if (text_mask)
    anchor.check(*text_mask, "text_mask", ScalarType::Bool, {a.B, a.T}), a.text_mask = token_mask(*text_mask);
  return a;
}

template <auto Launch>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& image_query, const Tensor& text_key,
                                                           const Tensor& image_value, const Tensor& text_value,
                                                           const Optional& image_mask, const Optional& text_mask,
                                                           double scale) {
  BidirectionalAttention a = arguments(image_query, text_key, image_value, text_value, image_mask, text_mask, scale);
  const ScalarType accumulate = accumulate_type(a.dtype);
  Tensor image_out = empty_heads(image_query, a.dv);
  Tensor text_out = empty_heads(text_key, a.dv);
  Tensor image_softmax = empty_tensor(image_query, {a.B, a.H, 2, a.N}, accumulate);
  Tensor text_softmax = empty_tensor(image_query, {a.B, a.H, 2, a.T}, accumulate);
  const bool rounds = image_query.scalar_type() != accumulate;
  Tensor unrounded = empty_tensor(image_query, rounds ? Shape{a.B, a.H, a.T, a.dv} : Shape{0}, accumulate);
  a.image_out = head_rows(image_out);
  a.text_out = head_rows(text_out);
  a.image_softmax = image_softmax.mutable_data_ptr();
  a.text_softmax = text_softmax.mutable_data_ptr();
  if (rounds)
    a.unrounded = head_rows(unrounded);
  Launch(a, image_query);
  return {image_out, text_out, image_softmax, text_softmax, unrounded};
}

template <auto Launch>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Optional& grad_image_out, const Optional& grad_text_out,
                                                    const Tensor& image_query, const Tensor& text_key,
                                                    const Tensor& image_value, const Tensor& text_value,
                                                    const Optional& image_mask, const Optional& text_mask,
                                                    const Tensor& image_out, const Tensor& unrounded,
                                                    const Tensor& image_softmax, const Tensor& text_softmax,
                                                    double scale, bool need_image_query_grad, bool need_text_key_grad,
                                                    bool need_image_value_grad, bool need_text_value_grad) {
  BidirectionalAttentionBackward g;
  g.forward = arguments(image_query, text_key, image_value, text_value, image_mask, text_mask, scale);
  BidirectionalAttention& a = g.forward;
  const Anchor anchor(image_query);
  const ScalarType accumulate = accumulate_type(a.dtype);
  anchor.check(image_out, "image_out", anchor.type, {a.B, a.H, a.N, a.dv});
  anchor.check(unrounded, "unrounded", accumulate, {a.B, a.H, a.T, a.dv});
  anchor.check(image_softmax, "image_softmax", accumulate, {a.B, a.H, 2, a.N});
  anchor.check(text_softmax, "text_softmax", accumulate, {a.B, a.H, 2, a.T});
  Tensor image_rows = dense(image_softmax);
  Tensor text_rows = dense(text_softmax);
  a.image_out = head_rows(image_out);
  a.unrounded = head_rows(unrounded);
  a.image_softmax = image_rows.mutable_data_ptr();
  a.text_softmax = text_rows.mutable_data_ptr();
  if (grad_image_out) {
    anchor.check(*grad_image_out, "grad_image_out", anchor.type, {a.B, a.H, a.N, a.dv});
    g.grad_image_out = head_rows(*grad_image_out);
  }
  if (grad_text_out) {
    anchor.check(*grad_text_out, "grad_text_out", anchor.type, {a.B, a.H, a.T, a.dv});
    g.grad_text_out = head_rows(*grad_text_out);
  }
  auto [grad_image_query, to_image_query] = gradient(image_query, need_image_query_grad);
  auto [grad_text_key, to_text_key] = gradient(text_key, need_text_key_grad);
  auto [grad_image_value, to_image_value] = gradient(image_value, need_image_value_grad);
  auto [grad_text_value, to_text_value] = gradient(text_value, need_text_value_grad);
  g.grad_image_query = to_image_query;
  g.grad_text_key = to_text_key;
  g.grad_image_value = to_image_value;
  g.grad_text_value = to_text_value;
  if (need_image_query_grad || need_text_key_grad || need_image_value_grad || need_text_value_grad)
    Launch(g, image_query);
  return {grad_image_query, grad_text_key, grad_image_value, grad_text_value};
}

#ifndef MMK_EMULATED
constexpr auto cpu = &forward<on_cpu<BidirectionalAttention, bidirectional_attention_forward>>;
constexpr auto cpu_back = &backward<on_cpu<BidirectionalAttentionBackward, bidirectional_attention_backward>>;
#endif

#if defined(MMK_CUDA) || defined(MMK_EMULATED)
constexpr auto gpu = &forward<
    on_gpu<BidirectionalAttention, cuda::bidirectional_attention_scratch, cuda::bidirectional_attention_forward>>;
constexpr auto gpu_back = &backward<on_gpu<BidirectionalAttentionBackward, cuda::bidirectional_attention_scratch,
                                           cuda::bidirectional_attention_backward>>;
#endif

}  // namespace
}  // namespace mmk::binding

STABLE_TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(MMK_OPERATION
        "(Tensor image_query, Tensor text_key, Tensor image_value, Tensor text_value, Tensor? image_mask, "
        "Tensor? text_mask, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(MMK_OPERATION
        "_backward(Tensor? grad_image_out, Tensor? grad_text_out, Tensor image_query, Tensor text_key, "
        "Tensor image_value, Tensor text_value, Tensor? image_mask, Tensor? text_mask, Tensor image_out, Tensor "
        "unrounded, "
        "Tensor image_softmax, Tensor text_softmax, float scale, bool need_image_query_grad, bool need_text_key_grad, "
        "bool need_image_value_grad, bool need_text_value_grad) -> (Tensor, Tensor, Tensor, Tensor)");
}

MMK_IMPLEMENT_CPU("", cpu)
MMK_IMPLEMENT_CPU("_backward", cpu_back)
MMK_IMPLEMENT_GPU("", gpu)
MMK_IMPLEMENT_GPU("_backward", gpu_back)
