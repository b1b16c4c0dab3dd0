// What the kernels of spatial attention are told, and where their memory, shared and global, has what.
#pragma once
#include "../spatial_attention.h"
#include "block.h"

namespace mmk::cuda::spatial {

// What a launch leaves of a chunk and a head for the next.
struct ChunkStats {
  float level;  // the maximum of the scores; backward: the mean of dw
  float mass;   // the sum of exponentials; backward: of weights
};

struct Task {
  // Offsets in bytes are 8 times a field's number.
  int64_t B, Y, X, D, H;      //  0 as in SpatialAttention
  int64_t heads;              //  5 heads of a block
  int64_t tile, slab, chunk;  //  6 positions of a tile; channels of a tile; positions of a chunk: a multiple of tile
  int64_t chunks, slots;      //  9 chunks of a sample (packed: 0); slots
  int64_t planes;             // 11 1: positions lie together in a tile, 0: channels do
  int64_t pool, rescale;      // 12
  double scale;               // 14
  Features image;             // 15 data, b, y, x, d
  Vectors text;               // 20 data, b, d
  Mask mask;                  // 23 data (null: none), b, y, x
  const int64_t* offsets;     // 27 null: not packed
  float* weights;             // 28 forward writes (raw scores between the launches), backward reads
  Features result;            // 29 multiply
  Vectors pooled;             // 34 pool
  Features grad_result;       // 37 data null: none
  Vectors grad_pooled;        // 42 data null: none
  const float* grad_weights;  // 45 null: none
  float* grad_scores;         // 46 scratch like weights: dw between the launches
  Features grad_image;        // 47 data null: not wanted
  Vectors grad_text;          // 52 data null: not wanted
  ChunkStats* stats;          // 55 [slots, H]
  float* valid_counts;        // 56 [slots, head groups]: positions that take part
  float* sums;                // 57 forward, pool: [slots, D]; backward: u and v, [slots, 2, D]
  int64_t local;              // 58 1: while a chunk lasts, its sums are in shared memory
  int64_t cluster;            // 59 blocks of a cluster: the chunks of a sample, each of one tile; 1: no clusters
  int64_t rows;  // 60 1: rows or planes go through registers (spatial_rows.h, _planes.h): no tiles, one sum a channel

  // Where scratch in global memory has what; place_scratch makes room for it.
  MMK_HOST_DEVICE ChunkStats* stats_of(int64_t slot, int64_t head) const { return stats + slot * H + head; }
  MMK_HOST_DEVICE float* valid_count_of(int64_t slot, int64_t groups, int64_t group) const {
    return valid_counts + slot * groups + group;
  }
  MMK_HOST_DEVICE float* sums_of(int64_t slot, int64_t sums_of_one, int64_t i) const {
    return sums + (sums_of_one * slot + i) * D;
  }
};
static_assert(sizeof(Task) == 61 * 8, "every field has 8 bytes");

// Where things lie in shared memory, in bytes. `pitch`: elements from a tile's outer index to the next.
struct Layout {
  int64_t pitch, x, y, v, u, p, q, sums, stats, scratch, valid, total;

  MMK_HOST_DEVICE Layout(const Task& t, int64_t element, bool backward) {
    const int64_t pack = 16 / element;
    const int64_t tile = round_up(t.tile, 8);
    pitch = round_up(t.planes ? tile : t.slab, pack);
    const int64_t features = round_up((t.planes ? t.slab : t.tile) * pitch * element, 16);
    x = 0;                                                    // T: the image's tile
    y = x + features;                                         // T: the gradient's
    v = y + (backward && t.grad_result.data ? features : 0);  // float [slab]: text
    u = v + round_up(t.slab * 4, 16);                         // float [slab]: the pooled result's gradient
    p = u + (backward ? round_up(t.slab * 4, 16) : 0);        // float [heads, tile]: scores, exponentials, weights
    q = p + t.heads * tile * 4;                               // float [heads, tile]: dw, ds
    sums = q + (backward ? t.heads * tile * 4 : 0);           // float [channels] or u and v, [2, channels]
    const int64_t both = backward && t.cluster == 1 ? 2 : 1;
    stats = sums + (t.local ? round_up(both * t.heads * (t.D / t.H) * 4, 16)
                            : 0);                     // float [4, heads]: SoftmaxStats, MeanStats
    scratch = stats + round_up(4 * t.heads * 4, 16);  // float [512]
    valid = scratch + 512 * 4;                        // bytes [tile]
    total = valid + round_up(tile, 16);
  }
};

// Cuts `memory` into stats, valid_counts and sums; nothing where a block or a cluster does it all. Returns floats.
inline int64_t place_scratch(Task& t, bool backward, float* memory) {
  if (t.cluster > 1)
    return 0;
  const bool once = !t.offsets && t.chunks == 1;
  const bool resident = once && (t.rows || t.Y * t.X <= t.tile);
  const bool sums = backward ? t.grad_text.data != nullptr : t.pool != 0;
  int64_t used = 0;
  auto take = [&](int64_t floats) {
    float* taken = memory + used;
    used += floats;
    return taken;
  };
  if (!once) {
    t.stats = reinterpret_cast<ChunkStats*>(take(2 * t.slots * t.H));
    t.valid_counts = take(t.slots * ceil_div(t.H, t.heads));
  }
  if (sums && !resident && !(once && t.local))
    t.sums = take((backward && !t.rows ? 2 : 1) * t.slots * t.D);
  return used;
}

}  // namespace mmk::cuda::spatial

// In spatial_rows.cu. They take long to compile.
namespace mmk::cuda {

using RowsKernel = void (*)(spatial::Task);
// Whether its rows can go through registers.
bool rows_fit(const spatial::Task&, int64_t element, bool backward, const Device&);
// Whether its planes can: any channels, from positions that lie together.
bool planes_fit(const spatial::Task&, int64_t element, bool backward, const Device&);
// Rows that a block of such a task has in flight, or its positions.
int64_t rows_of_block(const spatial::Task&, int64_t element, bool backward);
// `split`: a sample may have several chunks.
const char* rows_run(const spatial::Task&, Dtype, bool backward, bool split, Stream);

}  // namespace mmk::cuda
