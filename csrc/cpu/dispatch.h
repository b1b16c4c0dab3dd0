// Every file of csrc/cpu is compiled once per instruction set, with MMK_ISA naming the namespace. The baseline copy
// also defines the entry point that picks one at run time, and alone has float64 (the others: MMK_WITHOUT_FLOAT64),
// which exists for checking: a third of what would be compiled for it is enough.
#pragma once
#include "../isa.h"
#include "../tensor.h"
#include "simd.h"

namespace mmk {
namespace {

template <class Arguments>
auto dtype_of(const Arguments& a) -> decltype(a.dtype) {
  return a.dtype;
}
template <class Arguments>
auto dtype_of(const Arguments& a) -> decltype(a.forward.dtype) {
  return a.forward.dtype;
}

}  // namespace
}  // namespace mmk

#if defined(__x86_64__)
#define MMK_CPU_ENTRY(function, Arguments)                           \
  namespace mmk {                                                    \
  namespace avx2 {                                                   \
  void function(const Arguments&, const Parallel&);                  \
  }                                                                  \
  namespace avx512 {                                                 \
  void function(const Arguments&, const Parallel&);                  \
  }                                                                  \
  void function(const Arguments& a, const Parallel& p) {             \
    switch (dtype_of(a) == Dtype::float64 ? Isa::baseline : isa()) { \
      case Isa::avx512:                                              \
        return avx512::function(a, p);                               \
      case Isa::avx2:                                                \
        return avx2::function(a, p);                                 \
      default:                                                       \
        return baseline::function(a, p);                             \
    }                                                                \
  }                                                                  \
  }
#else
#define MMK_CPU_ENTRY(function, Arguments)               \
  namespace mmk {                                        \
  void function(const Arguments& a, const Parallel& p) { \
    baseline::function(a, p);                            \
  }                                                      \
  }
#endif

namespace mmk {
namespace {

// f of a zero of the dtype's type.
template <class F>
inline void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32:
      return f(float{});
    case Dtype::bfloat16:
      return f(bf16{});
    case Dtype::float16:
      return f(f16{});
    case Dtype::float64:
#ifdef MMK_WITHOUT_FLOAT64
      __builtin_trap();
#else
      return f(double{});
#endif
  }
}

}  // namespace
}  // namespace mmk
