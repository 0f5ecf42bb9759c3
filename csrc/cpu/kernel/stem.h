// The stem in the place of the expansion: a 3x3 convolution with stride 2 of the network's image, read
// from a patch S [rows][cols][C_in] that has its padding.
#pragma once

#include "expand.h"

namespace {

// Pixels of one row and vectors of channels.
template <class S, class T = Compute<S>>
struct StemTile {
  const S* patch;     // first value under the first pixel, [rows][cols][channels]
  int64_t patch_row;  // elements
  int64_t channels;   // of the patch: C_in up to a multiple of kDepth
  T* expanded;        // where the first pixel's first vector goes; the others follow it
  int64_t panel;      // elements between panels of `expanded`
  const S* weights;   // [group/16][9 * channels][16]
  const T* bias;      // [group]
  int64_t vector;     // first vector of this tile
  Clip<T> clip{Activation::kRelu6};  // of the activation
  Prefetch prefetch{};
};

// kChannels: of the patch, when known beforehand: then no pixel needs a pointer of its own.
template <class V, class S, int R, int N, int kChannels>
void stem_tile(const StemTile<S>& t) {
  const S* w[N];
  V acc[R][N];
  const int64_t channels = kChannels ? kChannels : t.channels;
  const int64_t run = 3 * channels, step = kStemStride * channels;
  unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
    w[j] = t.weights + vector_offset<V, kDepth<S>>(t.vector + j, 3 * run * kPanel);
    const V bias = V::load(t.bias + (t.vector + j) * V::kLanes);
    unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA { acc[i][j] = bias; });
  });
  const S* patch = t.patch;
  Prefetch prefetch = t.prefetch;
  const auto value = [&](auto i, int64_t k) MNV2_INLINE_LAMBDA { return patch + i * step + k; };
  for (int ky = 0; ky < 3; ++ky, patch += t.patch_row) {
    multiply<V, S, R, N>(acc, value, w, run, prefetch);
    unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA { w[j] += run * kPanel; });
  }
  unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
    auto* const out = t.expanded + vector_offset<V>(t.vector + j, t.panel);
    const V low = V::set1(t.clip.low), high = V::set1(t.clip.high);
    unrolled<R>([&](auto i)
                    MNV2_INLINE_LAMBDA { clamp(acc[i][j], low, high).store(out + i * kPanel); });
  });
}

// Functions by the number of pixels: entry r - 1 handles r of them.
template <class V, class S, int N, int kChannels, int... R>
auto stem_table(std::integer_sequence<int, R...>) {
  static constexpr decltype(&stem_tile<V, S, 1, N, kChannels>) kTable[] = {
      &stem_tile<V, S, R + 1, N, kChannels>...};
  return kTable;
}

// Sizes of the patch: channels, and elements of a row.
template <class S>
int64_t patch_channels(const Window<S>& w) {
  return round_up(w.shape.in_channels, kDepth<S>);
}
template <class S>
int64_t patch_row(const Window<S>& w) {
  return ((w.image_cols() - 1) * kStemStride + 3) * patch_channels(w);
}

// `count` pixels' channels side by side, with zeros behind an odd number of BFloat16.
template <class S>
void fill_pixels(const Window<S>& w, const S* x, int64_t count, S* out) {
  constexpr int64_t kRgb = round_up(3, kDepth<S>);
  const int64_t channels = patch_channels(w), in_channels = w.shape.in_channels;
  const int64_t x_col = w.args.x_col, x_channel = w.args.x_channel;
  if (x_channel == 1 && x_col == channels && in_channels == channels) {
    std::memcpy(out, x, size_t(count * channels) * sizeof(S));
  } else if (in_channels == 3 && x_col == 1) {
    const S *g = x + x_channel, *b = g + x_channel;
    for (int64_t i = 0; i < count; ++i, out += kRgb) {
      out[0] = x[i];
      out[1] = g[i];
      out[2] = b[i];
      if constexpr (kRgb > 3) out[3] = S{};
    }
  } else if (kRgb == 4 && in_channels == 3 && x_col == 3 && x_channel == 1) {
    // Four at a time; the fourth belongs to the next pixel.
    for (int64_t i = 0; i + 1 < count; ++i, out += 4, x += 3) {
      std::memcpy(out, x, 4 * sizeof(S));
      out[3] = S{};
    }
    std::memcpy(out, x, 3 * sizeof(S));
    out[3] = S{};
  } else {
    for (int64_t i = 0; i < count; ++i, x += x_col)
      for (int64_t c = 0; c < channels; ++c) *out++ = c < in_channels ? x[c * x_channel] : S{};
  }
}

// The image under rows of the window: what the stem's taps reach.
template <class S>
void fill_patch(const Window<S>& w, S* patch, RowRange range) {
  const BlockShape& s = w.shape;
  const int64_t channels = patch_channels(w), row_elements = patch_row(w);
  const int64_t rows = (range.to - range.from - 1) * kStemStride + 3;
  const int64_t cols = (w.image_cols() - 1) * kStemStride + 3;
  const int64_t first_row = (w.row * s.stride - s.pad_top + range.from) * kStemStride - 1;
  const int64_t first_col = (w.col * s.stride_across() - s.pad_left + w.left) * kStemStride - 1;
  const int64_t begin = greatest(0, -first_col), end = least(cols, s.image_width - first_col);
  for (int64_t r = 0; r < rows; ++r) {
    S* out = patch + r * row_elements;
    const int64_t row = first_row + r;
    if (row < 0 || row >= s.image_height) {
      std::memset(out, 0, size_t(row_elements) * sizeof(S));
      continue;
    }
    std::memset(out, 0, size_t(begin * channels) * sizeof(S));
    std::memset(out + end * channels, 0, size_t((cols - end) * channels) * sizeof(S));
    const S* x = w.x + row * w.args.x_row + (first_col + begin) * w.args.x_col;
    fill_pixels(w, x, end - begin, out + begin * channels);
  }
}

template <class V, class S>
void expand_stem(const Window<S>& w, const S* patch, Compute<S>* expanded, Group group,
                 Vectors vectors, RowRange rows, PrefetchQueue& prefetch) {
  StemTile<S> t;
  t.clip = Clip<Compute<S>>(w.shape.expand_activation);
  t.patch_row = patch_row(w);
  t.channels = patch_channels(w);
  t.panel = w.panel;
  t.weights = w.args.w_expand + group.first * w.shape.expand_terms(kDepth<S>);
  t.bias = w.args.b_expand + group.first;
  t.vector = vectors.first;
  constexpr int kRgb = round_up(3, kDepth<S>);
  const int64_t step = kStemStride * t.channels;
  with_vectors<V>(int(vectors.count), [&](auto N) {
    const auto table = t.channels == kRgb ? stem_table<V, S, N, kRgb>(Rows<V, N>{})
                                          : stem_table<V, S, N, 0>(Rows<V, N>{});
    for (int64_t row = rows.from; row < rows.to; ++row)
      for_pieces(w.image_cols(), max_rows<V>(N), [&](int64_t col, int count) {
        t.patch = patch + (row - rows.from) * kStemStride * t.patch_row + col * step;
        t.expanded = expanded + w.image_offset(row) + col * kPanel;
        t.prefetch = prefetch.next(9 * t.channels);
        table[count - 1](t);
      });
  });
  activate_rows<V>(w, expanded, vectors, rows, w.shape.expand_activation);
}

}  // namespace
