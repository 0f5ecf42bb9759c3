// expand: expanded = activation(w_expand x + b_expand), into the ring; or x itself, where the block has
// no expansion.
#pragma once

#include "activation.h"
#include "product.h"
#include "window.h"

namespace {

// A 1x1 product whose results are stored as O.
template <class S, class O>
struct ExpandTile : Product<S> {
  Pixels<O> expanded;            // where each pixel's first vector goes
  int64_t panel;                 // elements between panels of `expanded`
  Compute<S> low = 0, high = 6;  // of the activation
};

// kSum: adds the pixels up into expanded[0] instead of storing each.
template <class V, class S, class O, int R, int N, bool kSum>
void expand_tile(const ExpandTile<S, O>& t) {
  const S* w[N];
  const S* x[R];
  V acc[R][N];
  unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA { x[i] = t.x[i]; });
  weight_rows<V, S, N>(t, w);
  unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
    const V bias = V::load(t.bias + (t.vector + j) * V::kLanes);
    unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA { acc[i][j] = bias; });
  });
  const auto value = [&](auto i, int64_t k) MNV2_INLINE_LAMBDA { return x[i] + k; };
  Prefetch prefetch = t.prefetch;
  if (t.in_channels <= t.longest)
    multiply<V, S, R, N>(acc, value, w, t.in_channels, prefetch);
  else
    sum_in_chunks<V, S, R, N>(t, acc);
  unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
    const int64_t offset = vector_offset<V>(t.vector + j, t.panel);
    const V low = V::set1(t.low), high = V::set1(t.high);
    V sum = clamp(acc[0][j], low, high);
    unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
      if constexpr (!kSum)
        Elements<V, O>::store(clamp(acc[i][j], low, high), t.expanded[i] + offset);
      else if constexpr (i > 0)
        sum = V::add(sum, clamp(acc[i][j], low, high));
    });
    if constexpr (kSum) Elements<V, O>::store(sum, t.expanded[0] + offset);
  });
}

// Functions by the number of pixels: entry r - 1 handles r of them.
template <class V, class S, class O, int N, bool kSum, int... R>
auto expand_table(std::integer_sequence<int, R...>) {
  static constexpr decltype(&expand_tile<V, S, O, 1, N, kSum>) kTable[] = {
      &expand_tile<V, S, O, R + 1, N, kSum>...};
  return kTable;
}

// The next pixels of the window inside the image, in row order.
template <class S>
struct Cursor {
  int64_t row, col;
  const S* x;            // of this pixel
  Compute<S>* expanded;  // of this pixel

  Cursor(const Window<S>& w, Compute<S>* ring, int64_t row)
      : row(row), col(w.left), x(w.x_row(row)), expanded(ring + w.image_offset(row)) {}
};
template <class S>
void next_pixels(const Window<S>& w, Compute<S>* ring, Cursor<S>& at, int count,
                 ExpandTile<S, Compute<S>>& t) {
  for (int i = 0; i < count;) {
    t.x.fill(i, at.x, w.args.x_col);
    t.expanded.fill(i, at.expanded, kPanel);
    const int64_t run = least(count - i, w.right - at.col);
    i += int(run);
    at.col += run;
    at.x += run * w.args.x_col;
    at.expanded += run * kPanel;
    if (at.col == w.right) at = Cursor<S>(w, ring, at.row + 1);
  }
}

// Activation of expanded rows, where clipping was not all.
template <class V, class S>
void activate_rows(const Window<S>& w, Compute<S>* expanded, Vectors vectors, RowRange rows,
                   Activation activation) {
  if (is_clip(activation)) return;
  const ActivationFunction function = w.shape.function(activation);
  for (int64_t v = vectors.first; v < vectors.first + vectors.count; ++v)
    for (int64_t row = rows.from; row < rows.to; ++row)
      activate<V>(expanded + vector_offset<V>(v, w.panel) + w.image_offset(row), w.image_cols(),
                  kPanel, function);
}

template <class V, class S>
void expand(const Window<S>& w, Compute<S>* expanded, Group group, Vectors vectors, RowRange rows,
            PrefetchQueue& prefetch) {
  using T = Compute<S>;
  ExpandTile<S, T> t;
  t.panel = w.panel;
  t.weights = w.args.w_expand + group.first * w.shape.expand_terms(kDepth<S>);
  t.bias = w.args.b_expand + group.first;
  t.in_channels = w.shape.in_channels;
  t.vector = vectors.first;
  const Clip<T> clip(w.shape.expand_activation);
  t.low = clip.low;
  t.high = clip.high;
  with_vectors<V>(int(vectors.count), [&](auto N) {
    const auto table = expand_table<V, S, T, N, false>(Rows<V, N>{});
    Cursor<S> at(w, expanded, rows.from);
    for_pieces((rows.to - rows.from) * w.image_cols(), max_rows<V>(N), [&](int64_t, int count) {
      next_pixels(w, expanded, at, count, t);
      t.prefetch = prefetch.next(t.in_channels);
      table[count - 1](t);
    });
  });
  activate_rows<V>(w, expanded, vectors, rows, w.shape.expand_activation);
}

// No expansion: x itself, panel by panel, with zeros past the last channel.
template <class V, class S>
void copy_input(const Window<S>& w, Compute<S>* expanded, Group group, Vectors vectors,
                RowRange rows) {
  using In = Elements<V, S>;
  for (int64_t row = rows.from; row < rows.to; ++row)
    for (int64_t v = vectors.first; v < vectors.first + vectors.count; ++v) {
      const int64_t c = v * V::kLanes, lanes = group.channels - c;
      if (lanes <= 0) break;
      const S* x = w.x_row(row) + group.first + c;
      Compute<S>* e = expanded + vector_offset<V>(v, w.panel) + w.image_offset(row);
      for (int64_t col = w.left; col < w.right; ++col, x += w.args.x_col, e += kPanel)
        (lanes >= V::kLanes ? In::load(x) : In::load_partial(x, lanes)).store(e);
    }
}

}  // namespace
