// The kernels of spatial_rows.h, for T in f32, bf16, f16 and P packs of a lane in 1, 2, 4, of f32 8, too, and forward
// 16:
//   spatial_attention_rows_forward_first_P_T, _rows_forward_second_P_T, _rows_backward_first_P_T,
//   _rows_backward_second_P_T, _rows_backward_third_T(Task)
// grid (task.slots, H), block 128, dynamic shared memory Layout.total + rows_shared. And of spatial_planes.h:
//   spatial_attention_planes_forward_first_T, _planes_forward_second_T, _planes_backward_first_T,
//   _planes_backward_second_T(Task)
// the same grid, block 256 or 512, dynamic shared memory Layout.total + planes_shared.
#include "spatial_rows.h"

#include "spatial_planes.h"
#include "spatial_rows_backward.h"

namespace mmk::cuda {

using namespace spatial;

// Blocks that a processor's registers have room for.
template <class T>
constexpr int blocks_of(int packs) {
  const int floats = packs * Pack<T>::size;
  return floats <= 16 ? 4 : floats <= 32 ? 3 : 2;
}

#define MMK_KERNEL(name, blocks, T, suffix, P)                          \
  extern "C" __global__ void __launch_bounds__(rows_threads, blocks)    \
      spatial_attention_rows_##name##_##P##_##suffix(const Task task) { \
    MMK_DYNAMIC_SHARED(shared);                                         \
    rows_##name<T, P>(task, shared);                                    \
  }
#define MMK_FORWARD(T, suffix, P)                          \
  MMK_KERNEL(forward_first, blocks_of<T>(P), T, suffix, P) \
  MMK_KERNEL(forward_second, 4, T, suffix, P)
#define MMK_BACKWARD(T, suffix, P)                          \
  MMK_KERNEL(backward_first, blocks_of<T>(P), T, suffix, P) \
  MMK_KERNEL(backward_second, blocks_of<T>(P), T, suffix, P)
#define MMK_PACKS(T, suffix, P) \
  MMK_FORWARD(T, suffix, P)     \
  MMK_BACKWARD(T, suffix, P)
// Blocks of 512 threads a processor. Two leave 64 registers a thread: enough for what nvcc 13 makes for 9.0, while
// for 8.0 and 10.0 it spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int finishing_planes = 2;
#else
constexpr int finishing_planes = 1;
#endif
#define MMK_PLANES(name, blocks, T, suffix)                         \
  extern "C" __global__ void __launch_bounds__(512, blocks)         \
      spatial_attention_planes_##name##_##suffix(const Task task) { \
    MMK_DYNAMIC_SHARED(shared);                                     \
    planes_##name<T>(task, shared);                                 \
  }
#define MMK_KERNELS(T, suffix)                                          \
  MMK_PACKS(T, suffix, 1)                                               \
  MMK_PACKS(T, suffix, 2)                                               \
  MMK_PACKS(T, suffix, 4)                                               \
  MMK_PLANES(forward_first, 2, T, suffix)                               \
  MMK_PLANES(forward_second, finishing_planes, T, suffix)               \
  MMK_PLANES(backward_first, sizeof(T) == 4 ? 1 : 2, T, suffix)         \
  MMK_PLANES(backward_second, sizeof(T) == 4 ? 1 : 2, T, suffix)        \
  extern "C" __global__ void __launch_bounds__(rows_threads)            \
      spatial_attention_rows_backward_third_##suffix(const Task task) { \
    MMK_DYNAMIC_SHARED(shared);                                         \
    rows_backward_third<T>(task, shared);                               \
  }
MMK_KERNELS(float, f32)
MMK_KERNELS(bf16, bf16)
MMK_KERNELS(f16, f16)
MMK_PACKS(float, f32, 8)
MMK_FORWARD(float, f32, 16)

namespace {

template <class T>
int packs_of(int64_t width) {
  const int64_t packs = width / Pack<T>::size;
  const int64_t wanted = ceil_div(packs, lanes_of_row(width, Pack<T>::size));
  int index = 0;
  while ((1 << index) < wanted)
    ++index;
  return index;
}

// By packs: 1, 2, 4, 8, 16.
#define MMK_NARROW(name, suffix)                                                          \
  spatial_attention_rows_##name##_1_##suffix, spatial_attention_rows_##name##_2_##suffix, \
      spatial_attention_rows_##name##_4_##suffix
#define MMK_BY_PACKS(name, widest)                                                                      \
  {                                                                                                     \
    {MMK_NARROW(name, f32), spatial_attention_rows_##name##_8_f32, widest}, {MMK_NARROW(name, bf16)}, { \
      MMK_NARROW(name, f16)                                                                             \
    }                                                                                                   \
  }
constexpr RowsKernel firsts[2][3][5] = {MMK_BY_PACKS(forward_first, spatial_attention_rows_forward_first_16_f32),
                                        MMK_BY_PACKS(backward_first, nullptr)};
constexpr RowsKernel seconds[2][3][5] = {MMK_BY_PACKS(forward_second, spatial_attention_rows_forward_second_16_f32),
                                         MMK_BY_PACKS(backward_second, nullptr)};
constexpr RowsKernel thirds[3] = {spatial_attention_rows_backward_third_f32, spatial_attention_rows_backward_third_bf16,
                                  spatial_attention_rows_backward_third_f16};

#define MMK_PLANES_OF(name) \
  {spatial_attention_planes_##name##_f32, spatial_attention_planes_##name##_bf16, spatial_attention_planes_##name##_f16}
constexpr RowsKernel first_planes[2][3] = {MMK_PLANES_OF(forward_first), MMK_PLANES_OF(backward_first)};
constexpr RowsKernel second_planes[2][3] = {MMK_PLANES_OF(forward_second), MMK_PLANES_OF(backward_second)};

// More warps where there are channels for them.
int planes_threads(int64_t width) {
  return width < 512 ? 256 : 512;
}

// Tests of the tiles take shapes that would go another way.
bool only_tiles() {
#ifdef MMK_EMULATED
  return emulator::config.tiles;
#else
  return false;
#endif
}

// Null or with 16 bytes of every row together and aligned.
bool in_packs(const Features& f, int64_t element) {
  auto whole = [&](int64_t stride) { return stride * element % 16 == 0; };
  return !f.data ||
         (f.d == 1 && reinterpret_cast<uintptr_t>(f.data) % 16 == 0 && whole(f.b) && whole(f.y) && whole(f.x));
}

}  // namespace

bool rows_fit(const Task& t, int64_t element, bool backward, const Device& device) {
  const int64_t width = t.D / t.H;
  // Beyond, tiles were as fast or faster on the GPU that both ran on: sums take the registers that loads should have.
  const int64_t widest = element == 4 ? (backward ? 1024 : 2048) : t.pool && !backward ? 512 : 1024;
  Task own = t;
  own.heads = 1;
  return !only_tiles() && !t.planes && width * element % 16 == 0 && width <= widest &&
         Layout(own, element, backward).total + rows_shared(width, element, true) <= device.shared &&
         in_packs(t.image, element) && in_packs(t.result, element) && in_packs(t.grad_result, element) &&
         in_packs(t.grad_image, element);
}

bool planes_fit(const Task& t, int64_t element, bool backward, const Device& device) {
  Task own = t;
  own.heads = 1;
  const int64_t width = t.D / t.H;
  return !only_tiles() && t.planes && !t.offsets &&
         Layout(own, element, backward).total + planes_shared(width, planes_threads(width)) <= device.shared;
}

int64_t rows_of_block(const Task& t, int64_t element, bool backward) {
  const int64_t width = t.D / t.H;
  if (t.planes)
    return planes_chunk;
  const int index = element == 4 ? packs_of<float>(width) : packs_of<bf16>(width);
  return rows_at_once(1 << index, backward) * (rows_threads / lanes_of_row(width, 16 / element));
}

const char* rows_run(const Task& t, Dtype dtype, bool backward, bool split, Stream stream) {
  const int64_t width = t.D / t.H;
  const int64_t element = dtype == Dtype::float32 ? 4 : 2;
  const int index = t.planes ? 0 : element == 4 ? packs_of<float>(width) : packs_of<bf16>(width);
  const bool sums = backward ? t.grad_text.data != nullptr : t.pool != 0;
  const int64_t base = Layout(t, element, backward).total;
  const int type = int(dtype);
  const RowsKernel first = t.planes ? first_planes[backward][type] : firsts[backward][type][index];
  const RowsKernel second = t.planes ? second_planes[backward][type] : seconds[backward][type][index];
  const int threads = t.planes ? planes_threads(width) : rows_threads;
  const int64_t shared = base + (t.planes ? planes_shared(width, threads) : rows_shared(width, element, sums));
  const char* error = launch(first, t.slots, t.H, 1, threads, shared, stream, t);
  if (!error && split)
    error = launch(second, t.slots, t.H, 1, threads, shared, stream, t);
  if (!error && split && backward && sums)
    error = launch(thirds[type], t.slots, t.H, 1, rows_threads, base, stream, t);
  return error;
}

}  // namespace mmk::cuda
