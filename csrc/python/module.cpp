// mmkernels._C: importing it loads the operator library, which registers the operations; it tells what was built and
// what was chosen.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../isa.h"

#define MMK_STRING_(x) #x
#define MMK_STRING(x) MMK_STRING_(x)

PYBIND11_MODULE(_C, m) {
  using namespace mmk;
  m.attr("compiler") = __VERSION__;
  m.attr("torch_target") = MMK_STRING(MMK_TORCH_TARGET);  // the oldest torch that this build runs on
  std::vector<std::string> isas;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
#if !defined(__x86_64__)
    if (isa != Isa::baseline)
      continue;
#endif
    isas.push_back(name(isa));
  }
  m.attr("cpu_isas") = isas;
  m.attr("cpu_best_isa") = name(best_isa());
  m.attr("cpu_isa") = name(isa());
#ifdef MMK_CUDA_ARCHITECTURES
  m.attr("cuda_architectures") = std::vector<std::string>{MMK_CUDA_ARCHITECTURES};
  m.attr("cuda_reason") = "";
#else
  m.attr("cuda_architectures") = std::vector<std::string>{};
  m.attr("cuda_reason") = MMK_CUDA_REASON;
#endif
}
