// The inner loop of every 1x1 product, and sums over many channels.
#pragma once

#include "elements.h"
#include "prefetch.h"

namespace {

// acc[i][j] += sum over k of *a(i, k) * w[j][16 k]
template <class V, class S, int R, int N, class A>
MNV2_INLINE void multiply(V (&acc)[R][N], const A& a, const S* const (&w)[N], int64_t terms,
                          Prefetch& prefetch) {
  using E = Elements<V, S>;
#pragma GCC unroll 4
  for (int64_t k = 0; k + kDepth<S> <= terms; k += kDepth<S>) {
    __builtin_prefetch(prefetch.from, 0, 2);
    prefetch.from += prefetch.step;
    unrolled<E::kParts>([&](auto part) MNV2_INLINE_LAMBDA {
      using Factor = decltype(E::template weights<part>(w[0]));
      Factor row[N];
      unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
        row[j] = E::template weights<part>(w[j] + k * kPanel);
      });
      unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
        const Factor value = E::template value<part>(a(i, k));
        unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
          acc[i][j] = E::multiply_add(value, row[j], acc[i][j]);
        });
      });
    });
  }
  static_assert(kDepth<S> <= 2, "what is left of a deeper lane may be more than one element");
  if constexpr (kDepth<S> > 1) {
    if (terms % kDepth<S> == 0) return;
    // One element is left: what lies behind it is not its neighbour.
    unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
      const S pair[2] = {*a(i, terms - 1), S{}};
      unrolled<E::kParts>([&](auto part) MNV2_INLINE_LAMBDA {
        const auto value = E::template value<part>(pair);
        unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
          const auto row = E::template weights<part>(w[j] + (terms - 1) * kPanel);
          acc[i][j] = E::multiply_add(value, row, acc[i][j]);
        });
      });
    });
  }
}

// Terms that one accumulator sums at most: past it, every further term would be rounded to the size of
// a long sum. Of a linear layer fewer, since torch's product of a vector has many short sums, too.
constexpr int64_t kLongestSum = 160, kLongestLinearSum = 16;

// A 1x1 product of pixels and vectors of channels.
template <class S, class T = Compute<S>>
struct Product {
  Pixels<const S> x;
  const S* weights;  // [channels/16][C_in][16]
  const T* bias;     // [channels]
  int64_t in_channels;
  int64_t vector;  // first vector of this tile
  Prefetch prefetch{};
  int64_t longest = kLongestSum;
};

template <class V, class S, int N>
MNV2_INLINE void weight_rows(const Product<S>& t, const S* (&w)[N]) {
  const int64_t panel = round_up(t.in_channels, kDepth<S>) * kPanel;
  unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
    w[j] = t.weights + vector_offset<V, kDepth<S>>(t.vector + j, panel);
  });
}

// acc[i][j] += sum over k of x[i][k] * w[j][16 k], in chunks. The sums go by way of memory, where acc
// is no array of registers, and the function is one of its own: kernels without such sums must not pay
// for them.
template <class V, class S, int R, int N>
__attribute__((noinline)) void chunk_sums(const Product<S>& t, typename V::T* sums) {
  const S* w[N];
  weight_rows<V, S, N>(t, w);
  Prefetch prefetch = t.prefetch;
  for (int64_t k = 0; k < t.in_channels; k += t.longest) {
    const int64_t left = t.in_channels - k;
    V acc[R][N];
    unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
      unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA { acc[i][j] = V::set1(0); });
    });
    const S* x[R];
    unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA { x[i] = t.x[i] + k; });
    const auto value = [&](auto i, int64_t c) MNV2_INLINE_LAMBDA { return x[i] + c; };
    multiply<V, S, R, N>(acc, value, w, left < t.longest ? left : t.longest, prefetch);
    unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
      unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
        typename V::T* const p = sums + (i * N + j) * V::kLanes;
        V::add(V::load(p), acc[i][j]).store(p);
      });
    });
    unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA { w[j] += t.longest * kPanel; });
  }
}

template <class V, class S, int R, int N>
MNV2_INLINE void sum_in_chunks(const Product<S>& t, V (&acc)[R][N]) {
  typename V::T sums[R * N * V::kLanes];
  unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
    unrolled<N>([&](auto j)
                    MNV2_INLINE_LAMBDA { acc[i][j].store(sums + (i * N + j) * V::kLanes); });
  });
  chunk_sums<V, S, R, N>(t, sums);
  unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
    unrolled<N>([&](auto j)
                    MNV2_INLINE_LAMBDA { acc[i][j] = V::load(sums + (i * N + j) * V::kLanes); });
  });
}

}  // namespace
