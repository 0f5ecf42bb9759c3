// depthwise: taps of one row of the kernel as dot products over quads of columns, see columns.h.
//
// A quad begins at every second column. Of stride 1 the first tap lies in the first of its columns at even
// outputs and in the second at odd ones: weights are packed for both phases.
#pragma once

#include "product.h"

namespace {

// Outputs of a row that run together: as many as there are registers for, and fewer at its end.
template <class V, class T>
constexpr bool kFew = T::kDilated || (V::kRegisters < 16);
template <class V, class T>
using ColumnCounts = std::conditional_t<kFew<V, T>, std::integer_sequence<int, 4, 2, 1>,
                                        std::integer_sequence<int, 8, 7, 4, 2, 1>>;

template <class V>
struct DepthwiseRow {
  const int32_t* rows[kMostKernelSize];  // quad 0
  const int8_t* weights;                 // [k][phases][dots][16][4], this vector's lanes
  const Stage* stage;
  int64_t channel;
  typename V::In* out;  // [pixels][16]
  int32_t* sums;        // of q - zero, or null
};

// A row of K taps, `S` columns between outputs and `dilation` between taps.
template <int K, int S, bool kSpread>
struct Taps {
  static constexpr int kKernel = K, kStride = S;
  static constexpr bool kDilated = kSpread;
  static constexpr int kDots = int(row_dots(K, kSpread ? 2 : 1));
  static constexpr int kPhases = S == 1 ? 2 : 1;
  static constexpr int kRow = kPhases * kDots * kPanel * kQuad;  // weights
  int64_t dilation;

  // Quad that dot product `dot` reads of output `col`.
  MNV2_INLINE int64_t quad(int64_t col, int64_t dot) const {
    return kDilated ? (col * S + dot * dilation) / 2 : col * S / 2 + 2 * dot;
  }
};

template <class V, class T, int C, Bound kBound>
MNV2_INLINE void depthwise_cols(const DepthwiseRow<V>& t, T taps, int64_t first) {
  using Pair = typename V::Pair;
  V acc[C];
  const V bias = V::load(t.stage->bias + t.channel);
  unrolled<C>([&](auto c) MNV2_INLINE_LAMBDA { acc[c] = bias; });
  const int8_t* w = t.weights;
  for (int ky = 0; ky < T::kKernel; ++ky, w += T::kRow) {
    const int32_t* const row = t.rows[ky] + first * T::kStride / 2 * kPanel;
    unrolled<T::kDots>([&](auto dot) MNV2_INLINE_LAMBDA {
      typename V::Weights weights[T::kPhases];
      unrolled<T::kPhases>([&](auto phase) MNV2_INLINE_LAMBDA {
        weights[phase] = V::weights(w + (phase * T::kDots + dot) * kPanel * kQuad);
      });
      unrolled<C>([&](auto c) MNV2_INLINE_LAMBDA {
        const typename V::Value quad = V::value(row + taps.quad(c, dot) * kPanel);
        acc[c] = V::dot(acc[c], quad, weights[c % T::kPhases]);
      });
    });
  }
  requantize<V, kBound>(acc, *t.stage, t.channel);
  if (t.sums) {
    V total = V::load(t.sums);
    unrolled<C>([&](auto c) MNV2_INLINE_LAMBDA { total = V::add(total, acc[c]); });
    total.store(t.sums);
  }
  const auto value = [&](auto c) MNV2_INLINE_LAMBDA {
    if constexpr (c >= C)
      return V::set1(0);
    else
      return acc[c];
  };
  unrolled<(C + 3) / 4>([&](auto four) MNV2_INLINE_LAMBDA {
    constexpr int c = 4 * int(four);
    const auto pair = [&](auto at) MNV2_INLINE_LAMBDA {
      const V a = value(std::integral_constant<int, at>{});
      const V b = value(std::integral_constant<int, at + 1>{});
      return pair_of<V>(a, b, t.stage->zero);
    };
    const Pair low = pair(std::integral_constant<int, c>{});
    const Pair high = pair(std::integral_constant<int, c + 2>{});
    V::store_pixels(low, high, t.out + (first + c) * kPanel);
  });
}

template <class V, class T, Bound kBound>
void depthwise_row(const DepthwiseRow<V>& t, T taps, int64_t cols) {
  int64_t col = 0;
  [&]<int... C>(std::integer_sequence<int, C...>) {
    const auto run = [&]<int kCount>(std::integral_constant<int, kCount>) {
      for (; cols - col >= kCount; col += kCount)
        depthwise_cols<V, T, kCount, kBound>(t, taps, col);
    };
    (run(std::integral_constant<int, C>{}), ...);
  }(ColumnCounts<V, T>{});
}

// Calls f with the taps of a block.
template <class F>
void with_taps(const BlockShape& s, F f) {
  unrolled<kKernelSizeCount>([&](auto size) MNV2_INLINE_LAMBDA {
    constexpr int K = int(kKernelSizes[size]);
    if (s.kernel != K) return;
    if (s.dilation > 1) return f(Taps<K, 1, true>{s.dilation});  // of stride 1 alone
    s.stride_across() == 1 ? f(Taps<K, 1, false>{1}) : f(Taps<K, 2, false>{1});
  });
}

// Rows of a band: from the ring to d, [group/16][band pixels][16]. padding: quad 0 of a row of it.
template <class V>
void depthwise(const Window<uint8_t>& w, const Stage& stage, const int32_t* ring, const Ring& of,
               const int32_t* padding, typename V::In* d, int32_t* sums, Group group, Band band) {
  const BlockShape& s = w.shape;
  with_taps(s, [&]<class T>(T taps) {
    with_bound(stage, sums != nullptr, [&](auto bound) {
      for (int64_t v = 0; v < ceil_div(group.channels, kPanel) * kPerPanel<V>; ++v) {
        const int64_t vector = group.first / V::kLanes + v;
        const int64_t in_panel = v % kPerPanel<V> * V::kLanes;
        DepthwiseRow<V> t{};
        t.stage = &stage;
        t.channel = vector * V::kLanes;
        t.weights = stage.weight + vector / kPerPanel<V> * T::kKernel * T::kRow + in_panel * kQuad;
        t.sums = sums ? sums + t.channel : nullptr;
        const int32_t* const panel =
            ring + v / kPerPanel<V> * of.panel(w.ring_rows) + in_panel + kPanel;
        for (int64_t r = 0; r < band.rows; ++r) {
          for (int64_t ky = 0; ky < T::kKernel; ++ky) {
            const int64_t row = (band.row + r) * s.stride + ky * s.dilation;
            t.rows[ky] =
                row < w.top || row >= w.bottom ? padding : panel + row % w.ring_rows * of.row();
          }
          t.out = d + (v / kPerPanel<V> * band.rows + r) * w.cols * kPanel + in_panel;
          depthwise_row<V, T, bound()>(t, taps, w.cols);
        }
      }
    });
  });
}

// d = round(clip((d - zero) * factor)) + zero, from `d` to `out`; both may be one.
template <class V>
void multiply_by_factors(const typename V::In* d, typename V::In* out, int64_t panels,
                         int64_t pixels, const float* factors, int32_t zero) {
  using F = typename V::F;
  const F low = F::set1(float(-zero)), high = F::set1(float(kHighest - zero));
  for (int64_t v = 0; v < panels * kPerPanel<V>; ++v) {
    const F factor = F::load(factors + v * V::kLanes);
    const int64_t at = v / kPerPanel<V> * pixels * kPanel + v % kPerPanel<V> * V::kLanes;
    const auto value = [&](int64_t pixel) MNV2_INLINE_LAMBDA {
      const F centred = V::to_float(V::add(V::load_in(d + at + pixel * kPanel), V::set1(-zero)));
      return F::round(F::min(F::max(F::mul(centred, factor), low), high));
    };
    int64_t i = 0;
    for (; i + 4 <= pixels; i += 4)
      V::store_pixels(pair_of<V>(value(i), value(i + 1), zero),
                      pair_of<V>(value(i + 2), value(i + 3), zero), out + at + i * kPanel);
    for (; i < pixels; ++i) V::add(value(i), V::set1(zero)).narrow(out + at + i * kPanel);
  }
}

}  // namespace
