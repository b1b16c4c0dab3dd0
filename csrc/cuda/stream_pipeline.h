// The software pipeline of kernels that stream tiles past what a block holds: while one tile is used, the next is on
// its way by cp.async. As in CUTLASS a buffer is acquired, filled, committed, waited for and released; the order of a
// round:
//
//   for (StreamPipeline<S> tiles(...); tiles.more(); tiles.advance()) {
//     tiles.acquire();
//     if (tiles.brings()) ...                    copy tile tiles.next() to buffer tiles.into()
//     tiles.commit();
//     if (tiles.filling()) continue;             one round more: it brings the first tile
//     tiles.wait();
//     ...                                        use tile tiles.n in buffer tiles.at
//     tiles.release();
//   }
//   tiles.drain();
//
// A tile that comes in slabs goes through one buffer: acquire, commit and wait once a slab. Tiles that are resident,
// brought by an earlier pipeline with a buffer each, are only gone through.
#pragma once
#include "block.h"

namespace mmk::cuda {

// Tiles of S, from `begin` to `end`. Every function is called by all threads of the block.
template <int S>
struct StreamPipeline {
  int begin, end, buffers;
  bool slabs, resident;
  int ahead;  // S: the next tile is brought beside the one in use; 0: there is no room for it, or no need
  int n;      // where the tile in use begins
  int at;     // its buffer

  MMK_DEVICE StreamPipeline(int begin, int end, int64_t buffers, bool slabs, bool resident)
      : begin(begin), end(end), buffers(int(buffers)), slabs(slabs), resident(resident) {
    ahead = !resident && !slabs && buffers > 1 ? S : 0;
    n = begin - ahead;
    at = ahead ? this->buffers - 1 : 0;
  }

  MMK_DEVICE bool more() const { return n < end; }
  MMK_DEVICE void advance() {
    n += S;
    at = after(at);
  }

  MMK_DEVICE int next() const { return n + ahead; }
  MMK_DEVICE int into() const { return ahead ? after(at) : at; }
  MMK_DEVICE bool starts() const { return next() == begin; }
  MMK_DEVICE bool brings() const { return !resident && next() < end; }
  MMK_DEVICE bool filling() const { return n < begin; }

  // The readers of buffer `into` are done: since release, but for those of the slab before.
  MMK_DEVICE void acquire() const {
    if (slabs)
      __syncthreads();
  }
  MMK_DEVICE void commit() const { copy_commit(); }
  // What was committed for the tile in use is there, from all threads; of a resident one what the warp has brought.
  // `late`: but for what was committed last, which is for later.
  MMK_DEVICE void wait(bool late = false) const {
    if (ahead && late)
      copy_wait<2>();
    else if (ahead || late)
      copy_wait<1>();
    else
      copy_wait<0>();
    if (resident)
      __syncwarp();
    else
      __syncthreads();
  }
  // Before the next tile takes its place.
  MMK_DEVICE void release() const {
    if (!resident)
      __syncthreads();
  }
  MMK_DEVICE void drain() const { copy_wait<0>(); }

 private:
  MMK_DEVICE int after(int buffer) const { return buffer + 1 == buffers ? 0 : buffer + 1; }
};

}  // namespace mmk::cuda
