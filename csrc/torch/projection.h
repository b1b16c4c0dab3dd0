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
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
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
      : text_(text), weight_(weight), bias_(bias), B(samples), A(out), before_(before) {
    STD_TORCH_CHECK(text.dim() == 2, "text must be [B, E]");
    E = text.size(1);
    anchor.check(text, "text", anchor.type, {B, E});
    anchor.check(weight, "weight", anchor.type, {A, before + E});
    if (bias)
      anchor.check(*bias, "bias", anchor.type, {A});
    type_ = anchor.type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
#ifndef MMK_EMULATED  // what is tested there is what a GPU gets
    small_ = anchor.device == DeviceType::CPU && type_ == anchor.type && B * A * E <= 4096;
#endif
  }

  Tensor bias_hidden() const {
    using torch::stable::detail::from;
    Tensor to = empty_tensor(text_, {B, A}, type_);
    if (small_) {
      with_type([&](auto zero) {
        using C = decltype(zero);
        C* out = static_cast<C*>(to.mutable_data_ptr());
        multiply<C>(out, A, B, A, E, text_rows(), transposed(layer_rows()));
        for (int64_t i = 0; bias_ && i < B * A; ++i)
          out[i] += static_cast<const C*>(bias_->data_ptr())[i % A * bias_->stride(0)];
      });
      return to;
    }
    const Optional bias = bias_ ? Optional(torch::stable::to(*bias_, type_)) : Optional();
    std::array<StableIValue, 4> stack{from(torch::stable::to(text_, type_)), from(torch::stable::to(layer(), type_)),
                                      from(bias), from(to)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
    (void)torch::stable::detail::to<Tensor>(stack[0]);
    return to;
  }

  // Of grad [B, A], contiguous. The layer's is written into the last columns of the weight's.
  LayerGradients gradients(const Tensor& grad, const LayerNeeds& needs, Tensor& grad_weight) const {
    LayerGradients found{dense_gradient(text_, needs.text),
                         bias_ ? dense_gradient(*bias_, needs.bias) : empty_tensor(text_, {0})};
    if (small_) {
      with_type([&](auto zero) { small_gradients<decltype(zero)>(grad, needs, grad_weight, found); });
      return found;
    }
    if (needs.text)
      write(found.text, grad, layer());
    if (needs.weight) {
      Tensor to = columns(grad_weight);
      write(to, torch::stable::transpose(grad, 0, 1), text_);
    }
    if (needs.bias) {
      const int64_t samples = 0;
      torch::stable::copy_(found.bias, torch::stable::sum(grad, Shape(&samples, 1)));
    }
    return found;
  }

 private:
  const Tensor& text_;
  const Tensor& weight_;
  const Optional& bias_;
  int64_t B, A, E;
  int64_t before_;
  ScalarType type_;
  bool small_ = false;

  template <class F>
  void with_type(F f) const {
    if (type_ == ScalarType::Double)
      f(double{});
    else
      f(float{});
  }

  Tensor columns(const Tensor& weight) const {
    Tensor whole = weight;
    return torch::stable::narrow(whole, 1, before_, E);
  }
  Tensor layer() const { return columns(weight_); }

  // to = a b, rounded once.
  void write(Tensor& to, const Tensor& a, const Tensor& b) const {
    if (to.scalar_type() == type_)
      return multiply_into(to, a, b);
    Tensor exact = empty_tensor(to, to.sizes(), type_);
    multiply_into(exact, a, b);
    torch::stable::copy_(to, exact);
  }

  // Small products: matrices of C that are read with any strides.
  Projection text_rows() const { return projection(text_); }
  Projection layer_rows() const {
    const char* data = static_cast<const char*>(weight_.data_ptr());
    return {data + before_ * weight_.stride(1) * weight_.element_size(), weight_.stride(0), weight_.stride(1)};
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
      multiply<C>(static_cast<C*>(grad_weight.mutable_data_ptr()) + before_, before_ + E, A, E, B, transposed(up),
                  text_rows());
    if (needs.bias) {
      const C one = 1;
      multiply<C>(static_cast<C*>(found.bias.mutable_data_ptr()), A, 1, A, B, {&one, 0, 0}, up);
    }
  }
};

}  // namespace mmk::binding
