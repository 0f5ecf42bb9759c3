// depthwise: d = activation(taps * expanded + b_depthwise), times the gate of a squeeze-and-excite.
#pragma once

#include "activation.h"
#include "window.h"

namespace {

// Output columns of one pass: MobileNetV2's widths at 224 are multiples of 7. Of float64, which is there to
// check others, few: every count is code of its own for each kernel size and stride.
template <class T>
constexpr int kDepthwiseCols = sizeof(T) == 8  ? 2
                               : kMostRows < 7 ? kMostRows
                                               : 7;

// One row of depthwise outputs, one vector of channels.
template <class V, class O, class T = typename V::T>
struct DepthwiseRow {
  // Expanded rows under the kernel's, at the first output's first tap. Dilated, at the first column in
  // the image, and null for rows outside.
  const T* rows[kMostKernelSize];
  const T* weights;  // [taps][16]
  const T* bias;
  O* out;
  ActivationFunction activation;
  const T* gate;                        // factors of the activation's results, or null
  bool only_clips;                      // the activation does no more, and there is no gate
  Clip<T> clip{Activation::kIdentity};  // of the activation
  // Dilated rows alone: taps' distance, columns from the first tap to the image's first, its columns.
  int64_t dilation, left, in_image;
};

// Stores C outputs from `first` on, given their sums.
template <class V, int C, class O>
MNV2_INLINE void store_cols(const DepthwiseRow<V, O>& t, int64_t first, const V (&acc)[C]) {
  const V low = V::set1(t.clip.low), high = V::set1(t.clip.high);
  O* const out = t.out + first * kPanel;
  if (t.only_clips) {
    unrolled<C>([&](auto c) MNV2_INLINE_LAMBDA {
      Elements<V, O>::store(clamp(acc[c], low, high), out + c * kPanel);
    });
  } else {
    typename V::T results[C * V::kLanes];
    unrolled<C>([&](auto c) MNV2_INLINE_LAMBDA {
      clamp(acc[c], low, high).store(results + c * V::kLanes);
    });
    activate<V>(results, C, V::kLanes, t.activation);
    const V gate = t.gate ? V::load(t.gate) : V::set1(1);
    for (int64_t c = 0; c < C; ++c)
      Elements<V, O>::store(multiplied(V::load(results + c * V::kLanes), gate), out + c * kPanel);
  }
}

// C outputs from `first` on: all taps from K expanded rows.
template <class V, int K, int S, int C, class O>
MNV2_INLINE void depthwise_cols(const DepthwiseRow<V, O>& t, int64_t first, V bias) {
  V acc[C];
  unrolled<C>([&](auto c) MNV2_INLINE_LAMBDA { acc[c] = bias; });
  unrolled<K>([&](auto ky) MNV2_INLINE_LAMBDA {
    V tap[K];
    unrolled<K>([&](auto kx)
                    MNV2_INLINE_LAMBDA { tap[kx] = V::load(t.weights + (ky * K + kx) * kPanel); });
    unrolled<(C - 1) * S + K>([&](auto i) MNV2_INLINE_LAMBDA {
      V v = V::load(t.rows[ky] + (first * S + i) * kPanel);
      // One load for up to K products: left to itself, the compiler makes it an operand of each.
      asm volatile("" : V_KEEP(v.v));
      unrolled<K>([&](auto kx) MNV2_INLINE_LAMBDA {
        constexpr int kFirst = decltype(i)::value - decltype(kx)::value, kOut = kFirst / S;
        if constexpr (kFirst >= 0 && kFirst % S == 0 && kOut < C)
          acc[kOut] = V::fma(v, tap[kx], acc[kOut]);
      });
    });
  });
  store_cols<V, C>(t, first, acc);
}

// The same dilated, tap by tap, without those outside the image: far apart, most of them may be.
template <class V, int K, int C, class O>
MNV2_INLINE void dilated_cols(const DepthwiseRow<V, O>& t, int64_t first, V bias) {
  V acc[C];
  unrolled<C>([&](auto c) MNV2_INLINE_LAMBDA { acc[c] = bias; });
  for (int64_t tap = 0; tap < K * K; ++tap) {
    const typename V::T* const row = t.rows[tap / K];
    const int64_t from = first + tap % K * t.dilation - t.left;
    if (!row || from + C <= 0 || from >= t.in_image) continue;
    const V weight = V::load(t.weights + tap * kPanel);
    const bool all = from >= 0 && from + C <= t.in_image;
    unrolled<C>([&](auto c) MNV2_INLINE_LAMBDA {
      if (all || (from + c >= 0 && from + c < t.in_image))
        acc[c] = V::fma(V::load(row + (from + c) * kPanel), weight, acc[c]);
    });
  }
  store_cols<V, C>(t, first, acc);
}

// In the place of a stride: the row is dilated.
constexpr int kDilated = 0;

template <class V, int K, int kStride, class O>
void depthwise_row(const DepthwiseRow<V, O>& t, int64_t cols) {
  const V bias = V::load(t.bias);
  const auto run = [&](auto c, int64_t col) MNV2_INLINE_LAMBDA {
    if constexpr (kStride == kDilated)
      dilated_cols<V, K, c>(t, col, bias);
    else
      depthwise_cols<V, K, kStride, c>(t, col, bias);
  };
  constexpr int kCols = kDepthwiseCols<typename V::T>;
  int64_t col = 0;
  for (; cols - col >= kCols; col += kCols) run(std::integral_constant<int, kCols>{}, col);
  // What is left, in powers of two.
  unrolled<3>([&](auto i) MNV2_INLINE_LAMBDA {
    constexpr int kPart = 4 >> i;
    if constexpr (kPart < kCols)
      if ((cols - col) & kPart) {
        run(std::integral_constant<int, kPart>{}, col);
        col += kPart;
      }
  });
}

template <class V, class O>
void depthwise_row(const DepthwiseRow<V, O>& t, const BlockShape& s, int64_t cols) {
  if (s.kernel == 1) return depthwise_row<V, 1, 1>(t, cols);
  unrolled<kKernelSizeCount>([&](auto i) MNV2_INLINE_LAMBDA {
    constexpr int kSize = int(kKernelSizes[i]);
    if (s.kernel != kSize) return;
    if (s.dilation > 1)
      depthwise_row<V, kSize, kDilated>(t, cols);
    else if (s.stride_across() == 1)
      depthwise_row<V, kSize, 1>(t, cols);
    else
      depthwise_row<V, kSize, 2>(t, cols);
  });
}

// Vectors of the group in rows of a band: from the ring to d, [group/16][band pixels][16].
template <class V, class S>
void depthwise(const Window<S>& w, const Compute<S>* expanded, S* d, Group group, Vectors vectors,
               Band band) {
  const BlockShape& s = w.shape;
  DepthwiseRow<V, S> t{};
  t.activation = s.function(s.activation);
  t.clip = Clip<Compute<S>>(s.activation);
  t.only_clips = is_clip(s.activation) && !w.gate;
  t.dilation = s.dilation;
  t.left = w.left;
  t.in_image = w.image_cols();
  for (int64_t v = vectors.first; v < vectors.first + vectors.count; ++v) {
    const int64_t channel = group.first + v * V::kLanes;
    t.weights = w.args.w_depthwise +
                vector_offset<V>(group.first / V::kLanes + v, w.args.w_depthwise_panel);
    t.bias = w.args.b_depthwise + channel;
    t.gate = w.gate ? w.gate + channel : nullptr;
    const Compute<S>* in = expanded + vector_offset<V>(v, w.panel);
    S* out = d + vector_offset<V>(v, band.rows * w.cols * kPanel);
    for (int64_t r = 0; r < band.rows; ++r) {
      for (int64_t ky = 0; ky < s.kernel; ++ky) {
        const int64_t line = (band.row + r) * s.stride + ky * s.dilation;
        const bool skipped = s.dilation > 1 && (line < w.top || line >= w.bottom);
        t.rows[ky] = skipped ? nullptr : in + w.ring_offset(line);
      }
      t.out = out + r * w.cols * kPanel;
      depthwise_row(t, s, w.cols);
    }
  }
}

}  // namespace
