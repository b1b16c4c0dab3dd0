// How a backward call of attention over heads is cut, and its launch.
#pragma once
#include "heads_backward.h"

namespace mmk::cuda {

using BackwardKernel = void (*)(BackwardTask);
struct BackwardPlan {
  int index;
  int64_t shared, step;
};  // class, or -1: too little shared memory

template <class T, bool Own, bool Other>
int64_t backward_shared(int index, int64_t stages, bool whole) {
  return index == 0   ? BackwardLayout<T, 64, Own, Other>(stages, whole).total
         : index == 1 ? BackwardLayout<T, 128, Own, Other>(stages, whole).total
                      : BackwardLayout<T, 256, Own, Other>(stages, whole).total;
}
template <class T, bool Own, bool Other>
int64_t backward_step(int index) {
  return index == 0   ? BackwardLayout<T, 64, Own, Other>::S
         : index == 1 ? BackwardLayout<T, 128, Own, Other>::S
                      : BackwardLayout<T, 256, Own, Other>::S;
}

// How a launch is cut. float32 has no class of 256: registers for it, but no shared memory.
template <bool Own, bool Other>
BackwardPlan backward_plan(BackwardTask& t, Dtype dtype, const Device& device, bool whole) {
  auto shared = [&](int index, int64_t stages) {
    return dtype == Dtype::float32 ? backward_shared<float, Own, Other>(index, stages, whole)
                                   : backward_shared<bf16, Own, Other>(index, stages, whole);
  };
  int index = dtype == Dtype::float32 ? 1 : 2;
  while (index > 0 && t.d <= class_channels[index - 1] && t.dv <= class_channels[index - 1])
    --index;
  while (index >= 0 && shared(index, 1) > device.shared)
    --index;
  if (index < 0)
    return {-1, 0, 0};
  const bool once = t.d <= class_channels[index] && t.dv <= class_channels[index];
  if (whole && (!once || t.rows < 1 || t.rows > tile_rows))
    return {-1, 0, 0};
  const int64_t step =
      dtype == Dtype::float32 ? backward_step<float, Own, Other>(index) : backward_step<bf16, Own, Other>(index);
  t.whole = whole;
  t.stages = once && shared(index, 2) <= device.shared ? 2 : 1;
  t.tiles = ceil_div(t.rows, tile_rows);
  t.chunks = ceil_div(t.d, class_channels[index]);
  if (Other && ceil_div(t.dv, class_channels[index]) > t.chunks)
    t.chunks = ceil_div(t.dv, class_channels[index]);
  const int64_t blocks = t.count * t.tiles * t.chunks;
  const int64_t wanted = 2 * device.processors;
  const int64_t tiles = ceil_div(t.columns, step);
  t.splits = 1;
  if (blocks > 0 && blocks < wanted && tiles > 4) {  // at least two tiles a block; no block more than wanted
    const int64_t splits = wanted / blocks;
    t.splits = splits < tiles / 2 ? splits : tiles / 2;
  }
  t.span = ceil_div(tiles, t.splits) * step;
  if (t.span > 0)
    t.splits = ceil_div(t.columns, t.span);
  if (t.splits < 1)
    t.splits = 1;
  return {index, shared(index, t.stages), step};
}

inline const char* backward_launch(const BackwardTask& t, const BackwardPlan& plan, BackwardKernel kernel,
                                   BackwardKernel merge, Stream stream) {
  const int64_t blocks = t.count * t.tiles * t.splits * t.chunks;
  const int64_t merging = ceil_div(t.count * t.rows * (ceil_div(t.d, 8) + ceil_div(t.dv, 8)), 128);
  const char* error = beyond("positions or tokens", t.rows < t.columns ? t.columns : t.rows, most_rows);
  if (error)
    return error;
  error = launch(kernel, blocks, 1, 1, 256, plan.shared, stream, t);
  return error || t.splits == 1 ? error : launch(merge, merging, 1, 1, 128, 0, stream, t);
}

// A call's launches: one where all of the text is one tile of rows, else one a side. Both: either side attends to the
// other; else the image to the text.
template <bool Both>
struct BackwardSides {
  BackwardTask image = {}, text = {};
  BackwardPlan image_plan = {-1, 0, 0}, text_plan = {-1, 0, 0};
  bool fits = true;

  // True where the text's launch is the only one. Else the sides that are wanted have one each.
  bool plan(Dtype dtype, bool of_image, bool of_text) {
    const Device device = current_device();
    text_plan = backward_plan<Both, true>(text, dtype, device, true);
    if (text_plan.index >= 0)
      return true;
    if (of_text) {
      text_plan = backward_plan<Both, true>(text, dtype, device, false);
      fits = text_plan.index >= 0;
    }
    if (of_image) {
      image_plan = backward_plan<true, Both>(image, dtype, device, false);
      fits = fits && image_plan.index >= 0;
    }
    return false;
  }

  // Cuts `memory` into partial sums. Returns floats.
  int64_t scratch(float* memory) {
    const int64_t floats = text_plan.index >= 0 ? backward_scratch(text, memory) : 0;
    return floats + (image_plan.index >= 0 ? backward_scratch(image, memory + floats) : 0);
  }

  const char* launch(const BackwardKernel (&of_image)[classes], const BackwardKernel (&of_text)[classes],
                     BackwardKernel merge, Stream stream) const {
    const char* error = nullptr;
    if (text_plan.index >= 0)
      error = backward_launch(text, text_plan, of_text[text_plan.index], merge, stream);
    if (!error && image_plan.index >= 0)
      error = backward_launch(image, image_plan, of_image[image_plan.index], merge, stream);
    return error;
  }
};

}  // namespace mmk::cuda
