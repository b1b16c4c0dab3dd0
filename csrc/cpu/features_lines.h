// Lines, of features.h for channels of a position that are neighbours: vectors run along the channels.
#pragma once
#include "features.h"

namespace mmk {
namespace {

struct Lines {
  static constexpr int64_t least_bytes = 16;  // at least a block of four rows

  // scores[h][i] = sum over head h's channels of x[i][d] * y[i][d]; y is a Run or Shared.
  template <class T, class Y, class C>
  static void dot(Run<T> x, Y y, int64_t count, Heads<C> heads, C* scores, int64_t head_stride) {
    with_flag(x.channel == 1 && channel(y) == 1, [&](auto unit) {
      int64_t i = 0;
      for (; i + 4 <= count; i += 4)
        dot_rows<4, unit.value>(x, y, i, heads, scores, head_stride);
      for (; i < count; ++i)
        dot_rows<1, unit.value>(x, y, i, heads, scores, head_stride);
    });
  }

  // out[i][d] = w[h][i] * x[i][d]
  template <class T, class C>
  static void scale(Run<T> x, const C* w, int64_t count, Heads<C> heads, int64_t head_stride, Run<T> out,
                    bool streamed) {
    write(out, count, heads, streamed, x.channel == 1, [&](auto unit, int64_t i, int64_t h) {
      vec<C> wi = splat(w[h * head_stride + i]);
      const T* row = x.data + i * x.position;
      return [=](int64_t d, auto all) {
        if constexpr (all.value)
          return load_along<unit.value>(row + d * Stride<unit.value>{x.channel}, x.channel) * wi;
        else
          return to_acc(row[d * Stride<unit.value>{x.channel}]) * wi[0];
      };
    });
  }

  // out[i][d] = w[h][i] * y[i][d] + s[h][i] * t[d]: the image's gradient; y is a Run or Shared.
  template <class T, class Y, class C>
  static void blend(Y y, const C* w, const C* t, const C* s, int64_t count, Heads<C> heads, int64_t head_stride,
                    Run<T> out, bool streamed) {
    write(out, count, heads, streamed, channel(y) == 1, [&](auto unit, int64_t i, int64_t h) {
      vec<C> wi = splat(w[h * head_stride + i]);
      vec<C> si = splat(s[h * head_stride + i]);
      return [=](int64_t d, auto all) {
        if constexpr (all.value)
          return at<unit.value>(y, i, d) * wi + load(t + d) * si;
        else
          return one<unit.value>(y, i, d) * wi[0] + t[d] * si[0];
      };
    });
  }

  // a[d] += sum over i of p[h][i] * x[i][d], and likewise b with q; b null: only a.
  template <class T, class C>
  static void weighted_sum(Run<T> x, const C* p, const C* q, int64_t count, Heads<C> heads, int64_t head_stride, C* a,
                           C* b) {
    with_flag(x.channel == 1, [&](auto unit) {
      int64_t i = 0;
      for (; i + 8 <= count; i += 8)
        sum_rows<8, unit.value>(x, p, q, i, heads, head_stride, a, b);
      for (; i < count; ++i)
        sum_rows<1, unit.value>(x, p, q, i, heads, head_stride, a, b);
    });
  }

 private:
  template <class T>
  static int64_t channel(Run<T> y) {
    return y.channel;
  }
  template <class C>
  static int64_t channel(Shared<C>) {
    return 1;
  }
  template <bool Unit, class T>
  static MMK_INLINE vec<acc_t<T>> at(Run<T> y, int64_t i, int64_t d) {
    return load_along<Unit>(y.data + i * y.position + d * Stride<Unit>{y.channel}, y.channel);
  }
  template <bool, class C>
  static MMK_INLINE vec<C> at(Shared<C> y, int64_t, int64_t d) {
    return load(y.data + d);
  }
  template <bool Unit, class T>
  static MMK_INLINE acc_t<T> one(Run<T> y, int64_t i, int64_t d) {
    return to_acc(y.data[i * y.position + d * Stride<Unit>{y.channel}]);
  }
  template <bool, class C>
  static MMK_INLINE C one(Shared<C> y, int64_t, int64_t d) {
    return y.data[d];
  }

  // What is left of a row that isn't whole vectors is taken as one that ends with it: of its lanes the last `count` are
  // new.
  template <class C>
  static MMK_INLINE auto new_lanes(int64_t count) {
    vec<C> lane;
    for (int64_t i = 0; i < lanes<C>; ++i)
      lane[i] = C(i);
    return lane >= C(lanes<C> - count);
  }

  // R rows at a time: their sums are independent, so that additions needn't wait for each other.
  template <int R, bool Unit, class T, class Y, class C>
  static MMK_INLINE void dot_rows(Run<T> x, Y y, int64_t i, Heads<C> heads, C* scores, int64_t head_stride) {
    for (int64_t h = 0; h < heads.count; ++h) {
      vec<C> total[R] = {};
      C rest[R] = {};
      int64_t d = h * heads.width;
      int64_t end = d + heads.width;
      // A row after the other, as they lie: four streams side by side confuse the prefetcher where rows are short.
      const int64_t tail = end - heads.width % lanes<C>;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        for (d = h * heads.width; d < tail; d += lanes<C>)
          total[r] += at<Unit>(x, i + r, d) * at<Unit>(y, i + r, d);
        if (tail < end && heads.width >= lanes<C>) {
          const vec<C> last = at<Unit>(x, i + r, end - lanes<C>) * at<Unit>(y, i + r, end - lanes<C>);
          total[r] += new_lanes<C>(end - tail) ? last : vec<C>{};
          continue;
        }
        for (; d < end; ++d)
          rest[r] += one<Unit>(x, i + r, d) * one<Unit>(y, i + r, d);
      }
      C* s = scores + h * head_stride + i;
      if constexpr (R == 4) {
        C sums[4];
        sum4<C>(total, sums);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
          s[r] = sums[r] + rest[r];
      } else {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
          s[r] = sum<C>(total[r]) + rest[r];
      }
    }
  }

  template <int R, bool Unit, class T, class C>
  static MMK_INLINE void sum_rows(Run<T> x, const C* p, const C* q, int64_t i, Heads<C> heads, int64_t head_stride,
                                  C* a, C* b) {
    for (int64_t h = 0; h < heads.count; ++h) {
      C pi[R], qi[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        pi[r] = p[h * head_stride + i + r];
        qi[r] = b ? q[h * head_stride + i + r] : C(0);
      }
      int64_t d = h * heads.width;
      int64_t end = d + heads.width;
      if (b) {
        for (; d + lanes<C> <= end; d += lanes<C>) {
          vec<C> xd = at<Unit>(x, i, d);
          vec<C> ad = xd * pi[0];
          vec<C> bd = xd * qi[0];
#pragma GCC unroll 8
          for (int r = 1; r < R; ++r) {
            xd = at<Unit>(x, i + r, d);
            ad += xd * pi[r];
            bd += xd * qi[r];
          }
          store(a + d, load(a + d) + ad);
          store(b + d, load(b + d) + bd);
        }
      } else {
        for (; d + lanes<C> <= end; d += lanes<C>) {
          vec<C> ad = at<Unit>(x, i, d) * pi[0];
#pragma GCC unroll 8
          for (int r = 1; r < R; ++r)
            ad += at<Unit>(x, i + r, d) * pi[r];
          store(a + d, load(a + d) + ad);
        }
      }
      if (d < end && heads.width >= lanes<C>) {
        const int64_t last = end - lanes<C>;
        vec<C> ad = {};
        vec<C> bd = {};
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const vec<C> xd = at<Unit>(x, i + r, last);
          ad += xd * pi[r];
          bd += xd * qi[r];
        }
        const auto some = new_lanes<C>(end - d);
        store(a + last, load(a + last) + (some ? ad : vec<C>{}));
        if (b)
          store(b + last, load(b + last) + (some ? bd : vec<C>{}));
        continue;
      }
      for (; d < end; ++d)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          a[d] += one<Unit>(x, i + r, d) * pi[r];
          if (b)
            b[d] += one<Unit>(x, i + r, d) * qi[r];
        }
    }
  }

  // value(unit, i, h) gives the function that computes out[i][d], for whole vectors and for single elements.
  template <class T, class C, class F>
  static MMK_INLINE void write(Run<T> out, int64_t count, Heads<C> heads, bool streamed, bool unit_input, F value) {
    // Only where every head of every row is made of whole lines: a line written half past the cache, half through it,
    // is slow.
    streamed = streamed && heads.width * sizeof(T) % cache_line == 0 &&
               reinterpret_cast<uintptr_t>(out.data) % cache_line == 0 &&
               uintptr_t(out.position) * sizeof(T) % cache_line == 0;
    with_flag(unit_input, [&](auto unit) {
      with_write(streamed, out.channel, [&](auto how) {
        for (int64_t i = 0; i < count; ++i)
          for (int64_t h = 0; h < heads.count; ++h) {
            auto f = value(unit, i, h);
            T* row = out.data + i * out.position;
            int64_t d = h * heads.width;
            int64_t end = d + heads.width;
            for (; d + lanes<C> <= end; d += lanes<C>)
              store_along<how.value>(row + d * Stride<how.value != Write::scattered>{out.channel}, out.channel,
                                     f(d, std::true_type{}));
            for (; d < end; ++d)
              row[d * Stride<how.value != Write::scattered>{out.channel}] = from_acc<T>(f(d, std::false_type{}));
          }
      });
    });
  }
};

}  // namespace
}  // namespace mmk
