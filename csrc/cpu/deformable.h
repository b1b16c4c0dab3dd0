// What both passes of deformable attention share: the rows of a head's value map, where they lie or copied, and how
// threads share out the queries that sample them.
#pragma once
#include "deformable_packs.h"
#include "deformable_points.h"

namespace mmk {
namespace {

// Rows of a head's value map where they lie, and what stands for those that aren't there.
template <class T>
struct Rows {
  using element = std::remove_const_t<T>;
  T* data;
  int64_t step;
  T* absent;
  template <class I>
  MMK_INLINE T* operator[](I position) const {
    return position < 0 ? absent : data + int64_t(position) * step;
  }
};

// A head's rows side by side; the one before the first stands for those that aren't there. Where heads lie side by
// side, the rows of one are so far apart that they share a few sets of each cache, which then holds a fraction of
// what it could.
template <class C>
struct DenseRows {
  using element = std::remove_const_t<C>;
  C* data;
  int64_t step;
  template <class I>
  MMK_INLINE C* operator[](I position) const {
    return data + int64_t(position) * step;
  }
};
template <class C>
struct DenseMap {
  Scratch<C> memory;
  DenseRows<C> rows;
  DenseMap(int64_t positions, int64_t channels)
      : memory((positions + 1) * channels), rows{memory.data + channels, channels} {
    memset(memory.data, 0, channels * sizeof(C));
  }
};

// Whether so many rows are read of a head's map that a copy of it pays.
inline bool copy_pays(const DeformableAttention& a) {
  return a.Q * a.K >= 2 * a.S;
}

template <class T, class C>
inline void copy_row(const T* from, int64_t count, C* to) {
  int64_t i = 0;
  for (; i + lanes<C> <= count; i += lanes<C>)
    store(to + i, load(from + i));
  for (; i < count; ++i)
    to[i] = to_acc(from[i]);
}

// Positions `first` to `last` of a head's map; what is masked out is 0.
template <class T>
inline void copy_rows(const DeformableAttention& a, int64_t b, int64_t h, int64_t first, int64_t last,
                      DenseRows<acc_t<T>> to) {
  using C = acc_t<T>;
  const T* value = static_cast<const T*>(a.value.data) + b * a.value.b + h * a.value.h;
  const bool* mask = a.mask.data ? a.mask.data + b * a.mask.b : nullptr;
  for (int64_t s = first; s < last; ++s) {
    C* row = to[s];
    if (mask && !mask[s * a.mask.t])
      memset(row, 0, a.d * sizeof(C));
    else
      copy_row(value + s * a.value.n, a.d, row);
  }
}

// Threads share out the queries of all heads, a head's after the other: neighbours sample near each other, and what
// they need of one head's map stays in the second-level cache. Heads that are copied are taken one by one, by all
// threads, so that there is one copy.
struct QueryParts {
  const DeformableAttention& a;
  const Parallel& parallel;
  const int64_t flops_per_query;

  // work(thread) makes what a thread needs; its run(rows, b, h, first query, last query) does the work.
  template <class T, class Work>
  void run(Work work) const {
    if (copy_pays(a))
      dense<T>(work);
    else
      in_place<T>(work);
  }

 private:
  // Of `queries`, so many that it is worth waking another thread.
  int64_t parts(int64_t queries) const {
    const int64_t worth = queries * flops_per_query >> 17;
    const int64_t most = parallel.threads < queries ? parallel.threads : queries;
    return worth < 1 ? 1 : worth < most ? worth : most;
  }
  template <class T, class Work>
  void in_place(Work work) const {
    const int64_t all = a.B * a.H * a.Q;
    const int64_t count = parts(all);
    Scratch<T> zeros(a.d);
    memset(static_cast<void*>(zeros.data), 0, a.d * sizeof(T));
    each_part(parallel, all ? count : 0, [&](int64_t part) {
      auto own = work();
      const int64_t end = all * (part + 1) / count;
      for (int64_t i = all * part / count; i < end;) {
        const int64_t b = i / a.Q / a.H;
        const int64_t h = i / a.Q % a.H;
        const int64_t first = i % a.Q;
        const int64_t last = first + end - i < a.Q ? first + end - i : a.Q;
        const T* value = static_cast<const T*>(a.value.data) + b * a.value.b + h * a.value.h;
        own.run(Rows<const T>{value, a.value.n, zeros.data}, b, h, first, last);
        i += last - first;
      }
    });
  }
  template <class T, class Work>
  void dense(Work work) const {
    using C = acc_t<T>;
    DenseMap<C> map(a.S, a.d);
    const int64_t count = parts(a.Q);
    for (int64_t index = 0; index < a.B * a.H; ++index) {
      const int64_t b = index / a.H;
      const int64_t h = index % a.H;
      each_part(parallel, count,
                [&](int64_t part) { copy_rows<T>(a, b, h, a.S * part / count, a.S * (part + 1) / count, map.rows); });
      each_part(parallel, count, [&](int64_t part) {
        auto own = work();
        own.sampling.masked = false;
        own.run(DenseRows<const C>{map.rows.data, map.rows.step}, b, h, a.Q * part / count, a.Q * (part + 1) / count);
      });
    }
  }
};

}  // namespace
}  // namespace mmk
