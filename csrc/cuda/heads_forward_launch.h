// How a forward call of attention over heads is cut, and its launch.
#pragma once
#include "heads_forward.h"
#include "heads_forward_merge.h"

namespace mmk::cuda {

using AttendKernel = void (*)(AttendTask);

template <class T>
int64_t attend_shared(int index, int64_t stages, bool resident, bool both) {
  return index == 0   ? AttendLayout<T, 64>(stages, resident, both).total
         : index == 1 ? AttendLayout<T, 128>(stages, resident, both).total
                      : AttendLayout<T, 256>(stages, resident, both).total;
}
inline int64_t attend_shared(Dtype dtype, int index, int64_t stages, bool resident, bool both) {
  return dtype == Dtype::float32 ? attend_shared<float>(index, stages, resident, both)
                                 : attend_shared<bf16>(index, stages, resident, both);
}
inline int64_t attend_tile_columns(Dtype dtype, int index) {
  return dtype == Dtype::float32 ? (index ? 32 : 64) : index == 2 ? 32 : 64;
}

// Blocks that a processor has registers for: what the kernels' __launch_bounds__ say.
constexpr int64_t attend_together(Dtype dtype, int index) {
  return dtype != Dtype::float32 && index == 0 ? MMK_ATTEND_TOGETHER(bf16, 64) : MMK_ATTEND_TOGETHER(float, 64);
}

// How a call is cut: its class, or -1 where a block has too little shared memory. It depends on shapes and device only.
inline int attend_plan(AttendTask& t, Dtype dtype, const Device& device, bool both) {
  int index = dtype == Dtype::float32 ? 1 : 2;  // float32 has too few registers for the last
  while (index > 0 && t.d <= class_channels[index - 1] && t.dv <= class_channels[index - 1])
    --index;
  while (index >= 0 && attend_shared(dtype, index, 1, false, both) > device.shared)
    --index;
  if (index < 0)
    return index;
  const int64_t step = attend_tile_columns(dtype, index);
  const int64_t tiles = ceil_div(t.columns, step);
  const int64_t together = attend_together(dtype, index);
  t.tiles = ceil_div(t.rows, tile_rows);
  t.chunks = ceil_div(t.dv, class_channels[index]);
  // A text that is short stays in shared memory while as many blocks still fit a processor; else two buffers take
  // turns.
  t.resident = tiles > 0 && t.d <= class_channels[index] &&
               together * (attend_shared(dtype, index, tiles, true, both) + 1024) <= device.shared;
  t.stages = t.resident ? tiles : attend_shared(dtype, index, 2, false, both) <= device.shared ? 2 : 1;
  const int64_t blocks = t.count * t.tiles * t.chunks;
  const int64_t wanted = together * device.processors;
  t.splits = 1;
  t.group = 1;
  if (blocks > 0 && blocks < wanted && tiles > 4) {  // a stream of at least two tiles a block, all blocks at once
    const int64_t splits = wanted / blocks;
    t.splits = splits < tiles / 2 ? splits : tiles / 2;
  } else if (t.resident && blocks >= 4 * wanted) {  // a text that stays is read by fewer blocks, twice as many as fit
    t.group = blocks / (2 * wanted) < 8 ? blocks / (2 * wanted) : 8;
  }
  t.span = ceil_div(tiles, t.splits) * step;
  if (t.span > 0)
    t.splits = ceil_div(t.columns, t.span);
  if (t.splits < 1)
    t.splits = 1;
  if (t.splits > 1)
    t.resident = 0;
  return index;
}

// Starts the kernels for rows that attend to what is streamed, whichever is the image. In gated_cross_attention.cu, for
// both operations: they take long to compile.
const char* attend(const AttendTask&, Dtype, int index, Stream);
AttendKernel attend_merge_kernel(Dtype);

inline const char* attend_launch(const AttendTask& t, Dtype dtype, int index, bool both, AttendKernel kernel,
                                 AttendKernel merge, Stream stream) {
  const int64_t blocks = t.count * ceil_div(t.tiles, t.group) * t.splits * t.chunks;
  const int64_t merging = ceil_div(t.count * t.rows, 4);
  const char* error = beyond("positions or tokens", t.rows < t.columns ? t.columns : t.rows, most_rows);
  if (error)
    return error;
  error = launch(kernel, blocks, 1, 1, 128, attend_shared(dtype, index, t.stages, t.resident, both), stream, t);
  return error || t.splits == 1 ? error : launch(merge, merging, 1, 1, 128, 0, stream, t);
}

}  // namespace mmk::cuda
