// What a squeeze-and-excite needs beside the block's stages: sums of d over the image, their mean, the
// activation and the gate behind its two products, and d times the gate.
#pragma once

#include "activation.h"
#include "window.h"

namespace {

// Sums of each row of the band, one for every channel of the group.
template <class V, class S>
void pool(const Window<S>& w, const S* d, Group group, Band band) {
  const int64_t pitch = w.plan.tiles_across(w.shape) * w.shape.hidden_panels() * kPanel;
  for (int64_t v = 0; v < ceil_div(group.channels, V::kLanes); ++v) {
    const S* at = d + vector_offset<V>(v, band.rows * w.cols * kPanel);
    for (int64_t r = band.row; r < band.row + band.rows; ++r) {
      V sum = V::set1(0);
      for (int64_t col = 0; col < w.cols; ++col, at += kPanel)
        sum = V::add(sum, Elements<V, S>::load(at));
      sum.store(w.pooled + r * pitch + group.first + v * V::kLanes);
    }
  }
}

// d *= gate, in place.
template <class V, class S>
void multiply_by_gate(const Window<S>& w, S* d, Group group, Band band) {
  const int64_t pixels = band.rows * w.cols;
  for (int64_t v = 0; v < ceil_div(group.channels, V::kLanes); ++v) {
    const V gate = V::load(w.gate + group.first + v * V::kLanes);
    transform<V>(d + vector_offset<V>(v, pixels * kPanel), pixels, kPanel,
                 [&](V v) MNV2_INLINE_LAMBDA { return multiplied(v, gate); });
  }
}

// mean[c] = the rows' sums of one image, added up in order, over its pixels.
template <class V>
void mean_of_rows(const typename V::T* rows, int64_t count, int64_t channels, typename V::T scale,
                  typename V::T* mean) {
  for (int64_t c = 0; c < channels; c += V::kLanes) {
    V sum = V::load(rows + c);
    for (int64_t r = 1; r < count; ++r) sum = V::add(sum, V::load(rows + r * channels + c));
    multiplied(sum, V::set1(scale)).store(mean + c);
  }
}

// In place: the activation between the two products, and the gate behind them.
template <class V>
void activate_all(typename V::T* p, int64_t count, ActivationFunction a) {
  for_vectors<V>(count, [&](int64_t i, auto load, auto store)
                            MNV2_INLINE_LAMBDA { store(activated(load(p + i), a), p + i); });
}

template <class V>
void gate_all(typename V::T* p, int64_t count, Gate gate) {
  for_vectors<V>(count, [&](int64_t i, auto load, auto store)
                            MNV2_INLINE_LAMBDA { store(gate_of(load(p + i), gate), p + i); });
}

}  // namespace
