// torch.ops.mmkernels.absorbed_attention*: schema, checks, allocation, and the call of the device's launcher.
#include "../absorbed_attention.h"

#include <tuple>

#include "heads.h"

#if defined(MMK_CUDA) || defined(MMK_EMULATED)
#include "cuda.h"
#include "../cuda/absorbed_attention.h"
#endif

#ifdef MMK_EMULATED
#define MMK_OPERATION "absorbed_attention_emulated"
#else
#define MMK_OPERATION "absorbed_attention"
#endif

namespace mmk::binding {
namespace {

using Optional = std::optional<Tensor>;

SampleRows sample_rows(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

AbsorbedAttention arguments(const Tensor& image, const Tensor& key, const Optional& key_bias, const Optional& value,
                            const Optional& image_mask, const Optional& text_mask, bool pool) {
  AbsorbedAttention a;
  a.dtype = dtype_of(image, "image");
  const Anchor anchor(image);
  const ScalarType accumulate = accumulate_type(a.dtype);
  STD_TORCH_CHECK(is_strided(image) && image.dim() == 3, "image must be a dense [B, N, D] tensor");
  STD_TORCH_CHECK(key.dim() == 4, "key must be [B, H, T, D]");
  STD_TORCH_CHECK(value || pool, "value must be given, or pool be true");
  a.B = image.size(0);
  a.N = image.size(1);
  a.D = image.size(2);
  a.H = key.size(1);
  a.T = key.size(2);
  a.pool = pool;
  STD_TORCH_CHECK(a.D >= 1, "image must have at least one channel");
  a.wide_text = key.scalar_type() != anchor.type;
  const ScalarType text = a.wide_text ? accumulate : anchor.type;
  anchor.check(key, "key", text, {a.B, a.H, a.T, a.D});
  a.image = sample_rows(image);
  a.key = head_rows(key);
  if (key_bias) {
    anchor.check(*key_bias, "key_bias", accumulate, {a.B, a.H, a.T});
    a.key_bias = {key_bias->data_ptr(), key_bias->stride(0), key_bias->stride(1), 0, key_bias->stride(2)};
  }
  if (value) {
    STD_TORCH_CHECK(value->dim() == 4 && value->size(3) >= 1, "value must be [B, H, T, Dv]");
    a.Dv = value->size(3);
    anchor.check(*value, "value", text, {a.B, a.H, a.T, a.Dv});
    a.value = head_rows(*value);
  }
  if (image_mask) {
    anchor.check(*image_mask, "image_mask", ScalarType::Bool, {a.B, a.N});
    a.image_mask = token_mask(*image_mask);
  }
  if (text_mask) {
    anchor.check(*text_mask, "text_mask", ScalarType::Bool, {a.B, a.T});
    a.text_mask = token_mask(*text_mask);
  }
  return a;
}

template <auto Launch>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& image, const Tensor& key,
                                                           const Optional& key_bias, const Optional& value,
                                                           const Optional& image_mask, const Optional& text_mask,
                                                           bool pool) {
  AbsorbedAttention a = arguments(image, key, key_bias, value, image_mask, text_mask, pool);
  const ScalarType accumulate = accumulate_type(a.dtype);
  auto empty = [&](bool wanted, Shape sizes, ScalarType type) {
    return empty_tensor(image, wanted ? sizes : Shape{0}, type);
  };
  const bool attend = value.has_value();
  Tensor image_out = empty(attend, {a.B, a.N, a.Dv}, image.scalar_type());
  Tensor text_out = empty(pool, {a.B, a.H, a.T, a.D}, image.scalar_type());
  Tensor image_softmax = empty(attend, {a.B, a.H, 2, a.N}, accumulate);
  Tensor text_softmax = empty(pool, {a.B, a.H, 2, a.T}, accumulate);
  // Where text_out has 16 bits.
  Tensor unrounded = empty(pool && image.scalar_type() != accumulate, {a.B, a.H, a.T, a.D}, accumulate);
  advise_huge_pages(image_out);
  if (attend) {
    a.image_out = sample_rows(image_out);
    a.image_softmax = image_softmax.mutable_data_ptr();
  }
  if (pool) {
    a.text_out = head_rows(text_out);
    a.text_softmax = text_softmax.mutable_data_ptr();
    if (image.scalar_type() != accumulate)
      a.unrounded = head_rows(unrounded);
  }
  Launch(a, image);
  return {image_out, text_out, image_softmax, text_softmax, unrounded};
}

template <auto Launch>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Optional& grad_image_out, const Optional& grad_text_out,
                                                    const Tensor& image, const Tensor& key, const Optional& key_bias,
                                                    const Optional& value, const Optional& image_mask,
                                                    const Optional& text_mask, const Tensor& unrounded,
                                                    const Tensor& image_softmax, const Tensor& text_softmax, bool pool,
                                                    bool need_image_grad, bool need_key_grad, bool need_key_bias_grad,
                                                    bool need_value_grad) {
  AbsorbedAttentionBackward g;
  g.forward = arguments(image, key, key_bias, value, image_mask, text_mask, pool);
  AbsorbedAttention& a = g.forward;
  const Anchor anchor(image);
  const ScalarType accumulate = accumulate_type(a.dtype);
  Tensor image_rows = dense(image_softmax);
  Tensor text_rows = dense(text_softmax);
  if (value) {
    anchor.check(image_softmax, "image_softmax", accumulate, {a.B, a.H, 2, a.N});
    a.image_softmax = image_rows.mutable_data_ptr();
  }
  if (pool) {
    anchor.check(unrounded, "unrounded", accumulate, {a.B, a.H, a.T, a.D});
    anchor.check(text_softmax, "text_softmax", accumulate, {a.B, a.H, 2, a.T});
    a.unrounded = head_rows(unrounded);
    a.text_softmax = text_rows.mutable_data_ptr();
  }
  if (grad_image_out && value) {
    anchor.check(*grad_image_out, "grad_image_out", anchor.type, {a.B, a.N, a.Dv});
    g.grad_image_out = sample_rows(*grad_image_out);
  }
  if (grad_text_out && pool) {
    anchor.check(*grad_text_out, "grad_text_out", anchor.type, {a.B, a.H, a.T, a.D});
    g.grad_text_out = head_rows(*grad_text_out);
  }
  const bool of_bias = key_bias && need_key_bias_grad;
  const bool of_value = value && need_value_grad;
  Tensor grad_image = empty_tensor(image, need_image_grad ? Shape{a.B, a.N, a.D} : Shape{0});
  Tensor grad_key_bias = empty_tensor(image, of_bias ? Shape{a.B, a.H, a.T} : Shape{0}, accumulate);
  auto [grad_key, to_key] = gradient(key, need_key_grad);
  auto [grad_value, to_value] = gradient(value ? *value : key, of_value);
  advise_huge_pages(grad_image);
  if (need_image_grad)
    g.grad_image = sample_rows(grad_image);
  if (of_bias)
    g.grad_key_bias = grad_key_bias.mutable_data_ptr();
  g.grad_key = to_key;
  g.grad_value = to_value;
  if (need_image_grad || need_key_grad || of_bias || of_value)
    Launch(g, image);
  return {grad_image, grad_key, grad_key_bias, grad_value};
}

#ifndef MMK_EMULATED
void cpu_forward(const AbsorbedAttention& a, const Tensor&) {
  absorbed_attention_forward(a, torch_threads());
}
void cpu_backward(const AbsorbedAttentionBackward& g, const Tensor&) {
  absorbed_attention_backward(g, torch_threads());
}

constexpr auto cpu = &forward<cpu_forward>;
constexpr auto cpu_back = &backward<cpu_backward>;
#endif

#if defined(MMK_CUDA) || defined(MMK_EMULATED)
void cuda_forward(const AbsorbedAttention& a, const Tensor& like) {
  on_current_stream(
      like, [&] { return cuda::absorbed_attention_scratch(a); },
      [&](float* scratch, void* stream) { return cuda::absorbed_attention_forward(a, scratch, stream); });
}
void cuda_backward(const AbsorbedAttentionBackward& g, const Tensor& like) {
  on_current_stream(
      like, [&] { return cuda::absorbed_attention_scratch(g); },
      [&](float* scratch, void* stream) { return cuda::absorbed_attention_backward(g, scratch, stream); });
}

constexpr auto gpu = &forward<cuda_forward>;
constexpr auto gpu_back = &backward<cuda_backward>;
#endif

}  // namespace
}  // namespace mmk::binding

STABLE_TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(MMK_OPERATION
        "(Tensor image, Tensor key, Tensor? key_bias, Tensor? value, Tensor? image_mask, Tensor? text_mask, bool pool) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(MMK_OPERATION
        "_backward(Tensor? grad_image_out, Tensor? grad_text_out, Tensor image, Tensor key, Tensor? key_bias, Tensor? "
        "value, Tensor? image_mask, Tensor? text_mask, Tensor unrounded, Tensor image_softmax, Tensor text_softmax, "
        "bool pool, bool need_image_grad, bool need_key_grad, bool need_key_bias_grad, bool need_value_grad) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
}

MMK_IMPLEMENT_CPU("", cpu)
MMK_IMPLEMENT_CPU("_backward", cpu_back)
MMK_IMPLEMENT_GPU("", gpu)
MMK_IMPLEMENT_GPU("_backward", gpu_back)
