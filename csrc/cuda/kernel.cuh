// The inverted residual as one kernel on tensor cores, a group of hidden channels at a time:
//
//   e = relu6(x W_e + b_e), 0 outside the image     d = relu6(depthwise3x3(e) + b_d)
//   y = d W_p + b_p (+ x)
//
// or what a block has in their place: another activation, 5x5, dilation, padding, an activation of the
// output, a squeeze-and-excite, a network's stem in place of the expansion.
//
// A thread block owns a tile of outputs:
//
//   load_tile        x of the tile and its halo -> shared memory
//   for each group:  weights of the next group -> shared memory, meanwhile
//     run_group        expand      x W_e        -> e, shared memory
//                      depthwise   e            -> d, registers
//                      project     d W_p        -> sums, registers, over all groups
//   store_tile       sums + b_p (+ x) -> y
//
// d goes from the depthwise straight into the registers that the second product reads, so that a group
// takes two barriers: one before e is written, one before e is read.
//
// Everything is in panels of 16 channels, of which a lane holds a quad, four neighbouring channels: 4 t
// to 4 t + 3, t being lane % 4. PTX numbers the channels of a fragment otherwise, but the order of a
// sum's terms is free, and so are the columns of e and y, as long as the weights have the same order
// (fold.py packs them so). A quad is one load, and the results of a product are quads again. In shared
// memory a panel of all pixels lies together: eight pixels' quads fill the banks exactly.
//
// A warp's rows of the second product are outputs: lane / 4 is one of eight strips, columns of 2 kTiles
// outputs (drawn in tile.cuh).
#pragma once

#include "kernel/add_splits.cuh"
#include "kernel/depthwise.cuh"
#include "kernel/expand.cuh"
#include "kernel/store.cuh"

namespace mnv2_fused::cuda {

// What a lane remembers of its tile over all groups.
struct LoadedTile {
  bool expands;    // whether e is a product, not x itself
  int pixels;      // in the image, of all images of the tile
  int e;           // offset of the lane's quad in e, at the first row and column of its strip
  int outs;        // rows of the strip in the image; counted only in the first of two passes
  int gate_image;  // image whose gate the lane reads; known only in general forms
};

// x of the tile and its halo, or the image in front of a stem; positions in e; zeros in e.
template <class C>
MNV2_DEVICE LoadedTile load_tile(const Args& a) {
  const SharedLayout& l = a.shared;
  LoadedTile loaded{};
  loaded.expands = a.in_panels > 0;
  {
    const Tile tile = tile_of<C>(a);
    loaded.pixels = tile.pixels;
    if (has_stem<C>(a))
      copy_image<C>(a, tile);
    else if (loaded.expands)
      copy_x<C>(a, tile, 0, a.in_panels, {0, l.x_panel, -1});
    note_places<C>(a, tile);
    const Strip strip = strip_of<C>(a, tile.images);
    loaded.e = l.e + (strip.image * a.e_rows + strip.row * C::kStride) * a.e_cols * C::kPixel +
               strip.col * C::kPixel + lane_index() % 4 * C::kQuad;
    if constexpr (C::kPool)
      loaded.outs = strip.exists && strip.col < tile.cols ? tile.rows - strip.row : 0;
    else if constexpr (C::kGeneral)
      loaded.gate_image = tile.first_image + strip.image;
  }
  for (int i = threadIdx.x * 16; i < a.group_panels * l.e_panel; i += thread_count() * 16)
    store_shared(l.e + i, uint4{0, 0, 0, 0});
  return loaded;
}

// e of a group: the expansion's, or x itself. Returns whether d must avoid products with diagonal
// matrices, which would spread an infinity or NaN of e to other channels; ReLU6 leaves none in e.
template <class C>
MNV2_DEVICE bool fill_e(const Args& a, const LoadedTile& tile, const Group& g) {
  const SharedLayout& l = a.shared;
  bool infinite = false;
  if (a.in_panels > 0) {
    const bool found = expand<C>(a, tile.pixels, g);
    if constexpr (C::kGeneral && C::kPairs)
      infinite = barrier_any(found);  // e is there
    else
      barrier();  // e is there, too
  } else {
    copy_x<C>(a, tile_of<C>(a), g.panel, g.panels, {l.e, l.e_panel, l.places});
    wait_copies();
    barrier();
    if constexpr (C::kPairs) infinite = barrier_any(any_infinite<C>(l.e, g.panels * l.e_panel));
  }
  return infinite;
}

// One group of hidden channels: e, then panel by panel d and its part of the sums c.
template <class C>
MNV2_DEVICE void run_group(const Args& a, const LoadedTile& tile, const Group& g, int out_panels,
                           typename C::OutSums& c) {
  using Quad = typename C::Quad;
  const SharedLayout& l = a.shared;
  const int lane = lane_index(), t = lane % 4;
  if constexpr (C::kPairs) make_taps<C>(l, g);
  const bool infinite = fill_e<C>(a, tile, g);
#pragma unroll 1
  for (int p = 0; p < g.panels; ++p) {
    float4 total = {0, 0, 0, 0}, gate = {1, 1, 1, 1};
    if constexpr (C::kGeneral && !C::kPool) {
      if (a.gate)
        gate = load_written(reinterpret_cast<const float4*>(
            a.gate + (int64_t(tile.gate_image) * a.hidden_panels + g.panel + p) * kPanel + 4 * t));
    }
    const auto finish = [&](int row, float4 v) {
      if constexpr (!C::kGeneral) return C::Traits::narrow_relu6(v);
      v = activated(v, a.activation);
      if constexpr (C::kPool) {
        if (row < tile.outs) total = added(total, v);
        return Quad{};
      }
      return C::Traits::narrow({v.x * gate.x, v.y * gate.y, v.z * gate.z, v.w * gate.w});
    };

    int e_cols = a.e_cols;
    // Computed for each panel: kept over all groups, it is one register too many beside the sums of strips of
    // two rows, of which three thread blocks share a processor.
    if constexpr (C::kTiles == 1) asm volatile("" : "+r"(e_cols));
    const int odd = e_column<C::kStride>(1, e_cols) * C::kPixel;
    Quad d[C::kTiles][2];
    const DepthwiseAt at{tile.e + p * l.e_panel, a.e_cols * C::kPixel, odd,
                         g.stage + l.b_depthwise + (p * 4 + t) * 16};
    if (!C::kPairs || infinite)
      depthwise<C>(d, at, g.stage + l.w_depthwise + (p * C::kTaps * 4 + t) * 16, finish);
    else if constexpr (C::kPairs)
      depthwise_product<C>(d, at, l.taps + (p * 8 + lane / 4) * C::kTapWords * 4, finish);
    if constexpr (C::kPool) store_pooled(a, total, g.panel + p);

    const int w = g.stage + l.w_project + p * C::kOutPanels * C::kFragment;
#pragma unroll
    for (int r = 0; r < C::kOutPanels; ++r)
      if (r < out_panels) multiply<C::kPrecision, C::kTiles>(c[r], d, w + r * C::kFragment, lane);
  }
}

// Bias, activation and residual, then y; or, of several splits, the sums alone.
template <class C>
MNV2_DEVICE void store_tile(const Args& a, int first_out, int out_panels,
                            const typename C::OutSums& c) {
  using Element = typename C::Element;
  const int t = lane_index() % 4;
  const bool biased = a.splits == 1;
  const Tile tile = tile_of<C>(a);
  const Strip strip = strip_of<C>(a, tile.images);
#pragma unroll
  for (int o = 0; o < C::kRows; ++o) {
    const bool inside = strip.exists && strip.row + o < tile.rows && strip.col < tile.cols;
    const int image = tile.first_image + strip.image;
    const int row = tile.row + (strip.row + o) * tile.step, col = tile.col + strip.col * tile.step;
    const int64_t pixel = (int64_t(image) * a.out_height + row) * a.out_width + col;
    const Element* const x =
        static_cast<const Element*>(a.x) + image * a.x_image + row * a.x_row + col * a.x_col;
#pragma unroll
    for (int r = 0; r < C::kOutPanels; r += 2) {
      const int channel = (first_out + r) * int(kPanel) + 4 * t;
      float4 v[2] = {quad_of(c[r][o / 2], o % 2), quad_of(c[r + 1][o / 2], o % 2)};
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const int from = channel + p * int(kPanel), left = biased ? a.out_channels - from : 0;
        v[p] = added(v[p], load_floats(a.b_project + from, left));
        if (C::kGeneral && biased && !a.activates_sum) v[p] = activated(v[p], a.out_activation);
        const int kept = inside && a.residual ? left : 0;
        v[p] = added(v[p], load_quad<C::kPrecision>(x + from, kept, a.x_vectors));
        if (C::kGeneral && biased && a.activates_sum) v[p] = activated(v[p], a.out_activation);
      }
      if (r < out_panels) store_panels<C>(a, v[0], v[1], {pixel, channel, inside});
    }
  }
}

// blockIdx: tile, split, out block. Weights of two groups are in shared memory, one in use and one on its
// way, in the two stages by turns.
template <class C>
MNV2_DEVICE void inverted_residual(const Args& a) {
  const SharedLayout& l = a.shared;
  const int first_out = blockIdx.z * C::kOutPanels;
  const int out_panels = min(C::kOutPanels, a.out_panels - first_out);
  const int first = blockIdx.y * a.panels_each;
  const int end = min(first + a.panels_each, a.hidden_panels);
  const auto group_at = [&](int panel, int stage) {
    return Group{panel, min(a.group_panels, end - panel), stage};
  };

  int stage = l.weights;
  copy_weights<C>(a, group_at(first, stage), first_out);
  grid_dependency_wait();
  launch_dependents();
  const LoadedTile tile = load_tile<C>(a);

  typename C::OutSums c = {};
  for (int panel = first; panel < end; panel += a.group_panels) {
    const Group group = group_at(panel, stage);
    wait_copies();
    barrier();  // this group's weights are there, nobody reads the group before
    const int other = 2 * l.weights + l.stage - stage;
    const int next = panel + group.panels;
    if (next < end) copy_weights<C>(a, group_at(next, other), first_out);
    run_group<C>(a, tile, group, out_panels, c);
    stage = other;
  }
  if constexpr (!C::kPool) store_tile<C>(a, first_out, out_panels, c);
}

template <Precision kPrecision, Form kForm, int kStride, int kTiles, int kOutPanels>
MNV2_KERNEL(int(variant_of(kTiles, kOutPanels, kPrecision, kForm).most_warps* kLanes),
            int(variant_of(kTiles, kOutPanels, kPrecision, kForm).blocks_per_sm))
inverted_residual_kernel(const Args a) {
  inverted_residual<Config<kPrecision, kForm, kStride, kTiles, kOutPanels>>(a);
}

}  // namespace mnv2_fused::cuda
