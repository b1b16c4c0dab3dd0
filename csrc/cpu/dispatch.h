// Every file of csrc/cpu is compiled once per instruction set, with MMK_ISA naming the namespace. The baseline copy also
// defines the entry point that picks one at run time.
#pragma once
#include "../isa.h"

#if defined(__x86_64__)
#define MMK_CPU_ENTRY(function, Arguments)                                        \
  namespace mmk {                                                                 \
  namespace avx2 { void function(const Arguments&, const Parallel&); }            \
  namespace avx512 { void function(const Arguments&, const Parallel&); }          \
  void function(const Arguments& a, const Parallel& p) {                          \
    switch (isa()) {                                                              \
      case Isa::avx512: return avx512::function(a, p);                            \
      case Isa::avx2: return avx2::function(a, p);                                \
      default: return baseline::function(a, p);                                   \
    }                                                                             \
  }                                                                               \
  }
#else
#define MMK_CPU_ENTRY(function, Arguments) \
  namespace mmk { void function(const Arguments& a, const Parallel& p) { baseline::function(a, p); } }
#endif
