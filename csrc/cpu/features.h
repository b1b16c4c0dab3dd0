// The loops over image features that score -> softmax -> multiply operations are made of, for the two ways features
// lie:
//   Lines   the channels of a position are neighbours ([B, N, D], channels_last): vectors run along the channels;
//   Planes  the positions of a channel are neighbours (contiguous [B, D, Y, X]):  vectors run along the positions.
// Any other stride is right in both, gathered element by element. All calls work on a run: positions one stride apart.
//
// A coefficient array holds one number a head and position, the heads `head_stride` apart.
#pragma once
#include "simd.h"

#include <type_traits>  // compile-time constants only: nothing in it becomes code

namespace mmk {
namespace {

// One run of features, `position` and `channel` strides in elements.
template <class T>
struct Run {
  T* data;
  int64_t position, channel;
};

// The second factor of a score: another run (the gradient), or one vector for all positions (the text).
template <class C>
struct Shared {
  const C* data;
};

template <class C>
struct Heads {
  int64_t count, width;  // H, D / H
};

template <bool Unit>
struct Stride {
  int64_t value;
  MMK_INLINE operator int64_t() const { return Unit ? 1 : value; }
};

template <bool Unit, class T>
MMK_INLINE vec<acc_t<T>> load_along(const T* p, int64_t stride) {
  if constexpr (Unit)
    return load(p);
  else
    return gather(p, stride);
}

constexpr uintptr_t cache_line = 64;

enum class Write { cached, streamed, scattered };

template <Write W, class T>
MMK_INLINE void store_along(T* p, int64_t stride, vec<acc_t<T>> v) {
  if constexpr (W == Write::cached)
    store(p, v);
  else if constexpr (W == Write::streamed)
    stream(p, v);
  else
    scatter(p, stride, v);
}

// Picks how vectors `step` elements apart may be written.
template <class F>
MMK_INLINE void with_write(bool streamed, int64_t step, F f) {
  if (step != 1)
    f(std::integral_constant<Write, Write::scattered>{});
  else if (streamed)
    f(std::integral_constant<Write, Write::streamed>{});
  else
    f(std::integral_constant<Write, Write::cached>{});
}

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

struct Planes {
  static constexpr int64_t least_bytes = 4096;  // of a plane, before the next one, a page away

  template <class T, class Y, class C>
  static void dot(Run<T> x, Y y, int64_t count, Heads<C> heads, C* scores, int64_t head_stride) {
    with_flag(x.position == 1 && position(y) == 1, [=](auto unit) {
      for (int64_t h = 0; h < heads.count; ++h) {
        C* s = scores + h * head_stride;
        for (int64_t i = 0; i < count; ++i)
          s[i] = 0;
        int64_t d = h * heads.width;
        int64_t end = d + heads.width;
        for (; d + 4 <= end; d += 4)
          dot_planes<4, unit.value>(x, y, d, count, s);
        for (; d < end; ++d)
          dot_planes<1, unit.value>(x, y, d, count, s);
      }
    });
  }

  template <class T, class C>
  static void scale(Run<T> x, const C* w, int64_t count, Heads<C> heads, int64_t head_stride, Run<T> out,
                    bool streamed) {
    write(out, count, heads, streamed, x.position == 1, [&](auto unit, int64_t d, int64_t h) {
      const T* plane = x.data + d * x.channel;
      const C* wh = w + h * head_stride;
      return [=](int64_t i, auto all) {
        if constexpr (all.value)
          return load_along<unit.value>(plane + i * Stride<unit.value>{x.position}, x.position) * load(wh + i);
        else
          return to_acc(plane[i * Stride<unit.value>{x.position}]) * wh[i];
      };
    });
  }

  template <class T, class Y, class C>
  static void blend(Y y, const C* w, const C* t, const C* s, int64_t count, Heads<C> heads, int64_t head_stride,
                    Run<T> out, bool streamed) {
    write(out, count, heads, streamed, position(y) == 1, [&](auto unit, int64_t d, int64_t h) {
      const C* wh = w + h * head_stride;
      const C* sh = s + h * head_stride;
      C td = t[d];
      return [=](int64_t i, auto all) {
        if constexpr (all.value)
          return at<unit.value>(y, i, d) * load(wh + i) + load(sh + i) * td;
        else
          return one<unit.value>(y, i, d) * wh[i] + sh[i] * td;
      };
    });
  }

  template <class T, class C>
  static void weighted_sum(Run<T> x, const C* p, const C* q, int64_t count, Heads<C> heads, int64_t head_stride, C* a,
                           C* b) {
    with_flag(x.position == 1, [=](auto unit) {
      with_flag(b, [=](auto both) {
        for (int64_t h = 0; h < heads.count; ++h) {
          const C* ph = p + h * head_stride;
          const C* qh = q + h * head_stride;
          int64_t d = h * heads.width;
          int64_t end = d + heads.width;
          for (; d + 4 <= end; d += 4)
            sum_planes<4, unit.value, both.value>(x, ph, qh, d, count, a, b);
          for (; d < end; ++d)
            sum_planes<1, unit.value, both.value>(x, ph, qh, d, count, a, b);
        }
      });
    });
  }

 private:
  template <class T>
  static int64_t position(Run<T> y) {
    return y.position;
  }
  template <class C>
  static int64_t position(Shared<C>) {
    return 1;
  }
  template <bool Unit, class T>
  static MMK_INLINE vec<acc_t<T>> at(Run<T> y, int64_t i, int64_t d) {
    return load_along<Unit>(y.data + d * y.channel + i * Stride<Unit>{y.position}, y.position);
  }
  template <bool, class C>
  static MMK_INLINE vec<C> at(Shared<C> y, int64_t, int64_t d) {
    return splat(y.data[d]);
  }
  template <bool Unit, class T>
  static MMK_INLINE acc_t<T> one(Run<T> y, int64_t i, int64_t d) {
    return to_acc(y.data[d * y.channel + i * Stride<Unit>{y.position}]);
  }
  template <bool, class C>
  static MMK_INLINE C one(Shared<C> y, int64_t, int64_t d) {
    return y.data[d];
  }

  // R planes are added up before they join the scores: fewer passes over the scores, and shorter chains of rounding.
  template <int R, bool Unit, class T, class Y, class C>
  static MMK_INLINE void dot_planes(Run<T> x, Y y, int64_t d, int64_t count, C* s) {
    int64_t i = 0;
    for (; i + lanes<C> <= count; i += lanes<C>) {
      vec<C> total = at<Unit>(x, i, d) * at<Unit>(y, i, d);
#pragma GCC unroll 8
      for (int r = 1; r < R; ++r)
        total += at<Unit>(x, i, d + r) * at<Unit>(y, i, d + r);
      store(s + i, load(s + i) + total);
    }
    for (; i < count; ++i) {
      C total = 0;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        total += one<Unit>(x, i, d + r) * one<Unit>(y, i, d + r);
      s[i] += total;
    }
  }

  template <int R, bool Unit, bool Both, class T, class C>
  static MMK_INLINE void sum_planes(Run<T> x, const C* p, const C* q, int64_t d, int64_t count, C* a, C* b) {
    vec<C> at_a[R] = {}, at_b[R] = {};
    C rest_a[R] = {}, rest_b[R] = {};
    int64_t i = 0;
    for (; i + lanes<C> <= count; i += lanes<C>) {
      const vec<C> pi = load(p + i);
      const vec<C> qi = Both ? load(q + i) : vec<C>{};
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vec<C> xi = at<Unit>(x, i, d + r);
        at_a[r] += xi * pi;
        if constexpr (Both)
          at_b[r] += xi * qi;
      }
    }
    for (; i < count; ++i)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        C xi = one<Unit>(x, i, d + r);
        rest_a[r] += xi * p[i];
        if constexpr (Both)
          rest_b[r] += xi * q[i];
      }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      a[d + r] += sum<C>(at_a[r]) + rest_a[r];
      if constexpr (Both)
        b[d + r] += sum<C>(at_b[r]) + rest_b[r];
    }
  }

  template <class T, class C, class F>
  static MMK_INLINE void write(Run<T> out, int64_t count, Heads<C> heads, bool streamed, bool unit_input, F value) {
    // Planes of any length start and end anywhere in a line: only the whole lines between are written past the cache.
    // Short planes that follow each other without a gap are gathered into lines first.
    constexpr int64_t line = cache_line / sizeof(T);
    if (streamed && count < 8 * line && out.position == 1 && out.channel == count)
      return write_joined(out, count, heads, unit_input, value);
    if (count < 8 * line)
      streamed = false;
    with_flag(unit_input, [&](auto unit) {
      with_write(streamed, out.position, [&](auto how) {
        for (int64_t h = 0; h < heads.count; ++h)
          for (int64_t d = h * heads.width; d < (h + 1) * heads.width; ++d) {
            auto f = value(unit, d, h);
            T* plane = out.data + d * out.channel;
            int64_t i = 0;
            constexpr Write rest = how.value == Write::scattered ? Write::scattered : Write::cached;
            if constexpr (how.value == Write::streamed) {
              for (; reinterpret_cast<uintptr_t>(plane + i) % cache_line != 0; ++i)
                plane[i] = from_acc<T>(f(i, std::false_type{}));
              for (; i + line <= count; i += line)
                for (int64_t j = 0; j < line; j += lanes<C>)
                  stream(plane + i + j, f(i + j, std::true_type{}));
            }
            for (; i + lanes<C> <= count; i += lanes<C>)
              store_along<rest>(plane + i * Stride<rest == Write::cached>{out.position}, out.position,
                                f(i, std::true_type{}));
            for (; i < count; ++i)
              plane[i * Stride<rest == Write::cached>{out.position}] = from_acc<T>(f(i, std::false_type{}));
          }
      });
    });
  }

  template <class T, class C, class F>
  static MMK_INLINE void write_joined(Run<T> out, int64_t count, Heads<C> heads, bool unit_input, F value) {
    constexpr int64_t line = cache_line / sizeof(T);
    constexpr int64_t capacity = 64 * line;
    alignas(cache_line) T buffer[capacity];
    // of the buffer that holds values
    int64_t begin = int64_t(reinterpret_cast<uintptr_t>(out.data) % cache_line / sizeof(T));
    int64_t fill = begin;
    T* to = out.data - begin;  // where the buffer's start belongs
    auto flush = [&](bool last) {
      int64_t i = begin;
      int64_t whole = fill - fill % line;
      for (; i < (last ? fill : whole) && i % line; ++i)
        to[i] = buffer[i];  // the first line may not be ours alone
      for (; i < whole; i += line)
        for (int64_t j = 0; j < line; j += lanes<C>)
          stream(to + i + j, load(static_cast<const T*>(buffer) + i + j));
      if (last)
        for (; i < fill; ++i)
          to[i] = buffer[i];
      else
        for (int64_t j = whole; j < fill; ++j)
          buffer[j - whole] = buffer[j];
      to += whole;
      fill -= whole;
      begin = begin > whole ? begin - whole : 0;
    };
    with_flag(unit_input, [&](auto unit) {
      for (int64_t h = 0; h < heads.count; ++h)
        for (int64_t d = h * heads.width; d < (h + 1) * heads.width; ++d) {
          if (fill + count > capacity)
            flush(false);
          auto f = value(unit, d, h);
          T* plane = buffer + fill;
          int64_t i = 0;
          for (; i + lanes<C> <= count; i += lanes<C>)
            store(plane + i, f(i, std::true_type{}));
          for (; i < count; ++i)
            plane[i] = from_acc<T>(f(i, std::false_type{}));
          fill += count;
        }
    });
    flush(true);
  }
};

}  // namespace
}  // namespace mmk
