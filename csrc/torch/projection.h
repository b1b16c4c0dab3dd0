// The layer through which a sample's text reaches the scores of all of its rows, and its gradients. Its products are
// the library's, in float (double). On the CPU small ones are loops: a call of the library would take longer than all
// of the kernel.
#pragma once
#include <algorithm>
#include <array>

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

// A layer for texts, as it is given: text and weight are both there, or neither.
struct Layer {
  Optional text;    // [B, E]
  Optional weight;  // [A, before + E]: the layer is the last columns
  Optional bias;    // [A]
  int64_t before = 0;
  const char* text_name = "text";
  const char* weight_name = "weight";
};

// Which gradients of a layer are wanted.
struct LayerNeeds {
  bool text;
  bool weight;
  bool bias;

  bool any() const { return text || weight || bias; }
};

struct LayerGradients {
  Tensor text;  // [B, E]
  Tensor bias;  // [A]
};

// bias_hidden [B, A] = text [B, E] layer^T + bias [A], without a text the bias for every sample.
class TextProjection {
 public:
  TextProjection(const Anchor& anchor, int64_t samples, int64_t out, const Layer& given)
      : like(anchor.tensor), given(given), B(samples), A(out) {
    STD_TORCH_CHECK(bool(given.text) == bool(given.weight), given.text_name, " and ", given.weight_name,
                    " must be given together");
    if (given.text) {
      STD_TORCH_CHECK(given.text->dim() == 2, given.text_name, " must be [B, E]");
      E = given.text->size(1);
      anchor.check(*given.text, given.text_name, anchor.type, {B, E});
      anchor.check(*given.weight, given.weight_name, anchor.type, {A, given.before + E});
    }
    if (given.bias)
      anchor.check(*given.bias, "bias", anchor.type, {A});
    type = anchor.type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
#ifndef MMK_EMULATED  // what is tested there is what a GPU gets
    small = anchor.device == DeviceType::CPU && type == anchor.type && B * A * (E + 1) <= 4096;
#endif
  }

  // Contiguous, in float (double); nothing without a text and a bias.
  Optional bias_hidden() const {
    if (!given.text && !given.bias)
      return std::nullopt;
    Tensor to = empty_tensor(like, {B, A}, type);
    if (small)
      with_type([&](auto zero) { small_bias_hidden<decltype(zero)>(to); });
    else if (given.text)
      linear_into(to);
    else
      torch::stable::copy_(to, *given.bias);  // to every row
    return to;
  }

  // Of those that are asked for, those of what there is.
  LayerNeeds needed(bool text, bool weight, bool bias) const {
    return {text && given.text, weight && given.weight, bias && given.bias};
  }

  // Of grad [B, A], contiguous. The layer's is written into the last columns of the weight's.
  LayerGradients gradients(const Tensor& grad, const LayerNeeds& needs, Tensor& grad_weight) const {
    LayerGradients found{dense_gradient(needs.text ? *given.text : like, needs.text),
                         dense_gradient(needs.bias ? *given.bias : like, needs.bias)};
    if (small) {
      with_type([&](auto zero) { small_gradients<decltype(zero)>(grad, needs, grad_weight, found); });
      return found;
    }
    if (needs.text)
      write(found.text, grad, layer());
    if (needs.weight) {
      Tensor to = columns(grad_weight);
      write(to, torch::stable::transpose(grad, 0, 1), *given.text);
    }
    if (needs.bias) {
      const int64_t samples = 0;
      torch::stable::copy_(found.bias, torch::stable::sum(grad, Shape(&samples, 1)));
    }
    return found;
  }

 private:
  const Tensor& like;
  const Layer given;
  int64_t B;
  int64_t A;
  int64_t E = 0;
  ScalarType type;
  bool small = false;

  template <class F>
  void with_type(F f) const {
    if (type == ScalarType::Double)
      f(double{});
    else
      f(float{});
  }

  Tensor columns(Tensor whole) const { return torch::stable::narrow(whole, 1, given.before, E); }
  Tensor layer() const { return columns(*given.weight); }

  void linear_into(const Tensor& to) const {
    using torch::stable::detail::from;
    const Optional wide = given.bias ? Optional(torch::stable::to(*given.bias, type)) : Optional();
    std::array<StableIValue, 4> stack{from(torch::stable::to(*given.text, type)),
                                      from(torch::stable::to(layer(), type)), from(wide), from(to)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
    (void)torch::stable::detail::to<Tensor>(stack[0]);
  }

  // to = a b, rounded once.
  void write(Tensor& to, const Tensor& a, const Tensor& b) const {
    if (to.scalar_type() == type)
      return multiply_into(to, a, b);
    Tensor exact = empty_tensor(to, to.sizes(), type);
    multiply_into(exact, a, b);
    torch::stable::copy_(to, exact);
  }

  // Small products: matrices of C that are read with any strides.
  Projection text_rows() const { return projection(*given.text); }
  Projection layer_rows() const {
    const Tensor& weight = *given.weight;
    const char* data = static_cast<const char*>(weight.data_ptr());
    return {data + given.before * weight.stride(1) * weight.element_size(), weight.stride(0), weight.stride(1)};
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
  void small_bias_hidden(Tensor& to) const {
    C* out = static_cast<C*>(to.mutable_data_ptr());
    if (given.text)
      multiply<C>(out, A, B, A, E, text_rows(), transposed(layer_rows()));
    else
      std::fill_n(out, B * A, C(0));
    if (!given.bias)
      return;
    const C* bias = static_cast<const C*>(given.bias->data_ptr());
    const int64_t step = given.bias->stride(0);
    for (int64_t i = 0; i < B; ++i)
      for (int64_t c = 0; c < A; ++c)
        out[i * A + c] += bias[c * step];
  }

  template <class C>
  void small_gradients(const Tensor& grad, const LayerNeeds& needs, Tensor& grad_weight, LayerGradients& found) const {
    const Projection up{grad.data_ptr(), A, 1};
    if (needs.text)
      multiply<C>(static_cast<C*>(found.text.mutable_data_ptr()), E, B, E, A, up, layer_rows());
    if (needs.weight)
      multiply<C>(static_cast<C*>(grad_weight.mutable_data_ptr()) + given.before, given.before + E, A, E, B,
                  transposed(up), text_rows());
    if (needs.bias) {
      const C one = 1;
      multiply<C>(static_cast<C*>(found.bias.mutable_data_ptr()), A, 1, A, B, {&one, 0, 0}, up);
    }
  }
};

}  // namespace mmk::binding
