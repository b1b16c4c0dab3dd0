#include "rows_access.h"

namespace mmk::cuda {
namespace {

struct GatherTask {
  int64_t N, D;
  Panel panel;
  SampleRows image;
  Mask mask;
  void* to;
};

template <class T>
MMK_DEVICE void gather(const GatherTask& t) {
  const int64_t r = warp_row();
  if (r >= t.panel.rows)
    return;
  const Place at(t.panel, t.N, r);
  const bool valid = !t.mask.data || load(t.mask.data + at.sample * t.mask.b + at.position * t.mask.x);
  const T* from = static_cast<const T*>(t.image.data) + at.sample * t.image.b + at.position * t.image.n;
  T* to = static_cast<T*>(t.to) + r * t.D;
  for (int64_t c = threadIdx.x % 32; c < t.D; c += 32)
    store(to + c, valid ? load(from + c * t.image.c) : from_float<T>(0.f));
}

struct ColumnsTask {
  SampledRows samples;
  int64_t first, count, C;
  const float* rows;
  float* to;
};

MMK_DEVICE void columns(const ColumnsTask& t) {
  const int64_t b = blockIdx.x;
  const int64_t c = int64_t(blockIdx.y) * blockDim.x + threadIdx.x;
  if (c >= t.C)
    return;
  const int64_t begin = most(begin_of(t.samples, b), t.first);
  const int64_t end = least(end_of(t.samples, b), t.first + t.count);
  if (begin >= end)
    return;
  float total = 0;
  for (int64_t piece = begin; piece < end; piece += 64) {  // in pieces, which keeps long sums exact
    float sum = 0;
    for (int64_t r = piece; r < least(piece + 64, end); ++r)
      sum += load(t.rows + (r - t.first) * t.C + c);
    total += sum;
  }
  store(t.to + b * t.C + c, load(t.to + b * t.C + c) + total);
}

struct AddTask {
  float* to;
  const float* from;  // null: to = 0
  int64_t count;
};

MMK_DEVICE void add(const AddTask& t) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < t.count)
    store(t.to + i, t.from ? load(t.to + i) + load(t.from + i) : 0.f);
}

extern "C" __global__ void __launch_bounds__(256, 1) rows_gather_f32(const GatherTask task) {
  gather<float>(task);
}
extern "C" __global__ void __launch_bounds__(256, 1) rows_gather_bf16(const GatherTask task) {
  gather<bf16>(task);
}
extern "C" __global__ void __launch_bounds__(256, 1) rows_gather_f16(const GatherTask task) {
  gather<f16>(task);
}
extern "C" __global__ void __launch_bounds__(128) rows_columns(const ColumnsTask task) {
  columns(task);
}
extern "C" __global__ void __launch_bounds__(256, 1) rows_add(const AddTask task) {
  add(task);
}

}  // namespace

const char* gather_rows(Dtype dtype, const SampledRows& samples, const Panel& panel, const SampleRows& image,
                        const Mask& mask, int64_t D, void* to, void* stream) {
  if (const char* error = beyond("positions", samples.N, most_positions))
    return error;
  return run(dtype, MMK_PICK(dtype, rows_gather), panel, GatherTask{samples.N, D, panel, image, mask, to}, stream);
}
const char* sum_columns(const SampledRows& samples, int64_t first, int64_t count, const float* rows, int64_t C,
                        float* to, void* stream) {
  return launch(rows_columns, samples.B, ceil_div(C, 128), 1, 128, 0, static_cast<Stream>(stream),
                ColumnsTask{samples, first, count, C, rows, to});
}
const char* clear(float* to, int64_t count, void* stream) {
  return launch(rows_add, ceil_div(count, 256), 1, 1, 256, 0, static_cast<Stream>(stream), AddTask{to, nullptr, count});
}
const char* accumulate(float* to, const float* from, int64_t count, void* stream) {
  return launch(rows_add, ceil_div(count, 256), 1, 1, 256, 0, static_cast<Stream>(stream), AddTask{to, from, count});
}

}  // namespace mmk::cuda
