// What the kernels refuse without having looked at memory, a line each. Exit status 2: one of them isn't refused.
#include <cstdio>

#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/rows.h"

namespace {

bool right = true;

void told(const char* error) {
  right = right && error;
  printf("%s\n", error ? error : "not refused");
}

struct Task {};
void nothing(Task) {}

}  // namespace

int main() {
  using namespace mmk;
  const int64_t x = int64_t(1) << 31;
  const int64_t y = 1 << 16;
  told(cuda::sum_columns({1, 1, 1}, 0, 1, nullptr, 0, y * 128, nullptr, nullptr, nullptr));
  told(cuda::clear(nullptr, x * 256, nullptr));
  told(cuda::accumulate(nullptr, nullptr, x * 256, nullptr));
  told(cuda::gather_rows(Dtype::float32, {1, 8 * x, 8 * x}, {0, 8 * x}, {}, {}, 1, nullptr, nullptr));
  told(cuda::gather_rows(Dtype::float32, {x, 8, 8 * x}, {0, 8 * x}, {}, {}, 1, nullptr, nullptr));
  // The device itself, here the emulator.
  told(emulator::launch(nothing, dim3(1, unsigned(y)), 1, dim3(32), 0, Task{}));
  told(emulator::launch(nothing, dim3(unsigned(x)), 1, dim3(32), 0, Task{}));
  told(emulator::launch(nothing, dim3(0), 1, dim3(32), 0, Task{}));
  if (cuda::clear(nullptr, 0, nullptr) || cuda::accumulate(nullptr, nullptr, 0, nullptr))
    right = false;
  return right ? 0 : 2;
}
