// Which instruction set the CPU kernels use.
#pragma once

namespace mmk {

enum class Isa { baseline, avx2, avx512 };

#define MMK_EXPORT __attribute__((visibility("default")))  // for the Python module, which is another library

// The best that this machine has, or a lower one that the environment variable MMKERNELS_CPU_ISA names.
MMK_EXPORT Isa isa();
MMK_EXPORT const char* name(Isa);
MMK_EXPORT Isa best_isa();

}  // namespace mmk
