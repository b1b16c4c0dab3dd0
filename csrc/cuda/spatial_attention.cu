// Spatial attention in CUDA C++. S = bytes of the image features. Moved:
//   multiply  read S, write S: a sample that fits in shared memory (or a cluster's, see below) is read once;
//             a larger one twice, the second time from L2 where it fits there;
//   pool      read S;
//   backward  read S (image) + S (gradient), write S; a larger sample reads its gradient once more.
//             Pool: read S, write S.
// Beside that a few floats a position: mask, weights.
//
// Where a position's channels lie together and aligned, rows go through registers (spatial_rows.h); where positions do,
// planes (spatial_planes.h). Else tiles, as follows.
//
// Positions are cut into chunks, chunks into tiles; heads into groups of at most 64. A block takes a chunk and a group.
// It copies a tile to shared memory (cp.async where 16 bytes lie together and aligned, else one by one), takes its
// scores there, and its weighted sum (online softmax: running maximum and sum, Milakov & Gimelshein 2018,
// arXiv:1805.02867). A sample of one chunk is finished by the same block, else a second launch merges the chunks'
// maxima and sums and combines. A tile too wide for shared memory is taken in slabs of channels. Masked positions are
// zeros in the tile, and aren't read. Where the device has clusters (compute capability 9.0), a sample that fits in the
// shared memories of 2, 4 or 8 blocks is read once, too: each keeps a chunk of one tile, and they read each other's
// maxima and sums. Not when packed: a bag's size is known on the device only.
//
// Backward, with w = weights, g = the result's gradient and dw[n] = <g[n], x[n]> + the weights' own gradient:
//   ds[n] = w[n] (dw[n] - c), c = sum(w dw) / sum(w);  dx[n] = w[n] g[n] + scale ds[n] t;  dt = scale sum(ds[n] x[n]).
// c is known only at the end, so u = sum(w (dw - c_k) x) and v = sum(w x) are summed with what is known, c_k; whenever
// that changes, u += (c_k - c) v. No cancellation: c_k - c is a difference of means.
//
// Kernels, for T in f32, bf16, f16:
//   spatial_attention_forward_first_T, _forward_second_T, _forward_cluster_T, _backward_first_T, _backward_second_T,
//   _backward_cluster_T(Task)
// grid (task.slots, ceil(H / task.heads)); block: a multiple of 32 threads, at most 512; dynamic shared memory:
// Layout.total. The one parameter is Task, whose fields are all 8 bytes. _second is launched where a sample may have
// several chunks; _cluster instead of both where task.cluster > 1, with clusters of (task.cluster, 1, 1) blocks: a
// sample's chunks. Slots: dense, chunk k of sample b is slot b * chunks + k. Packed, sizes of bags are known on the
// device only: chunk k of bag b is slot offsets[b] / chunk + b + k; a slot without a chunk does nothing. There are rows
// / chunk + B slots.
#include "spatial_attention.h"

#include <initializer_list>

#include "spatial_backward.h"
#include "spatial_forward.h"

namespace mmk::cuda {

using namespace spatial;

#define MMK_KERNEL(name, T, suffix)                                                                           \
  extern "C" __global__ void __launch_bounds__(512, 1) spatial_attention_##name##_##suffix(const Task task) { \
    MMK_DYNAMIC_SHARED(shared);                                                                               \
    name<T>(task, shared);                                                                                    \
  }
#define MMK_KERNELS(T, suffix)           \
  MMK_KERNEL(forward_first, T, suffix)   \
  MMK_KERNEL(forward_second, T, suffix)  \
  MMK_KERNEL(forward_cluster, T, suffix) \
  MMK_KERNEL(backward_first, T, suffix)  \
  MMK_KERNEL(backward_second, T, suffix) \
  MMK_KERNEL(backward_cluster, T, suffix)
MMK_KERNELS(float, f32)
MMK_KERNELS(bf16, bf16)
MMK_KERNELS(f16, f16)

// ---- host

namespace {

int64_t element_size(Dtype dtype) {
  return dtype == Dtype::float32 ? 4 : 2;
}

Task task_of(const SpatialAttention& a) {
  Task t = {};
  t.B = a.B;
  t.Y = a.Y;
  t.X = a.X;
  t.D = a.D;
  t.H = a.H;
  t.planes = a.image.x == 1 && (a.image.d != 1 || a.D == 1);
  t.pool = a.pool;
  t.rescale = a.rescale;
  t.scale = a.scale;
  t.image = a.image;
  t.text = a.text;
  t.mask = a.mask;
  t.offsets = a.offsets;
  t.weights = static_cast<float*>(a.weights);
  t.result = a.result;
  t.pooled = a.pooled;
  return t;
}

Task task_of(const SpatialAttentionBackward& g) {
  Task t = task_of(g.forward);
  t.grad_result = g.grad_result;
  t.grad_pooled = g.grad_pooled;
  t.grad_weights = static_cast<const float*>(g.grad_weights);
  t.grad_scores = static_cast<float*>(g.grad_scores);
  t.grad_image = g.grad_image;
  t.grad_text = g.grad_text;
  return t;
}

// Chunks where rows go through registers: enough blocks for four a processor, none with less than it has in flight.
void plan_rows(Task& t, const Device& device, int64_t element, bool backward) {
  t.rows = 1;
  t.heads = 1;
  t.cluster = 1;
  const int64_t positions = t.Y * t.X;
  const int64_t samples = t.B * t.H > 0 ? t.B * t.H : 1;
  const int64_t wanted = 4 * device.processors;
  const int64_t fewest = rows_of_block(t, element, backward);
  const int64_t rows = t.offsets           ? ceil_div(positions * t.H, wanted)
                       : samples >= wanted ? positions
                                           : ceil_div(positions * samples, wanted);
  t.chunk = t.planes || rows < fewest ? fewest : rows;
  t.chunks = t.offsets ? 0 : positions > t.chunk ? ceil_div(positions, t.chunk) : 1;
  t.slots = t.offsets ? positions / t.chunk + t.B : t.B * t.chunks;
}

// Sizes of tiles and chunks. It depends on shapes, layout and device only: whatever gradient is asked for, the same
// bits.
void plan(Task& t, const Device& device, int64_t element, bool backward) {
  if (rows_fit(t, element, backward, device) || planes_fit(t, element, backward, device))
    return plan_rows(t, device, element, backward);
  const int64_t positions = t.Y * t.X;
  t.heads = t.H < 64 ? t.H : 64;
  t.local = 0;
  t.cluster = 1;
  const int64_t groups = ceil_div(t.H, t.heads);
  const int64_t channels = t.heads * (t.D / t.H);
  const int64_t samples = t.B * groups > 0 ? t.B * groups : 1;
  auto fits = [&](int64_t tile, int64_t slab, int64_t bytes) {
    t.tile = tile;
    t.slab = slab;
    return tile < (1 << 20) && Layout(t, element, backward).total <= bytes;
  };

  // A whole sample where that fits; bags may be twice as large as they are on average.
  int64_t whole = positions;
  if (t.offsets && t.B > 1 && 2 * ceil_div(positions, t.B) < positions)
    whole = 2 * ceil_div(positions, t.B);
  if (!fits(whole > 0 ? whole : 1, channels, device.shared)) {
    // Else in the blocks of a cluster, two on a processor rather than one: one loads while the other waits. At least
    // half of the processors must have work: a cluster's few can't draw what the memory gives, and a sample that is
    // split over all of them is faster though it is read twice.
    t.local = t.pool || backward;
    for (int64_t bytes : {device.shared / 2 - 1024, device.shared}) {
      for (t.cluster = 2; !t.offsets && t.cluster <= device.cluster; t.cluster *= 2) {
        const int64_t share = round_up(ceil_div(positions, t.cluster), t.planes ? 8 : 1);
        if (2 * samples * t.cluster < device.processors || !fits(share, channels, bytes))
          continue;
        t.chunk = share;
        t.chunks = t.cluster;
        t.slots = t.B * t.cluster;
        return;
      }
    }
    t.cluster = 1;
    // Else what leaves room for two blocks on a processor (each has 1 KiB that it doesn't see); a few positions at
    // least, in slabs of channels where they are too wide.
    const int64_t bytes = device.shared / 2 - 1024;
    const int64_t fewest = t.planes ? 32 : 2;
    const int64_t step = t.planes ? 8 : 1;
    int64_t tile = fewest;
    int64_t slab = channels;
    t.local = (t.pool || backward) && 8 * channels <= bytes / 4;
    if (fits(fewest, channels, bytes)) {
      // the largest tile that fits is in low..high - 1
      int64_t low = fewest / step;
      int64_t high = ceil_div(whole, step) + 1;
      while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (fits(middle * step, channels, bytes) ? low : high) = middle;
      }
      tile = low * step;
    } else {
      // as many channels, in eights
      int64_t low = 1;
      int64_t high = ceil_div(channels, 8);
      while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (fits(fewest, middle * 8, bytes) ? low : high) = middle;
      }
      slab = low * 8 < channels ? low * 8 : channels;
    }
    t.tile = tile;
    t.slab = slab;
  }

  // A sample is split where there are too few for two blocks a processor, then for four; not so far that the chunks'
  // sums, 4 or 8 bytes a channel, were much beside their features.
  const int64_t tiles = ceil_div(positions > 0 ? positions : 1, t.tile);
  const int64_t blocks = 4 * device.processors;
  const int64_t fewest = t.pool || backward ? ceil_div(16, t.tile) : 1;
  int64_t each;  // tiles of a chunk
  if (t.offsets) {
    each = ceil_div(tiles * groups, blocks);
  } else {
    const int64_t wanted = 2 * samples >= blocks ? 1 : ceil_div(blocks, samples);
    each = ceil_div(tiles, wanted < tiles ? wanted : tiles);
  }
  if (each < fewest)
    each = fewest < tiles ? fewest : tiles;
  t.chunk = t.tile * each;
  t.chunks = t.offsets ? 0 : ceil_div(tiles, each);
  t.slots = t.offsets ? positions / t.chunk + t.B : t.B * t.chunks;
}

using Kernel = void (*)(Task);
struct Kernels {
  Kernel first, second, cluster;
};  // of one dtype

const char* run(const Task& t, Dtype dtype, bool backward, const Device& device, Kernels f32, Kernels bf16, Kernels f16,
                Stream stream) {
  if (t.B == 0 || t.slots == 0)
    return nullptr;
  if (dtype == Dtype::float64)
    return "the CUDA kernels have no float64";
  const bool split = t.offsets ? t.X > t.chunk : t.chunks > 1;
  if (t.rows)
    return rows_run(t, dtype, backward, split, stream);
  const int64_t shared = Layout(t, element_size(dtype), backward).total;
  const int64_t groups = ceil_div(t.H, t.heads);
  if (const char* error = beyond("bytes of shared memory for a block", shared, device.shared))
    return error;
  const int threads = 2 * shared > device.shared ? 512 : 256;  // where a processor has room for one block, a larger one
  const Kernels& kernels = dtype == Dtype::float32 ? f32 : dtype == Dtype::bfloat16 ? bf16 : f16;
  if (t.cluster > 1)
    return launch(kernels.cluster, t.slots, groups, t.cluster, threads, shared, stream, t);
  const char* error = launch(kernels.first, t.slots, groups, 1, threads, shared, stream, t);
  return error || !split ? error : launch(kernels.second, t.slots, groups, 1, threads, shared, stream, t);
}

Device device() {
  return current_device(spatial_attention_forward_cluster_f32);
}

template <class Arguments>
int64_t scratch_of(const Arguments& arguments, Dtype dtype, bool backward) {
  Task t = task_of(arguments);
  plan(t, device(), element_size(dtype), backward);
  return place_scratch(t, backward, nullptr);
}

}  // namespace

int64_t spatial_attention_scratch(const SpatialAttention& a) {
  return scratch_of(a, a.dtype, false);
}
int64_t spatial_attention_scratch(const SpatialAttentionBackward& g) {
  return scratch_of(g, g.forward.dtype, true);
}

#define MMK_KERNELS_OF(pass, suffix)                                                       \
  Kernels {                                                                                \
    spatial_attention_##pass##_first_##suffix, spatial_attention_##pass##_second_##suffix, \
        spatial_attention_##pass##_cluster_##suffix                                        \
  }

const char* spatial_attention_forward(const SpatialAttention& a, float* memory, void* stream) {
  Task t = task_of(a);
  const Device on = device();
  plan(t, on, element_size(a.dtype), false);
  place_scratch(t, false, memory);
  return run(t, a.dtype, false, on, MMK_KERNELS_OF(forward, f32), MMK_KERNELS_OF(forward, bf16),
             MMK_KERNELS_OF(forward, f16), static_cast<Stream>(stream));
}

const char* spatial_attention_backward(const SpatialAttentionBackward& g, float* memory, void* stream) {
  Task t = task_of(g);
  const Device on = device();
  plan(t, on, element_size(g.forward.dtype), true);
  place_scratch(t, true, memory);
  return run(t, g.forward.dtype, true, on, MMK_KERNELS_OF(backward, f32), MMK_KERNELS_OF(backward, bf16),
             MMK_KERNELS_OF(backward, f16), static_cast<Stream>(stream));
}

}  // namespace mmk::cuda
