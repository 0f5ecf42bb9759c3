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

// Where rows of a product go: one behind the other.
template <class T>
struct Dense {
  T* first;
  int64_t step;

  template <int R>
  MNV2_INLINE void fill(int64_t row, T* (&at)[R]) const {
    unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA { at[i] = first + (row + i) * step; });
  }
};

// y[i][v] (+)= sum over k of a[i * row + k * term] * weights[v][k], for rows [0, rows) and vectors
// [0, vectors): start(y of row i, v) is what a sum begins with, store(y of row i, v, sum) takes it.
template <class V, class T, class Places, class Start, class Store>
MNV2_INLINE void product(int64_t rows, int64_t vectors, const T* a, int64_t row, int64_t term,
                         const T* weights, int64_t panel, int64_t terms, Places places, Start start,
                         Store store) {
  for_pieces(vectors, kMaxVectors<V>, [&](int64_t vector, int n) {
    with_vectors<V>(n, [&]<int N>(std::integral_constant<int, N>) {
      const T* w[N];
      unrolled<N>([&](auto j)
                      MNV2_INLINE_LAMBDA { w[j] = weights + vector_offset<V>(vector + j, panel); });
      for_pieces(rows, max_rows<V>(N), [&](int64_t first, int count) {
        with_count<max_rows<V>(N)>(count, [&]<int R>(
                                              std::integral_constant<int, R>) MNV2_INLINE_LAMBDA {
          V acc[R][N];
          std::remove_pointer_t<decltype(places.first)>* y[R];
          places.fill(first, y);
          unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
            unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA { acc[i][j] = start(y[i], vector + j); });
          });
          accumulate<V, R, N>(acc, a + first * row, row, term, w, terms);
          unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
            unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA { store(y[i], vector + j, acc[i][j]); });
          });
        });
      });
    });
  });
}

// y[i][c] (+)= sum over the channels k of a[k/16][i][k % 16] * weights[c/16][k][c % 16], c < channels.
template <class T>
struct Projected {
  const T* a;
  int64_t a_panel, panels;  // of 16 channels k
  const T* weights;
  int64_t w_panel;
  T* y;
  int64_t channels;
  bool adds;  // to what is there
};

// N vectors of c from `vector` on, of which the last has `lanes`.
template <class V, int N, bool kPartial, class T>
void project_vectors(const Projected<T>& t, int64_t pixels, int64_t vector, int64_t lanes) {
  for_pieces(pixels, max_rows<V>(N), [&](int64_t first, int count) {
    T* const y = t.y + first * t.channels + vector * V::kLanes;
    with_count<max_rows<V>(N)>(
        count, [&]<int R>(std::integral_constant<int, R>) MNV2_INLINE_LAMBDA {
          V acc[R][N];
          const auto each = [&](auto f) MNV2_INLINE_LAMBDA {
            unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
              unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
                f(acc[i][j], y + i * t.channels + j * V::kLanes,
                  std::bool_constant < kPartial && j == N - 1 > {});
              });
            });
          };
          each([&](V& sum, const T* from, auto partial) MNV2_INLINE_LAMBDA {
            sum = !t.adds ? V::set1(0) : partial ? V::load_partial(from, lanes) : V::load(from);
          });
          for (int64_t p = 0; p < t.panels; ++p) {
            const T* w[N];
            unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
              w[j] = t.weights + vector_offset<V>(vector + j, t.w_panel) + p * kPanel * kPanel;
            });
            accumulate<V, R, N>(acc, t.a + p * t.a_panel + first * kPanel, kPanel, 1, w, kPanel);
          }
          each([&](V& sum, T* to, auto partial)
                   MNV2_INLINE_LAMBDA { partial ? sum.store_partial(to, lanes) : sum.store(to); });
        });
  });
}

template <class V, class T>
void project(const Projected<T>& t, int64_t pixels) {
  const int64_t vectors = ceil_div(t.channels, V::kLanes), rest = t.channels % V::kLanes;
  for_pieces(vectors, kMaxVectors<V>, [&](int64_t vector, int n) {
    with_vectors<V>(n, [&]<int N>(std::integral_constant<int, N>) {
      if (rest > 0 && vector + N == vectors)
        project_vectors<V, N, true>(t, pixels, vector, rest);
      else
        project_vectors<V, N, false>(t, pixels, vector, V::kLanes);
    });
  });
}

}  // namespace
