// Absorbed attention in CUDA C++. Must move: the image once, its result once, backward the image and its result's
// gradient once and its gradient once; 8 bytes a position and head for its softmax; no N x H T matrix. The text's side
// is small: it is packed into scratch first. A short text (all columns one tile) reads the image from memory once for
// both results; a longer one once for the image's side and once a tile of 64 columns for the text's, from L2 where
// tiles run beside each other. Up to a chunk of 256 channels a tile of the image stays in shared memory from its
// scores to what weights gather of it, where there is room beside all that a tile of columns has; more are read again,
// and each chunk takes the scores again. Sums over positions are split over blocks and merged in a fixed order.
//
// Kernels, for T in f32, bf16, f16; all take AbsorbedTask:
//   absorbed_attention_pack_T            block 128: the text's side, before
//   absorbed_attention_pool_T            block 512, dynamic shared memory AbsorbedLayout.total: text_out's sums
//   absorbed_attention_attend_T          the same: image_out
//   absorbed_attention_merge_T           block 128, dynamic shared memory merge_shared
//   absorbed_attention_delta_T           block 512, AbsorbedLayout.total
//   absorbed_attention_backward_image_T  the same
//   absorbed_attention_backward_text_T   the same
//   absorbed_attention_backward_merge_T  the same as merge
#include "absorbed_attention.h"

#include <algorithm>

#include "absorbed_backward.h"
#include "absorbed_forward.h"
#include "absorbed_merge.h"
#include "absorbed_pack.h"

namespace mmk::cuda {

#define MMK_PACK_KERNEL(T, suffix)                                                                              \
  extern "C" __global__ void __launch_bounds__(128) absorbed_attention_pack_##suffix(const AbsorbedTask task) { \
    absorbed_pack<T>(task);                                                                                     \
  }
#define MMK_MERGE_KERNEL(name, T, suffix)                             \
  extern "C" __global__ void __launch_bounds__(merge_threads)         \
      absorbed_attention_##name##_##suffix(const AbsorbedTask task) { \
    MMK_DYNAMIC_SHARED(shared);                                       \
    absorbed_##name<T>(task, shared);                                 \
  }
#define MMK_TILE_KERNEL(name, Block, T, suffix, blocks)                  \
  extern "C" __global__ void __launch_bounds__(absorbed_threads, blocks) \
      absorbed_attention_##name##_##suffix(const AbsorbedTask task) {    \
    MMK_DYNAMIC_SHARED(shared);                                          \
    Block<T>(task, shared).run();                                        \
  }
#define MMK_KERNELS(T, suffix)                                         \
  MMK_PACK_KERNEL(T, suffix)                                           \
  MMK_MERGE_KERNEL(merge, T, suffix)                                   \
  MMK_MERGE_KERNEL(backward_merge, T, suffix)                          \
  MMK_TILE_KERNEL(pool, AbsorbedPool, T, suffix, 1)                    \
  MMK_TILE_KERNEL(attend, AbsorbedAttend, T, suffix, 1)                \
  MMK_TILE_KERNEL(delta, AbsorbedDelta, T, suffix, 1)                  \
  MMK_TILE_KERNEL(backward_image, AbsorbedBackwardImage, T, suffix, 1) \
  MMK_TILE_KERNEL(backward_text, AbsorbedBackwardText, T, suffix, 1)
MMK_KERNELS(float, f32)
MMK_KERNELS(bf16, bf16)
MMK_KERNELS(f16, f16)

// ---- host

namespace {

using AbsorbedKernel = void (*)(AbsorbedTask);
#define MMK_DTYPES(name) \
  {absorbed_attention_##name##_f32, absorbed_attention_##name##_bf16, absorbed_attention_##name##_f16}
constexpr AbsorbedKernel packs[3] = MMK_DTYPES(pack);
constexpr AbsorbedKernel pools[3] = MMK_DTYPES(pool);
constexpr AbsorbedKernel attends[3] = MMK_DTYPES(attend);
constexpr AbsorbedKernel merges[3] = MMK_DTYPES(merge);
constexpr AbsorbedKernel deltas[3] = MMK_DTYPES(delta);
constexpr AbsorbedKernel backward_images[3] = MMK_DTYPES(backward_image);
constexpr AbsorbedKernel backward_texts[3] = MMK_DTYPES(backward_text);
constexpr AbsorbedKernel backward_merges[3] = MMK_DTYPES(backward_merge);

// Scratch, cut into pieces that begin on 16 bytes.
struct Pieces {
  float* memory;
  int64_t floats = 0;
  float* take(int64_t count) {
    float* piece = memory + floats;
    floats += round_up(count, 4);
    return piece;
  }
};

// How a call is cut; it depends on shapes and device only.
struct Call {
  AbsorbedTask t = {};
  Dtype dtype;
  Device device = current_device();
  Pieces pieces;

  Call(const AbsorbedAttention& a, float* memory) : dtype(a.dtype), pieces{memory} {
    t.B = a.B;
    t.H = a.H;
    t.N = a.N;
    t.T = a.T;
    t.D = a.D;
    t.Dv = a.Dv;
    t.image = rows_of(a.image);
    t.key = a.key;
    t.value = a.value;
    t.key_bias = a.key_bias;
    t.image_mask = a.image_mask;
    t.text_mask = a.text_mask;
    t.image_out = rows_of(a.image_out);
    t.text_out = a.text_out;
    t.unrounded = a.unrounded;
    t.image_softmax = static_cast<float*>(a.image_softmax);
    t.text_softmax = static_cast<float*>(a.text_softmax);
    t.pool = a.pool;
    t.bits = a.wide_text;
    t.parts = a.wide_text && a.dtype != Dtype::float32 ? 2 : 1;
    // A group's softmaxes lie in shared memory: not too many.
    const int64_t most_heads = a.Dv ? 16 : tile;
    t.heads = a.T >= tile ? 1 : a.T < 1 ? most_heads : std::min(tile / a.T, most_heads);
    t.heads = std::min(t.heads, a.H < 1 ? 1 : a.H);
    t.buffers = 1;
    while (t.heads > 1 && shared_of(2) > device.shared)
      t.heads = ceil_div(t.heads, 2);
    t.stages = shared_of(3) <= device.shared ? 3 : 2;
    t.groups = ceil_div(a.H, t.heads);
    t.tiles = ceil_div(a.T, tile);
    t.whole = t.all_tiles() == 1 && a.Dv && a.pool;
    t.fine = a.N <= tile && a.dtype != Dtype::float32;
    t.positions = ceil_div(a.N, tile);
    t.chunks = ceil_div(a.D, absorbed_chunk);
    t.value_chunks = ceil_div(a.Dv, absorbed_chunk);
    const int64_t columns = t.B * t.all_columns();
    t.keys = packed(columns * t.parts * t.width());
    if (a.Dv)
      t.values = packed(columns * t.parts * t.value_width());
    t.columns = reinterpret_cast<Column*>(pieces.take(columns * int64_t(sizeof(Column) / 4)));
  }

  int64_t shared_of(int64_t stages, int64_t held = 0) const {
    return dtype == Dtype::float32 ? AbsorbedLayout<float>(held, stages, t.parts, t.heads).total
                                   : AbsorbedLayout<bf16>(held, stages, t.parts, t.heads).total;
  }
  int64_t slabs(int64_t channels) const {
    return ceil_div(channels, dtype == Dtype::float32 ? slab_of<float> : slab_of<bf16>);
  }
  int64_t shared() const { return shared_of(t.stages, t.held); }
  // Tiles of the image, and of the gradient, are held where a chunk has all of their channels and there is room.
  void hold(bool grad) {
    const int64_t image = slabs(t.D);
    if (t.D > absorbed_chunk || shared_of(2, image) > device.shared)
      return;
    t.image_slabs = t.held = image;
    const int64_t of_grad = slabs(t.Dv);
    if (grad && t.Dv <= absorbed_chunk && shared_of(2, image + of_grad) <= device.shared) {
      t.grad_slabs = of_grad;
      t.held += of_grad;
    }
    t.stages = shared_of(3, t.held) <= device.shared ? 3 : 2;
  }
  // All that a block takes is held where there is room, and nothing streamed slab by slab: the image in so many
  // buffers, the gradient's slabs, and those of a tile of columns.
  bool reside(int64_t buffers, int64_t grad, int64_t of_columns) {
    const int64_t image = slabs(t.D);
    const int64_t held = buffers * image + grad + of_columns;
    if (t.D > absorbed_chunk || shared_of(0, held) > device.shared)
      return false;
    t.image_slabs = image;
    t.grad_slabs = grad;
    t.buffers = buffers;
    t.held = held;
    t.resident = 1;
    t.stages = 0;
    return true;
  }
  int64_t slabs_of_columns(bool values) const { return t.parts * (slabs(t.D) + (values ? slabs(t.Dv) : 0)); }
  void* packed(int64_t elements) { return pieces.take(dtype == Dtype::float32 ? elements : elements / 2); }

  // Blocks of a tile of columns share out the positions, so that the device is done soonest: it runs a block a
  // multiprocessor at a time, and a block's start and end take as long as a tile of positions.
  void split(int64_t chunks) {
    const int64_t blocks = t.B * t.all_tiles() * chunks;
    t.splits = 1;
    t.span = t.positions * tile;
    int64_t soonest = ceil_div(blocks, device.processors) * (t.positions + 1);
    for (int64_t rounds = 1; blocks > 0 && rounds <= 4; ++rounds) {
      const int64_t most = std::min(rounds * device.processors / blocks, t.positions);
      if (most < 2)
        continue;
      const int64_t span = ceil_div(t.positions, most);
      const int64_t splits = ceil_div(t.positions, span);
      const int64_t time = ceil_div(blocks * splits, device.processors) * (span + 1);
      if (time >= soonest)
        continue;
      soonest = time;
      t.splits = splits;
      t.span = span * tile;
    }
  }
  int64_t left() const { return t.B * t.all_tiles() * t.splits * tile; }

  const char* why_not() const {
    if (dtype == Dtype::float64)
      return no_float64;
    if (shared() > device.shared)
      return too_little;
    return beyond("positions or tokens", t.N < t.T ? t.T : t.N, most_rows);
  }
  const char* pack(void* stream) const {
    return launch(packs[int(dtype)], ceil_div(t.B * t.all_columns(), 4), 1, 1, 128, 0, static_cast<Stream>(stream), t);
  }
  const char* merge_kernel(const AbsorbedKernel* kernels, int64_t panels, void* stream) const {
    return launch(kernels[int(dtype)], t.B * t.all_columns(), panels, 1, merge_threads, merge_shared,
                  static_cast<Stream>(stream), t);
  }
  const char* tiles_kernel(const AbsorbedKernel* kernels, int64_t blocks, void* stream) const {
    return launch(kernels[int(dtype)], blocks, 1, 1, absorbed_threads, shared(), static_cast<Stream>(stream), t);
  }
};

struct ForwardCall : Call {
  Call image;  // the image's side is cut otherwise
  ForwardCall(const AbsorbedAttention& a, float* memory) : Call(a, memory), image(*this) {
    const bool values = t.Dv <= absorbed_chunk;
    if (!values || !image.reside(1, 0, slabs_of_columns(true)))
      image.hold(false);
    const int64_t of_columns = slabs_of_columns(t.whole);
    if ((t.whole && !values) || !(reside(2, 0, of_columns) || reside(1, 0, of_columns)))
      hold(false);
    split(t.chunks);
    if (a.pool) {
      t.partial = pieces.take(left() * t.width());
      t.stats = pieces.take(left() * 2);
    }
  }
  const char* run(void* stream) const {
    const bool attend = t.Dv && !(t.whole && t.N);
    const char* error = why_not();
    if (!error && attend)
      error = image.why_not();
    if (!error)
      error = pack(stream);
    if (!error && t.pool)
      error = tiles_kernel(pools, t.B * t.all_tiles() * t.splits * t.chunks, stream);
    if (!error && t.pool)
      error = merge_kernel(merges, ceil_div(t.D, padded_channels), stream);
    if (!error && attend)
      error = image.tiles_kernel(attends, t.B * t.positions * t.value_chunks, stream);
    return error;
  }
};

struct BackwardCall : Call {
  Call image;  // the image's side is cut otherwise
  bool of_text;
  BackwardCall(const AbsorbedAttentionBackward& g, float* memory) : Call(g.forward, memory), image(*this) {
    t.of_image_out = g.grad_image_out.data != nullptr;
    t.of_text_out = g.grad_text_out.data != nullptr;
    t.grad_image_out = rows_of(g.grad_image_out);
    t.grad_text_out = g.grad_text_out;
    t.grad_image = rows_of(g.grad_image);
    t.grad_key = g.grad_key;
    t.grad_value = g.grad_value;
    t.grad_key_bias = static_cast<float*>(g.grad_key_bias);
    if (t.of_text_out)
      t.features = packed(t.B * t.all_columns() * t.width());
    if (t.of_image_out)
      t.delta = pieces.take(t.B * t.H * t.N);
    image = *this;
    const int64_t grad = t.of_image_out ? slabs(t.Dv) : 0;
    const int64_t of_columns = slabs_of_columns(t.of_image_out) + slabs(t.D);  // and features
    const bool grad_too_wide = t.of_image_out && t.Dv > absorbed_chunk;
    if (grad_too_wide || !image.reside(1, grad, of_columns))
      image.hold(t.of_image_out);
    if (grad_too_wide || !reside(1, grad, of_columns))
      hold(false);
    t.chunks = t.grad_key.data ? t.chunks : t.grad_key_bias ? 1 : 0;
    t.value_chunks = t.grad_value.data ? t.value_chunks : 0;
    of_text = t.chunks + t.value_chunks > 0;
    split(t.chunks + t.value_chunks);
    if (t.chunks)
      t.partial = pieces.take(left() * t.width());
    t.stats = pieces.take(left() * 2);
    if (t.value_chunks)
      t.partial_value = pieces.take(left() * t.value_width());
  }
  const char* run(void* stream) const {
    const char* error = why_not();
    if (!error)
      error = pack(stream);
    if (!error && t.of_image_out && (t.tiles > 1 || !t.grad_image.data))
      error = image.tiles_kernel(deltas, t.B * t.positions, stream);
    if (!error && t.grad_image.data)
      error = image.tiles_kernel(backward_images, t.B * t.positions * image.t.chunks, stream);
    if (!error && of_text)
      error = tiles_kernel(backward_texts, t.B * t.all_tiles() * t.splits * (t.chunks + t.value_chunks), stream);
    const int64_t panels = (t.grad_key.data ? ceil_div(t.D, padded_channels) : 0) +
                           (t.grad_value.data ? ceil_div(t.Dv, padded_channels) : 0);
    if (!error && of_text)
      error = merge_kernel(backward_merges, std::max<int64_t>(panels, 1), stream);
    return error;
  }
};

}  // namespace

int64_t absorbed_attention_scratch(const AbsorbedAttention& a) {
  return a.dtype == Dtype::float64 ? 0 : ForwardCall(a, nullptr).pieces.floats;
}
int64_t absorbed_attention_scratch(const AbsorbedAttentionBackward& g) {
  return g.forward.dtype == Dtype::float64 ? 0 : BackwardCall(g, nullptr).pieces.floats;
}

const char* absorbed_attention_forward(const AbsorbedAttention& a, float* scratch, void* stream) {
  return ForwardCall(a, scratch).run(stream);
}
const char* absorbed_attention_backward(const AbsorbedAttentionBackward& g, float* scratch, void* stream) {
  return BackwardCall(g, scratch).run(stream);
}

}  // namespace mmk::cuda
