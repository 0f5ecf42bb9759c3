// Copies from global to shared memory: x, the image in front of a stem, weights.
#pragma once

#include "tile.cuh"

namespace mnv2_fused::cuda {

// Panels of hidden channels that are in shared memory at a time.
struct Group {
  int panel, panels;  // the first, and how many
  int stage;          // offset of their weights
};

// Position in e of each pixel of x.
template <class C>
MNV2_DEVICE void note_places(const Args& a, const Tile& tile) {
  for (int i = threadIdx.x; i < tile.pixels; i += thread_count()) {
    const Pixel at = pixel_of(tile, i);
    const int e_line = at.image * a.e_rows + tile.e_row + at.row;
    const int place = e_line * a.e_cols + e_column<C::kStride>(tile.e_col + at.col, a.e_cols);
    store_shared(a.shared.places + 2 * i, uint16_t(place));
  }
}

// Offset of the first panel, and bytes of a panel. places: a list of each pixel's position; or -1 for
// pixels side by side.
struct PixelTarget {
  int offset, panel, places;
};

// Channels of `panels` panels of x, pixel by pixel, four lanes to a pixel.
template <class C>
MNV2_DEVICE void copy_x(const Args& a, const Tile& tile, int first_panel, int panels,
                        const PixelTarget& to) {
  using Element = typename C::Element;
  constexpr int kElements = 16 / sizeof(Element), kChunks = kPanel / kElements;
  for (int i = threadIdx.x / 4; i < tile.pixels; i += thread_count() / 4) {
    const auto [image, row, col] = pixel_of(tile, i);
    const Element* const pixel =
        static_cast<const Element*>(a.x) + (tile.first_image + image) * a.x_image +
        (tile.in_row + row * tile.step) * a.x_row + (tile.in_col + col * tile.step) * a.x_col;
    const int place = to.places < 0 ? i : int(load_shared<uint16_t>(to.places + 2 * i));
    for (int chunk = threadIdx.x % 4; chunk < panels * kChunks; chunk += 4) {
      const int at =
          to.offset + chunk / kChunks * to.panel + (place * kChunks + chunk % kChunks) * 16;
      const int channel = first_panel * int(kPanel) + chunk * kElements;
      if (a.x_vectors && channel < a.in_channels) {
        copy_16(at, pixel + channel);
      } else {
        for (int k = 0; k < kElements; ++k) {
          const bool exists = channel + k < a.in_channels;
          store_shared(at + k * int(sizeof(Element)),
                       exists ? load_written(pixel + channel + k) : Element(0));
        }
      }
    }
  }
}

// The image under the stem's windows of a tile, a quad a pixel, zeros around it; and the start of each
// window.
template <class C>
MNV2_DEVICE void copy_image(const Args& a, const Tile& tile) {
  using Element = typename C::Element;
  const int rows = int(stem_rows(tile.image_rows)), cols = int(stem_rows(tile.image_cols));
  const int pitch = a.shared.x_panel / C::kQuad;
  for (int i = threadIdx.x; i < tile.images * rows * cols; i += thread_count()) {
    const int col = i % cols, line = i / cols, row = line % rows, image = line / rows;
    const int at_row = tile.in_row * int(kStemStride) - 1 + row;
    const int at_col = tile.in_col * int(kStemStride) - 1 + col;
    const bool inside =
        at_row >= 0 && at_row < a.image_height && at_col >= 0 && at_col < a.image_width;
    const int64_t at_image = tile.first_image + image;
    const Element* const from = static_cast<const Element*>(a.x) + at_image * a.x_image +
                                at_row * a.x_row + at_col * a.x_col;
    Element v[4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
      v[k] = inside && k < a.in_channels ? load_written(from + k * a.x_channel) : Element(0);
    store_shared(((image * a.image_rows + row) * pitch + col) * C::kQuad, C::Traits::quad(v));
  }
  for (int i = threadIdx.x; i < tile.pixels; i += thread_count()) {
    const auto [image, row, col] = pixel_of(tile, i);
    const int window =
        (image * a.image_rows + row * int(kStemStride)) * pitch + col * int(kStemStride);
    store_shared(a.shared.windows + 2 * i, uint16_t(window));
  }
  if (threadIdx.x == 0) store_shared(a.shared.zeros, uint4{0, 0, 0, 0});
}

MNV2_DEVICE void copy_bytes(int to, const void* from, int bytes) {
  for (int i = threadIdx.x * 16; i < bytes; i += thread_count() * 16)
    copy_16(to + i, static_cast<const char*>(from) + i);
}

// Start of the copies of a group's weights; w_project from output panel first_out on.
template <class C>
MNV2_DEVICE void copy_weights(const Args& a, const Group& g, int first_out) {
  const SharedLayout& l = a.shared;
  constexpr int kVector = kPanel * 4;  // bytes of one float for each channel of a panel
  if (a.in_panels > 0) {
    const int one = a.in_panels * C::kFragment;
    copy_bytes(g.stage, static_cast<const char*>(a.w_expand) + int64_t(g.panel) * one,
               g.panels * one);
    copy_bytes(g.stage + l.b_expand, a.b_expand + g.panel * kPanel, g.panels * kVector);
  }
  for (int p = 0; !C::kPool && p < g.panels; ++p)
    copy_bytes(g.stage + l.w_project + p * C::kOutPanels * C::kFragment,
               static_cast<const char*>(a.w_project) +
                   (int64_t(g.panel + p) * a.out_panels + first_out) * C::kFragment,
               min(C::kOutPanels, a.out_panels - first_out) * C::kFragment);
  copy_bytes(g.stage + l.w_depthwise, a.w_depthwise + g.panel * C::kTaps * kPanel,
             g.panels * C::kTaps * kVector);
  copy_bytes(g.stage + l.b_depthwise, a.b_depthwise + g.panel * kPanel, g.panels * kVector);
}

}  // namespace mnv2_fused::cuda
