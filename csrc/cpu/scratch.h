// Memory for a call.
#pragma once
#include <cstdint>
#include <new>

namespace mmk {
namespace {

// Aligned to cache lines by hand: aligned operator new takes several times as long, and a small call asks often. Under
// AddressSanitizer by it, so that the first byte beyond is seen. Operator new lives in the C++ library, so no template
// of it is compiled for this instruction set.
template <class C>
struct Scratch {
  C* data;
  explicit Scratch(int64_t count) {
    const size_t bytes = sizeof(C) * (count > 0 ? count : 1);
#ifdef __SANITIZE_ADDRESS__
    memory_ = ::operator new(bytes, std::align_val_t(line));
#else
    memory_ = ::operator new(bytes + line - 1);
#endif
    data = reinterpret_cast<C*>((reinterpret_cast<uintptr_t>(memory_) + line - 1) & ~(line - 1));
  }
  ~Scratch() {
#ifdef __SANITIZE_ADDRESS__
    ::operator delete(memory_, std::align_val_t(line));
#else
    ::operator delete(memory_);
#endif
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

 private:
  static constexpr uintptr_t line = 64;
  void* memory_;
};

}  // namespace
}  // namespace mmk
