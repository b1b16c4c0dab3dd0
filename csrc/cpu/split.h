// How work over samples and positions is shared out: positions are cut into chunks that fit the cache, the same chunks
// whatever the number of threads. Where samples fill the threads evenly, a thread takes whole samples and a sample's
// later pass finds its features in cache; else (one large bag) every pass is spread over all chunks.
#pragma once
#include "../parallel.h"
#include "../tensor.h"
#include "scratch.h"
#include "simd.h"

namespace mmk {
namespace {

struct Sample {
  int64_t index, first, count;  // its number, its first row when packed (else 0), its positions
  int64_t chunks, chunk;        // number of chunks, and where its chunks' scratch begins
  int64_t slot;                 // where its own scratch is
};

class Split {
 public:
  int64_t chunk_positions, slots, chunk_slots;

  Split(int64_t samples, int64_t positions, const int64_t* offsets, int64_t chunk_positions, int64_t position_bytes,
        const Parallel& parallel)
      : chunk_positions(chunk_positions),
        samples_(samples),
        positions_(positions),
        offsets_(offsets),
        parallel_(parallel),
        chunk_start_(samples + 1),
        part_start_(parallel.threads + 1) {
    const int64_t total = start(samples);
    if (total * position_bytes < 64 << 10)
      parallel_.threads = 1;  // not worth waking another thread
    parts_ = parallel_.threads;
    int64_t chunks = 0;
    int64_t most = 0;
    for (int64_t b = 0; b < samples; ++b) {
      chunk_start_.data[b] = chunks;
      int64_t own = chunks_of(b);
      chunks += own;
      most = most < own ? own : most;
    }
    chunk_start_.data[samples] = chunks;

    // Part p takes the samples that start in its share of all positions.
    int64_t largest = 0;
    int64_t b = 0;
    for (int64_t p = 0; p <= parts_; ++p) {
      while (b < samples && (p == parts_ || start(b) * parts_ < p * total))
        ++b;
      part_start_.data[p] = b;
      if (p) {
        int64_t load = start(b) - start(part_start_.data[p - 1]);
        largest = largest < load ? load : largest;
      }
    }
    whole_ = parts_ == 1 || 4 * largest * parts_ <= 5 * total;  // nobody has over 1.25 times its share
    slots = whole_ ? parts_ : samples;
    chunk_slots = whole_ ? parts_ * most : chunks;
    most_ = most;
  }

  // operation.prepare(sample), .first(sample, chunk) for every chunk, .merge(sample), .second(sample, chunk).
  template <class Operation>
  void run(Operation& operation) const {
    if (whole_) {
      parallel_for(parallel_, parts_, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p)
          for (int64_t b = part_start_.data[p]; b < part_start_.data[p + 1]; ++b) {
            Sample s = sample(b, p, p * most_);
            operation.prepare(s);
            for (int64_t k = 0; k < s.chunks; ++k)
              operation.first(s, k);
            operation.merge(s);
            for (int64_t k = s.chunks - 1; k >= 0; --k)
              operation.second(s, k);  // backwards: the last read is still in cache
          }
        fence();
      });
      return;
    }
    auto samples = [&](auto f) {
      parallel_for(parallel_, samples_, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b)
          f(sample(b, b, chunk_start_.data[b]));
      });
    };
    auto chunks = [&](auto f) {
      parallel_for(parallel_, chunk_start_.data[samples_], [&](int64_t begin, int64_t end) {
        f(begin, end);
        fence();
      });
    };
    samples([&](Sample s) { operation.prepare(s); });
    chunks([&](int64_t begin, int64_t end) {
      int64_t b = sample_of(begin);
      for (int64_t c = begin; c < end; ++c) {
        while (c >= chunk_start_.data[b + 1])
          ++b;
        operation.first(sample(b, b, chunk_start_.data[b]), c - chunk_start_.data[b]);
      }
    });
    samples([&](Sample s) { operation.merge(s); });
    chunks([&](int64_t begin, int64_t end) {
      int64_t b = sample_of(end - 1);
      for (int64_t c = end - 1; c >= begin; --c) {
        while (c < chunk_start_.data[b])
          --b;
        operation.second(sample(b, b, chunk_start_.data[b]), c - chunk_start_.data[b]);
      }
    });
  }

 private:
  int64_t samples_, positions_;
  const int64_t* offsets_;
  Parallel parallel_;
  Scratch<int64_t> chunk_start_, part_start_;
  int64_t parts_, most_;
  bool whole_;

  int64_t start(int64_t b) const { return offsets_ ? offsets_[b] : b * positions_; }
  int64_t chunks_of(int64_t b) const { return (start(b + 1) - start(b) + chunk_positions - 1) / chunk_positions; }
  Sample sample(int64_t b, int64_t slot, int64_t chunk) const {
    return {b, offsets_ ? offsets_[b] : 0, start(b + 1) - start(b), chunks_of(b), chunk, slot};
  }
  int64_t sample_of(int64_t chunk) const {
    // the last b with chunk_start[b] <= chunk
    int64_t low = 0;
    int64_t high = samples_;
    while (high - low > 1) {
      int64_t middle = (low + high) / 2;
      (chunk_start_.data[middle] <= chunk ? low : high) = middle;
    }
    return low;
  }
};

// Calls f(n, y, x, count, valid) for the runs of positions begin..end that one stride walks and that all take part, or
// are all masked.
template <class F>
MMK_INLINE void for_each_run(const Mask& mask, const Sample& s, int64_t X, int64_t begin, int64_t end, F f) {
  const bool* from = mask.data ? mask.data + s.index * mask.b + s.first * mask.x : nullptr;
  for (int64_t n = begin; n < end;) {
    int64_t y = n / X;
    int64_t x = n % X;
    int64_t count = end - n < X - x ? end - n : X - x;
    bool valid = true;
    if (from) {
      const bool* row = from + y * mask.y + x * mask.x;
      int64_t same = 1;
      valid = row[0];
      while (same < count && row[same * mask.x] == valid)
        ++same;
      count = same;
    }
    f(n, y, x, count, valid);
    n += count;
  }
}

}  // namespace
}  // namespace mmk
