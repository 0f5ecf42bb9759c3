// Expanded pixels into the ring. A lane of the ring holds kDepth columns of one channel, the last of
// them its own: what one dot product of the depthwise convolution takes.
//
//   column   0        1        2        3        4
//   lane     z z z 0  z z 0 1  z 0 1 2  0 1 2 3  1 2 3 4      for kDepth = 4, z: the zero point
#pragma once

#include "requantize.h"

namespace {

// Lanes that hold the zero point in every column.
template <class V>
V padding_lanes(int32_t zero) {
  uint32_t lanes = 0;
  for (int i = 0; i < V::kDepth; ++i) lanes |= uint32_t(zero) << (i * 32 / V::kDepth);
  return V::set1(int32_t(lanes));
}

// acc[i][j] += x[i * pitch + ...] w[j][...], over `terms` elements.
template <class V, int R, int N>
MNV2_INLINE void dot_products(V (&acc)[R][N], const typename V::In* x, int64_t pitch,
                              const typename V::In* const (&w)[N], int64_t terms) {
#pragma GCC unroll 4
  for (int64_t k = 0; k < terms; k += V::kDepth) {
    V row[N];
    unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA { row[j] = V::weights(w[j] + k * kPanel); });
    unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
      const V value = V::broadcast(x + i * pitch + k);
      unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA { acc[i][j] = V::dot(acc[i][j], value, row[j]); });
    });
  }
}

template <class V>
struct ExpandTile {
  using In = typename V::In;
  const In* x;    // of the first pixel
  int64_t pitch;  // elements between pixels
  int64_t terms;  // a multiple of kDepth
  const Stage* stage;
  int64_t vector;    // first vector of channels
  int32_t* ring;     // of the first pixel and the group's first panel
  int64_t panel;     // elements between panels of the ring
  int64_t in_group;  // first vector, counted within the group
  bool first;        // whether padding lies before the first pixel
};

template <class V, int R, int N, bool kClips>
void expand_tile(const ExpandTile<V>& t) {
  using In = typename V::In;
  const In* w[N];
  int32_t* ring[N];
  V acc[R][N];
  unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
    const int64_t v = t.vector + j, g = t.in_group + j;
    w[j] = static_cast<const In*>(t.stage->weight) + v / kPerPanel<V> * t.terms * kPanel +
           v % kPerPanel<V> * V::kLanes * V::kDepth;
    ring[j] = t.ring + g / kPerPanel<V> * t.panel + g % kPerPanel<V> * V::kLanes;
    const V bias = V::load(t.stage->bias + v * V::kLanes);
    unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA { acc[i][j] = bias; });
  });
  dot_products<V, R, N>(acc, t.x, t.pitch, w, t.terms);
  unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
    V lanes = t.first ? padding_lanes<V>(t.stage->zero) : V::load(ring[j] - kPanel);
    unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
      const V q = requantize<V, kClips>(acc[i][j], *t.stage, (t.vector + j) * V::kLanes);
      lanes = V::push(lanes, q);
      lanes.store(ring[j] + i * kPanel);
    });
  });
}

template <class V, int N, bool kClips, int... R>
auto expand_table(std::integer_sequence<int, R...>) {
  static constexpr decltype(&expand_tile<V, 1, N, kClips>) kTable[] = {
      &expand_tile<V, R + 1, N, kClips>...};
  return kTable;
}

// One row of the window: its pixels inside the image, then the padding behind them.
template <class V>
void expand_row(const Window<uint8_t>& w, const typename V::In* x, int64_t pitch,
                const Stage& stage, Group group, int32_t* ring_row) {
  const int64_t vectors = ceil_div(group.channels, kPanel) * kPerPanel<V>;
  ExpandTile<V> t{x, pitch, pitch, &stage, 0, nullptr, w.panel, 0, false};
  const auto run = [&]<bool kClips>(std::bool_constant<kClips>) {
    for_pieces(vectors, kMaxVectors<V>, [&](int64_t vector, int n) {
      with_vectors<V>(n, [&](auto N) {
        const auto table = expand_table<V, N, kClips>(Rows<V, N>{});
        for_pieces(w.image_cols(), max_rows<V>(N), [&](int64_t col, int count) {
          t.x = x + col * pitch;
          t.in_group = vector;
          t.vector = group.first / V::kLanes + vector;
          t.ring = ring_row + (w.left + col) * kPanel;
          t.first = col == 0;
          table[count - 1](t);
        });
      });
    });
  };
  clips(stage) ? run(std::true_type{}) : run(std::false_type{});
}

// The columns behind the image that hold some of its pixels.
template <class V>
void pad_row(const Window<uint8_t>& w, Group group, int32_t* ring_row, int32_t zero) {
  const V padding = V::set1(zero);
  const int64_t end = least(w.right + V::kDepth - 1, w.in_cols);
  for (int64_t panel = 0; panel < ceil_div(group.channels, kPanel); ++panel)
    for (int64_t v = 0; v < kPerPanel<V>; ++v) {
      int32_t* at = ring_row + panel * w.panel + w.right * kPanel + v * V::kLanes;
      V lanes = V::load(at - kPanel);
      for (int64_t col = w.right; col < end; ++col, at += kPanel) {
        lanes = V::push(lanes, padding);
        lanes.store(at);
      }
    }
}

// No expansion: x itself.
template <class V>
void copy_row(const Window<uint8_t>& w, const uint8_t* x, Group group, int32_t* ring_row,
              int32_t zero) {
  for (int64_t v = 0; v < ceil_div(group.channels, kPanel) * kPerPanel<V>; ++v) {
    const int64_t channel = v * V::kLanes, count = least(group.channels - channel, V::kLanes);
    int32_t* at =
        ring_row + v / kPerPanel<V> * w.panel + v % kPerPanel<V> * V::kLanes + w.left * kPanel;
    V lanes = padding_lanes<V>(zero);
    for (int64_t col = 0; col < w.image_cols(); ++col, at += kPanel) {
      const uint8_t* const pixel = x + col * w.args.x_col + group.first + channel;
      lanes = V::push(lanes, count > 0 ? V::load_bytes(pixel, count) : V::set1(0));
      lanes.store(at);
    }
  }
}

// Rows of x as the dot products take them: [pixel][terms], zeros behind the last term.
template <class V>
void load_row(const uint8_t* x, int64_t x_col, int64_t cols, int64_t terms, typename V::In* out) {
  const int64_t pitch = round_up(terms, V::kDepth);
  for (int64_t col = 0; col < cols; ++col, x += x_col, out += pitch) {
    V::widen(x, terms, out);
    for (int64_t k = terms; k < pitch; ++k) out[k] = 0;
  }
}

// The same of a stem: the nine pixels under each of its outputs, padded by the zero point.
template <class V>
void load_stem_row(const Window<uint8_t>& w, int64_t row, int32_t zero, typename V::In* out) {
  const BlockShape& s = w.shape;
  const int64_t terms = 9 * s.in_channels, pitch = round_up(terms, V::kDepth);
  const int64_t y = (w.row * s.stride - s.pad_top + row) * kStemStride - 1;
  const int64_t first = w.col * s.stride_across() - s.pad_left + w.left;
  for (int64_t col = 0; col < w.image_cols(); ++col, out += pitch) {
    const int64_t x = (first + col) * kStemStride - 1;
    typename V::In* to = out;
    for (int64_t ky = 0; ky < 3; ++ky)
      for (int64_t kx = 0; kx < 3; ++kx, to += s.in_channels) {
        const bool inside =
            y + ky >= 0 && y + ky < s.image_height && x + kx >= 0 && x + kx < s.image_width;
        const uint8_t* const pixel = w.x + (y + ky) * w.args.x_row + (x + kx) * w.args.x_col;
        for (int64_t c = 0; c < s.in_channels; ++c)
          to[c] = typename V::In(inside ? pixel[c] : zero);
      }
    for (int64_t k = terms; k < pitch; ++k) out[k] = 0;
  }
}

}  // namespace
