// torch.ops.mmkernels.gated_cross_attention*: schema, checks, allocation, and the call of the device's launcher.
#include "../gated_cross_attention.h"

#include <tuple>

#include "heads.h"

#if defined(MMK_CUDA) || defined(MMK_EMULATED)
#include "cuda.h"
#include "../cuda/gated_cross_attention.h"
#endif

#ifdef MMK_EMULATED
#define MMK_OPERATION "gated_cross_attention_emulated"
#else
#define MMK_OPERATION "gated_cross_attention"
#endif

namespace mmk::binding {
namespace {

using Optional = std::optional<Tensor>;

GatedCrossAttention arguments(const Tensor& query, const Tensor& key, const Tensor& value, const Optional& gate,
                              const Optional& tokens, const Optional& pairs, const Optional& bias, double scale) {
  GatedCrossAttention a;
  a.dtype = dtype_of(query, "query");
  const Anchor anchor(query);
  STD_TORCH_CHECK(is_strided(query) && query.dim() == 4, "query must be a dense [B, H, N, d] tensor");
  STD_TORCH_CHECK(key.dim() == 4 && value.dim() == 4, "key and value must be [B, H, T, d] and [B, H, T, dv]");
  a.B = query.size(0);
  a.H = query.size(1);
  a.N = query.size(2);
  a.d = query.size(3);
  a.T = key.size(2);
  a.dv = value.size(3);
  STD_TORCH_CHECK(a.d >= 1 && a.dv >= 1, "query and value must have at least one channel");
  a.scale = scale;
  anchor.check(key, "key", anchor.type, {a.B, a.H, a.T, a.d});
  anchor.check(value, "value", anchor.type, {a.B, a.H, a.T, a.dv});
  a.query = head_rows(query);
  a.key = head_rows(key);
  a.value = head_rows(value);
  if (gate)
    anchor.check(*gate, "gate", anchor.type, {a.B, a.H, a.N, a.dv}), a.gate = head_rows(*gate);
  if (tokens)
    anchor.check(*tokens, "tokens", ScalarType::Bool, {a.B, a.H, a.T}), a.tokens = token_mask(*tokens);
  if (pairs)
    anchor.check(*pairs, "pairs", ScalarType::Bool, {a.B, a.H, a.N, a.T}), a.pairs = pair_mask(*pairs);
  if (bias)
    anchor.check(*bias, "bias", accumulate_type(a.dtype), {a.B, a.H, a.N, a.T}), a.bias = bias_of(*bias);
  STD_TORCH_CHECK(!bias || (!tokens && !pairs), "bias goes with neither tokens nor pairs");
  STD_TORCH_CHECK(!pairs || tokens, "pairs need tokens: which of them any query attends to");
  return a;
}

template <auto Launch>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                           const Optional& gate, const Optional& tokens, const Optional& pairs,
                                           const Optional& bias, double scale, bool need_attended) {
  GatedCrossAttention a = arguments(query, key, value, gate, tokens, pairs, bias, scale);
  Tensor result = empty_heads(query, a.dv);
  Tensor attended = need_attended && gate ? empty_heads(query, a.dv) : empty_tensor(query, {0});
  Tensor softmax = empty_tensor(query, {a.B, a.H, 2, a.N}, accumulate_type(a.dtype));
  a.result = head_rows(result);
  if (need_attended && gate)
    a.attended = head_rows(attended);
  a.softmax = softmax.mutable_data_ptr();
  a.nontemporal = too_large_for_cache(result);
  Launch(a, query);
  return {result, attended, softmax};
}

template <auto Launch>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Optional& grad_result, const Tensor& query, const Tensor& key, const Tensor& value, const Optional& gate,
    const Optional& tokens, const Optional& pairs, const Optional& bias, const Tensor& attended, const Tensor& softmax,
    double scale, bool, bool need_query_grad, bool need_key_grad, bool need_value_grad, bool need_gate_grad,
    bool need_bias_grad) {
  GatedCrossAttentionBackward g;
  g.forward = arguments(query, key, value, gate, tokens, pairs, bias, scale);
  GatedCrossAttention& a = g.forward;
  const Anchor anchor(query);
  STD_TORCH_CHECK(bool(grad_result), "grad_result must be given");
  anchor.check(*grad_result, "grad_result", anchor.type, {a.B, a.H, a.N, a.dv});
  anchor.check(attended, "attended", anchor.type, {a.B, a.H, a.N, a.dv});
  anchor.check(softmax, "softmax", accumulate_type(a.dtype), {a.B, a.H, 2, a.N});
  Tensor rows = dense(softmax);
  g.grad_result = head_rows(*grad_result);
  a.attended = head_rows(attended);
  a.softmax = rows.mutable_data_ptr();
  a.nontemporal = too_large_for_cache(attended);
  auto [grad_query, to_query] = gradient(query, need_query_grad);
  auto [grad_key, to_key] = gradient(key, need_key_grad);
  auto [grad_value, to_value] = gradient(value, need_value_grad);
  auto [grad_gate, to_gate] = gradient(gate ? *gate : query, need_gate_grad && gate);
  g.grad_query = to_query;
  g.grad_key = to_key;
  g.grad_value = to_value;
  g.grad_gate = to_gate;
  need_bias_grad = need_bias_grad && bias;
  Tensor grad_bias =
      empty_tensor(query, need_bias_grad ? Shape{a.B, a.H, a.N, a.T} : Shape{0}, accumulate_type(a.dtype));
  if (need_bias_grad)
    g.grad_bias = grad_bias.mutable_data_ptr();
  if (need_query_grad || need_key_grad || need_value_grad || g.grad_gate.data || need_bias_grad)
    Launch(g, query);
  return {grad_query, grad_key, grad_value, grad_gate, grad_bias};
}

#ifndef MMK_EMULATED
constexpr auto cpu = &forward<on_cpu<GatedCrossAttention, gated_cross_attention_forward>>;
constexpr auto cpu_back = &backward<on_cpu<GatedCrossAttentionBackward, gated_cross_attention_backward>>;
#endif

#if defined(MMK_CUDA) || defined(MMK_EMULATED)
constexpr auto gpu =
    &forward<on_gpu<GatedCrossAttention, cuda::gated_cross_attention_scratch, cuda::gated_cross_attention_forward>>;
constexpr auto gpu_back = &backward<
    on_gpu<GatedCrossAttentionBackward, cuda::gated_cross_attention_scratch, cuda::gated_cross_attention_backward>>;
#endif

}  // namespace
}  // namespace mmk::binding

STABLE_TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(MMK_OPERATION
        "(Tensor query, Tensor key, Tensor value, Tensor? gate, Tensor? tokens, Tensor? pairs, Tensor? bias, float "
        "scale, "
        "bool need_attended) -> (Tensor, Tensor, Tensor)");
  m.def(MMK_OPERATION
        "_backward(Tensor? grad_result, Tensor query, Tensor key, Tensor value, Tensor? gate, Tensor? tokens, "
        "Tensor? pairs, Tensor? bias, Tensor attended, Tensor softmax, float scale, bool need_attended, bool "
        "need_query_grad, "
        "bool need_key_grad, bool need_value_grad, bool need_gate_grad, bool need_bias_grad) -> (Tensor, Tensor, "
        "Tensor, Tensor, Tensor)");
}

MMK_IMPLEMENT_CPU("", cpu)
MMK_IMPLEMENT_CPU("_backward", cpu_back)
MMK_IMPLEMENT_GPU("", gpu)
MMK_IMPLEMENT_GPU("_backward", gpu_back)
