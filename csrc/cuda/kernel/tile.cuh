// Where the outputs of a thread block, and of a lane, lie in the image.
//
// A tile is cut into strips, columns of kRows outputs; the four lanes 4 i to 4 i + 3 hold strip i, each
// lane a quad of its channels. A tile of 4 x 5 outputs in strips of two rows:
//
//       0   1   2   3   4   columns
//     +---+---+---+---+---+
//   0 | s | s | s | s | s |    A lane slides down its strip and reads each row of e once: at stride 1
//   1 | 0 | 1 | 2 | 3 | 4 |    four rows of e make two rows of outputs.
//     +---+---+---+---+---+
//   2 | s | s | s | s | s |
//   3 | 5 | 6 | 7 | 8 | 9 |
//     +---+---+---+---+---+
//
// A dilated convolution is several ordinary ones, its phases, between each other. A tile lies in one
// phase. Outputs of dilation 2 by phase; outputs of one phase read pixels of one phase:
//
//   0 1 0 1 0 1
//   2 3 2 3 2 3
//   0 1 0 1 0 1
//   2 3 2 3 2 3
#pragma once

#include "config.cuh"

namespace mnv2_fused::cuda {

// A thread block's outputs, and the part of its input that lies in the image.
struct Tile {
  int first_image, images;
  int row, col;                // of the first output
  int rows, cols;              // of outputs inside the image
  int in_row, in_col;          // of the first pixel in the image
  int image_rows, image_cols;  // of pixels in the image
  int e_row, e_col;            // of the first pixel in the image, within e
  int pixels;                  // in the image, of all images
  int step;                    // dilation: from one row or column to the next
};

// One side, rows or columns, of a dilated tile.
struct Side {
  int out, outs;         // the first output, and how many
  int in, ins, e_first;  // the first pixel in the image, how many, and where in e
};

// phase: of the dilated convolution; from: first output of the tile in that phase.
template <int kKernel, int kStride>
MNV2_DEVICE Side side_of(int phase, int from, int tile, int dilation, int pad, int out_size,
                         int size) {
  const int before = phase * kStride - pad, first = from * kStride;  // before: of tap 0, output 0
  const int start = max(first, before < 0 ? (dilation - 1 - before) / dilation : 0);
  const int end =
      min(first + (tile - 1) * kStride + kKernel, (size - before + dilation - 1) / dilation);
  return {phase + from * dilation, min(tile, (out_size - phase + dilation - 1) / dilation - from),
          before + start * dilation, max(end - start, 0), start - first};
}

// Tile of a general form: any dilation, any padding.
template <class C>
MNV2_DEVICE Tile dilated_tile_of(const Args& a) {
  int index = block_index();
  const auto next = [&](int count) {
    const int rest = index % count;
    index /= count;
    return rest;
  };
  const auto parts = [](int size, int part) { return (size + part - 1) / part; };
  const auto side = [&](int tile, int pad, int out_size, int size) {
    const int phase = next(min(a.dilation, out_size));
    const int from = next(parts(parts(out_size, a.dilation), tile)) * tile;
    return side_of<C::kKernel, C::kStride>(phase, from, tile, a.dilation, pad, out_size, size);
  };
  const Side col = side(a.tile_cols, a.pad_left, a.out_width, a.width);
  const Side row = side(a.tile_rows, a.pad_top, a.out_height, a.height);
  const int first_image = index * a.images, images = min(a.images, a.batch - first_image);
  return {first_image,
          images,
          row.out,
          col.out,
          row.outs,
          col.outs,
          row.in,
          col.in,
          row.ins,
          col.ins,
          row.e_first,
          col.e_first,
          images * row.ins * col.ins,
          a.dilation};
}

// Tile of MobileNetV2's forms: no dilation, one row and column of padding.
template <class C>
MNV2_DEVICE Tile plain_tile_of(const Args& a) {
  constexpr int stride = C::kStride;
  const int index = block_index();
  const int across = int(ceil_div(a.out_width, a.tile_cols));
  const int down = int(ceil_div(a.out_height, a.tile_rows));
  Tile t;
  t.col = index % across * a.tile_cols;
  t.row = index / across % down * a.tile_rows;
  t.first_image = index / across / down * a.images;
  t.images = min(a.images, a.batch - t.first_image);
  t.rows = min(a.tile_rows, a.out_height - t.row);
  t.cols = min(a.tile_cols, a.out_width - t.col);
  t.in_row = max(t.row * stride - 1, 0);
  t.in_col = max(t.col * stride - 1, 0);
  t.image_rows = min((t.row + a.tile_rows - 1) * stride + 2, a.height) - t.in_row;
  t.image_cols = min((t.col + a.tile_cols - 1) * stride + 2, a.width) - t.in_col;
  t.e_row = t.in_row - (t.row * stride - 1);
  t.e_col = t.in_col - (t.col * stride - 1);
  t.pixels = t.images * t.image_rows * t.image_cols;
  t.step = 1;
  return t;
}

template <class C>
MNV2_DEVICE Tile tile_of(const Args& a) {
  if constexpr (C::kGeneral)
    return dilated_tile_of<C>(a);
  else
    return plain_tile_of<C>(a);
}

// A lane's outputs: rows from `row` on, of one column.
struct Strip {
  int image, row, col;  // within the tile
  bool exists;          // false in lanes behind the last strip, which repeat it
};

template <class C>
MNV2_DEVICE Strip strip_of(const Args& a, int images) {
  const int down = int(ceil_div(a.tile_rows, C::kRows));
  const int strips = images * down * a.tile_cols, index = thread_index() / 4;
  const int clamped = min(index, strips - 1);
  return {clamped / a.tile_cols / down, clamped / a.tile_cols % down * C::kRows,
          clamped % a.tile_cols, index < strips};
}

// Position of a column of e: at stride 2 even columns come first, so that the windows of neighbouring
// outputs read neighbours.
template <int kStride>
MNV2_DEVICE int e_column(int col, int e_cols) {
  return kStride == 1 ? col : col / 2 + (col % 2) * (int(unsigned(e_cols) + 1) >> 1);
}

// A pixel of a tile by its number, image after image, row after row.
struct Pixel {
  int image, row, col;
};
MNV2_DEVICE Pixel pixel_of(const Tile& tile, int i) {
  const int col = i % tile.image_cols, line = i / tile.image_cols;
  return {line / tile.image_rows, line % tile.image_rows, col};
}

}  // namespace mnv2_fused::cuda
