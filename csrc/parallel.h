// How a kernel asks for threads without knowing whose they are: torch's pool in the bindings, plain loops in tests.
#pragma once
#include <cstdint>

namespace mmk {

struct Parallel {
  int threads;
  // Calls body(context, begin, end) on ranges that cover 0..count, at most one per thread; body must not throw.
  void (*run)(int64_t count, void (*body)(void* context, int64_t begin, int64_t end), void* context);
};

template <class F>
inline void parallel_for(const Parallel& parallel, int64_t count, F&& body) {
  auto call = [](void* context, int64_t begin, int64_t end) { (*static_cast<F*>(context))(begin, end); };
  if (parallel.threads <= 1 || count <= 1) {
    if (count > 0)
      body(int64_t(0), count);
  } else {
    parallel.run(count, call, &body);
  }
}

// f(part) on a thread for every part.
template <class F>
inline void each_part(const Parallel& parallel, int64_t parts, F f) {
  const Parallel limited{int(parts), parallel.run};
  parallel_for(limited, parts, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p)
      f(p);
  });
}

}  // namespace mmk
