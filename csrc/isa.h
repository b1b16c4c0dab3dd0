// Which instruction set the CPU kernels use.
#pragma once

namespace mmk {

enum class Isa { baseline, avx2, avx512 };

// The best that this machine has, or a lower one that the environment variable MMKERNELS_CPU_ISA names.
Isa isa();
const char* name(Isa);
Isa best_isa();

}  // namespace mmk
