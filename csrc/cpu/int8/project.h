// project: sums of a tile's outputs over the groups, then y.
#pragma once

#include "product.h"

namespace {

template <class V>
struct ProjectTile {
  PixelPanels<V> d;
  int64_t terms;
  int64_t first, hidden;  // term of the weights that is d's first, and how many they have
  const Stage* stage;
  int64_t vector;
  int32_t* sums;  // of the tile's first pixel
  int64_t pitch;  // between pixels
};

template <class V, int R, int N>
void project_tile(const ProjectTile<V>& t) {
  const int8_t* w[N];
  V acc[R][N];
  unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
    const int64_t v = t.vector + j;
    w[j] = product_weights<V>(*t.stage, v, t.hidden) + t.first * kPanel;
    unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
      acc[i][j] = V::load((t.first == 0 ? t.stage->bias : t.sums + i * t.pitch) + v * V::kLanes);
    });
  });
  dot_products<V, R, N>(acc, t.d, w, t.terms);
  unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
    unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
      acc[i][j].store(t.sums + i * t.pitch + (t.vector + j) * V::kLanes);
    });
  });
}

template <class V, int N, int... R>
auto project_table(std::integer_sequence<int, R...>) {
  static constexpr decltype(&project_tile<V, 1, N>) kTable[] = {&project_tile<V, R + 1, N>...};
  return kTable;
}

// sums[pixels][out/16 * 16] += w_project d, of one group.
template <class V>
void project(const typename V::In* d, int64_t pixels, const Stage& stage, Group group,
             int64_t hidden, int64_t out, int32_t* sums) {
  const int64_t pitch = round_up(out, kPanel), terms = round_up(group.channels, kPanel);
  for_pieces(ceil_div(out, V::kLanes), kMaxVectors<V>, [&](int64_t vector, int n) {
    with_vectors<V>(n, [&](auto N) {
      const auto table = project_table<V, N>(Rows<V, N>{});
      for_pieces(pixels, max_rows<V>(N), [&](int64_t pixel, int count) {
        table[count - 1]({{d + pixel * kPanel, pixels * kPanel},
                          terms,
                          group.first,
                          hidden,
                          &stage,
                          vector,
                          sums + pixel * pitch,
                          pitch});
      });
    });
  });
}

// A tile's sums and where its outputs go.
struct Outputs {
  const int32_t* sums;
  int64_t pitch;  // between pixels of sums
  int64_t rows, cols;
  uint8_t* y;
  int64_t y_row, y_col;
  // What a residual adds, or null:
  const uint8_t* x;
  int64_t x_row, x_col;
  int32_t x_zero;
  float residual_scale;
};

// y of one vector of channels, [channel, channel + count).
template <class V, Bound kBound, bool kAdds>
void finish_vector(const Outputs& o, const Stage& stage, int64_t channel, int64_t count) {
  using F = typename V::F;
  // Copies: y is bytes, of which a compiler must fear that they are anything.
  const Stage s = stage;
  const F scale = F::set1(o.residual_scale);
  const V x_zero = V::set1(-o.x_zero), zero = V::set1(s.zero);
  const int64_t cols = o.cols, pitch = o.pitch, x_col = o.x_col, y_col = o.y_col;
  for (int64_t r = 0; r < o.rows; ++r) {
    const int32_t* sums = o.sums + r * cols * pitch + channel;
    const uint8_t* x = kAdds ? o.x + r * o.x_row + channel : nullptr;
    uint8_t* y = o.y + r * o.y_row + channel;
    for (int64_t c = 0; c < cols; ++c, sums += pitch, y += y_col) {
      F added = F::set1(0);
      if constexpr (kAdds) {
        added = F::mul(V::to_float(V::add(V::load_bytes(x, count), x_zero)), scale);
        x += x_col;
      }
      const V q = requantize<V, kBound>(V::load(sums), s, channel, added, kAdds);
      V::add(q, zero).store_bytes(y, count);
    }
  }
}

template <class V>
void finish(const Outputs& o, const Stage& stage, int64_t channels) {
  with_bound(stage, true, [&](auto bound) {
    for (int64_t c = 0; c < channels; c += V::kLanes) {
      const int64_t count = least(channels - c, V::kLanes);
      o.x ? finish_vector<V, bound(), true>(o, stage, c, count)
          : finish_vector<V, bound(), false>(o, stage, c, count);
    }
  });
}

}  // namespace
