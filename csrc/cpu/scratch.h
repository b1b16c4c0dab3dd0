// Memory for a call.
#pragma once
#include <cstdint>
#include <new>

namespace mmk {
namespace {

// Aligned to cache lines by hand: aligned operator new takes several times as long, and a small call asks often.
// Operator new lives in the C++ library, so no template of it is compiled for this instruction set.
template <class C>
struct Scratch {
  C* data;
  explicit Scratch(int64_t count) : memory_(::operator new(sizeof(C) * (count > 0 ? count : 1) + line - 1)) {
    data = reinterpret_cast<C*>((reinterpret_cast<uintptr_t>(memory_) + line - 1) & ~(line - 1));
  }
  ~Scratch() { ::operator delete(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

 private:
  static constexpr uintptr_t line = 64;
  void* memory_;
};

}  // namespace
}  // namespace mmk
