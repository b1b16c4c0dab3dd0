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

// partial [chunks, 2, C]: sums of a chunk's first sample and of its last, where other chunks have rows of those, too.
struct ColumnsTask {
  SampledRows samples;
  int64_t first, count, step, C;
  const float* rows;
  float *to, *partial;
  int64_t size;  // rows of a chunk
  int lanes;
};

// A sample's rows of a panel.
struct Span {
  int64_t begin, end;
  MMK_DEVICE Span(const ColumnsTask& t, int64_t b)
      : begin(most(begin_of(t.samples, b), t.first)), end(least(end_of(t.samples, b), t.first + t.count)) {}
};
MMK_DEVICE void add_to(const ColumnsTask& t, int64_t b, int64_t c, float total) {
  store(t.to + b * t.C + c, load(t.to + b * t.C + c) + total);
}

// A block has a chunk of rows and lanes * V columns.
template <int V>
MMK_DEVICE void columns(const ColumnsTask& t) {
  MMK_DYNAMIC_SHARED(memory);
  float* scratch = reinterpret_cast<float*>(memory);
  const Lanes lanes(t.lanes);
  const int64_t from = t.first + blockIdx.x * t.size;
  const int64_t until = least(from + t.size, t.first + t.count);
  const int64_t column = int64_t(blockIdx.y) * t.lanes * V;
  const bool there = column + lanes.lane * V < t.C;
  const float* rows = t.rows - t.first * t.step + column + lanes.lane * V;
  for (int64_t b = sample_of(t.samples, from); b < t.samples.B; ++b) {
    const Span all(t, b);
    if (all.begin >= until)
      break;
    const int64_t begin = most(all.begin, from);
    float own[V] = {};
    if (there)
      add_rows(own, begin + lanes.group, least(all.end, until), lanes.groups,
               [&](float (&row)[V], int64_t r) { load_floats(row, rows + r * t.step); });
    const float total = over_groups(lanes, own, scratch);
    const int64_t c = column + threadIdx.x;
    if (int(threadIdx.x) >= t.lanes * V || c >= t.C || all.begin >= all.end)
      continue;
    if (all.begin >= from && all.end <= until)
      add_to(t, b, c, total);
    else
      store(t.partial + (2 * int64_t(blockIdx.x) + (begin > from)) * t.C + c, total);
  }
}

// A block has a chunk, in which a sample begins that goes on, and 32 columns; chunks are added in order.
MMK_DEVICE void merge_columns(const ColumnsTask& t) {
  MMK_DYNAMIC_SHARED(memory);
  const Lanes lanes(32);
  const int64_t from = t.first + blockIdx.x * t.size;
  const int64_t until = from + t.size;  // there is another chunk
  const int64_t b = sample_of(t.samples, until - 1);
  const Span all(t, b);
  if (all.begin < from || all.begin >= until || all.end <= until)
    return;
  const int64_t column = int64_t(blockIdx.y) * 32;
  const int64_t last = (all.end - 1 - t.first) / t.size;
  float own[1] = {};
  if (column + lanes.lane < t.C)
    add_rows(own, blockIdx.x + lanes.group, last + 1, lanes.groups, [&](float (&sum)[1], int64_t chunk) {
      const bool second = chunk == blockIdx.x && all.begin > from;
      sum[0] = load(t.partial + (2 * chunk + second) * t.C + column + lanes.lane);
    });
  const float total = over_groups(lanes, own, reinterpret_cast<float*>(memory));
  if (threadIdx.x < 32 && column + threadIdx.x < t.C)
    add_to(t, b, column + threadIdx.x, total);
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
extern "C" __global__ void __launch_bounds__(256, 4) rows_columns(const ColumnsTask task) {
  columns<1>(task);
}
extern "C" __global__ void __launch_bounds__(256, 4) rows_columns_wide(const ColumnsTask task) {
  columns<4>(task);
}
extern "C" __global__ void __launch_bounds__(256, 4) rows_merge(const ColumnsTask task) {
  merge_columns(task);
}
extern "C" __global__ void __launch_bounds__(256, 1) rows_add(const AddTask task) {
  add(task);
}

// Blocks that share a panel's rows: four a processor.
int64_t chunks_of(int64_t slabs) {
  return ceil_div(4 * current_device().processors, slabs);
}

}  // namespace

int64_t panel_rows(int64_t rows, int64_t width) {
  const int64_t cache = most(current_device().cache, least_cache);
  const int64_t fit = cache / 3 / int64_t(sizeof(float)) / most(width, int64_t(1));
  const int64_t panels = ceil_div(most(rows, int64_t(1)), most(fit / 16, int64_t(1)) * 16);
  return round_up(ceil_div(most(rows, int64_t(1)), panels), 16);
}
const char* gather_rows(Dtype dtype, const SampledRows& samples, const Panel& panel, const SampleRows& image,
                        const Mask& mask, int64_t D, void* to, void* stream) {
  if (const char* error = beyond("positions", samples.N, most_positions))
    return error;
  return run(dtype, MMK_PICK(dtype, rows_gather), panel, GatherTask{samples.N, D, panel, image, mask, to}, stream);
}
int64_t columns_scratch(int64_t C) {
  return chunks_of(1) * 2 * C;
}
const char* sum_columns(const SampledRows& samples, int64_t first, int64_t count, const float* rows, int64_t step,
                        int64_t C, float* to, float* partial, void* stream) {
  const bool wide = aligned(rows) && aligned(step * int64_t(sizeof(float))) && C % 4 == 0;
  const int V = wide ? 4 : 1;
  const int lanes = lanes_for(C, V);
  const int64_t slabs = ceil_div(C, lanes * V);
  const int64_t wanted = ceil_div(count, chunks_of(slabs));
  const int64_t fewest = 2 * row_threads / lanes;  // rows that give every thread something to do
  const ColumnsTask task{samples, first, count, step, C, rows, to, partial, wanted < fewest ? fewest : wanted, lanes};
  const int64_t chunks = ceil_div(count, task.size);
  if (const char* error = launch(wide ? rows_columns_wide : rows_columns, chunks, slabs, 1, row_threads,
                                 groups_scratch(V), static_cast<Stream>(stream), task))
    return error;
  return launch(rows_merge, chunks - 1, ceil_div(C, 32), 1, row_threads, groups_scratch(1), static_cast<Stream>(stream),
                task);
}
const char* clear(float* to, int64_t count, void* stream) {
  return launch(rows_add, ceil_div(count, 256), 1, 1, 256, 0, static_cast<Stream>(stream), AddTask{to, nullptr, count});
}
const char* accumulate(float* to, const float* from, int64_t count, void* stream) {
  return launch(rows_add, ceil_div(count, 256), 1, 1, 256, 0, static_cast<Stream>(stream), AddTask{to, from, count});
}

}  // namespace mmk::cuda
