// depthwise: taps of one row of the kernel as dot products over the lanes' columns, the last taps first;
// columns before the first tap have weights of 0.
#pragma once

#include "requantize.h"

namespace {

// Dot products that K taps of a row take.
template <class V, int K>
constexpr int kDots = (K + V::kDepth - 1) / V::kDepth;
constexpr int kDepthwiseCols = 7;

template <class V>
struct DepthwiseRow {
  const int32_t* rows[kMostKernelSize];
  const typename V::In* weights;  // [k][dots][16][depth], this vector's lanes
  const Stage* stage;
  int64_t channel;
  typename V::In* out;  // [pixels][16]
  int32_t* sums;        // of q - zero, or null
};

template <class V, int K, int S, int C, bool kClips>
MNV2_INLINE void depthwise_cols(const DepthwiseRow<V>& t, int64_t first) {
  V acc[C];
  const V bias = V::load(t.stage->bias + t.channel);
  unrolled<C>([&](auto c) MNV2_INLINE_LAMBDA { acc[c] = bias; });
  for (int ky = 0; ky < K; ++ky) {
    const int32_t* const row = t.rows[ky] + (first * S + K - 1) * kPanel;
    unrolled<kDots<V, K>>([&](auto d) MNV2_INLINE_LAMBDA {
      const V w = V::weights(t.weights + (ky * kDots<V, K> + d) * kPanel * V::kDepth);
      unrolled<C>([&](auto c) MNV2_INLINE_LAMBDA {
        acc[c] = V::dot(acc[c], V::load(row + (c * S - d * V::kDepth) * kPanel), w);
      });
    });
  }
  V total = V::set1(0);
  unrolled<C>([&](auto c) MNV2_INLINE_LAMBDA {
    const V q = requantize<V, kClips>(acc[c], *t.stage, t.channel);
    total = V::add(total, q);
    q.narrow(t.out + (first + c) * kPanel);
  });
  if (t.sums) V::add(V::load(t.sums), V::add(total, V::set1(-C * t.stage->zero))).store(t.sums);
}

template <class V, int K, int S, bool kClips>
void depthwise_row(const DepthwiseRow<V>& t, int64_t cols) {
  int64_t col = 0;
  for (; cols - col >= kDepthwiseCols; col += kDepthwiseCols)
    depthwise_cols<V, K, S, kDepthwiseCols, kClips>(t, col);
  unrolled<kDepthwiseCols - 1>([&](auto c) MNV2_INLINE_LAMBDA {
    if (cols - col == c + 1) depthwise_cols<V, K, S, c + 1, kClips>(t, col);
  });
}

// Rows of a band: from the ring to d, [group/16][band pixels][16].
template <class V>
void depthwise(const Window<uint8_t>& w, const Stage& stage, const int32_t* ring, typename V::In* d,
               int32_t* sums, Group group, Band band) {
  const BlockShape& s = w.shape;
  unrolled<kKernelSizeCount>([&](auto size) MNV2_INLINE_LAMBDA {
    constexpr int K = int(kKernelSizes[size]);
    if (s.kernel != K) return;
    const auto run = [&]<int S, bool kClips>(std::integral_constant<int, S>,
                                             std::bool_constant<kClips>) {
      for (int64_t v = 0; v < ceil_div(group.channels, kPanel) * kPerPanel<V>; ++v) {
        const int64_t vector = group.first / V::kLanes + v;
        const int64_t in_panel = v % kPerPanel<V> * V::kLanes;
        DepthwiseRow<V> t{};
        t.stage = &stage;
        t.channel = vector * V::kLanes;
        t.weights = static_cast<const typename V::In*>(stage.weight) +
                    vector / kPerPanel<V> * K * kDots<V, K> * kPanel * V::kDepth +
                    in_panel * V::kDepth;
        t.sums = sums ? sums + t.channel : nullptr;
        const int32_t* const in = ring + v / kPerPanel<V> * w.panel + in_panel;
        for (int64_t r = 0; r < band.rows; ++r) {
          for (int64_t ky = 0; ky < K; ++ky)
            t.rows[ky] = in + w.ring_offset((band.row + r) * s.stride + ky);
          t.out = d + (v / kPerPanel<V> * band.rows + r) * w.cols * kPanel + in_panel;
          depthwise_row<V, K, S, kClips>(t, w.cols);
        }
      }
    };
    const auto by_stride = [&](auto clip) {
      s.stride_across() == 1 ? run(std::integral_constant<int, 1>{}, clip)
                             : run(std::integral_constant<int, 2>{}, clip);
    };
    clips(stage) ? by_stride(std::true_type{}) : by_stride(std::false_type{});
  });
}

// d = round(clip((d - zero) * factor)) + zero, in place.
template <class V>
void multiply_by_factors(typename V::In* d, int64_t panels, int64_t pixels, const float* factors,
                         int32_t zero) {
  using F = typename V::F;
  const F low = F::set1(float(-zero)), high = F::set1(float(kHighest - zero));
  for (int64_t v = 0; v < panels * kPerPanel<V>; ++v) {
    const F factor = F::load(factors + v * V::kLanes);
    typename V::In* at = d + v / kPerPanel<V> * pixels * kPanel + v % kPerPanel<V> * V::kLanes;
    for (int64_t i = 0; i < pixels; ++i, at += kPanel) {
      const F value = V::to_float(V::add(V::load_in(at), V::set1(-zero)));
      const F r = F::min(F::max(F::mul(value, factor), low), high);
      V::add(F::round(r), V::set1(zero)).narrow(at);
    }
  }
}

}  // namespace
