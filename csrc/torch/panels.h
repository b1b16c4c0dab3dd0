// How the CUDA bindings of channel and additive attention walk an image: panel by panel of rows, whose products are
// torch's library's and whose scores stay in the L2 cache until the kernels have used them.
#pragma once
#include "../cuda/rows.h"
#include "cuda.h"
#include "projection.h"
#include "rows.h"

namespace mmk::binding {

inline void nothing_kept(int64_t kept_rows) {
  STD_TORCH_CHECK(kept_rows == 0, "kept_rows must be 0: only the CPU keeps rows");
}

inline Tensor transposed(const Tensor& t) {
  return torch::stable::transpose(t, 0, 1);
}

// a b in float, not rounded in between; contiguous.
inline Tensor product(const Tensor& a, const Tensor& b) {
  Tensor to = empty_tensor(a, {a.size(0), b.size(1)}, ScalarType::Float);
#ifndef MMK_EMULATED  // the CPU's library has no product of another dtype
  if (a.scalar_type() != ScalarType::Float) {
    using torch::stable::detail::from;
    std::array<StableIValue, 4> stack{from(a), from(b), from(ScalarType::Float), from(to)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
#endif
  multiply_into(to, a, b);
  return to;
}

inline float* floats(const Tensor& t) {
  return static_cast<float*>(t.mutable_data_ptr());
}

struct Panels {
  const Tensor& image;
  const SampleRows rows;
  const Mask mask;
  const cuda::SampledRows samples;
  const int64_t D;
  const Dtype dtype;
  void* const stream;
  std::optional<Tensor> flat;  // [rows, D], where that is a view of image and nothing is masked

  Panels(const Tensor& image, Dtype dtype, const cuda::SampledRows& samples, const Mask& mask, void* stream)
      : image(image),
        rows(binding::rows(image)),
        mask(mask),
        samples(samples),
        D(image.size(image.dim() - 1)),
        dtype(dtype),
        stream(stream) {
    if (mask.data)
      return;
    if (image.dim() == 2)
      flat = image;
    else if (rows.b == samples.N * rows.n || samples.B == 1)
      flat = torch::stable::reshape(image, {samples.rows, D});
  }

  // f(panel, its rows [rows, D]); `width`: floats that a row has in the widest product.
  template <class F>
  void each(int64_t width, F f) const {
    const int64_t size = cuda::panel_rows(samples.rows, width);
    for (int64_t first = 0; first < samples.rows; first += size) {
      const int64_t count = samples.rows - first < size ? samples.rows - first : size;
      Tensor all = flat ? *flat : image;
      Tensor x = flat ? torch::stable::narrow(all, 0, first, count) : empty_tensor(image, {count, D});
      cuda::Panel panel = cuda::panel_of(samples, first, count);
      if (!flat)
        check_launch(cuda::gather_rows(dtype, samples, panel, rows, mask, D, x.mutable_data_ptr(), stream));
      panel.image = x.data_ptr();
      panel.n = x.stride(0);
      panel.c = x.stride(1);
      f(panel, x);
    }
  }
};

// to [samples, C] = sums over each sample's rows, panel by panel; null: not wanted.
struct ColumnSum {
  const cuda::SampledRows samples;
  const int64_t C;
  float* const to;
  Tensor partial;
  void* const stream;
  ColumnSum(const Tensor& like, const cuda::SampledRows& samples, int64_t C, void* to, void* stream)
      : samples(samples),
        C(C),
        to(static_cast<float*>(to)),
        partial(empty_tensor(like, {to ? cuda::columns_scratch(C) : 0}, ScalarType::Float)),
        stream(stream) {
    if (to)
      check_launch(cuda::clear(this->to, samples.B * C, stream));
  }
  void add(const cuda::Panel& panel, const Tensor& rows) const {
    if (to)
      check_launch(cuda::sum_columns(samples, panel.first, panel.rows, floats(rows), rows.stride(0), C, to,
                                     floats(partial), stream));
  }
};

// sum over panels of grad_output^T rows in float, then the weight's gradient in its dtype.
struct WeightSum {
  Tensor sum;
  void* stream;
  bool wanted;
  WeightSum(const Tensor& like, int64_t out, int64_t in, bool wanted, void* stream)
      : sum(empty_tensor(like, wanted ? Shape{out, in} : Shape{0}, ScalarType::Float)), stream(stream), wanted(wanted) {
    if (wanted)
      check_launch(cuda::clear(floats(sum), out * in, stream));
  }
  void add(const Tensor& grad_output, const Tensor& x) const {
    if (!wanted)
      return;
    Tensor partial = product(transposed(grad_output), x);
    check_launch(cuda::accumulate(floats(sum), floats(partial), sum.numel(), stream));
  }
  // A weight's rows from `first` on.
  void write(Tensor& to, int64_t first = 0) const {
    Tensor all = sum;
    if (wanted)
      torch::stable::copy_(to, torch::stable::narrow(all, 0, first, to.size(0)));
  }
};

}  // namespace mmk::binding
