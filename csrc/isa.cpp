#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace mmk {

const char* name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (avx2)
    return Isa::avx2;
#endif
  return Isa::baseline;
}

static Isa choose() {
  const char* wanted = std::getenv("MMKERNELS_CPU_ISA");
  if (!wanted || !*wanted)
    return best_isa();
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
    if (std::string(wanted) == name(isa)) {
      if (isa <= best_isa())
        return isa;
      throw std::runtime_error(std::string("MMKERNELS_CPU_ISA asks for ") + wanted + ", but this machine has " +
                               name(best_isa()) + " at best");
    }
  throw std::runtime_error(std::string("MMKERNELS_CPU_ISA must be baseline, avx2 or avx512, got ") + wanted);
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace mmk
