// What the bindings share: checks that keep a kernel safe whatever arrives through torch.ops, and torch tensors as the
// kernels' plain structs. The friendly messages live in mmkernels/checks.py; these only refuse.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "../parallel.h"
#include "../tensor.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mmk::binding {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::Double:
      return Dtype::float64;
    default:
      break;
  }
  STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64");
  return Dtype::float32;
}

inline ScalarType accumulate_type(Dtype dtype) {
  return dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
}

// As Tensor::layout() == Layout::Strided, which torch 2.10 doesn't have.
inline bool is_strided(const Tensor& t) {
  int32_t layout;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
  return layout == aoti_torch_layout_strided();
}

inline void check_shape(const Tensor& t, const char* name, Shape sizes) {
  const bool fits = is_strided(t) && t.sizes().equals(sizes);
  STD_TORCH_CHECK(fits, name, " doesn't have the shape that the other arguments call for");
}

// An uninitialized tensor on another's device, in a dtype or the other's. torch::stable::new_empty is the same by way
// of the dispatcher's stack of boxed arguments, which takes longer than a small kernel; so does
// torch::stable::contiguous.
inline Tensor empty_tensor(const Tensor& like, Shape sizes, std::optional<ScalarType> type = {}) {
  int32_t dtype = type ? torch::stable::detail::to<int32_t>(torch::stable::detail::from(*type)) : 0;
  AtenTensorHandle empty;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.data(), int64_t(sizes.size()),
                                                   type ? &dtype : nullptr, nullptr, nullptr, 0, nullptr, &empty));
  return Tensor(empty);
}

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// The tensor that everything else must be like.
struct Anchor {
  const Tensor& tensor;
  ScalarType type;
  DeviceType device;
  int32_t index;

  explicit Anchor(const Tensor& t)
      : tensor(t), type(t.scalar_type()), device(t.device().type()), index(t.get_device_index()) {}

  void check(const Tensor& t, const char* name, ScalarType wanted, Shape sizes) const {
    STD_TORCH_CHECK(t.device().type() == device && t.get_device_index() == index, name,
                    " must be on the other arguments' device");
    STD_TORCH_CHECK(t.scalar_type() == wanted, name, " has the wrong dtype");
    check_shape(t, name, sizes);
  }
};

// The bounds of packed bags, [B + 1], contiguous. On the CPU their values are checked; elsewhere that would mean to
// wait, and the kernels confine every access to the rows that exist.
inline Tensor bag_bounds(const Anchor& anchor, const Tensor& offsets, int64_t rows) {
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) >= 1, "offsets must be [B + 1]");
  anchor.check(offsets, "offsets", ScalarType::Long, {offsets.size(0)});
  Tensor bounds = dense(offsets);
  if (anchor.device == DeviceType::CPU) {
    const int64_t* bound = static_cast<const int64_t*>(bounds.data_ptr());
    const int64_t bags = bounds.size(0) - 1;
    bool valid = bound[0] == 0 && bound[bags] == rows;
    for (int64_t b = 0; valid && b < bags; ++b)
      valid = bound[b] <= bound[b + 1];
    STD_TORCH_CHECK(valid, "offsets must ascend from 0 to the number of rows of image");
  }
  return bounds;
}

// A large result that comes as untouched pages costs more in page faults than its kernel takes; in huge pages a
// fraction of that (docs/architecture.md, "Fresh memory"). Only from 32 MB on, where glibc's malloc takes fresh pages
// for every call: below, it has memory that was used before, and huge pages would be slower than that. What is resident
// already is left as it is.
inline void advise_huge_pages(const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = 4096, huge = 2 << 20;
  uintptr_t bytes = uintptr_t(t.numel()) * t.element_size();
  if (bytes < 16 * huge || !t.device().is_cpu())
    return;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(t.data_ptr()) + page - 1) & ~(page - 1);
  uintptr_t end = (reinterpret_cast<uintptr_t>(t.data_ptr()) + bytes) & ~(page - 1);
  unsigned char resident = 1;
  mincore(reinterpret_cast<void*>((begin + bytes / 2) & ~(page - 1)), page, &resident);
  if (!(resident & 1))
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: failure changes nothing
#else
  (void)t;
#endif
}

// A contiguous gradient; empty if it isn't needed.
inline Tensor dense_gradient(const Tensor& like, bool need) {
  if (!need)
    return empty_tensor(like, {0});
  Tensor t = empty_tensor(like, like.sizes());
  advise_huge_pages(t);
  return t;
}

// Beyond this a result doesn't survive in cache until its reader comes, so it is written past the cache.
inline bool too_large_for_cache(const Tensor& t) {
  return t.numel() * int64_t(t.element_size()) > (8 << 20);
}

inline Parallel torch_threads() {
  return {int(torch::stable::get_num_threads()),
          [](int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
            torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) { body(context, begin, end); });
          }};
}

// What `forward` and `backward` of a binding launch: a kernel of the CPU with torch's threads.
template <class Arguments, void (*kernel)(const Arguments&, const Parallel&)>
void on_cpu(const Arguments& arguments, const Tensor&) {
  kernel(arguments, torch_threads());
}

}  // namespace mmk::binding

// Implements MMK_OPERATION with a suffix ("_backward"), one line a function; nothing where the build has no such
// device. The tests' emulated operations are on the CPU, in place of the kernels for it.
#define MMK_IMPLEMENT(key, suffix, function)                         \
  STABLE_TORCH_LIBRARY_IMPL(mmkernels, key, m) {                     \
    m.impl(MMK_OPERATION suffix, TORCH_BOX(mmk::binding::function)); \
  }
#if defined(MMK_EMULATED)
#define MMK_IMPLEMENT_CPU(suffix, function)
#define MMK_IMPLEMENT_GPU(suffix, function) MMK_IMPLEMENT(CPU, suffix, function)
#elif defined(MMK_CUDA)
#define MMK_IMPLEMENT_CPU(suffix, function) MMK_IMPLEMENT(CPU, suffix, function)
#define MMK_IMPLEMENT_GPU(suffix, function) MMK_IMPLEMENT(CUDA, suffix, function)
#else
#define MMK_IMPLEMENT_CPU(suffix, function) MMK_IMPLEMENT(CPU, suffix, function)
#define MMK_IMPLEMENT_GPU(suffix, function)
#endif
