// Register tiles, and vectors of what is stored: the words in which every stage is written.
#pragma once

#define MNV2_INLINE_LAMBDA __attribute__((always_inline))

namespace {

// Vectors of channels, and rows of pixels, in the register tile of a 1x1 product. Registers hold its
// accumulators, one row of weights and one broadcast value.
template <class V>
constexpr int kMaxVectors = V::kRegisters >= 32 ? 4 : 2;
#ifndef MNV2_MOST_ROWS  // fewer for compilers that check every access: their time goes with this
#define MNV2_MOST_ROWS 12
#endif
constexpr int kMostRows = MNV2_MOST_ROWS;
template <class V>
constexpr int max_rows(int vectors) {
  const int rows = (V::kRegisters - 1 - vectors) / vectors;
  // 16 registers hold 6 rows of two vectors; many more of one are no faster.
  const int fits = sizeof(typename V::T) == 8 ? 4 : V::kRegisters >= 32 ? kMostRows : 7;
  const int most = fits < kMostRows ? fits : kMostRows;
  return rows < most ? rows : most;
}
// Row counts of such a tile, less one: 0, ..., max_rows - 1, for tables of functions.
template <class V, int N>
using Rows = std::make_integer_sequence<int, max_rows<V>(N)>;

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

// Calls f(begin, count) over [0, total) in near-equal pieces of at most `most`.
template <class F>
MNV2_INLINE void for_pieces(int64_t total, int64_t most, F f) {
  const int64_t pieces = ceil_div(total, most);
  for (int64_t i = 0, begin = 0; i < pieces; ++i) {
    const int64_t count = (total - begin) / (pieces - i);
    f(begin, int(count));
    begin += count;
  }
}

// Calls f(0), ..., f(N - 1) with compile-time indices: a loop would leave arrays of vectors on the
// stack.
template <int N, class F>
MNV2_INLINE void unrolled(F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) MNV2_INLINE_LAMBDA {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

// Calls f(std::integral_constant<int, n>) for a run-time n in [1, kMaxVectors].
template <class V, class F>
MNV2_INLINE void with_vectors(int n, F f) {
  if constexpr (kMaxVectors<V> == 4) {
    if (n == 4) return f(std::integral_constant<int, 4>{});
    if (n == 3) return f(std::integral_constant<int, 3>{});
  }
  if (n == 2) return f(std::integral_constant<int, 2>{});
  return f(std::integral_constant<int, 1>{});
}

// Pointers to a tile's pixels, filled by whole vectors: every fill writes kMostRows pointers. Those past
// the run's own pixels are the next run's to overwrite; behind the tile's last pixel no kernel reads.
//   fill(0, a, s)   a0 a1 a2 a3 a4 .. a11             a run of two pixels, then
//   fill(2, b, s)   a0 a1 b0 b1 b2 .. .. .. b11       the next one
template <class P>
struct Pixels {
  P* at[2 * kMostRows];

  MNV2_INLINE P* operator[](int i) const { return at[i]; }
  MNV2_INLINE void fill(int begin, P* first, int64_t step) {
    for (int i = 0; i < kMostRows; ++i) at[begin + i] = first + i * step;
  }
};

// Elements stored as S, and their products in V. One lane of a factor holds kDepth neighbouring
// elements; kParts multiply-adds go over them.
template <class V, class S>
struct Elements;
template <class V>
struct Elements<V, typename V::T> {
  using T = typename V::T;
  static constexpr int kParts = 1;
  static MNV2_INLINE V load(const T* p) { return V::load(p); }
  static MNV2_INLINE V load_partial(const T* p, int64_t n) { return V::load_partial(p, n); }
  static MNV2_INLINE void store(V v, T* p) { v.store(p); }
  static MNV2_INLINE void store_partial(V v, T* p, int64_t n) { v.store_partial(p, n); }
  template <int>
  static MNV2_INLINE V value(const T* p) {
    return V::set1(*p);
  }
  template <int>
  static MNV2_INLINE V weights(const T* p) {
    return V::load(p);
  }
  static MNV2_INLINE V multiply_add(V value, V weights, V sum) {
    return V::fma(value, weights, sum);
  }
};
#ifdef MNV2_BFLOAT16
template <class V>
struct Elements<V, BFloat16> : Bf16<V> {};
#endif

template <class S>
constexpr int64_t kDepth = depth<S>;

// Offset of vector j in a panel-major buffer, in elements. A lane of the vector is kDeep elements.
template <class V, int64_t kDeep = 1>
MNV2_INLINE int64_t vector_offset(int64_t vector, int64_t panel_stride) {
  constexpr int64_t kPerPanel = kPanel / V::kLanes;
  return vector / kPerPanel * panel_stride + vector % kPerPanel * V::kLanes * kDeep;
}

// v = f(v), in place, for the vectors at `count` places that lie `step` elements apart.
template <class V, class S, class F>
MNV2_INLINE void transform(S* p, int64_t count, int64_t step, F f) {
  for (int64_t i = 0; i < count; ++i, p += step)
    Elements<V, S>::store(f(Elements<V, S>::load(p)), p);
}

// Calls f(i, load, store) for the vectors of `count` elements of any kinds; the last vector may be
// partial.
template <class V, class F>
MNV2_INLINE void for_vectors(int64_t count, F f) {
  for (int64_t i = 0; i < count; i += V::kLanes) {
    const int64_t lanes = count - i;
    const auto load = [lanes]<class O>(const O* p) MNV2_INLINE_LAMBDA {
      return lanes >= V::kLanes ? Elements<V, O>::load(p) : Elements<V, O>::load_partial(p, lanes);
    };
    const auto store = [lanes]<class O>(V v, O* p) MNV2_INLINE_LAMBDA {
      lanes >= V::kLanes ? Elements<V, O>::store(v, p) : Elements<V, O>::store_partial(v, p, lanes);
    };
    f(i, load, store);
  }
}

}  // namespace
