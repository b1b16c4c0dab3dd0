// What the bindings of attention over heads share: [B, H, N, C] tensors and their masks as the kernels' plain structs.
#pragma once
#include <utility>

#include "common.h"

namespace mmk::binding {

inline HeadRows head_rows(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}
inline TokenMask token_mask(const Tensor& t) {  // [B, H, T], or [B, T] for all heads
  const bool* data = static_cast<const bool*>(t.data_ptr());
  return t.dim() == 2 ? TokenMask{data, t.stride(0), 0, t.stride(1)}
                      : TokenMask{data, t.stride(0), t.stride(1), t.stride(2)};
}
inline PairMask pair_mask(const Tensor& t) {
  return {static_cast<const bool*>(t.data_ptr()), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}
inline Bias bias_of(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// An empty [B, H, N, channels] tensor; a view of [B, N, H * channels] where `like` is one (empty_heads in
// ops/common.py).
inline Tensor empty_heads(const Tensor& like, int64_t channels) {
  int64_t B = like.size(0);
  int64_t H = like.size(1);
  int64_t N = like.size(2);
  Tensor t = H > 1 && N > 1 && like.stride(1) < like.stride(2)
                 ? torch::stable::transpose(empty_tensor(like, {B, N, H, channels}), 1, 2)
                 : empty_tensor(like, {B, H, N, channels});
  advise_huge_pages(t);
  return t;
}

// A gradient, and where the kernel writes it: nowhere if it isn't needed.
inline std::pair<Tensor, HeadRows> gradient(const Tensor& like, bool need) {
  if (!need)
    return {empty_tensor(like, {0}), HeadRows{}};
  Tensor t = empty_heads(like, like.size(3));
  return {t, head_rows(t)};
}

}  // namespace mmk::binding
