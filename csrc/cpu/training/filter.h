// Rows of the depthwise convolution, of its transpose, and of its weights' gradient. Vectors lie kPanel
// elements apart, and zeros around the image: no column has to be asked for.
#pragma once

#include "../kernel/elements.h"

namespace {

// Rows of taps that lie over one another.
template <class T>
struct Rows2d {
  int count = 0;
  const T* at[kMostKernelSize];       // column 0 under the first tap of output 0
  const T* weights[kMostKernelSize];  // [taps of a row][16]

  MNV2_INLINE void add(const T* row, const T* of_row) {
    at[count] = row;
    weights[count++] = of_row;
  }
};

// out[c] = f(c, sum of weights[k] * row[c * kStep + k * spread] over all rows): C outputs from `first`
// on. spread: negative where the kernel is mirrored.
template <class V, int K, int kStep, int C, class F>
MNV2_INLINE void filter_cols(const Rows2d<typename V::T>& rows, int64_t spread, int64_t first,
                             typename V::T* out, F f) {
  V acc[C];
  unrolled<C>([&](auto c) MNV2_INLINE_LAMBDA { acc[c] = V::set1(0); });
  for (int r = 0; r < rows.count; ++r) {
    const typename V::T* const at = rows.at[r] + first * kStep * kPanel;
    const typename V::T* const w = rows.weights[r];
    unrolled<K>([&](auto k) MNV2_INLINE_LAMBDA {
      const V weight = V::load(w + k * kPanel);
      const typename V::T* const tap = at + k * spread * kPanel;
      unrolled<C>([&](auto c) MNV2_INLINE_LAMBDA {
        acc[c] = V::fma(V::load(tap + c * kStep * kPanel), weight, acc[c]);
      });
    });
  }
  unrolled<C>([&](auto c)
                  MNV2_INLINE_LAMBDA { f(first + c, acc[c]).store(out + (first + c) * kPanel); });
}

template <class V, class F>
void filter_row(int64_t kernel, int64_t step, const Rows2d<typename V::T>& rows, int64_t spread,
                int64_t cols, typename V::T* out, F f) {
  const auto with_step =
      [&]<int K, int kStep>(std::integer_sequence<int, K, kStep>) MNV2_INLINE_LAMBDA {
        int64_t col = 0;
        const auto run = [&]<int C>(std::integral_constant<int, C>) MNV2_INLINE_LAMBDA {
          for (; cols - col >= C; col += C) filter_cols<V, K, kStep, C>(rows, spread, col, out, f);
        };
        // Widths are mostly multiples of 7.
        run(std::integral_constant<int, V::kRegisters >= 32 ? 14 : 7>{});
        run(std::integral_constant<int, 7>{});
        run(std::integral_constant<int, 1>{});
      };
  unrolled<kKernelSizeCount>([&](auto size) MNV2_INLINE_LAMBDA {
    constexpr int K = int(kKernelSizes[size]);
    if (kernel != K) return;
    step == 1 ? with_step(std::integer_sequence<int, K, 1>{})
              : with_step(std::integer_sequence<int, K, 2>{});
  });
}

// dw[ky][kx] += sum over c of rows[ky][c * step + kx * spread] * g[c * step], of K rows of K taps from
// `first` on.
template <class V, int K, int kRows>
MNV2_INLINE void filter_weights(const typename V::T* const* rows, const typename V::T* g,
                                int64_t step, int64_t spread, int64_t cols, typename V::T* dw,
                                int64_t pitch) {
  V acc[kRows][K];
  unrolled<kRows>([&](auto ky) MNV2_INLINE_LAMBDA {
    unrolled<K>([&](auto kx)
                    MNV2_INLINE_LAMBDA { acc[ky][kx] = V::load(dw + (ky * K + kx) * pitch); });
  });
  for (int64_t c = 0; c < cols; ++c) {
    const int64_t at = c * step * kPanel;
    const V value = V::load(g + at);
    unrolled<kRows>([&](auto ky) MNV2_INLINE_LAMBDA {
      unrolled<K>([&](auto kx) MNV2_INLINE_LAMBDA {
        acc[ky][kx] = V::fma(V::load(rows[ky] + at + kx * spread * kPanel), value, acc[ky][kx]);
      });
    });
  }
  unrolled<kRows>([&](auto ky) MNV2_INLINE_LAMBDA {
    unrolled<K>([&](auto kx) MNV2_INLINE_LAMBDA { acc[ky][kx].store(dw + (ky * K + kx) * pitch); });
  });
}

template <class V>
void filter_weights(int64_t kernel, const typename V::T* const* rows, const typename V::T* g,
                    int64_t step, int64_t spread, int64_t cols, typename V::T* dw, int64_t pitch) {
  unrolled<kKernelSizeCount>([&](auto size) MNV2_INLINE_LAMBDA {
    constexpr int K = int(kKernelSizes[size]);
    if (kernel != K) return;
    // All rows at once where there are registers for them.
    constexpr int kRows = K * K + 2 <= V::kRegisters ? K : 1;
    for (int ky = 0; ky < K; ky += kRows)
      filter_weights<V, K, kRows>(rows + ky, g, step, spread, cols, dw + ky * K * pitch, pitch);
  });
}

}  // namespace
