// The layer through which a sample's text reaches the scores of all of its rows, and its gradients. Its products are
// the library's, in float (double). On the CPU small ones are loops: a call of the library would take longer than all
// of the kernel.
#pragma once
#include "rows.h"

namespace mmk::binding {

// to = a b in to's dtype, not rounded in between. As an `out` variant: autocast, which may be on around us, leaves
// those alone.
inline void multiply_into(const Tensor& to, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  const ScalarType type = to.scalar_type();
  std::array<StableIValue, 3> stack{from(torch::stable::to(a, type)), from(torch::stable::to(b, type)), from(to)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

// Which gradients of a layer are wanted.
struct LayerNeeds {
  bool text;
  bool weight;
  bool bias;
};

struct LayerGradients {
  Tensor text;  // [B, E]
  Tensor bias;  // [A]
};

// bias_hidden [B, A] = text [B, E] layer^T + bias [A], where the layer [A, E] is the last columns of a weight.
class TextProjection {
 public:
  // `before`: columns of the weight that aren't the layer's.
  TextProjection(const Anchor& anchor, int64_t samples, const Tensor& text, const Tensor& weight, int64_t out,
                 int64_t before, const Optional& bias)
      : text(text), weight(weight), bias(bias), B(samples), A(out), before(before) {
    STD_TORCH_CHECK(text.dim() == 2, "text must be [B, E]");
    E = text.size(1);
    anchor.check(text, "text", anchor.type, {B, E});
    anchor.check(weight, "weight", anchor.type, {A, before + E});
    if (bias)
      anchor.check(*bias, "bias", anchor.type, {A});
    type = anchor.type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
#ifndef MMK_EMULATED  // what is tested there is what a GPU gets
    small = anchor.device == DeviceType::CPU && type == anchor.type && B * A * (E + 1) <= 4096;
#endif
  }

  Tensor bias_hidden() const {
    using torch::stable::detail::from;
    Tensor to = empty_tensor(text, {B, A}, type);
    if (small) {
      with_type([&](auto zero) {
        using C = decltype(zero);
        C* out = static_cast<C*>(to.mutable_data_ptr());
        multiply<C>(out, A, B, A, E, text_rows(), transposed(layer_rows()));
        for (int64_t i = 0; bias && i < B * A; ++i)
          out[i] += static_cast<const C*>(bias->data_ptr())[i % A * bias->stride(0)];
      });
      return to;
    }
    const Optional wide = bias ? Optional(torch::stable::to(*bias, type)) : Optional();
    std::array<StableIValue, 4> stack{from(torch::stable::to(text, type)), from(torch::stable::to(layer(), type)),
                                      from(wide), from(to)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
    (void)torch::stable::detail::to<Tensor>(stack[0]);
    return to;
  }

  // Of grad [B, A], contiguous. The layer's is written into the last columns of the weight's.
  LayerGradients gradients(const Tensor& grad, const LayerNeeds& needs, Tensor& grad_weight) const {
    LayerGradients found{dense_gradient(text, needs.text),
                         bias ? dense_gradient(*bias, needs.bias) : empty_tensor(text, {0})};
    if (small) {
      with_type([&](auto zero) { small_gradients<decltype(zero)>(grad, needs, grad_weight, found); });
      return found;
    }
    if (needs.text)
      write(found.text, grad, layer());
    if (needs.weight) {
      Tensor to = columns(grad_weight);
      write(to, torch::stable::transpose(grad, 0, 1), text);
    }
    if (needs.bias) {
      const int64_t samples = 0;
      torch::stable::copy_(found.bias, torch::stable::sum(grad, Shape(&samples, 1)));
    }
    return found;
  }

 private:
  const Tensor& text;
  const Tensor& weight;
  const Optional& bias;
  int64_t B;
  int64_t A;
  int64_t E;
  int64_t before;
  ScalarType type;
  bool small = false;

  template <class F>
  void with_type(F f) const {
    if (type == ScalarType::Double)
      f(double{});
    else
      f(float{});
  }

  Tensor columns(Tensor whole) const { return torch::stable::narrow(whole, 1, before, E); }
  Tensor layer() const { return columns(weight); }

  // to = a b, rounded once.
  void write(Tensor& to, const Tensor& a, const Tensor& b) const {
    if (to.scalar_type() == type)
      return multiply_into(to, a, b);
    Tensor exact = empty_tensor(to, to.sizes(), type);
    multiply_into(exact, a, b);
    torch::stable::copy_(to, exact);
  }

  // Small products: matrices of C that are read with any strides.
  Projection text_rows() const { return projection(text); }
  Projection layer_rows() const {
    const char* data = static_cast<const char*>(weight.data_ptr());
    return {data + before * weight.stride(1) * weight.element_size(), weight.stride(0), weight.stride(1)};
  }
  static Projection transposed(const Projection& m) { return {m.data, m.column, m.row}; }

  // to [rows, columns], rows `step` apart, = a [rows, inner] b [inner, columns]
  template <class C>
  static void multiply(C* to, int64_t step, int64_t rows, int64_t columns, int64_t inner, const Projection& a,
                       const Projection& b) {
    const C* left = static_cast<const C*>(a.data);
    const C* right = static_cast<const C*>(b.data);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        double sum = 0;
        for (int64_t k = 0; k < inner; ++k)
          sum += double(left[i * a.row + k * a.column]) * double(right[k * b.row + j * b.column]);
        to[i * step + j] = C(sum);
      }
  }

  template <class C>
  void small_gradients(const Tensor& grad, const LayerNeeds& needs, Tensor& grad_weight, LayerGradients& found) const {
    const Projection up{grad.data_ptr(), A, 1};
    if (needs.text)
      multiply<C>(static_cast<C*>(found.text.mutable_data_ptr()), E, B, E, A, up, layer_rows());
    if (needs.weight)
      multiply<C>(static_cast<C*>(grad_weight.mutable_data_ptr()) + before, before + E, A, E, B, transposed(up),
                  text_rows());
    if (needs.bias) {
      const C one = 1;
      multiply<C>(static_cast<C*>(found.bias.mutable_data_ptr()), A, 1, A, B, {&one, 0, 0}, up);
    }
  }
};

}  // namespace mmk::binding
