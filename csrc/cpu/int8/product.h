// Sums of products in a register tile: R pixels times N vectors of channels, read by both 1x1 convolutions.
#pragma once

#include "columns.h"

namespace {

// Pixels as products read them: [terms/16][pixels][16].
template <class V>
struct PixelPanels {
  const typename V::In* first;
  int64_t panel;  // elements between panels
};

template <class V, int kSteps, int R, int N>
MNV2_INLINE void dot_steps(V (&acc)[R][N], const typename V::In* x, const int8_t* const (&w)[N]) {
  unrolled<kSteps>([&](auto k) MNV2_INLINE_LAMBDA {
    typename V::Weights row[N];
    unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA { row[j] = V::weights(w[j] + k * kQuad * kPanel); });
    unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
      const typename V::Value value = V::broadcast(x + i * kPanel + k * kQuad);
      unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA { acc[i][j] = V::dot(acc[i][j], value, row[j]); });
    });
  });
}

// Tells the compiler that sums stay in registers from one turn of a loop to the next.
template <class V, int R, int N>
MNV2_INLINE void keep(V (&acc)[R][N]) {
  if constexpr (V::kRegisters >= 16)
    unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
      unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA { asm volatile("" : V_KEEP(acc[i][j].v)); });
    });
}

// acc[i][j] += x[i] w[j] over `terms`, a multiple of kQuad. Moves w.
template <class V, int R, int N>
MNV2_INLINE void dot_products(V (&acc)[R][N], const PixelPanels<V>& x, const int8_t* (&w)[N],
                              int64_t terms) {
  const typename V::In* p = x.first;
  for (; terms >= kPanel; terms -= kPanel, p += x.panel) {
    dot_steps<V, kPanel / kQuad>(acc, p, w);
    unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA { w[j] += kPanel * kPanel; });
    keep(acc);
  }
  for (; terms > 0; terms -= kQuad, p += kQuad) {
    dot_steps<V, 1>(acc, p, w);
    unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA { w[j] += kQuad * kPanel; });
  }
}

// Weights of vector `v` of a product over `terms`.
template <class V>
MNV2_INLINE const int8_t* product_weights(const Stage& s, int64_t v, int64_t terms) {
  return s.weight + v / kPerPanel<V> * terms * kPanel + v % kPerPanel<V> * V::kLanes * kQuad;
}

// Pixels of uint8 as products read them. Behind the last term lies what lies behind the pixel: its weights
// are 0, and memory is readable 16 bytes on.
template <class V>
void load_pixels(const uint8_t* x, int64_t x_pixel, int64_t pixels, int64_t terms,
                 typename V::In* out) {
  for (int64_t k = 0; k < terms; k += kPanel) {
    const uint8_t* from = x + k;
    for (int64_t i = 0; i < pixels; ++i, from += x_pixel, out += kPanel) V::widen(from, out);
  }
}

}  // namespace
