// project: sums of a tile's outputs over the groups, then y.
#pragma once

#include "expand.h"

namespace {

template <class V, int R, int N>
void project_tile(const typename V::In* d, int64_t panels, int64_t panel, const Stage& stage,
                  int64_t first, int64_t hidden, int64_t vector, int32_t* sums, int64_t pitch,
                  bool starts) {
  using In = typename V::In;
  const In* w[N];
  V acc[R][N];
  unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
    const int64_t v = vector + j;
    w[j] = static_cast<const In*>(stage.weight) + (v / kPerPanel<V> * hidden + first) * kPanel +
           v % kPerPanel<V> * V::kLanes * V::kDepth;
    unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
      acc[i][j] = V::load(starts ? stage.bias + v * V::kLanes : sums + i * pitch + v * V::kLanes);
    });
  });
  for (int64_t p = 0; p < panels; ++p, d += panel) {
    dot_products<V, R, N>(acc, d, kPanel, w, kPanel);
    unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA { w[j] += kPanel * kPanel; });
  }
  unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
    unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
      acc[i][j].store(sums + i * pitch + (vector + j) * V::kLanes);
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
  const int64_t panels = ceil_div(group.channels, kPanel), panel = pixels * kPanel;
  const int64_t pitch = round_up(out, kPanel);
  for_pieces(ceil_div(out, V::kLanes), kMaxVectors<V>, [&](int64_t vector, int n) {
    with_vectors<V>(n, [&](auto N) {
      const auto table = project_table<V, N>(Rows<V, N>{});
      for_pieces(pixels, max_rows<V>(N), [&](int64_t pixel, int count) {
        table[count - 1](d + pixel * kPanel, panels, panel, stage, group.first, hidden, vector,
                         sums + pixel * pitch, pitch, group.first == 0);
      });
    });
  });
}

// One output pixel of its sums. x: what a residual adds, or null.
template <class V, bool kClips>
MNV2_INLINE void finish_pixel(const int32_t* sums, const Stage& stage, int64_t out,
                              const uint8_t* x, int32_t x_zero, float residual_scale, uint8_t* y) {
  using F = typename V::F;
  for (int64_t c = 0; c < out; c += V::kLanes) {
    const int64_t count = least(out - c, V::kLanes);
    F added = F::set1(0);
    if (x) {
      const V q = V::add(V::load_bytes(x + c, count), V::set1(-x_zero));
      added = F::mul(V::to_float(q), F::set1(residual_scale));
    }
    requantize<V, kClips>(V::load(sums + c), stage, c, added, x != nullptr)
        .store_bytes(y + c, count);
  }
}

}  // namespace
