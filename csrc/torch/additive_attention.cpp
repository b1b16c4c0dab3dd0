// torch.ops.mmkernels.additive_attention*: schema, checks, allocation, and the call of the device's launcher.
#include "../additive_attention.h"

#include <tuple>

#include "projection.h"
#include "rows.h"

#if defined(MMK_CUDA) || defined(MMK_EMULATED)
#include "../cuda/additive_attention.h"
#include "panels.h"
#endif

#ifdef MMK_EMULATED
#define MMK_OPERATION "additive_attention_emulated"
#else
#define MMK_OPERATION "additive_attention"
#endif

namespace mmk::binding {
namespace {

Optional contiguous_if(const Optional& t) {
  return t ? Optional(dense(*t)) : t;
}

Optional in_type(const Optional& t, ScalarType type) {
  return t && t->scalar_type() != type ? Optional(torch::stable::to(*t, type)) : t;
}

// A call's arguments.
struct Given {
  const Tensor& image;
  const Optional& query;
  const Tensor& w_image;
  const Optional& w_query;
  const Tensor& v;
  const Optional& bias;
  const Optional& w_gate;
  const Optional& bias_gate;
  const Optional& mask;
  const Optional& offsets;
  const Optional& seed;
  int64_t activation;
  bool pool;
  double dropout_p;
  bool need_scores;
  int64_t kept_rows;
};

// The tensors that the kernels read: weights as they were given; biases, in float (double), and offsets contiguous.
struct Operands {
  Tensor image, w_image, v;
  Optional bias_hidden, w_gate, bias_gate, offsets, seed;
};

// Gradients of weights, which a library's product may leave.
struct WeightGradients {
  Tensor w_image, v, w_gate;
};

// What both directions check.
struct Arguments {
  AdditiveAttention a;
  const Anchor anchor;
  const ScalarType accumulate;
  Operands operands;
  std::optional<TextProjection> projection;
  std::vector<int64_t> result_shape, weights_shape, scores_shape, kept_shape;

  explicit Arguments(const Given& given)
      : anchor(given.image),
        accumulate(accumulate_type(dtype_of(given.image, "image"))),
        operands{given.image, given.w_image, given.v, {}, given.w_gate, {}, {}, given.seed} {
    const auto& [image, query, w_image, w_query, v, bias, w_gate, bias_gate, mask, offsets, seed, activation, pool,
                 dropout_p, need_scores, kept_rows] = given;
    a.dtype = dtype_of(image, "image");
    STD_TORCH_CHECK(is_strided(image) && image.dim() == (offsets ? 2 : 3),
                    "image must be [B, N, D], or [rows, D] with offsets");
    STD_TORCH_CHECK(w_image.dim() == 2 && v.dim() == 2, "w_image and v must be [A, D] and [K, A]");
    STD_TORCH_CHECK(activation >= 0 && activation <= 2, "activation must be 0, 1 or 2");
    a.activation = Activation(activation);
    a.pool = pool;
    a.N = image.size(image.dim() - 2);
    a.D = image.size(image.dim() - 1);
    a.A = w_image.size(0);
    a.K = v.size(0);
    a.B = offsets ? -1 : image.size(0);
    STD_TORCH_CHECK(a.D >= 1 && a.A >= 1 && a.K >= 1 && (pool || a.K == 1),
                    "D, A and K must be at least 1, K 1 without pool");
    if (offsets) {
      operands.offsets = bag_bounds(anchor, *offsets, a.N);
      a.B = operands.offsets->size(0) - 1;
      a.offsets = static_cast<const int64_t*>(operands.offsets->data_ptr());
    }
    anchor.check(w_image, "w_image", anchor.type, {a.A, a.D});
    anchor.check(v, "v", anchor.type, {a.K, a.A});
    a.image = rows(image);
    a.w_image = binding::projection(w_image);
    a.v = binding::projection(v);
    projection.emplace(anchor, a.B, a.A, Layer{query, w_query, bias, 0, "query", "w_query"});
    operands.bias_hidden = projection->bias_hidden();
    if (operands.bias_hidden)
      a.bias_hidden = operands.bias_hidden->data_ptr();
    if (w_gate)
      anchor.check(*w_gate, "w_gate", anchor.type, {a.A, a.D}), a.w_gate = binding::projection(*w_gate);
    STD_TORCH_CHECK(w_gate || !bias_gate, "bias_gate needs w_gate");
    if (bias_gate) {
      anchor.check(*bias_gate, "bias_gate", anchor.type, {a.A});
      operands.bias_gate = contiguous_if(in_type(bias_gate, accumulate));
      a.bias_gate = operands.bias_gate->data_ptr();
    }
    if (mask) {
      anchor.check(*mask, "mask", ScalarType::Bool, offsets ? Shape{a.N} : Shape{a.B, a.N});
      a.mask = {static_cast<const bool*>(mask->data_ptr()), offsets ? 0 : mask->stride(0), 0,
                mask->stride(offsets ? 0 : 1)};
    }
    STD_TORCH_CHECK(dropout_p >= 0 && dropout_p <= 1, "dropout_p must be from 0 to 1");
    STD_TORCH_CHECK(bool(seed) == (dropout_p > 0), "seed must be given with dropout_p, and only then");
    if (seed) {
      anchor.check(*seed, "seed", ScalarType::Long, {});
      a.dropout = dropout_of(dropout_p, static_cast<const int64_t*>(operands.seed->data_ptr()));
    }
    result_shape = pool ? std::vector<int64_t>{a.B, a.K, a.D} : image.sizes().vec();
    weights_shape = offsets ? std::vector<int64_t>{a.K, a.N} : std::vector<int64_t>{a.B, a.K, a.N};
    scores_shape = need_scores ? weights_shape : std::vector<int64_t>{0};
    a.kept_rows = kept_rows;
    kept_shape = kept_shape_of(kept_rows, offsets ? a.N : a.B * a.N, w_gate ? 2 * a.A : a.A);
  }
};

template <auto Launch>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& image, const Optional& query, const Tensor& w_image,
                                                   const Optional& w_query, const Tensor& v, const Optional& bias,
                                                   const Optional& w_gate, const Optional& bias_gate,
                                                   const Optional& mask, const Optional& offsets, const Optional& seed,
                                                   int64_t activation, bool pool, double dropout_p, bool need_scores,
                                                   int64_t kept_rows) {
  Arguments all({image, query, w_image, w_query, v, bias, w_gate, bias_gate, mask, offsets, seed, activation, pool,
                 dropout_p, need_scores, kept_rows});
  AdditiveAttention& a = all.a;
  Tensor result = empty_tensor(image, all.result_shape);
  Tensor weights = empty_tensor(image, all.weights_shape, all.accumulate);
  Tensor scores = empty_tensor(image, all.scores_shape, all.accumulate);
  Tensor kept = empty_tensor(image, all.kept_shape, all.accumulate);
  advise_huge_pages(result);
  advise_huge_pages(kept);
  a.result = rows(result);
  a.weights = weights.mutable_data_ptr();
  if (need_scores)
    a.scores = scores.mutable_data_ptr();
  a.kept = kept.mutable_data_ptr();
  Launch(a, all.operands);
  return {result, weights, scores, kept};
}

template <auto Launch>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Optional& grad_result, const Optional& grad_weights, const Optional& grad_scores, const Tensor& image,
    const Optional& query, const Tensor& w_image, const Optional& w_query, const Tensor& v, const Optional& bias,
    const Optional& w_gate, const Optional& bias_gate, const Optional& mask, const Optional& offsets,
    const Optional& seed, const Tensor& weights, const Tensor& kept, int64_t activation, bool pool, double dropout_p,
    bool need_scores, int64_t kept_rows, bool need_image_grad, bool need_query_grad, bool need_w_image_grad,
    bool need_w_query_grad, bool need_v_grad, bool need_bias_grad, bool need_w_gate_grad, bool need_bias_gate_grad) {
  Arguments all({image, query, w_image, w_query, v, bias, w_gate, bias_gate, mask, offsets, seed, activation, pool,
                 dropout_p, need_scores, kept_rows});
  AdditiveAttentionBackward g;
  const Anchor& anchor = all.anchor;
  const ScalarType accumulate = all.accumulate;
  if (grad_result)
    anchor.check(*grad_result, "grad_result", anchor.type, all.result_shape), g.grad_result = rows(*grad_result);
  Tensor all_weights = dense(weights);
  anchor.check(weights, "weights", accumulate, all.weights_shape);
  Tensor products = dense(kept);
  anchor.check(kept, "kept", accumulate, all.kept_shape);
  Optional all_grad_weights = contiguous_if(grad_weights);
  if (grad_weights)
    anchor.check(*grad_weights, "grad_weights", accumulate, all.weights_shape),
        g.grad_weights = all_grad_weights->data_ptr();
  Optional all_grad_scores = contiguous_if(grad_scores);
  if (grad_scores) {
    anchor.check(*grad_scores, "grad_scores", accumulate, all.scores_shape);
    if (need_scores)
      g.grad_scores = all_grad_scores->data_ptr();
  }
  all.a.weights = all_weights.mutable_data_ptr();
  all.a.kept = products.mutable_data_ptr();
  g.forward = all.a;
  const LayerNeeds needs = all.projection->needed(need_query_grad, need_w_query_grad, need_bias_grad);
  need_w_gate_grad = need_w_gate_grad && w_gate;
  need_bias_gate_grad = need_bias_gate_grad && bias_gate;
  Tensor grad_image = dense_gradient(image, need_image_grad);
  Tensor grad_w_image = dense_gradient(w_image, need_w_image_grad);
  Tensor grad_w_query = dense_gradient(needs.weight ? *w_query : image, needs.weight);
  Tensor grad_v = dense_gradient(v, need_v_grad);
  Tensor grad_w_gate = dense_gradient(w_gate ? *w_gate : image, need_w_gate_grad);
  Tensor grad_bias_hidden = dense_gradient(needs.any() ? *all.operands.bias_hidden : image, needs.any());
  Tensor grad_bias_gate = dense_gradient(need_bias_gate_grad ? *all.operands.bias_gate : image, need_bias_gate_grad);
  if (need_image_grad)
    g.grad_image = rows(grad_image);
  g.grad_bias_hidden = data_if(grad_bias_hidden, needs.any());
  g.grad_w_image = data_if(grad_w_image, need_w_image_grad);
  g.grad_v = data_if(grad_v, need_v_grad);
  g.grad_w_gate = data_if(grad_w_gate, need_w_gate_grad);
  g.grad_bias_gate = data_if(grad_bias_gate, need_bias_gate_grad);
  if (need_image_grad || needs.any() || need_w_image_grad || need_v_grad || need_w_gate_grad || need_bias_gate_grad) {
    WeightGradients grads{grad_w_image, grad_v, grad_w_gate};
    Launch(g, all.operands, grads);
  }
  LayerGradients of_layer = all.projection->gradients(grad_bias_hidden, needs, grad_w_query);
  return {grad_image, of_layer.text, grad_w_image, grad_w_query,
          grad_v,     of_layer.bias, grad_w_gate,  *in_type(grad_bias_gate, anchor.type)};
}

#ifndef MMK_EMULATED
void cpu_forward(const AdditiveAttention& a, const Operands&) {
  additive_attention_forward(a, torch_threads());
}
void cpu_backward(const AdditiveAttentionBackward& g, const Operands&, WeightGradients&) {
  additive_attention_backward(g, torch_threads());
}

constexpr auto cpu = &forward<cpu_forward>;
constexpr auto cpu_back = &backward<cpu_backward>;
#endif

#if defined(MMK_CUDA) || defined(MMK_EMULATED)
// [w_image; w_gate]: a panel has one product with both.
Tensor stacked(const AdditiveAttention& a, const Operands& operands) {
  if (!operands.w_gate)
    return operands.w_image;
  Tensor both = empty_tensor(operands.w_image, {2 * a.A, a.D});
  Tensor first = torch::stable::narrow(both, 0, 0, a.A), second = torch::stable::narrow(both, 0, a.A, a.A);
  torch::stable::copy_(first, operands.w_image);
  torch::stable::copy_(second, *operands.w_gate);
  return both;
}

// f(panel, rows, u) of every panel.
template <class F>
void each_panel(const AdditiveAttention& a, const Operands& operands, const Tensor& weights, void* stream, F f) {
  const Tensor columns = transposed(weights);
  Panels(operands.image, a.dtype, cuda::sampled_rows(a), a.mask, stream)
      .each(weights.size(0), [&](const cuda::Panel& panel, const Tensor& x) { f(panel, x, product(x, columns)); });
}

// [K, A]
Tensor in_float(const Tensor& v) {
  return dense(torch::stable::to(v, ScalarType::Float));
}

void cuda_forward(const AdditiveAttention& a, const Operands& operands) {
  nothing_kept(a.kept_rows);
  on_stream(operands.image, [&](void* stream) {
    const int64_t rows = cuda::sampled_rows(a).rows;
    Tensor scores = empty_tensor(operands.image, {rows, a.K}, ScalarType::Float), v = in_float(operands.v);
    each_panel(a, operands, stacked(a, operands), stream,
               [&](const cuda::Panel& panel, const Tensor&, const Tensor& u) {
                 check_launch(cuda::additive_attention_activate(a, panel, floats(u), floats(v),
                                                                floats(scores) + panel.first * a.K, stream));
               });
    Tensor partial = empty_tensor(scores, {cuda::additive_attention_scratch(a)});
    check_launch(cuda::additive_attention_finish(a, floats(scores), floats(partial), stream));
  });
}

void cuda_backward(const AdditiveAttentionBackward& g, const Operands& operands, WeightGradients& grads) {
  const AdditiveAttention& a = g.forward;
  nothing_kept(a.kept_rows);
  on_stream(operands.image, [&](void* stream) {
    const cuda::SampledRows samples = cuda::sampled_rows(a), all{1, samples.rows, samples.rows, nullptr};
    const Tensor& image = operands.image;
    const Tensor weights = stacked(a, operands);
    const int64_t width = weights.size(0);
    const ColumnSum of_bias_hidden(image, samples, a.A, g.grad_bias_hidden, stream),
        of_bias_gate(image, all, a.A, g.grad_bias_gate, stream);
    const WeightSum of_weights(image, width, a.D, g.grad_w_image || g.grad_w_gate, stream),
        of_v(image, a.K, a.A, g.grad_v, stream);
    Tensor grad_scores = empty_tensor(image, {a.K, samples.rows}, ScalarType::Float), v = in_float(operands.v);
    Tensor partial = empty_tensor(grad_scores, {cuda::additive_attention_scores_scratch(a)});
    check_launch(cuda::additive_attention_scores(g, floats(grad_scores), floats(partial), stream));
    each_panel(a, operands, weights, stream, [&](const cuda::Panel& panel, const Tensor& x, const Tensor& u) {
      const bool is_float = a.dtype == Dtype::float32;
      Tensor hidden = empty_tensor(u, {g.grad_v ? panel.rows : 0, a.A});
      Tensor rounded = is_float ? u : empty_tensor(x, {panel.rows, width});
      check_launch(cuda::additive_attention_differentiate(a, panel, floats(u), floats(v), floats(grad_scores),
                                                          g.grad_v ? floats(hidden) : nullptr,
                                                          is_float ? nullptr : rounded.mutable_data_ptr(), stream));
      if (g.grad_v)
        of_v.add(transposed(torch::stable::narrow(grad_scores, 1, panel.first, panel.rows)), hidden);
      // Not of what is rounded for the products: these sums cancel.
      Tensor grad = u;
      of_bias_hidden.add(panel, torch::stable::narrow(grad, 1, 0, a.A));
      if (g.grad_bias_gate)
        of_bias_gate.add(panel, torch::stable::narrow(grad, 1, a.A, a.A));
      of_weights.add(rounded, x);
      if (g.grad_image.data)
        check_launch(cuda::additive_attention_write(g, panel, floats(product(rounded, weights)), stream));
    });
    of_v.write(grads.v);
    if (g.grad_w_image)
      of_weights.write(grads.w_image, 0);
    if (g.grad_w_gate)
      of_weights.write(grads.w_gate, a.A);
  });
}

constexpr auto gpu = &forward<cuda_forward>;
constexpr auto gpu_back = &backward<cuda_backward>;
#endif

}  // namespace
}  // namespace mmk::binding

STABLE_TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(MMK_OPERATION
        "(Tensor image, Tensor? query, Tensor w_image, Tensor? w_query, Tensor v, Tensor? bias, Tensor? w_gate, "
        "Tensor? bias_gate, Tensor? mask, Tensor? offsets, Tensor? seed, int activation, bool pool, float dropout_p, "
        "bool need_scores, SymInt kept_rows) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(MMK_OPERATION
        "_backward(Tensor? grad_result, Tensor? grad_weights, Tensor? grad_scores, Tensor image, Tensor? query, Tensor "
        "w_image, Tensor? w_query, Tensor v, Tensor? bias, Tensor? w_gate, Tensor? bias_gate, Tensor? mask, Tensor? "
        "offsets, Tensor? seed, Tensor weights, Tensor kept, int activation, bool pool, float dropout_p, bool "
        "need_scores, SymInt kept_rows, bool need_image_grad, bool need_query_grad, bool need_w_image_grad, bool "
        "need_w_query_grad, bool need_v_grad, bool need_bias_grad, bool need_w_gate_grad, bool need_bias_gate_grad) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

MMK_IMPLEMENT_CPU("", cpu)
MMK_IMPLEMENT_CPU("_backward", cpu_back)
MMK_IMPLEMENT_GPU("", gpu)
MMK_IMPLEMENT_GPU("_backward", gpu_back)
