// The planner: block shape + machine -> how one call is tiled. Pure; shared by the op, Python and
// the tests.
#pragma once

#include "args.h"

namespace mnv2_fused::cpu {

// Expanded channels whose products one accumulator sums at most: past it, every further product would
// be rounded to the size of a long sum.
constexpr int64_t kLongestProject = 256;

struct Machine {
  int64_t threads;
  int64_t lanes;         // sums in one vector register
  int64_t element_size;  // bytes of a sum
  int64_t storage_size;  // bytes of what x, y and the products' weights hold
  int64_t depth;         // products that one multiply-add puts into a sum
  int64_t l2_bytes;      // per core
  bool operator==(const Machine&) const = default;
};

struct Plan {
  int64_t tile_rows, tile_cols;  // output pixels one task computes
  int64_t group;                 // expanded channels computed at a time, a multiple of kPanel
  int64_t band_rows;             // output rows that a task works through at a time
  int64_t splits;  // tasks that share a tile's groups; their sums are added up at the end
  bool tile_sums_in_scratch;    // y's elements are too narrow for the sums of a tile's groups
  bool caches_depthwise;        // a squeeze-and-excite's d stays in memory between its passes
  int64_t tasks;                // images x tiles x splits
  int64_t workers;              // tasks that run at once, each with its own scratch
  int64_t scratch_bytes;        // per worker
  int64_t partial_bytes;        // the sums of every group, shared by all workers, when splits > 1
  int64_t bytes_never_written;  // the expanded tensors an unfused block writes
  double recompute;             // expanded pixels computed / expanded pixels needed
  double cost;                  // estimated vector operations on the slowest worker

  int64_t groups(const BlockShape& s) const { return ceil_div(s.hidden_channels, group); }
  int64_t tiles_down(const BlockShape& s) const { return ceil_div(s.out_height(), tile_rows); }
  int64_t tiles_across(const BlockShape& s) const { return ceil_div(s.out_width(), tile_cols); }
  // Rows and columns of the expanded tensor that lie in scratch: all that the taps span, zeros around
  // the image included; dilated, where zeros may be most of it, those in the image.
  int64_t ring_rows(const BlockShape& s) const {
    const int64_t rows = (band_rows - 1) * s.stride + s.extent();
    return s.dilation > 1 && rows > s.height ? s.height : rows;
  }
  int64_t in_cols(const BlockShape& s) const {
    const int64_t cols = (tile_cols - 1) * s.stride_across() + s.extent();
    return s.dilation > 1 && cols > s.width ? s.width : cols;
  }
  // Elements of one worker's scratch buffers.
  int64_t expanded_elements(const BlockShape& s) const { return group * ring_rows(s) * in_cols(s); }
  int64_t depthwise_elements() const { return group * band_rows * tile_cols; }
  // One band's sum over a group, where that has to be complete before it is added to earlier groups.
  int64_t run_sum_elements(const BlockShape& s) const {
    const bool needed = group > kLongestProject && splits == 1 && groups(s) > 1;
    return needed ? round_up(band_rows * tile_cols * s.out_channels, kPanel) : 0;
  }
  // A tile's sums, where y cannot hold them.
  int64_t tile_sum_elements(const BlockShape& s) const {
    return tile_sums_in_scratch ? round_up(tile_rows * tile_cols * s.out_channels, kPanel) : 0;
  }
  // Elements that a squeeze-and-excite needs from pass to pass: d where it is cached, its rows' sums.
  int64_t cached_elements(const BlockShape& s) const {
    const int64_t pixels = s.batch * s.out_height() * s.out_width();
    return caches_depthwise ? pixels * s.hidden_panels() * kPanel : 0;
  }
  int64_t pooled_elements(const BlockShape& s) const {
    if (s.squeeze_channels == 0) return 0;
    return s.batch * s.out_height() * tiles_across(s) * s.hidden_panels() * kPanel;
  }
  // The part of the image under a stem's window, padding included, up to a full vector; with room for
  // the channel that makes an odd number of BFloat16 even.
  int64_t patch_elements(const BlockShape& s) const {
    if (s.expand != Expand::kStem) return 0;
    const int64_t rows = (ring_rows(s) - 1) * kStemStride + 3;
    const int64_t cols = (in_cols(s) - 1) * kStemStride + 3;
    return round_up(rows * cols * round_up(s.in_channels, depth<BFloat16>), kPanel);
  }
};

// The plan of least cost whose scratch fits the machine. Its group does not depend on batch and
// threads.
Plan make_plan(const BlockShape& shape, const Machine& machine);

// The plan with tile, group and splits forced. Throws std::invalid_argument naming the value and
// the limit.
Plan make_plan(const BlockShape& shape, const Machine& machine, int64_t tile_rows,
               int64_t tile_cols, int64_t group, int64_t splits);

// Whether x is one pixel, of which each output sums the middle tap alone.
bool takes_middle_taps(const BlockShape& shape);
// `images` of such a block as the columns of one image, whose kernel is that tap.
BlockShape as_one_image(BlockShape shape, int64_t images);

// Images of a squeeze-and-excite block that run at once: as many as `threads`, or more where their d
// is small.
int64_t squeezed_together(const BlockShape& shape, const Machine& machine);

}  // namespace mnv2_fused::cpu
