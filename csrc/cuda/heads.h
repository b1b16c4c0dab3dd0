// What the kernels of attention over heads share: tiles of rows in shared memory, products of such tiles by warps, and
// rows of results that leave the registers.
//
// A warp's product has 16 rows and 8 J columns, spread over its lanes as mma.sync.m16n8k16 has it, whatever the dtype:
// with g = lane / 4 and q = lane % 4, a lane holds of each 8 columns the columns 2 q and 2 q + 1 of rows g (elements 0,
// 1) and g + 8 (2, 3). 16-bit elements go through the tensor cores with float32 sums; float32 is multiplied as float32
// (no TF32: whether the user allows it, the kernels don't know), in the same layout, so that whatever follows is
// written once. Rows in shared memory are 16 bytes longer than their columns: then neither ldmatrix nor 128-bit loads
// meet in a bank.
#pragma once
#include "../tensor.h"
#include "block.h"

namespace mmk::cuda {

constexpr const char* no_float64 = "the CUDA kernels have no float64";
constexpr int64_t most_rows = (int64_t(1) << 30) - 1;  // of a head: kernels count them in 32 bits, a tile further
constexpr const char* too_little = "a block has too little shared memory for the CUDA kernels";

// Classes of kernels: channels that registers and shared memory are made for.
constexpr int classes = 3;
constexpr int class_channels[classes] = {64, 128, 256};

// Tables of the kernels KERNEL_TYPE, by Dtype, and of KERNEL_CLASS_TYPE, by Dtype and class: float32 has no widest one.
#define MMK_BY_DTYPE(kernel) {kernel##_f32, kernel##_bf16, kernel##_f16}
#define MMK_CLASSES_OF(kernel, type) {kernel##_64_##type, kernel##_128_##type, kernel##_256_##type}
#define MMK_BY_CLASS(kernel) \
  {{kernel##_64_f32, kernel##_128_f32, nullptr}, MMK_CLASSES_OF(kernel, bf16), MMK_CLASSES_OF(kernel, f16)}

constexpr int tile_rows = 64;  // rows of a block's own side

// Rows of the columns' side that come at once: what shared memory has room for.
template <class T, int C>
constexpr int tile_columns = sizeof(T) == 4 ? (C > 64 ? 32 : 64) : (C > 128 ? 32 : 64);
template <class T>
constexpr int pad = 16 / sizeof(T);
template <class T, int C>
constexpr int pitch_of = C + pad<T>;

struct alignas(8) Two {
  float at[2];
};

// Scores are kept in base 4, divided by ln 4: so they are in range wherever the scores themselves are. In base 2, which
// the hardware has, a mask of the lowest float wouldn't be.
constexpr float log4e = 0.7213475204444817f;

// exp(score - top), 2^(2 x - 2 top) of scores in base 4, no more instructions than a difference. Where 2 top could be
// out of range, scores are equal or so far apart that 2^(x - top) is the same. No score at all, or all -Inf:
// exponentials 0, not NaN.
struct Exponential {
  float factor, base;
  Exponential() = default;
  MMK_DEVICE explicit Exponential(float top)
      : factor(fabsf(top) < 0x1p126f ? 2.f : 1.f), base(top == -INFINITY ? 0.f : factor * top) {}
  MMK_DEVICE float operator()(float x) const { return exponential2(fmaf(x, factor, -base)); }
};

// What backward finds the weights with, exp(score - top) share: of `rows` rows of a head, [2, rows], the largest score,
// and one over the sum of exponentials, 0 where nothing takes part. (The logarithm of a sum would be lost beside a top
// of 1e9, a mask's.)
MMK_DEVICE void store_softmax(float* to, int64_t head, int64_t rows, int64_t r, float top, float total) {
  to += 2 * head * rows + r;
  store(to, top == -INFINITY ? 0.f : top);
  store(to + rows, total == 0 ? 0.f : 1 / total);
}
MMK_DEVICE float top_of(const float* softmax, int64_t head, int64_t rows, int64_t r) {
  return load(softmax + 2 * head * rows + r);
}
MMK_DEVICE float share_of(const float* softmax, int64_t head, int64_t rows, int64_t r) {
  return load(softmax + (2 * head + 1) * rows + r);
}

MMK_DEVICE int lane_row() {
  return threadIdx.x % 32 / 4;
}  // g
MMK_DEVICE int lane_column() {
  return 2 * (threadIdx.x % 4);
}  // 2 q

// sum += A B over `depth`, a multiple of 16. A is stored [16 rows][depth], or (AcrossA) [depth][16 rows]; B [8 J
// columns][depth], or (AcrossB) [depth][8 J columns]. `sum` may have room for more columns.
template <int J, bool AcrossA, bool AcrossB, int Room, class T>
MMK_DEVICE void mma(float (&sum)[Room][4], const T* a, int pitch_a, const T* b, int pitch_b, int depth) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    static_assert(J % 2 == 0 && J <= Room);
    a += AcrossA ? (lane % 8 + lane / 16 * 8) * pitch_a + lane / 8 % 2 * 8 : lane % 16 * pitch_a + lane / 16 * 8;
    b += AcrossB ? lane % 16 * pitch_b + lane / 16 * 8 : (lane % 8 + lane / 16 * 8) * pitch_b + lane / 8 % 2 * 8;
#pragma unroll 2
    for (int k = 0; k < depth; k += 16) {
      uint32_t x[4], y[4];
      load_matrices<AcrossA>(x, a + k * (AcrossA ? pitch_a : 1));
#pragma unroll
      for (int j = 0; j < J; j += 2) {
        load_matrices<AcrossB>(y, b + k * (AcrossB ? pitch_b : 1) + 8 * j * (AcrossB ? 1 : pitch_b));
        mma_tile<T>(sum[j], x, y[0], y[1]);
        mma_tile<T>(sum[j + 1], x, y[2], y[3]);
      }
    }
  } else {
    const int g = lane / 4;
    const int q = lane % 4;
    a += AcrossA ? g : g * pitch_a;
    b += AcrossB ? 2 * q : 2 * q * pitch_b;
#pragma unroll 1
    for (int k = 0; k < depth; k += 4) {
      float x[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (AcrossA) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            x[half][i] = a[(k + i) * pitch_a + 8 * half];
        } else {
          *reinterpret_cast<Pack<float>*>(x[half]) = *reinterpret_cast<const Pack<float>*>(a + 8 * half * pitch_a + k);
        }
      }
#pragma unroll
      for (int j = 0; j < J; ++j) {
        float y[2][4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if constexpr (AcrossB) {
            const Two two = *reinterpret_cast<const Two*>(b + (k + i) * pitch_b + 8 * j);
            y[0][i] = two.at[0];
            y[1][i] = two.at[1];
          }
        if constexpr (!AcrossB) {
#pragma unroll
          for (int c = 0; c < 2; ++c)
            *reinterpret_cast<Pack<float>*>(y[c]) =
                *reinterpret_cast<const Pack<float>*>(b + (8 * j + c) * pitch_b + k);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum[j][0] += x[0][i] * y[0][i];
          sum[j][1] += x[0][i] * y[1][i];
          sum[j][2] += x[1][i] * y[0][i];
          sum[j][3] += x[1][i] * y[1][i];
        }
      }
    }
  }
}

// sum += P B, P the first 8 K of the weights that the warp has in registers, B stored [8 K][8 J columns]. float32 takes
// the way through `rows`, [16][pitch], the warp's own shared memory.
template <int K, int J, int Room, class T>
MMK_DEVICE void mma_weights(float (&sum)[J][4], const float (&p)[Room][4], T* rows, int pitch, const T* b,
                            int pitch_b) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    b += lane % 16 * pitch_b + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < K; k += 2) {
      const uint32_t x[4] = {pair_of<T>(p[k][0], p[k][1]), pair_of<T>(p[k][2], p[k][3]),
                             pair_of<T>(p[k + 1][0], p[k + 1][1]), pair_of<T>(p[k + 1][2], p[k + 1][3])};
#pragma unroll
      for (int j = 0; j < J; j += 2) {
        uint32_t y[4];
        load_matrices<true>(y, b + 8 * k * pitch_b + 8 * j);
        mma_tile<T>(sum[j], x, y[0], y[1]);
        mma_tile<T>(sum[j + 1], x, y[2], y[3]);
      }
    }
  } else {
    __syncwarp();  // the last call's readers are done
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        rows[(lane_row() + i / 2 * 8) * pitch + 8 * k + lane_column() + i % 2] = p[k][i];
    __syncwarp();
    mma<J, false, true>(sum, rows, pitch, b, pitch_b, 8 * K);
  }
}

template <int J>
MMK_DEVICE void clear(float (&sum)[J][4]) {
#pragma unroll
  for (int j = 0; j < J; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      sum[j][i] = 0;
}

// Which rows of a tile are read as they are, which are zeros, and of which only the finite elements count.
enum class Row : int { zeros, whole, finite };

template <class T>
MMK_DEVICE T* head_of(const HeadRows& f, int64_t b, int64_t h) {
  return static_cast<T*>(f.data) + b * f.b + h * f.h;
}

// up to `count` neighbouring channels as floats, zeros beyond; up to 8 of them.
template <int V, class T>
MMK_DEVICE void get(float* to, const T* from, int64_t stride, int count) {
  if (stride == 1 && count >= V && aligned(from)) {
#pragma unroll
    for (int i = 0; i < V; i += Pack<T>::size) {
      const Pack<T> pack = load(reinterpret_cast<const Pack<T>*>(from + i));
#pragma unroll
      for (int e = 0; e < Pack<T>::size; ++e)
        to[i + e] = to_float(pack.at[e]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i)
      to[i] = i < count ? to_float(load(from + i * stride)) : 0.f;
  }
}
template <int V, class T>
MMK_DEVICE void put(T* to, const float* from, int64_t stride, int count) {
  if (stride == 1 && count >= V && aligned(to)) {
#pragma unroll
    for (int i = 0; i < V; i += Pack<T>::size) {
      Pack<T> pack;
#pragma unroll
      for (int e = 0; e < Pack<T>::size; ++e)
        pack.at[e] = from_float<T>(from[i + e]);
      store(reinterpret_cast<Pack<T>*>(to + i), pack);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i < count)
        store(to + i * stride, from_float<T>(from[i]));
  }
}

// A pack of a row of a head, by elements: what isn't finite is 0 where only the finite ones count.
template <class T>
MMK_DEVICE Pack<T> pack_of(const T* from, int64_t stride, int count, Row how, const T* factor, int64_t by) {
  constexpr int V = Pack<T>::size;
  Pack<T> pack = {};
  if (how == Row::zeros)
    return pack;
  float x[V];
  get<V>(x, from, stride, count);
  if (factor) {
    float y[V];
    get<V>(y, factor, by, count);
#pragma unroll
    for (int e = 0; e < V; ++e)
      x[e] *= y[e];
  }
#pragma unroll
  for (int e = 0; e < V; ++e)
    pack.at[e] = from_float<T>(how == Row::finite && !(fabsf(x[e]) < INFINITY) ? 0.f : x[e]);
  return pack;
}

// Starts to copy rows of a head to a tile [Rows][C + pad]: `from` is the first row's first channel, `rows` and
// `channels` are there, the rest is zeros. row(r) tells how row r is read. `factor`: null, or rows to multiply them by.
// By `Threads` threads of which this is `thread`. To be followed by copy_commit, and waited for.
template <int Rows, int C, int Threads, class T, class How>
MMK_DEVICE void stage(T* to, const T* from, const HeadRows& f, int64_t rows, int64_t channels, How row, int thread,
                      const T* factor = nullptr, const HeadRows& by = HeadRows()) {
  constexpr int V = Pack<T>::size;
  constexpr int packs = C / V;
  constexpr int pitch = pitch_of<T, C>;
  constexpr int apart = Threads / packs;  // rows from one of a thread's packs to its next
  static_assert(Threads % packs == 0 && Rows % apart == 0);
  auto wide = [&](const T* first, const HeadRows& of) {
    return of.c == 1 && aligned(first) && aligned(of.n * int64_t(sizeof(T)));
  };
  const bool packed = wide(from, f) && (!factor || wide(factor, by)) && channels % V == 0;
  bool some_finite = false;
  if (packed) {
    // A few rows at a time, so that what is asked of global memory is on its way together.
    constexpr int together = Rows / apart < 4 ? Rows / apart : 4;
    thread = opaque(thread);
    const int c = thread % packs * V;
    const int own = thread / packs;
    const int there = c < channels ? int(least<int64_t>(rows, Rows)) : 0;
    const int64_t step = apart * f.n;
    const int64_t by_step = apart * by.n;
    const T* at = from + own * f.n + c;
    const T* by_at = factor ? factor + own * by.n + c : nullptr;
    T* into = to + own * pitch + c;
#pragma unroll 1
    for (int i = own; i < Rows; i += together * apart) {
      Row how[together];
#pragma unroll
      for (int k = 0; k < together; ++k) {
        how[k] = i + k * apart < there ? row(i + k * apart) : Row::zeros;
        some_finite |= how[k] == Row::finite;
      }
      if (factor) {
        Pack<T> x[together], y[together];
#pragma unroll
        for (int k = 0; k < together; ++k, at += step, by_at += by_step) {
          x[k] = y[k] = {};
          if (how[k] != Row::zeros) {
            x[k] = load(reinterpret_cast<const Pack<T>*>(at));
            y[k] = load(reinterpret_cast<const Pack<T>*>(by_at));
          }
        }
#pragma unroll
        for (int k = 0; k < together; ++k, into += apart * pitch) {
#pragma unroll
          for (int e = 0; e < V; ++e)
            x[k].at[e] = from_float<T>(to_float(x[k].at[e]) * to_float(y[k].at[e]));
          *reinterpret_cast<Pack<T>*>(into) = x[k];
        }
      } else {
#pragma unroll
        for (int k = 0; k < together; ++k, at += step, into += apart * pitch) {
          if (how[k] != Row::finite)
            copy_async(into, how[k] == Row::whole ? at : from, how[k] == Row::whole);
        }
      }
    }
    if (!some_finite)
      return;
  }
  const bool across = f.n == 1 && f.c != 1;  // neighbouring threads read what lies together
#pragma unroll 1
  for (int i = thread; i < Rows * packs; i += Threads) {
    const int r = across ? i % Rows : i / packs;
    const int c = (across ? i / Rows : i % packs) * V;
    const Row how = r < rows && c < channels ? row(r) : Row::zeros;
    if (packed && how != Row::finite)
      continue;
    *reinterpret_cast<Pack<T>*>(to + r * pitch + c) =
        pack_of<T>(from + r * f.n + c * f.c, f.c, int(least<int64_t>(V, channels - c)), how,
                   factor ? factor + r * by.n + c * by.c : nullptr, by.c);
  }
}

// Hands the warp's product out in rows: emit(row, column, x) with row < 16, column a multiple of 8, x[8] the 8 columns
// from it on. Lanes of four exchange theirs, so that each has neighbouring channels to load and to store.
template <int J, class Emit>
MMK_DEVICE void emit_rows(const float (&sum)[J][4], Emit emit) {
  static_assert(J % 4 == 0);
  const int q = threadIdx.x % 4;
  const int odd = q & 1;
  const int high = q >> 1;
#pragma unroll
  for (int j = 0; j < J; j += 4)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float pair[2][2][2], x[8];  // [tiles of two][from an even or odd lane][column]
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float low = sum[j + 2 * i][2 * half + c];
          const float up = sum[j + 2 * i + 1][2 * half + c];
          const float other = __shfl_xor_sync(all_lanes, odd ? low : up, 1);
          const float own = odd ? up : low;
          pair[i][0][c] = odd ? other : own;
          pair[i][1][c] = odd ? own : other;
        }
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float other = __shfl_xor_sync(all_lanes, high ? pair[0][s][c] : pair[1][s][c], 2);
          const float own = high ? pair[1][s][c] : pair[0][s][c];
          x[2 * s + c] = high ? other : own;
          x[4 + 2 * s + c] = high ? own : other;
        }
      emit(lane_row() + 8 * half, 8 * (j + q), x);
    }
}

// The same for many columns, in a loop, which keeps the code short: through `memory`, [16][8 J + 4] floats of the
// warp's own.
template <int J, class Emit>
MMK_DEVICE void emit_through(float* memory, const float (*sum)[4], Emit emit) {
  constexpr int pitch = 8 * J + 4;
  __syncwarp();
#pragma unroll
  for (int j = 0; j < J; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      *reinterpret_cast<Two*>(memory + (lane_row() + 8 * half) * pitch + 8 * j +
                              lane_column()) = {{sum[j][2 * half], sum[j][2 * half + 1]}};
  __syncwarp();
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < 16 * J; i += 32) {
    float x[8];
    const float* from = memory + i / J * pitch + i % J * 8;
    *reinterpret_cast<Pack<float>*>(x) = *reinterpret_cast<const Pack<float>*>(from);
    *reinterpret_cast<Pack<float>*>(x + 4) = *reinterpret_cast<const Pack<float>*>(from + 4);
    emit(i / J, i % J * 8, x);
  }
}

// The least multiple of 16 that isn't below.
MMK_DEVICE int whole_depth(int64_t channels) {
  return int(round_up(channels, 16));
}

}  // namespace mmk::cuda
