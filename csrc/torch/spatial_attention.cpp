// torch.ops.mmkernels.spatial_attention*: schema, checks, allocation, and the call of the device's launcher.
#include "../spatial_attention.h"

#include <tuple>

#include "common.h"

#if defined(MMK_CUDA) || defined(MMK_EMULATED)
#include "cuda.h"
#include "../cuda/spatial_attention.h"
#endif

// The tests' emulated CUDA kernels are operations of their own, on CPU tensors.
#ifdef MMK_EMULATED
#define MMK_OPERATION "spatial_attention_emulated"
#else
#define MMK_OPERATION "spatial_attention"
#endif

namespace mmk::binding {
namespace {

// image [rows, D] with offsets, [B, N, D] or [B, D, Y, X].
Features features(const Tensor& t) {
  void* data = t.data_ptr();
  if (t.dim() == 2)
    return {data, 0, 0, t.stride(0), t.stride(1)};
  if (t.dim() == 3)
    return {data, t.stride(0), 0, t.stride(1), t.stride(2)};
  return {data, t.stride(0), t.stride(2), t.stride(3), t.stride(1)};
}

Vectors vectors(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1)};
}

// Rows of an image that follow each other with one stride in every tensor are walked as one.
void merge_rows(SpatialAttention& a, std::initializer_list<Features*> all) {
  auto mergeable = [&](int64_t y, int64_t x) { return a.Y == 1 || a.X == 1 || y == a.X * x; };
  bool merge = !a.mask.data || mergeable(a.mask.y, a.mask.x);
  for (Features* f : all)
    merge = merge && (!f->data || mergeable(f->y, f->x));
  if (!merge || a.Y == 1)
    return;
  if (a.X == 1) {
    a.mask.x = a.mask.y;
    for (Features* f : all)
      f->x = f->y;
  }
  a.X *= a.Y;
  a.Y = 1;
}

// Uninitialized, with the strides that torch gives it.
Tensor empty_image(const Tensor& image) {
  return image.is_contiguous() ? empty_tensor(image, image.sizes()) : torch::stable::empty_like(image);
}

struct Arguments {
  SpatialAttention a;
  std::optional<Tensor> offsets;  // contiguous
  std::vector<int64_t> weights_shape, pooled_shape;
};

Arguments arguments(const Tensor& image, const Tensor& text, const std::optional<Tensor>& mask,
                    const std::optional<Tensor>& offsets, double scale, int64_t num_heads, bool pool, bool rescale) {
  Arguments all;
  SpatialAttention& a = all.a;
  a.dtype = dtype_of(image, "image");
  const Anchor anchor(image);
  STD_TORCH_CHECK(is_strided(image), "image must be a dense tensor");
  STD_TORCH_CHECK(image.dim() == (offsets            ? 2
                                  : image.dim() == 4 ? 4
                                                     : 3),
                  "image must be [B, N, D] or [B, D, Y, X], or [rows, D] with offsets");
  std::vector<int64_t> grid;
  if (offsets) {
    all.offsets = bag_bounds(anchor, *offsets, image.size(0));
    a.offsets = static_cast<const int64_t*>(all.offsets->data_ptr());
    a.B = all.offsets->size(0) - 1;
    a.X = image.size(0);
    a.D = image.size(1);
    grid = {a.X};
  } else if (image.dim() == 4) {
    a.B = image.size(0);
    a.D = image.size(1);
    a.Y = image.size(2);
    a.X = image.size(3);
    grid = {a.B, a.Y, a.X};
  } else {
    a.B = image.size(0);
    a.X = image.size(1);
    a.D = image.size(2);
    grid = {a.B, a.X};
  }
  STD_TORCH_CHECK(a.D >= 1, "image must have at least one channel");
  STD_TORCH_CHECK(num_heads >= 1 && a.D % num_heads == 0, "num_heads must divide image's channels");
  anchor.check(text, "text", anchor.type, {a.B, a.D});
  a.H = num_heads;
  a.scale = scale;
  a.pool = pool;
  a.rescale = rescale;
  a.image = features(image);
  a.text = vectors(text);
  if (mask) {
    anchor.check(*mask, "mask", ScalarType::Bool, grid);
    a.mask.data = static_cast<const bool*>(mask->data_ptr());
    if (offsets)
      a.mask.x = mask->stride(0);
    else if (image.dim() == 3)
      a.mask.b = mask->stride(0), a.mask.x = mask->stride(1);
    else
      a.mask.b = mask->stride(0), a.mask.y = mask->stride(1), a.mask.x = mask->stride(2);
  }
  all.weights_shape = offsets ? std::vector<int64_t>{a.H, a.X} : std::vector<int64_t>{a.B, a.H, a.Y * a.X};
  all.pooled_shape = {a.B, a.D};
  return all;
}

void check_positive(const Tensor& t, const char* name) {
  for (int64_t i = 0; i < t.dim(); ++i)
    STD_TORCH_CHECK(t.size(i) == 1 || t.stride(i) >= 0, name, " has a negative stride");
}

template <auto Launch>
void forward_into(Arguments& all, const Tensor& weights, const Tensor& result) {
  SpatialAttention& a = all.a;
  a.weights = weights.mutable_data_ptr();
  a.pool ? void(a.pooled = vectors(result)) : void(a.result = features(result));
  a.nontemporal = too_large_for_cache(result);
  merge_rows(a, {&a.image, &a.result});
  Launch(a, weights);
}

template <auto Launch>
std::tuple<Tensor, Tensor> forward(const Tensor& image, const Tensor& text, const std::optional<Tensor>& mask,
                                   const std::optional<Tensor>& offsets, double scale, int64_t num_heads, bool pool,
                                   bool rescale) {
  Arguments all = arguments(image, text, mask, offsets, scale, num_heads, pool, rescale);
  Tensor weights = empty_tensor(image, all.weights_shape, accumulate_type(all.a.dtype));
  Tensor result = pool ? empty_tensor(image, all.pooled_shape) : empty_image(image);
  advise_huge_pages(result);
  forward_into<Launch>(all, weights, result);
  return {result, weights};
}

template <auto Launch>
Tensor forward_out(const Tensor& image, const Tensor& text, const std::optional<Tensor>& mask,
                   const std::optional<Tensor>& offsets, double scale, int64_t num_heads, bool pool, bool rescale,
                   const Tensor& out) {
  Arguments all = arguments(image, text, mask, offsets, scale, num_heads, pool, rescale);
  Anchor(image).check(out, "out", image.scalar_type(), pool ? Shape(all.pooled_shape) : image.sizes());
  check_positive(out, "out");
  Tensor weights = empty_tensor(image, all.weights_shape, accumulate_type(all.a.dtype));
  forward_into<Launch>(all, weights, out);
  return weights;
}

template <auto Launch>
std::tuple<Tensor, Tensor> backward(const std::optional<Tensor>& grad_result, const std::optional<Tensor>& grad_weights,
                                    const Tensor& image, const Tensor& text, const std::optional<Tensor>& mask,
                                    const std::optional<Tensor>& offsets, const Tensor& weights, double scale,
                                    int64_t num_heads, bool pool, bool rescale, bool need_image_grad,
                                    bool need_text_grad) {
  Arguments all = arguments(image, text, mask, offsets, scale, num_heads, pool, rescale);
  SpatialAttention& a = all.a;
  const Anchor anchor(image);
  const ScalarType accumulate = accumulate_type(a.dtype);
  anchor.check(weights, "weights", accumulate, all.weights_shape);
  Tensor w = dense(weights);
  a.weights = w.data_ptr();
  SpatialAttentionBackward g;
  if (grad_result) {
    anchor.check(*grad_result, "grad_result", anchor.type, pool ? Shape(all.pooled_shape) : image.sizes());
    pool ? void(g.grad_pooled = vectors(*grad_result)) : void(g.grad_result = features(*grad_result));
  }
  std::optional<Tensor> gw;
  if (grad_weights) {
    anchor.check(*grad_weights, "grad_weights", accumulate, all.weights_shape);
    gw = dense(*grad_weights);
    g.grad_weights = gw->data_ptr();
  }
  Tensor scratch = empty_tensor(image, all.weights_shape, accumulate);
  g.grad_scores = scratch.mutable_data_ptr();
  Tensor grad_image = need_image_grad ? empty_image(image) : empty_tensor(image, {0});
  Tensor grad_text = empty_tensor(text, need_text_grad ? all.pooled_shape : Shape{0});
  if (need_image_grad) {
    g.grad_image = features(grad_image);
    advise_huge_pages(grad_image);
    a.nontemporal = too_large_for_cache(grad_image);
  }
  if (need_text_grad)
    g.grad_text = vectors(grad_text);
  merge_rows(a, {&a.image, &g.grad_result, &g.grad_image});
  g.forward = a;
  if (need_image_grad || need_text_grad)
    Launch(g, weights);
  return {grad_image, grad_text};
}

#ifndef MMK_EMULATED
constexpr auto cpu = &forward<on_cpu<SpatialAttention, spatial_attention_forward>>;
constexpr auto cpu_out = &forward_out<on_cpu<SpatialAttention, spatial_attention_forward>>;
constexpr auto cpu_back = &backward<on_cpu<SpatialAttentionBackward, spatial_attention_backward>>;
#endif

#if defined(MMK_CUDA) || defined(MMK_EMULATED)
constexpr auto gpu =
    &forward<on_gpu<SpatialAttention, cuda::spatial_attention_scratch, cuda::spatial_attention_forward>>;
constexpr auto gpu_out =
    &forward_out<on_gpu<SpatialAttention, cuda::spatial_attention_scratch, cuda::spatial_attention_forward>>;
constexpr auto gpu_back =
    &backward<on_gpu<SpatialAttentionBackward, cuda::spatial_attention_scratch, cuda::spatial_attention_backward>>;
#endif

}  // namespace
}  // namespace mmk::binding

STABLE_TORCH_LIBRARY_FRAGMENT(mmkernels, m) {
  m.def(MMK_OPERATION
        "(Tensor image, Tensor text, Tensor? mask, Tensor? offsets, float scale, int num_heads, bool pool, "
        "bool rescale) -> (Tensor, Tensor)");
  m.def(MMK_OPERATION
        "_out(Tensor image, Tensor text, Tensor? mask, Tensor? offsets, float scale, int num_heads, bool pool, "
        "bool rescale, Tensor(a!) out) -> Tensor");
  m.def(MMK_OPERATION
        "_backward(Tensor? grad_result, Tensor? grad_weights, Tensor image, Tensor text, Tensor? mask, "
        "Tensor? offsets, Tensor weights, float scale, int num_heads, bool pool, bool rescale, bool need_image_grad, "
        "bool need_text_grad) -> (Tensor, Tensor)");
}

MMK_IMPLEMENT_CPU("", cpu)
MMK_IMPLEMENT_CPU("_out", cpu_out)
MMK_IMPLEMENT_CPU("_backward", cpu_back)
MMK_IMPLEMENT_GPU("", gpu)
MMK_IMPLEMENT_GPU("_out", gpu_out)
MMK_IMPLEMENT_GPU("_backward", gpu_back)
