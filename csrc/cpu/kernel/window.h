// Where one tile lies: its output pixels, the expanded pixels under them, and the ring that holds these.
//
// A tile works down the image in bands of output rows. The ring holds the expanded rows of one band;
// rows that the next band needs, too, stay, and no row is computed twice.
#pragma once

#include "elements.h"

namespace {

// Expanded channels [first, first + channels) of the block.
struct Group {
  int64_t first, channels;
};
// Vectors [first, first + count) of a group.
struct Vectors {
  int64_t first, count;
};
// Output rows [row, row + rows) of the tile.
struct Band {
  int64_t row, rows;
};
// Expanded rows [from, to) of the window.
struct RowRange {
  int64_t from, to;

  bool empty() const { return from >= to; }
};

// The window: expanded pixels that the tile's taps reach. Its rows and columns count from the first tap
// of the first output; rows [top, bottom) and columns [left, right) lie inside the image.
//
//              left          right
//        +------+-------------+------+
//        |  0   |      0      |  0   |
//   top  +------+-------------+------+
//        |  0   |    image    |  0   |
// bottom +------+-------------+------+
//
// The ring: row r of the window lies in row r % ring_rows, with all columns. Dilated, zeros may be most
// of the window: the ring then has the columns inside the image alone, and no tap reads a zero.
template <class S>
struct Window {
  using T = Compute<S>;

  const BlockArgs<S>& args;
  const BlockShape& shape;
  const Plan& plan;
  int64_t split;                     // index of this task among those that share the tile
  int64_t row, col, rows, cols;      // output pixels of the tile, in the image
  int64_t ring_rows, in_cols;        // of the ring
  int64_t top, left, bottom, right;  // of the window, inside the image
  int64_t ring_col0;                 // column of the window that is the ring's first
  int64_t panel;                     // elements between panels of the ring
  const S* x;   // input pixel of expanded pixel (0, 0); of a stem, of the image
  int64_t out;  // elements from the first output to the tile's
  // Of a squeeze-and-excite, else null:
  const T* gate = nullptr;  // [E], factors of this pass
  S* cached = nullptr;      // this tile's d, from pass to pass
  T* pooled = nullptr;      // [tile rows, ...], sums of d over the tile's rows

  Window(const BlockArgs<S>& a, const Plan& p, int64_t task) : args(a), shape(a.shape), plan(p) {
    const BlockShape& s = shape;
    const int64_t across = plan.tiles_across(s), down = plan.tiles_down(s);
    split = task % plan.splits;
    task /= plan.splits;
    const int64_t image = task / (across * down);
    row = task / across % down * plan.tile_rows;
    col = task % across * plan.tile_cols;
    rows = least(plan.tile_rows, s.out_height() - row);
    cols = least(plan.tile_cols, s.out_width() - col);
    ring_rows = plan.ring_rows(s);
    const int64_t across_step = s.stride_across();
    const int64_t window = (cols - 1) * across_step + s.extent();
    top = greatest(0, s.pad_top - row * s.stride);
    left = greatest(0, s.pad_left - col * across_step);
    bottom = least((rows - 1) * s.stride + s.extent(), s.height + s.pad_top - row * s.stride);
    right = least(window, s.width + s.pad_left - col * across_step);
    ring_col0 = s.dilation > 1 ? left : 0;
    in_cols = s.dilation > 1 ? right - left : window;
    panel = ring_rows * in_cols * kPanel;
    x = a.x + image * a.x_image;
    if (s.expand != Expand::kStem)
      x += (row * s.stride - s.pad_top) * a.x_row + (col * across_step - s.pad_left) * a.x_col;
    out = ((image * s.out_height() + row) * s.out_width() + col) * s.out_channels;
    if (a.gate && a.pass == Pass::kLast) gate = a.gate + image * s.hidden_channels;
    const int64_t hidden = s.hidden_panels() * kPanel;
    if (a.cached)
      cached = a.cached + ((image * s.out_height() + row) * s.out_width() + col * rows) * hidden;
    if (a.pass == Pass::kPool)
      pooled = a.pooled + ((image * s.out_height() + row) * across + col / plan.tile_cols) * hidden;
  }

  // Columns inside the image.
  int64_t image_cols() const { return right - left; }
  // Rows of the window from its first to the last that this band needs.
  int64_t rows_under(Band b) const { return (b.row + b.rows - 1) * shape.stride + shape.extent(); }
  RowRange inside_image(RowRange r) const { return {greatest(r.from, top), least(r.to, bottom)}; }
  // Input pixel of row r's first expanded pixel inside the image.
  const S* x_row(int64_t r) const { return x + r * args.x_row + left * args.x_col; }
  // x under output pixel (r, c), where they are of one size.
  const S* residual(int64_t r, int64_t c) const {
    return x + (r + shape.pad_top) * args.x_row + (c + shape.pad_left) * args.x_col;
  }

  // Offsets in a panel of the ring, in elements: of row r, and of its first pixel inside the image.
  int64_t ring_offset(int64_t r) const { return r % ring_rows * in_cols * kPanel; }
  int64_t image_offset(int64_t r) const { return ring_offset(r) + (left - ring_col0) * kPanel; }
};

template <class V>
void clear(typename V::T* p, int64_t pixels) {
  for (int64_t i = 0; i < pixels * kPanel; i += V::kLanes) V::set1(0).store(p + i);
}
// Zeros outside the image: columns of the ring, once for all groups, since no expansion writes them;
template <class V, class S>
void clear_columns(const Window<S>& w, Compute<S>* expanded) {
  const int64_t panels = least(w.plan.group / kPanel, w.shape.hidden_panels());
  if (w.image_cols() == w.in_cols) return;
  for (int64_t i = 0; i < panels * w.ring_rows; ++i) {
    Compute<S>* const row = expanded + i * w.in_cols * kPanel;
    clear<V>(row, w.left);
    clear<V>(row + w.right * kPanel, w.in_cols - w.right);
  }
}
// rows of the ring, since an earlier row of the window may lie there.
template <class V, class S>
void clear_rows(const Window<S>& w, Compute<S>* expanded, int64_t channels, RowRange rows) {
  if (w.shape.dilation > 1) return;
  for (int64_t r = rows.from; r < rows.to; ++r)
    if (r < w.top || r >= w.bottom)
      for (int64_t panel = 0; panel < ceil_div(channels, kPanel); ++panel)
        clear<V>(expanded + panel * w.panel + w.ring_offset(r), w.in_cols);
}

}  // namespace
