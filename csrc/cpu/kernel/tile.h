// One tile of one image, from x to y: the stages in their order, and what each prefetches for the next.
#pragma once

#include "depthwise.h"
#include "expand.h"
#include "project.h"
#include "squeeze.h"
#include "stem.h"

namespace {

template <class V, class S>
class Tile {
  using T = Compute<S>;

 public:
  // scratch: the plan's scratch_bytes.
  Tile(const BlockArgs<S>& args, const Plan& plan, int64_t task, T* scratch)
      : w_(args, plan, task), a_(args), s_(args.shape), plan_(plan), expanded_(scratch) {
    run_sums_ = scratch + plan.expanded_elements(s_);
    tile_sums_ = run_sums_ + plan.run_sum_elements(s_);
    depthwise_ = reinterpret_cast<S*>(tile_sums_ + plan.tile_sum_elements(s_));
    patch_ = depthwise_ + plan.depthwise_elements();
  }

  void run() {
    // Of a squeeze-and-excite's last pass, d may be cached: then there is nothing to expand.
    const bool expands = !w_.cached || a_.pass == Pass::kPool;
    if (expands) clear_columns<V>(w_, expanded_);
    const int64_t groups = plan_.groups(s_), splits = plan_.splits;
    const int64_t last_group = groups * (w_.split + 1) / splits - 1;
    for (int64_t g = groups * w_.split / splits; g <= last_group; ++g) {
      const int64_t first = g * plan_.group;
      const Group group{first, least(plan_.group, s_.hidden_channels - first)};
      const Outputs<S> out = outputs(g);
      int64_t done = 0;  // rows of the window that are in the ring, or were
      for (int64_t row = 0; row < w_.rows; row += plan_.band_rows) {
        const Band band{row, least(plan_.band_rows, w_.rows - row)};
        if (w_.cached) depthwise_ = cached(group, band);
        if (expands) {
          const RowRange rows{done, w_.rows_under(band)};
          run_band(group, band, rows, out, g == last_group);
          done = rows.to;
        } else {
          multiply_by_gate<V>(w_, depthwise_, group, band);
          project<V>(w_, out, depthwise_, group, band, {});
        }
      }
    }
  }

 private:
  // One band of one group: expand -> depthwise -> project, or in the first pass of a
  // squeeze-and-excite, expand -> depthwise -> pool. `rows`: those of the window that are new.
  void run_band(Group group, Band band, RowRange rows, const Outputs<S>& out, bool last_group) {
    clear_rows<V>(w_, expanded_, group.channels, rows);
    rows = w_.inside_image(rows);
    if (s_.expand == Expand::kStem && !rows.empty()) fill_patch(w_, patch_, rows);
    const int64_t vectors = ceil_div(group.channels, kPanel) * (kPanel / V::kLanes);
    PrefetchQueue prefetch(read_by_project(group, band, out),
                           calls(vectors, (rows.to - rows.from) * w_.image_cols()));
    for_pieces(vectors, kMaxVectors<V>, [&](int64_t vector, int n) {
      if (!rows.empty()) expand_vectors(group, {vector, n}, rows, prefetch);
      // While these channels are in L1.
      const int64_t end = least(vector + n, ceil_div(group.channels, V::kLanes));
      depthwise<V>(w_, expanded_, depthwise_, group, {vector, end - vector}, band);
    });
    if (a_.pass == Pass::kPool) return pool<V>(w_, depthwise_, group, band);
    const int64_t out_vectors = ceil_div(s_.out_channels, V::kLanes);
    project<V>(w_, out, depthwise_, group, band,
               PrefetchQueue(read_after(group, band, rows.to, last_group),
                             calls(out_vectors, band.rows * w_.cols)));
  }

  void expand_vectors(Group group, Vectors vectors, RowRange rows, PrefetchQueue& prefetch) {
    switch (s_.expand) {
      case Expand::kNone:
        return copy_input<V>(w_, expanded_, group, vectors, rows);
      case Expand::kPointwise:
        return expand<V>(w_, expanded_, group, vectors, rows, prefetch);
      case Expand::kStem:
        return expand_stem<V>(w_, patch_, expanded_, group, vectors, rows, prefetch);
    }
  }

  // Where the results of group g go.
  Outputs<S> outputs(int64_t g) const {
    S* const y = a_.y + w_.out;
    const int64_t y_row = s_.out_width() * s_.out_channels;
    if (plan_.splits > 1) return {y, a_.partial + g * s_.out_elements() + w_.out, y_row, run_sums_};
    if constexpr (kDepth<S> == 1)
      return {y, y, y_row, run_sums_};
    else
      return {y, tile_sums_, w_.cols * s_.out_channels, run_sums_};
  }

  // d of a group and band, where it stays between the passes.
  S* cached(Group group, Band band) const {
    return w_.cached +
           (group.first * w_.rows + band.row * round_up(group.channels, kPanel)) * w_.cols;
  }

  // About how many kernel calls it takes to multiply this many vectors of channels and pixels.
  static int64_t calls(int64_t vectors, int64_t pixels) {
    const int64_t pieces = ceil_div(vectors, kMaxVectors<V>);
    return pieces * ceil_div(pixels, max_rows<V>(int(ceil_div(vectors, pieces))));
  }

  // What the project stage of this band reads first: its weights, or where those are known its
  // outputs.
  Region read_by_project(Group group, Band band, const Outputs<S>& out) const {
    if (band.row == 0) {
      const int64_t run = group.channels * kPanel * kBytes;
      return {a_.w_project + group.first * kPanel, ceil_div(s_.out_channels, kPanel) * run, run,
              s_.hidden_channels * kPanel * kBytes};
    }
    const int64_t y_row = s_.out_width() * s_.out_channels;
    const int64_t run = w_.cols * s_.out_channels * kBytes;
    return {out.y + band.row * y_row, band.rows * run, run, y_row * kBytes};
  }

  // What the stage after this band's project stage reads first: x of the next band, whose window
  // begins at row `from`, or the weights of the next group or layer.
  Region read_after(Group group, Band band, int64_t from, bool last_group) const {
    const int64_t row = band.row + band.rows, channel = group.first + group.channels;
    if (row < w_.rows) {
      const Band next{row, least(plan_.band_rows, w_.rows - row)};
      const int64_t to = least(w_.rows_under(next), w_.bottom);
      return s_.expand == Expand::kStem ? image_rows({from, to}) : x_rows({from, to});
    }
    if (last_group) return Region::dense(a_.next, a_.next_bytes);
    const int64_t terms = s_.expand_terms(kDepth<S>);
    return Region::dense(
        a_.w_expand + channel * terms,
        least(plan_.group, s_.hidden_panels() * kPanel - channel) * terms * kBytes);
  }
  Region x_rows(RowRange rows) const {
    const int64_t run = w_.image_cols() * a_.x_col * kBytes;
    return {w_.x_row(rows.from), (rows.to - rows.from) * run, run, a_.x_row * kBytes};
  }
  // Of a stem's image, plane by plane where its channels lie apart.
  Region image_rows(RowRange range) const {
    const int64_t first = (w_.row * s_.stride - s_.pad_top + range.from) * kStemStride;
    const int64_t rows = least((range.to - range.from) * kStemStride, s_.image_height - first);
    const int64_t run = rows * a_.x_row * kBytes;
    const int64_t planes = a_.x_channel == 1 ? 1 : s_.in_channels;
    return {w_.x + first * a_.x_row, planes * run, run, a_.x_channel * kBytes};
  }

  static constexpr int64_t kBytes = sizeof(S);

  const Window<S> w_;
  const BlockArgs<S>& a_;
  const BlockShape& s_;
  const Plan& plan_;
  T* expanded_;   // [group/16][ring rows][in_cols][16]
  T* run_sums_;   // [band pixels][C_out], of a group of several runs
  T* tile_sums_;  // [tile pixels][C_out], the groups' sums where y cannot hold them
  S* depthwise_;  // [group/16][band pixels][16]
  S* patch_;      // [rows][cols][C_in], of a stem's image
};

template <class V, class S>
void run_tile(const BlockArgs<S>& args, const Plan& plan, int64_t task, typename V::T* scratch) {
  Tile<V, S>(args, plan, task, scratch).run();
}

}  // namespace
