// Division of a thread block's shared memory. No torch, no CUDA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "../block.h"
#include "precision.h"

namespace mnv2_fused::cuda {

// Rows (or columns) under the depthwise windows of a tile's outputs.
constexpr int64_t in_rows(int64_t out_rows, int64_t stride, int64_t kernel) {
  return (out_rows - 1) * stride + kernel;
}

// A stem is multiplied like an expansion: one panel for each row of its window, four pixels of four
// channels. Weights of the fourth pixel and of channels that an image lacks are zeros.
constexpr int64_t kStemKernel = 3, kStemChannels = 4;
constexpr int64_t stem_rows(int64_t e_rows) { return in_rows(e_rows, kStemStride, kStemKernel); }

// Panels of the expansion's input; 0 without an expansion.
constexpr int64_t expand_panels(const BlockShape& s) {
  switch (s.expand) {
    case Expand::kNone:
      return 0;
    case Expand::kStem:
      return kStemKernel;
    case Expand::kPointwise:
      return ceil_div(s.in_channels, kPanel);
  }
  throw std::invalid_argument("expand must be none, pointwise or a stem");
}

// Taps of one panel as diagonal matrices (two-byte elements): words of one window column, and words
// of all columns for each of 8 kinds of lanes. Padding to 28 and 60 words puts the 8 kinds into
// different banks.
constexpr int64_t column_words(int64_t kernel) {
  if (kernel == 3) return 8;
  if (kernel == 5) return 12;
  throw std::invalid_argument("kernel must be 3 or 5");
}
constexpr int64_t tap_words(int64_t kernel) {
  if (kernel == 3) return 28;
  if (kernel == 5) return 60;
  throw std::invalid_argument("kernel must be 3 or 5");
}

// Byte offsets from the start of shared memory, in the order of the drawing:
//
//   | x | e: one group | stage 0 | stage 1 | taps | places | windows | zeros |
//                          |
//                          | w_expand | w_project | w_depthwise | b_expand | b_depthwise |
//
// One stage is read while the copies of the next group's weights fill the other.
struct SharedLayout {
  int32_t x_panel;  // bytes of 16 channels of all pixels; with a stem, of one image row
  int32_t e, e_panel;
  int32_t weights, stage;  // first stage; bytes of one stage
  // Offsets within a stage; w_expand is first.
  int32_t w_project, w_depthwise, b_expand, b_depthwise;
  int32_t taps;     // diagonal matrices of the depthwise, two-byte elements only
  int32_t places;   // position in e of each pixel of x
  int32_t windows;  // with a stem: start of each pixel's window in the image
  int32_t zeros;    // with a stem: the fourth column of every window
  int32_t bytes;
};

// Part of a plan that decides the layout.
struct Tiling {
  int64_t images, tile_rows, tile_cols, strip_rows;
  int64_t group_panels;  // of hidden channels
  int64_t out_panels;    // of output channels in a lane's registers
};

constexpr SharedLayout shared_layout(const BlockShape& s, Precision precision, const Tiling& t) {
  const int64_t element = element_size(precision), fragment = kPanel * kPanel * element;
  const int64_t in_panels = expand_panels(s), kernel = s.kernel;
  const bool stem = s.expand == Expand::kStem;
  const int64_t rows = in_rows(round_up(t.tile_rows, t.strip_rows), s.stride, kernel);
  const int64_t cols = in_rows(t.tile_cols, s.stride, kernel);
  // Pixels in the image: a dilated block has every dilation-th row and column.
  const int64_t x_rows =
      std::min(in_rows(t.tile_rows, s.stride, kernel), ceil_div(s.height, s.dilation));
  const int64_t x_cols = std::min(cols, ceil_div(s.width, s.dilation));
  const int64_t pixels = t.images * x_rows * x_cols;
  SharedLayout l{};
  if (stem) {
    l.x_panel = int32_t(stem_rows(x_cols) * kStemChannels * element);
    l.e = int32_t(round_up(t.images * stem_rows(x_rows) * l.x_panel, 16));
  } else {
    l.x_panel = int32_t(pixels * kPanel * element);
    l.e = int32_t(in_panels) * l.x_panel;
  }
  l.e_panel = int32_t(t.images * rows * cols * kPanel * element);
  l.weights = l.e + int32_t(t.group_panels) * l.e_panel;
  l.w_project = int32_t(t.group_panels * in_panels * fragment);
  l.w_depthwise = l.w_project + int32_t(t.group_panels * t.out_panels * fragment);
  l.b_expand = l.w_depthwise + int32_t(t.group_panels * kernel * kernel * kPanel * 4);
  l.b_depthwise = l.b_expand + int32_t(t.group_panels * kPanel * 4);
  l.stage = l.b_depthwise + int32_t(t.group_panels * kPanel * 4);
  l.taps = l.weights + 2 * l.stage;
  l.places = l.taps + int32_t(element == 2 ? t.group_panels * 8 * tap_words(kernel) * 4 : 0);
  l.windows = l.places + int32_t(round_up(pixels * 2, 16));
  l.zeros = l.windows + (stem ? int32_t(round_up(pixels * 2, 16)) : 0);
  l.bytes = l.zeros + (stem ? 16 : 0);
  return l;
}

}  // namespace mnv2_fused::cuda
