// Memory for a call.
#pragma once
#include <cstdint>
#include <new>

namespace mmk {
namespace {

// Aligned to cache lines; operator new lives in the C++ library, so no template of it is compiled for this instruction
// set.
template <class C>
struct Scratch {
  C* data;
  explicit Scratch(int64_t count)
      : data(static_cast<C*>(::operator new(sizeof(C) * (count > 0 ? count : 1), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(data, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

}  // namespace
}  // namespace mmk
