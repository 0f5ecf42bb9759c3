// The register tile of the project stage: pixels of d times vectors of output channels.
#pragma once

#include "activation.h"
#include "product.h"

namespace {

// A 1x1 product of pixels of d and vectors of output channels, over one run of expanded channels.
template <class S, class T = Compute<S>>
struct ProjectTile {
  const S* panels;     // [terms/16][band pixels][16]
  const S* depthwise;  // of them, the first pixel
  int64_t panel;       // elements between its panels
  const S* weights;    // this run's first row of the tile's first panel, [..][E][16]
  int64_t hidden;      // E
  int64_t terms;       // expanded channels in this run
  Pixels<T> sum;      // where the sums so far lie, at the tile's first channel: in y, or in scratch
  Pixels<S> y;        // output pixels, if they are not the same
  Pixels<const S> x;  // what a residual adds to them
  const T* bias;      // what the first group's sum ends with, else null
  bool add_sum;       // after a further run or group: what lies at `sum` counts
  bool add_x;         // after the last group of a residual block
  bool finished;      // the result goes to y
  Clip<T> clip{Activation::kIdentity};  // of what is finished, by its activation
  int64_t lanes;                        // valid lanes, when partial
  int64_t channel_offset;               // of the tile's first channel in its first panel
  Prefetch prefetch{};
};

template <class V, class S, int R, int N, bool kPartial>
void project_tile(const ProjectTile<S>& t) {
  const auto load = [&]<class O>(const O* p) MNV2_INLINE_LAMBDA {
    if constexpr (kPartial) return Elements<V, O>::load_partial(p, t.lanes);
    return Elements<V, O>::load(p);
  };
  const auto store = [&]<class O>(V v, O* p) MNV2_INLINE_LAMBDA {
    if constexpr (kPartial)
      Elements<V, O>::store_partial(v, p, t.lanes);
    else
      Elements<V, O>::store(v, p);
  };
  const S* w[N];
  V acc[R][N];
  unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
    w[j] = t.weights +
           vector_offset<V, kDepth<S>>(j + t.channel_offset / V::kLanes, t.hidden * kPanel);
    unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA { acc[i][j] = V::set1(0); });
  });
  const S* depthwise = t.depthwise;
  const auto value = [&](auto i, int64_t c)
                         MNV2_INLINE_LAMBDA { return depthwise + i * kPanel + c; };
  int64_t left = t.terms;
  Prefetch prefetch = t.prefetch;
  for (; left >= kPanel; left -= kPanel, depthwise += t.panel) {
    multiply<V, S, R, N>(acc, value, w, kPanel, prefetch);
    unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA { w[j] += kPanel * kPanel; });
  }
  multiply<V, S, R, N>(acc, value, w, left / kDepth<S> * kDepth<S>, prefetch);
  unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
    unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
      V y = acc[i][j];
      if (t.bias) y = V::add(y, load(t.bias + j * V::kLanes));
      if (t.add_sum) y = V::add(y, load(t.sum[i] + j * V::kLanes));
      y = clamp(y, V::set1(t.clip.low), V::set1(t.clip.high));
      if (t.add_x) y = V::add(y, load(t.x[i] + j * V::kLanes));
      if constexpr (kDepth<S> == 1)
        store(y, t.sum[i] + j * V::kLanes);
      else if (t.finished)
        store(y, t.y[i] + j * V::kLanes);
      else
        store(y, t.sum[i] + j * V::kLanes);
    });
  });
}

// Functions by the number of pixels: entry r - 1 handles r of them.
template <class V, class S, int N, bool kPartial, int... R>
auto project_table(std::integer_sequence<int, R...>) {
  static constexpr decltype(&project_tile<V, S, 1, N, kPartial>) kTable[] = {
      &project_tile<V, S, R + 1, N, kPartial>...};
  return kTable;
}

}  // namespace
