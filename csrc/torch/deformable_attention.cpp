// torch.ops.mmkernels.deformable_attention*: schema, checks, allocation, and the call of the device's launcher.
#include "../deformable_attention.h"

#include <tuple>

#include "common.h"

#if defined(MMK_CUDA) || defined(MMK_EMULATED)
#include "cuda.h"
#include "../cuda/deformable_attention.h"
#endif

#ifdef MMK_EMULATED
#define MMK_OPERATION "deformable_attention_emulated"
#else
#define MMK_OPERATION "deformable_attention"
#endif

namespace mmk::binding {
namespace {

using Optional = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

// Contiguous from a dimension on, copied where it isn't.
Tensor dense_from(const Tensor& t, int64_t first) {
  int64_t stride = 1;
  for (int64_t i = t.dim() - 1; i >= first; stride *= t.size(i--))
    if (t.size(i) != 1 && t.stride(i) != stride)
      return dense(t);
  return t;
}

QueryRows query_rows(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}
// [B, Q, H d] as heads.
QueryRows result_rows(const Tensor& t, int64_t d) {
  return {t.data_ptr(), t.stride(0), t.stride(1), d};
}

// What was given, where the kernels can read it.
struct Given {
  Tensor value, locations, scores;
  Given(const Tensor& value, const Tensor& locations, const Tensor& scores)
      : value(value.dim() == 4 ? dense_from(value, 3) : value),
        locations(locations.dim() == 5 ? dense_from(locations, 3) : locations),
        scores(scores.dim() == 4 ? dense_from(scores, 3) : scores) {}

  DeformableAttention arguments(const Optional& mask, const Sizes& spatial_shapes, const Sizes& points,
                                bool softmax) const {
    DeformableAttention a;
    a.dtype = dtype_of(value, "value");
    const Anchor anchor(value);
    const ScalarType accumulate = accumulate_type(a.dtype);
    STD_TORCH_CHECK(is_strided(value) && value.dim() == 4, "value must be a dense [B, S, H, d] tensor");
    STD_TORCH_CHECK(locations.dim() == 5, "locations must be [B, Q, H, K, 2]");
    a.B = value.size(0);
    a.S = value.size(1);
    a.H = value.size(2);
    a.d = value.size(3);
    a.Q = locations.size(1);
    a.K = locations.size(3);
    a.L = int64_t(points.size());
    a.softmax = softmax;
    STD_TORCH_CHECK(a.d >= 1, "value must have at least one channel");
    STD_TORCH_CHECK(a.S < int64_t(1) << 31, "value must have fewer than 2^31 positions");
    STD_TORCH_CHECK(spatial_shapes.size() == 2 * points.size(), "spatial_shapes must be (Y, X) of each level in turn");
    int64_t positions = 0;
    int64_t of_points = 0;
    for (int64_t l = 0; l < a.L; ++l) {
      const int64_t y = spatial_shapes[2 * l];
      const int64_t x = spatial_shapes[2 * l + 1];
      STD_TORCH_CHECK(y >= 1 && x >= 1 && y <= a.S && x <= a.S / y, "spatial_shapes don't add up to value's positions");
      STD_TORCH_CHECK(points[l] >= 0 && points[l] <= a.K, "points don't add up to locations' K");
      positions += y * x;
      of_points += points[l];
    }
    STD_TORCH_CHECK(positions == a.S, "spatial_shapes don't add up to value's positions");
    STD_TORCH_CHECK(of_points == a.K, "points don't add up to locations' K");
    a.shapes = spatial_shapes.data();
    a.points = points.data();
    a.wide_locations = locations.scalar_type() != anchor.type;
    a.wide_scores = scores.scalar_type() != anchor.type;
    anchor.check(locations, "locations", a.wide_locations ? accumulate : anchor.type, {a.B, a.Q, a.H, a.K, 2});
    anchor.check(scores, "scores", a.wide_scores ? accumulate : anchor.type, {a.B, a.Q, a.H, a.K});
    a.value = {value.data_ptr(), value.stride(0), value.stride(2), value.stride(1), 1};
    a.locations = query_rows(locations);
    a.scores = query_rows(scores);
    if (mask) {
      anchor.check(*mask, "mask", ScalarType::Bool, {a.B, a.S});
      a.mask = {static_cast<const bool*>(mask->data_ptr()), mask->stride(0), 0, mask->stride(1)};
    }
    return a;
  }
};

Sizes softmax_shape(const DeformableAttention& a) {
  return a.softmax ? Sizes{a.B, a.Q, a.H, 2} : Sizes{0};
}

template <auto Launch>
std::tuple<Tensor, Tensor> forward(const Tensor& value, const Tensor& locations, const Tensor& scores,
                                   const Optional& mask, Sizes spatial_shapes, Sizes points, bool softmax,
                                   bool /*deterministic: the backward call's*/) {
  const Given given(value, locations, scores);
  DeformableAttention a = given.arguments(mask, spatial_shapes, points, softmax);
  Tensor result = empty_tensor(value, {a.B, a.Q, a.H * a.d});
  Tensor softmax_rows = empty_tensor(value, softmax_shape(a), accumulate_type(a.dtype));
  advise_huge_pages(result);
  a.result = result_rows(result, a.d);
  if (softmax)
    a.softmax_rows = softmax_rows.mutable_data_ptr();
  Launch(a, value);
  return {result, softmax_rows};
}

template <auto Launch>
std::tuple<Tensor, Tensor, Tensor> backward(const Optional& grad_result, const Tensor& value, const Tensor& locations,
                                            const Tensor& scores, const Optional& mask, const Tensor& softmax_rows,
                                            Sizes spatial_shapes, Sizes points, bool softmax, bool deterministic,
                                            bool need_value_grad, bool need_locations_grad, bool need_scores_grad) {
  const Given given(value, locations, scores);
  DeformableAttentionBackward g;
  g.forward = given.arguments(mask, spatial_shapes, points, softmax);
  DeformableAttention& a = g.forward;
  g.deterministic = deterministic;
  const Anchor anchor(value);
  Tensor rows = dense(softmax_rows);
  if (softmax) {
    anchor.check(softmax_rows, "softmax_rows", accumulate_type(a.dtype), softmax_shape(a));
    a.softmax_rows = rows.mutable_data_ptr();
  }
  STD_TORCH_CHECK(grad_result, "grad_result must be given");
  anchor.check(*grad_result, "grad_result", anchor.type, {a.B, a.Q, a.H * a.d});
  Tensor upstream = dense_from(*grad_result, 2);
  g.grad_result = result_rows(upstream, a.d);
  Tensor grad_value = dense_gradient(value, need_value_grad);
  Tensor grad_locations = dense_gradient(locations, need_locations_grad);
  Tensor grad_scores = dense_gradient(scores, need_scores_grad);
  g.nontemporal = too_large_for_cache(grad_value);
  if (need_value_grad)
    g.grad_value = {grad_value.mutable_data_ptr(), grad_value.stride(0), grad_value.stride(2), grad_value.stride(1), 1};
  if (need_locations_grad)
    g.grad_locations = query_rows(grad_locations);
  if (need_scores_grad)
    g.grad_scores = query_rows(grad_scores);
  if (need_value_grad || need_locations_grad || need_scores_grad)
    Launch(g, value);
  return {grad_value, grad_locations, grad_scores};
}

#ifndef MMK_EMULATED
constexpr auto cpu = &forward<on_cpu<DeformableAttention, deformable_attention_forward>>;
constexpr auto cpu_back = &backward<on_cpu<DeformableAttentionBackward, deformable_attention_backward>>;
#endif

#if defined(MMK_CUDA) || defined(MMK_EMULATED)
constexpr auto gpu =
    &forward<on_gpu<DeformableAttention, cuda::deformable_attention_scratch, cuda::deformable_attention_forward>>;
constexpr auto gpu_back = &backward<
    on_gpu<DeformableAttentionBackward, cuda::deformable_attention_scratch, cuda::deformable_attention_backward>>;
#endif

}  // namespace
}  // namespace mmk::binding

STABLE_TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(MMK_OPERATION
        "(Tensor value, Tensor locations, Tensor scores, Tensor? mask, int[] spatial_shapes, int[] points, bool "
        "softmax, bool deterministic) -> (Tensor, Tensor)");
  m.def(MMK_OPERATION
        "_backward(Tensor? grad_result, Tensor value, Tensor locations, Tensor scores, Tensor? mask, Tensor "
        "softmax_rows, int[] spatial_shapes, int[] points, bool softmax, bool deterministic, bool "
        "need_value_grad, bool need_locations_grad, bool need_scores_grad) -> (Tensor, Tensor, Tensor)");
}

MMK_IMPLEMENT_CPU("", cpu)
MMK_IMPLEMENT_CPU("_backward", cpu_back)
MMK_IMPLEMENT_GPU("", gpu)
MMK_IMPLEMENT_GPU("_backward", gpu_back)
