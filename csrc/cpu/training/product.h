// Register tiles of the products: rows of broadcast values times vectors of channels.
#pragma once

#include "../kernel/product.h"

namespace {

// Calls f(std::integral_constant<int, r>) for a run-time r in [1, kMost].
template <int kMost, class F>
MNV2_INLINE void with_count(int r, F f) {
  unrolled<kMost>([&](auto i) MNV2_INLINE_LAMBDA {
    if (r == i + 1) f(std::integral_constant<int, i + 1>{});
  });
}

// acc[i][j] += sum over k of a[i * row + k * term] * w[j][16 k]
template <class V, int R, int N, class T = typename V::T>
MNV2_INLINE void accumulate(V (&acc)[R][N], const T* a, int64_t row, int64_t term,
                            const T* const (&w)[N], int64_t terms) {
  const T* at = a;
#pragma GCC unroll 2
  for (int64_t k = 0; k < terms; ++k, at += term) {
    V weights[N];
    unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA { weights[j] = V::load(w[j] + k * kPanel); });
    unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
      const V value = V::set1(at[i * row]);
      unrolled<N>([&](auto j)
                      MNV2_INLINE_LAMBDA { acc[i][j] = V::fma(value, weights[j], acc[i][j]); });
    });
  }
}

// y[i][v] (+)= sum over k of a[i * row + k * term] * weights[v][k], for rows [0, rows) and vectors
// [0, vectors): store(i, v, sum) takes each, start(i, v) is what it is added to.
template <class V, class T, class Start, class Store>
MNV2_INLINE void product(int64_t rows, int64_t vectors, const T* a, int64_t row, int64_t term,
                         const T* weights, int64_t panel, int64_t terms, Start start, Store store) {
  for_pieces(vectors, kMaxVectors<V>, [&](int64_t vector, int n) {
    with_vectors<V>(n, [&]<int N>(std::integral_constant<int, N>) {
      const T* w[N];
      unrolled<N>([&](auto j)
                      MNV2_INLINE_LAMBDA { w[j] = weights + vector_offset<V>(vector + j, panel); });
      for_pieces(rows, max_rows<V>(N), [&](int64_t first, int count) {
        with_count<max_rows<V>(N)>(
            count, [&]<int R>(std::integral_constant<int, R>) MNV2_INLINE_LAMBDA {
              V acc[R][N];
              unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
                unrolled<N>([&](auto j)
                                MNV2_INLINE_LAMBDA { acc[i][j] = start(first + i, vector + j); });
              });
              accumulate<V, R, N>(acc, a + first * row, row, term, w, terms);
              unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
                unrolled<N>([&](auto j)
                                MNV2_INLINE_LAMBDA { store(first + i, vector + j, acc[i][j]); });
              });
            });
      });
    });
  });
}

// y[i][c] (+)= sum over the channels k of a[k/16][i][k % 16] * weights[c/16][k][c % 16], c < channels.
template <class V, int N, bool kPartial, class T>
void project_piece(int64_t pixels, const T* a, int64_t a_panel, int64_t panels, const T* weights,
                   int64_t w_panel, int64_t vector, int64_t lanes, bool adds, T* y, int64_t pitch) {
  const auto load = [&](const T* p) MNV2_INLINE_LAMBDA {
    if constexpr (kPartial) return V::load_partial(p, lanes);
    return V::load(p);
  };
  for_pieces(pixels, max_rows<V>(N), [&](int64_t first, int count) {
    with_count<max_rows<V>(N)>(
        count, [&]<int R>(std::integral_constant<int, R>) MNV2_INLINE_LAMBDA {
          V acc[R][N];
          T* const at = y + first * pitch + vector * V::kLanes;
          unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
            unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
              acc[i][j] = adds ? load(at + i * pitch + j * V::kLanes) : V::set1(0);
            });
          });
          for (int64_t p = 0; p < panels; ++p) {
            const T* w[N];
            unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
              w[j] = weights + vector_offset<V>(vector + j, w_panel) + p * kPanel * kPanel;
            });
            accumulate<V, R, N>(acc, a + p * a_panel + first * kPanel, kPanel, 1, w, kPanel);
          }
          unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
            unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
              T* const to = at + i * pitch + j * V::kLanes;
              if constexpr (kPartial)
                acc[i][j].store_partial(to, lanes);
              else
                acc[i][j].store(to);
            });
          });
        });
  });
}

template <class V, class T>
void project(int64_t pixels, const T* a, int64_t a_panel, int64_t panels, const T* weights,
             int64_t w_panel, int64_t channels, bool adds, T* y) {
  const int64_t full = channels / V::kLanes, rest = channels % V::kLanes;
  for_pieces(full, kMaxVectors<V>, [&](int64_t vector, int n) {
    with_vectors<V>(n, [&]<int N>(std::integral_constant<int, N>) {
      project_piece<V, N, false>(pixels, a, a_panel, panels, weights, w_panel, vector, V::kLanes,
                                 adds, y, channels);
    });
  });
  if (rest > 0)
    project_piece<V, 1, true>(pixels, a, a_panel, panels, weights, w_panel, full, rest, adds, y,
                              channels);
}

}  // namespace
