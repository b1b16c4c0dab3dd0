// What the kernels of absorbed attention are told, and where their memory, shared and global, has what.
//
// The tokens of all heads are columns. They come in tiles of 64: several whole heads, a group, where a head's tokens
// fit a tile; else a head is a group of several tiles. Keys and values are packed once into scratch, tile by tile: rows
// of whole slabs, zeros where there is nothing, and in two parts where they have more bits than the image. A float row
// that is beyond float16 is packed over a power of two, its scale.
#pragma once
#include "heads.h"

namespace mmk::cuda {

constexpr int tile = 64;  // positions, and columns
constexpr int absorbed_threads = 512;
constexpr int column_warps = 4;      // warps that share out a tile's columns, and a slab's channels; as many its rows
constexpr int absorbed_chunk = 256;  // channels of a result that a block has in registers
constexpr int padded_channels = 64;  // packed rows are multiples of it

// Channels that come at once: 128 bytes.
template <class T>
constexpr int slab_of = 128 / int(sizeof(T));

// A column, and of its softmax over positions what backward needs; one without a token: head -1.
struct alignas(16) Column {
  Exponential power;
  float share, delta;
  float bias;  // times log4e
  int head;
  int slot;                      // the head's place in its group
  int token, takes;              // takes: part in the softmax over tokens
  float key_scale, value_scale;  // of its packed rows
  int unused[1];
};
static_assert(sizeof(Column) == 48);

// Of a position and a head's softmax over tokens. While forward finds it, `delta` is the largest score so far, `share`
// the sum.
struct alignas(16) RowSide {
  Exponential power;
  float share, delta;
};

struct AbsorbedTask {
  // Every field has 8 bytes.
  int64_t B, H, N, T, D, Dv;             //  0
  int64_t heads, groups, tiles;          //  6 heads of a group; groups; tiles of a group
  int64_t parts, pool, bits;             //  9 of keys and values; text_out is wanted; 1: key and value are float
  int64_t whole;                         // 12 1: all columns are one tile, and its blocks do the image's side, too
  int64_t positions, splits, span;       // 13 tiles of positions; splits of them; positions of one
  int64_t chunks, value_chunks, stages;  // 16 of D and Dv; buffers of slabs, 2 or 3
  int64_t of_image_out, of_text_out;     // 19 backward: there is a gradient of them
  int64_t fine;  // 21 1: positions are so few that the weights' roundings wouldn't cancel: they are two numbers
  // Slabs that shared memory holds of a tile, or 0: of the image, in 1 or 2 buffers, of image_out's gradient; resident:
  // a tile's keys and values, too. Slabs held in all.
  int64_t image_slabs, buffers, grad_slabs, resident, held;                  // 22
  HeadRows image, key, value;                                                // 27 data, b, h, n, c each
  Bias key_bias;                                                             // 42
  TokenMask image_mask, text_mask;                                           // 47
  HeadRows image_out, text_out, unrounded;                                   // 55
  float *image_softmax, *text_softmax;                                       // 70
  HeadRows grad_image_out, grad_text_out, grad_image, grad_key, grad_value;  // 72
  float* grad_key_bias;                                                      // 97
  // Scratch. keys [b, part, column, D padded], values likewise, features (grad_text_out) [b, column, D padded].
  void *keys, *values, *features;  // 98
  Column* columns;                 // 101 [b, column]
  float* delta;                    // 102 [b, h, n]: over tokens, the weights times their gradients
  float *partial, *stats;  // 103 [b, tile, split, 64, D padded]; [.., 64, 2]: maximum, sum (backward: of the bias)
  float* partial_value;    // 105 backward: [b, tile, split, 64, Dv padded]

  MMK_HOST_DEVICE int64_t all_tiles() const { return groups * tiles; }
  MMK_HOST_DEVICE int64_t all_columns() const { return all_tiles() * tile; }
  MMK_HOST_DEVICE int64_t width() const { return round_up(D, padded_channels); }
  MMK_HOST_DEVICE int64_t value_width() const { return round_up(Dv, padded_channels); }
  // Where a split leaves what it has of a tile.
  MMK_DEVICE int64_t left_at(int64_t b, int64_t of_tile, int64_t split) const {
    return ((b * all_tiles() + of_tile) * splits + split) * tile;
  }
};
static_assert(sizeof(AbsorbedTask) == 106 * 8, "every field has 8 bytes");

inline HeadRows rows_of(const SampleRows& r) {
  return {r.data, r.b, 0, r.n, r.c};
}

template <class T>
struct AbsorbedLayout {
  static constexpr int K = slab_of<T>;
  static constexpr int pitch = pitch_of<T, K>;
  static constexpr int weights = pitch_of<T, tile>;
  static constexpr int scores = tile + 1;  // floats: neighbouring rows in neighbouring banks
  static constexpr int emitted = K / column_warps + 4;
  int64_t buffers, first, second, scratch, columns, sides, state, valid, total;
  MMK_HOST_DEVICE AbsorbedLayout(int64_t held, int64_t stages, int64_t parts, int64_t heads) {
    constexpr int64_t size = sizeof(T);
    constexpr int64_t of_scores = tile * scores * 4;
    constexpr int64_t of_emitted = absorbed_threads / 32 * 16 * emitted * 4;
    buffers = held * tile * pitch * size;                          // after the slabs that are held
    first = buffers + stages * (1 + parts) * tile * pitch * size;  // after the buffers of slabs: T [64][weights]
    second = first + tile * weights * size;                        // the same
    scratch = second + tile * weights * size;                      // float [64][scores], or rows that leave
    columns = scratch + round_up(of_scores < of_emitted ? of_emitted : of_scores, 16);  // Column [64]
    sides = columns + tile * int64_t(sizeof(Column));                                   // RowSide [heads][64]
    state = sides + heads * tile * int64_t(sizeof(RowSide));                            // float [3][64]
    valid = state + 3 * tile * 4;                                                       // bytes [64]
    total = valid + tile;
  }
};

}  // namespace mmk::cuda
