// The expansion: e = activation(x W_e + b_e), or the stem's, of one group of hidden channels.
#pragma once

#include "activation.cuh"
#include "load.cuh"

namespace mnv2_fused::cuda {

// Zeros for the channels of a quad that do not exist: 0 * Inf would give NaN.
MNV2_DEVICE void keep(uint2& q, int channels) {
  if (channels < 2) q.x &= channels < 1 ? 0 : 0xffffu;
  if (channels < 4) q.y &= channels < 3 ? 0 : 0xffffu;
}
MNV2_DEVICE void keep(uint4& q, int channels) {
  if (channels < 1) q.x = 0;
  if (channels < 2) q.y = 0;
  if (channels < 3) q.z = 0;
  if (channels < 4) q.w = 0;
}

template <class C>
MNV2_DEVICE typename C::Quad narrow_expanded(float4 v, const Args& a) {
  if constexpr (C::kGeneral)
    return C::Traits::narrow(activated(v, a.expand_activation));
  else
    return C::Traits::narrow_relu6(v);
}

// Offsets of what one step reads and writes, for its first panel.
struct ExpandStep {
  int weights, bias, e;
};

// e of kTiles tiles of 16 pixels, `apart` tiles from each other, and of kPanels panels. Returns whether
// any of it is infinite or NaN; asked only of two-byte elements in general forms.
template <class C, int kTiles, int kPanels>
MNV2_DEVICE bool expand_tiles(const Args& a, int pixels, int tile, int apart,
                              const ExpandStep& step) {
  using Quad = typename C::Quad;
  constexpr int kQuad = C::kQuad, kPixel = C::kPixel;
  const int lane = lane_index(), t = lane % 4;
  Sums c[kPanels][kTiles];
#pragma unroll
  for (int p = 0; p < kPanels; ++p) {
    const float4 b = load_shared<float4>(step.bias + (p * 4 + t) * 16);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) start_at(c[p][i], b);
  }
  int row[kTiles][2], window[kTiles][2];
  const int to_row = C::kTakesStem && t < 3 ? a.shared.x_panel : 0;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      row[i][lower] = (tile + i * apart) * 16 + lower * 8 + lane / 4;
      if (!has_stem<C>(a)) continue;
      // Three pixels of a row; the pixel behind them may be infinite, so it is not read.
      const int at = a.shared.windows + 2 * min(row[i][lower], pixels - 1);
      window[i][lower] = t < 3 ? (load_shared<uint16_t>(at) + t) * kQuad : a.shared.zeros;
    }
  }
#pragma unroll 1
  for (int q = 0; q < a.in_panels; ++q) {
    Quad x[kTiles][2];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const int at = has_stem<C>(a) ? window[i][lower] + q * to_row
                                      : q * a.shared.x_panel +
                                            min(row[i][lower], pixels - 1) * kPixel + t * kQuad;
        x[i][lower] = load_shared<Quad>(at);
      }
    }
#pragma unroll
    for (int p = 0; p < kPanels; ++p)
      multiply<C::kPrecision, kTiles>(c[p], x, step.weights + (p * a.in_panels + q) * C::kFragment,
                                      lane);
  }
  bool infinite = false;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      if (row[i][lower] >= pixels) continue;
      const int place = load_shared<uint16_t>(a.shared.places + 2 * row[i][lower]);
#pragma unroll
      for (int p = 0; p < kPanels; ++p) {
        const Quad q = narrow_expanded<C>(quad_of(c[p][i], lower), a);
        if constexpr (C::kGeneral && C::kPairs)
          infinite = infinite || C::Traits::is_infinite(q.x) || C::Traits::is_infinite(q.y);
        store_shared(step.e + p * a.shared.e_panel + place * kPixel + t * kQuad, q);
      }
    }
  }
  return infinite;
}

// Clears channels behind the last one in the group's last panel: 0, not the 0 * Inf of their weights.
template <class C>
MNV2_DEVICE void clear_missing_channels(const Args& a, int pixels, const Group& g) {
  using Quad = typename C::Quad;
  const SharedLayout& l = a.shared;
  const int channels = a.hidden_channels - g.panel * int(kPanel);
  if (channels >= g.panels * int(kPanel)) return;
  const int tiles = (pixels + 15) / 16, lane = lane_index();
  // A lane clears what it has written itself, so that no barrier is needed.
  for (int i = warp_index(); i < tiles; i += warp_count()) {
    for (int row = i * 16 + lane / 4; row < min(i * 16 + 16, pixels); row += 8) {
      const int place = load_shared<uint16_t>(l.places + 2 * row), last = g.panels - 1;
      const int at = l.e + last * l.e_panel + (place * 4 + lane % 4) * C::kQuad;
      Quad q = load_shared<Quad>(at);
      keep(q, channels - last * int(kPanel) - lane % 4 * 4);
      store_shared(at, q);
    }
  }
}

// A group of e at each pixel in the image; the rest of e is zero already. A step of a warp computes up
// to C::kExpandTiles tiles of 16 pixels and C::kExpandPanels panels. Returns what its steps return.
template <class C>
MNV2_DEVICE bool expand(const Args& a, int pixels, const Group& g) {
  constexpr int kTiles = C::kExpandTiles, kPanels = C::kExpandPanels;
  const SharedLayout& l = a.shared;
  const int tiles = (pixels + 15) / 16, warps = warp_count();
  bool infinite = false;
  for (int p = 0; p < g.panels; p += kPanels) {
    const ExpandStep step{g.stage + p * a.in_panels * C::kFragment,
                          g.stage + l.b_expand + p * int(kPanel) * 4, l.e + p * l.e_panel};
    const bool all = kPanels == 1 || p + 1 < g.panels;
    for (int i = warp_index(); i < tiles; i += kTiles * warps) {
      const bool two = kTiles == 2 && i + warps < tiles;
      bool found;
      if (two && all)
        found = expand_tiles<C, kTiles, kPanels>(a, pixels, i, warps, step);
      else if (two)
        found = expand_tiles<C, kTiles, 1>(a, pixels, i, warps, step);
      else if (all)
        found = expand_tiles<C, 1, kPanels>(a, pixels, i, warps, step);
      else
        found = expand_tiles<C, 1, 1>(a, pixels, i, warps, step);
      infinite = infinite || found;
    }
  }
  clear_missing_channels<C>(a, pixels, g);
  return infinite;
}

// Whether bytes of e hold an infinity or NaN.
template <class C>
MNV2_DEVICE bool any_infinite(int e, int bytes) {
  bool found = false;
  for (int i = threadIdx.x * 16; i < bytes; i += thread_count() * 16) {
    const uint4 v = load_shared<uint4>(e + i);
    for (const uint32_t two : {v.x, v.y, v.z, v.w}) found = found || C::Traits::is_infinite(two);
  }
  return found;
}

}  // namespace mnv2_fused::cuda
