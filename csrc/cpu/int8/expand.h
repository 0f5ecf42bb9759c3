// expand: a row of x to a row of the ring, see columns.h.
#pragma once

#include "product.h"

namespace {

template <class V>
struct ExpandTile {
  PixelPanels<V> x;  // from the tile's first pixel on
  int64_t terms;     // a multiple of kQuad
  const Stage* stage;
  int64_t vector;       // first vector of channels
  Columns<V>* columns;  // of each vector
  bool odd;             // whether the first pixel is the second of its pair
};

template <class V, int R, int N, Bound kBound>
void expand_tile(const ExpandTile<V>& t) {
  const int8_t* w[N];
  V acc[R][N];
  unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
    w[j] = product_weights<V>(*t.stage, t.vector + j, t.terms);
    const V bias = V::load(t.stage->bias + (t.vector + j) * V::kLanes);
    unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA { acc[i][j] = bias; });
  });
  dot_products<V, R, N>(acc, t.x, w, t.terms);
  const int32_t zero = t.stage->zero;
  unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
    Columns<V> columns = t.columns[j];
    V values[R];
    unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA { values[i] = acc[i][j]; });
    requantize<V, kBound>(values, *t.stage, (t.vector + j) * V::kLanes);
    // Padding before the first and behind the last.
    const auto value = [&](auto i) MNV2_INLINE_LAMBDA {
      if constexpr (i < 0 || i >= R)
        return V::set1(0);
      else
        return values[i];
    };
    const auto push = [&](auto begin) MNV2_INLINE_LAMBDA {
      unrolled<(R - begin + 1) / 2>([&](auto p) MNV2_INLINE_LAMBDA {
        constexpr int i = int(begin) + 2 * int(p);
        columns.push(pair_of<V>(value(std::integral_constant<int, i>{}),
                                value(std::integral_constant<int, i + 1>{}), zero));
      });
    };
    t.odd ? push(std::integral_constant<int, -1>{}) : push(std::integral_constant<int, 0>{});
    t.columns[j] = columns;
  });
}

template <class V, int N, Bound kBound, int... R>
auto expand_table(std::integer_sequence<int, R...>) {
  static constexpr decltype(&expand_tile<V, 1, N, kBound>) kTable[] = {
      &expand_tile<V, R + 1, N, kBound>...};
  return kTable;
}

// Where a row lies in the ring.
struct RingRow {
  int32_t* first;  // quad -1 of the group's first panel
  int64_t length;  // quads of a row, all 16 channels
  int64_t panel;   // between panels

  // Quad -1 of vector `v` of the group, and the row's end.
  template <class V>
  MNV2_INLINE int32_t* begin(int64_t v) const {
    return first + v / kPerPanel<V> * panel + v % kPerPanel<V> * V::kLanes;
  }
  template <class V>
  MNV2_INLINE int32_t* end(int64_t v) const {
    return begin<V>(v) + length;
  }
};

// left: columns of padding before the `cols` pixels.
template <class V>
void expand_row(const PixelPanels<V>& x, int64_t left, int64_t cols, int64_t terms,
                const Stage& stage, Group group, const RingRow& row) {
  const int64_t vectors = ceil_div(group.channels, kPanel) * kPerPanel<V>;
  const auto padding = V::Pair::set1(int16_t(stage.zero));
  with_bound(stage, false, [&](auto bound) {
    for_pieces(vectors, kMaxVectors<V>, [&](int64_t vector, int n) {
      with_vectors<V>(n, [&](auto N) {
        constexpr int kMost = max_rows<V>(N) / 2 * 2;
        const auto table = expand_table<V, N, bound()>(std::make_integer_sequence<int, kMost>{});
        Columns<V> columns[N];
        for (int j = 0; j < N; ++j) columns[j] = {row.begin<V>(vector + j), left, padding};
        ExpandTile<V> t{x,       round_up(terms, kQuad), &stage, group.first / V::kLanes + vector,
                        columns, left % 2 == 1};
        // Pieces end between pairs, but for the last.
        for (int64_t done = 0; done < cols;) {
          const int64_t to_go = cols - done, pieces = ceil_div(to_go + t.odd, kMost);
          const int64_t count =
              pieces == 1 ? to_go : round_up(ceil_div(to_go + t.odd, pieces), 2) - t.odd;
          table[count - 1](t);
          t.x.first += count * kPanel;
          t.odd = false;
          done += count;
        }
        for (int j = 0; j < N; ++j) columns[j].finish(row.end<V>(vector + j), padding);
      });
    });
  });
}

// No expansion: x itself.
template <class V>
void copy_row(const uint8_t* x, int64_t x_col, int64_t left, int64_t cols, int32_t zero,
              Group group, const RingRow& row) {
  const auto padding = V::Pair::set1(int16_t(zero));
  for (int64_t v = 0; v < ceil_div(group.channels, kPanel) * kPerPanel<V>; ++v) {
    const int64_t channel = v * V::kLanes, count = least(group.channels - channel, V::kLanes);
    Columns<V> columns(row.begin<V>(v), left, padding);
    const uint8_t* const first = x + group.first + channel;
    const auto value = [&](int64_t col) MNV2_INLINE_LAMBDA {
      if (col < 0 || col >= cols) return V::set1(zero);
      return count > 0 ? V::load_bytes(first + col * x_col, count) : V::set1(0);
    };
    for (int64_t col = -(left % 2); col < cols; col += 2)
      columns.push(V::pair(value(col), value(col + 1)));
    columns.finish(row.end<V>(v), padding);
  }
}

// The nine pixels under each of a stem's outputs, padded by the zero point, as products read them.
template <class V>
void load_stem_row(const Window<uint8_t>& w, int64_t row, int32_t zero, typename V::In* out) {
  // Copies: bytes are written, of which a compiler must fear that they are anything.
  const BlockShape s = w.shape;
  const int64_t c = s.in_channels, terms = 9 * c, cols = w.image_cols();
  const int64_t y = (w.row * s.stride - s.pad_top + row) * kStemStride - 1;
  const int64_t first = (w.col * s.stride_across() - s.pad_left + w.left) * kStemStride - 1;
  const int64_t x_row = w.args.x_row, top = greatest(0, -y);
  const int64_t bottom = least(3, s.image_height - y);
  const uint8_t* const image = w.x + y * x_row;
  uint8_t bytes[9 * kMostStemChannels + kPanel];
  std::memset(bytes, 0, sizeof(bytes));
  for (int64_t ky = 0; ky < 3; ++ky)
    if (ky < top || ky >= bottom) std::memset(bytes + ky * 3 * c, zero, size_t(3 * c));
  for (int64_t col = 0; col < cols; ++col, out += kPanel) {
    const int64_t x = first + col * kStemStride;
    const bool inside = x >= 0 && x + 3 <= s.image_width;
    for (int64_t ky = top; ky < bottom; ++ky) {
      uint8_t* const to = bytes + ky * 3 * c;
      const uint8_t* const from = image + ky * x_row + x * c;
      if (inside && c == 3) {
        std::memcpy(to, from, 9);
      } else if (inside) {
        std::memcpy(to, from, size_t(3 * c));
      } else {
        for (int64_t kx = 0; kx < 3; ++kx)
          x + kx >= 0 && x + kx < s.image_width ? std::memcpy(to + kx * c, from + kx * c, size_t(c))
                                                : std::memset(to + kx * c, zero, size_t(c));
      }
    }
    for (int64_t k = 0; k < terms; k += kPanel) V::widen(bytes + k, out + k * cols);
  }
}

}  // namespace
