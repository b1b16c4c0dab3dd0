// Deformable attention on a GPU. What must move: locations, scores and the result once; of the value map four rows a
// point, B Q H K 4 d numbers, mostly out of L1 and L2: a block has neighbouring queries of one head. As many lanes as a
// row of channels has loads of 16 bytes (up to a warp) take a query and head; where rows aren't aligned, loads of one
// channel. Backward the same rows once for the gradients of scores and locations. The gradient of value adds a float
// for each of those numbers by atomics, in float whatever the type; or, where the same bits are wanted every time,
// warps own bands of it (deformable_ordered.h) and each band's level is searched for the points that touch it.
#include "deformable_attention.h"

#include "deformable_backward.h"
#include "deformable_forward.h"
#include "deformable_ordered.h"
#include "rows.h"

#include <initializer_list>

namespace mmk::cuda {
namespace {

using deformable::Level;
using deformable::Task;
using deformable::task_levels;

struct LevelsTask {
  Level* to;
  int64_t count;
  Level level[task_levels];
};
struct RoundTask {
  const float* from;
  void* to;
  int64_t count;
};

MMK_DEVICE void write_levels(const LevelsTask& t) {
#pragma unroll
  for (int i = 0; i < task_levels; ++i)
    if (i < t.count && int(threadIdx.x) == i)
      store(t.to + i, t.level[i]);
}
template <class T>
MMK_DEVICE void round_sums(const RoundTask& t) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < t.count)
    store(static_cast<T*>(t.to) + i, from_float<T>(load(t.from + i)));
}

extern "C" __global__ void __launch_bounds__(32) deformable_attention_levels(const LevelsTask task) {
  write_levels(task);
}
// packs: 16 bytes of channels a load; singles: one channel.
#define MMK_KERNELS(T, V, suffix)                                                                               \
  extern "C" __global__ void __launch_bounds__(256, 4) deformable_attention_forward_##suffix(const Task task) { \
    deformable::forward<T, V>(task);                                                                            \
  }                                                                                                             \
  extern "C" __global__ void __launch_bounds__(128, 5) deformable_attention_points_##suffix(const Task task) {  \
    deformable::differentiate<T, V>(task);                                                                      \
  }
MMK_KERNELS(float, 4, packs_f32)
MMK_KERNELS(bf16, 8, packs_bf16)
MMK_KERNELS(f16, 8, packs_f16)
MMK_KERNELS(float, 1, singles_f32)
MMK_KERNELS(bf16, 1, singles_bf16)
MMK_KERNELS(f16, 1, singles_f16)
#undef MMK_KERNELS

#define MMK_KERNELS(T, suffix)                                                                                  \
  extern "C" __global__ void __launch_bounds__(256, 4) deformable_attention_scatter_##suffix(const Task task) { \
    deformable::scatter<T>(task);                                                                               \
  }                                                                                                             \
  extern "C" __global__ void __launch_bounds__(128, 5) deformable_attention_ordered_##suffix(const Task task) { \
    deformable::add_in_order<T>(task);                                                                          \
  }
MMK_KERNELS(float, f32)
MMK_KERNELS(bf16, bf16)
MMK_KERNELS(f16, f16)
#undef MMK_KERNELS
extern "C" __global__ void __launch_bounds__(256) deformable_attention_round_bf16(const RoundTask task) {
  round_sums<bf16>(task);
}
extern "C" __global__ void __launch_bounds__(256) deformable_attention_round_f16(const RoundTask task) {
  round_sums<f16>(task);
}

using Kernel = void (*)(Task);
// By dtype.
#define MMK_ALL(kernel) {kernel##_f32, kernel##_bf16, kernel##_f16}
const Kernel forwards[2][3] = {MMK_ALL(deformable_attention_forward_singles),
                               MMK_ALL(deformable_attention_forward_packs)};
const Kernel points[2][3] = {MMK_ALL(deformable_attention_points_singles), MMK_ALL(deformable_attention_points_packs)};
const Kernel scatters[3] = MMK_ALL(deformable_attention_scatter);
const Kernel ordered[3] = MMK_ALL(deformable_attention_ordered);
#undef MMK_ALL

// Whether rows are whole packs, aligned.
struct Packed {
  int64_t size, channels;
  bool all;
  Packed(const DeformableAttention& a)
      : size(a.dtype == Dtype::float32 ? 4 : 2), channels(16 / size), all(a.d % channels == 0) {
    see(a.value.data, {a.value.b, a.value.h, a.value.n});
  }
  void see(const QueryRows& rows) { see(rows.data, {rows.b, rows.q, rows.h}); }

 private:
  struct Strides {
    int64_t a, b, c;
  };
  void see(const void* data, Strides s) {
    all = all && reinterpret_cast<uintptr_t>(data) % 16 == 0;
    for (int64_t stride : {s.a, s.b, s.c})
      all = all && stride % channels == 0;
  }
};

int64_t table_floats(int64_t levels) {
  return levels > task_levels ? levels * int64_t(sizeof(Level) / 4) : 0;
}

struct Call {
  const DeformableAttention& a;
  Task t;
  float* memory;
  Stream stream;

  Call(const DeformableAttention& a, float* memory, void* stream)
      : a(a), t(), memory(memory), stream(static_cast<Stream>(stream)) {
    t.B = a.B;
    t.S = a.S;
    t.H = a.H;
    t.d = a.d;
    t.Q = a.Q;
    t.K = a.K;
    t.L = a.L;
    t.softmax = a.softmax;
    t.wide_locations = a.wide_locations || a.dtype == Dtype::float32;
    t.wide_scores = a.wide_scores || a.dtype == Dtype::float32;
    t.value = a.value;
    t.locations = a.locations;
    t.scores = a.scores;
    t.mask = a.mask;
    t.result = a.result;
    t.softmax_rows = static_cast<float*>(a.softmax_rows);
    t.band = 1;
  }
  const char* why_not() const {
    const int64_t most = (int64_t(1) << 31) - 1;
    if (a.dtype == Dtype::float64)
      return "the CUDA kernels have no float64";
    if (const char* error = beyond("positions", a.S, most))
      return error;
    if (const char* error = beyond("heads", a.H, most))
      return error;
    return beyond("points", a.K, most);
  }

  // f(level, its index)
  template <class F>
  void each_level(F f) const {
    Level level = {};
    for (int64_t l = 0; l < a.L; ++l) {
      level.height = int32_t(a.shapes[2 * l]);
      level.width = int32_t(a.shapes[2 * l + 1]);
      level.points = int32_t(a.points[l]);
      f(level, l);
      const int64_t positions = int64_t(level.height) * level.width;
      level.begin += int32_t(positions);
      level.point += level.points;
      level.band += int32_t(ceil_div(positions, t.band));
    }
  }
  // Without waiting: with each launch, or written to memory by kernels that levels come to with theirs.
  const char* hand_over_levels() {
    if (a.L <= task_levels) {
      each_level([&](const Level& level, int64_t l) { t.level[l] = level; });
      return nullptr;
    }
    Level* table = reinterpret_cast<Level*>(memory);
    t.table = table;
    const char* error = nullptr;
    LevelsTask some = {table, 0, {}};
    each_level([&](const Level& level, int64_t l) {
      some.level[some.count++] = level;
      if (error || (some.count < task_levels && l + 1 < a.L))
        return;
      error = launch(deformable_attention_levels, 1, 1, 1, 32, 0, stream, some);
      some.to += some.count;
      some.count = 0;
    });
    return error;
  }

  // A group of lanes a query and head, `loads` a row of channels, at most so many points of a lane at a time.
  const char* groups(Kernel kernel, int64_t loads, int threads, int arrays, int64_t most_points) {
    t.lanes = deformable::lanes_for(loads);
    t.batch = std::min(round_up(t.K, t.lanes), most_points * t.lanes);
    t.blocks = ceil_div(t.Q, threads / t.lanes);
    return launch(kernel, t.blocks * t.B * t.H, 1, 1, threads, deformable::shared_of(t, threads, arrays), stream, t);
  }
};

struct BackwardCall : Call {
  const DeformableAttentionBackward& g;
  BackwardCall(const DeformableAttentionBackward& g, float* memory, void* stream)
      : Call(g.forward, memory, stream), g(g) {
    t.grad_result = g.grad_result;
    t.grad_locations = g.grad_locations;
    t.grad_scores = g.grad_scores;
    t.grad_value = g.grad_value.data;
    cut();
  }
  int64_t values() const { return a.B * a.S * a.H * a.d; }
  int64_t sums() const { return t.grad_value && !g.deterministic && a.dtype != Dtype::float32 ? values() : 0; }

  const char* run() {
    const char* error = why_not();
    if (!error && t.grad_value && (g.grad_value.n != a.H * a.d || g.grad_value.h != a.d || g.grad_value.c != 1))
      error = "the gradient of value must be contiguous";
    if (!error)
      error = hand_over_levels();
    if (!error && (t.grad_scores.data || t.grad_locations.data))
      error = differentiate();
    if (!error && t.grad_value)
      error = g.deterministic ? in_order() : by_atomics();
    return error;
  }

 private:
  // Bands as high as shared memory has room for, lower where that leaves processors idle.
  void cut() {
    t.chunks = ceil_div(a.d, 32);
    if (!t.grad_value || !g.deterministic || values() == 0)
      return;
    const int64_t wanted = 16 * current_device().processors;
    for (t.band = 64; t.band > 8 && items() < wanted; t.band /= 2) {}
    t.bands = bands();
  }
  int64_t bands() const {
    int64_t count = 0;
    each_level([&](const Level& level, int64_t) { count += ceil_div(int64_t(level.height) * level.width, t.band); });
    return count;
  }
  int64_t items() const { return a.B * a.H * t.chunks * bands(); }

  const char* differentiate() {
    Packed packed(a);
    packed.see(t.grad_result);
    return groups(points[packed.all][int(a.dtype)], packed.all ? a.d / packed.channels : a.d,
                  deformable::backward_threads, 3, 8);
  }
  const char* by_atomics() {
    const bool round = a.dtype != Dtype::float32;
    t.sums = round ? memory + table_floats(a.L) : static_cast<float*>(t.grad_value);
    const char* error = clear(t.sums, values(), stream);
    if (!error)
      error = groups(scatters[int(a.dtype)], a.d, deformable::forward_threads, 2, 4);
    if (!error && round)
      error = launch(a.dtype == Dtype::float16 ? deformable_attention_round_f16 : deformable_attention_round_bf16,
                     ceil_div(values(), 256), 1, 1, 256, 0, stream, RoundTask{t.sums, t.grad_value, values()});
    return error;
  }
  const char* in_order() {
    if (values() == 0)
      return nullptr;
    return launch(ordered[int(a.dtype)], ceil_div(items(), deformable::ordered_warps), 1, 1,
                  deformable::ordered_threads, deformable::ordered_warps * deformable::Band::bytes(t.band), stream, t);
  }
};

}  // namespace

int64_t deformable_attention_scratch(const DeformableAttention& a) {
  return table_floats(a.L);
}
int64_t deformable_attention_scratch(const DeformableAttentionBackward& g) {
  return table_floats(g.forward.L) + BackwardCall(g, nullptr, nullptr).sums();
}

const char* deformable_attention_forward(const DeformableAttention& a, float* scratch, void* stream) {
  Call call(a, scratch, stream);
  if (const char* error = call.why_not())
    return error;
  if (const char* error = call.hand_over_levels())
    return error;
  Packed packed(a);
  packed.see(a.result);
  return call.groups(forwards[packed.all][int(a.dtype)], packed.all ? a.d / packed.channels : a.d,
                     deformable::forward_threads, 2, 4);
}
const char* deformable_attention_backward(const DeformableAttentionBackward& g, float* scratch, void* stream) {
  return BackwardCall(g, scratch, stream).run();
}

}  // namespace mmk::cuda
