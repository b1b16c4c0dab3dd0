// What the bindings of channel and additive attention share: rows of samples and layers' weights as the kernels' plain
// structs.
#pragma once
#include <utility>

#include "common.h"

namespace mmk::binding {

using Optional = std::optional<Tensor>;

inline SampleRows rows(const Tensor& t) {  // [B, N, C], or packed [N, C]
  return t.dim() == 2 ? SampleRows{t.data_ptr(), 0, t.stride(0), t.stride(1)}
                      : SampleRows{t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}
inline Projection projection(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1)};
}

// Of the rows that a forward pass keeps for backward, [kept_rows, columns].
inline std::vector<int64_t> kept_shape_of(int64_t kept_rows, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(kept_rows >= 0 && kept_rows <= rows, "kept_rows must be between 0 and the number of rows");
  return {kept_rows, columns};
}

// Where the kernel writes a gradient: nowhere if it isn't needed.
inline void* data_if(const Tensor& t, bool need) {
  return need ? t.mutable_data_ptr() : nullptr;
}

}  // namespace mmk::binding
