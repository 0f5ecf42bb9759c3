// project: y = w_project d + b_project (+ x), the groups' sums added up one after the other.
#pragma once

#include "project_tile.h"
#include "window.h"

namespace {

// A tile's outputs, and the sums on their way to them.
template <class S>
struct Outputs {
  S* y;                    // output pixel (0, 0) of the tile
  Compute<S>* group_sums;  // its groups' sums: in y, in scratch, or this group's own
  int64_t group_sums_row;  // elements between rows of group_sums
  Compute<S>* run_sums;    // [band pixels][C_out], scratch for a group of several runs
};

// The output's activation, and x, in the block's order. x(): what a residual adds.
template <class V, class F>
MNV2_INLINE V finished(V sum, const BlockShape& s, F x) {
  if (!s.residual) return activated(sum, s.function(s.out_activation));
  if (s.activates_sum) return activated(V::add(sum, x()), s.function(s.out_activation));
  return V::add(activated(sum, s.function(s.out_activation)), x());
}

// The stage for one group and one band.
template <class V, class S>
class Projection {
  using T = Compute<S>;

 public:
  Projection(const Window<S>& window, const Outputs<S>& out, const S* d, Group group, Band band,
             PrefetchQueue& prefetch)
      : w_(window),
        s_(window.shape),
        out_(out),
        d_(d),
        group_(group),
        band_(band),
        prefetch_(prefetch),
        alone_(window.plan.splits == 1),
        in_scratch_(group.channels > kLongestProject && group.first != 0 && alone_),
        at_once_(is_clip(s_.out_activation) && !(s_.residual && s_.activates_sum)) {}

  // A large group's channels go in runs of a length that rounds well. The runs' sums are added up
  // before the groups' sums are: in the place of those where nothing else is yet, else in scratch.
  void run() {
    ProjectTile<S> t;
    t.panel = band_.rows * w_.cols * kPanel;
    t.hidden = s_.hidden_channels;
    for_pieces(ceil_div(group_.channels, kPanel), kLongestProject / kPanel,
               [&](int64_t panel, int panels) {
                 const int64_t begin = panel * kPanel;
                 t.panels = d_ + panel * t.panel;
                 t.terms = least(panels * kPanel, group_.channels - begin);
                 t.add_sum = begin != 0 || (group_.first != 0 && alone_ && !in_scratch_);
                 all_channels(t, group_.first + begin);
               });
    const bool last = group_.first + group_.channels == s_.hidden_channels;
    if (in_scratch_) return add_run_sums(last);
    if (last && alone_ && !at_once_)
      for_outputs([&](int64_t r, int64_t col) MNV2_INLINE_LAMBDA { activate_output(r, col); });
  }

 private:
  // All output channels, by one run of expanded channels from `first` on.
  void all_channels(ProjectTile<S>& t, int64_t first) {
    const int64_t full = s_.out_channels / V::kLanes;
    for_pieces(full, kMaxVectors<V>, [&](int64_t vector, int n) {
      with_vectors<V>(n, [&](auto N) {
        const auto table = project_table<V, S, N, false>(Rows<V, N>{});
        all_pixels(t, first, vector * V::kLanes, max_rows<V>(N),
                   [&](int count) { table[count - 1](t); });
      });
    });
    const int64_t done = full * V::kLanes;
    t.lanes = s_.out_channels - done;
    if (t.lanes > 0) {
      // What is left fills no vector; a half vector does it at half the cost where there is one.
      using H = typename V::Half;
      const auto tail = [&]<class U>(U) {
        const auto table = project_table<U, S, 1, true>(Rows<U, 1>{});
        all_pixels(t, first, done, max_rows<U>(1), [&](int count) { table[count - 1](t); });
      };
      t.lanes <= H::kLanes ? tail(H{}) : tail(V{});
    }
  }

  // Output channels from `channel` on, in pieces of at most `most` pixels: f(count), with t set.
  template <class F>
  void all_pixels(ProjectTile<S>& t, int64_t first, int64_t channel, int most, F f) {
    const BlockArgs<S>& args = w_.args;
    t.weights = args.w_project + channel / kPanel * s_.hidden_channels * kPanel + first * kPanel;
    t.channel_offset = channel % kPanel;
    t.bias = first == 0 ? args.b_project + channel : nullptr;
    t.finished = alone_ && !in_scratch_ && first + t.terms == s_.hidden_channels;
    t.clip = Clip<T>(t.finished && at_once_ ? s_.out_activation : Activation::kIdentity);
    t.add_x = s_.residual && t.finished && at_once_;
    int64_t r = band_.row, c = 0;
    for_pieces(band_.rows * w_.cols, most, [&](int64_t pixel, int count) {
      t.depthwise = t.panels + pixel * kPanel;
      const int64_t step = s_.out_channels;
      for (int i = 0; i < count;) {
        if (in_scratch_)
          t.sum.fill(i, out_.run_sums + (pixel + i) * step + channel, step);
        else
          t.sum.fill(i, group_sums(r, c) + channel, step);
        if constexpr (kDepth<S> > 1) t.y.fill(i, y(r, c) + channel, step);
        if (t.add_x) t.x.fill(i, w_.residual(r, c) + channel, args.x_col);
        const int64_t run = least(count - i, w_.cols - c);
        i += int(run);
        c += run;
        if (c == w_.cols) {
          c = 0;
          ++r;
        }
      }
      t.prefetch = prefetch_.next(t.terms);
      f(count);
    });
  }

  // What register tiles leave to do: y = activation of y (+ x).
  void activate_output(int64_t r, int64_t col) {
    S* const y = this->y(r, col);
    const S* const x = w_.residual(r, col);
    for_vectors<V>(s_.out_channels, [&](int64_t c, auto load, auto store) MNV2_INLINE_LAMBDA {
      const auto added = [&] MNV2_INLINE_LAMBDA { return load(x + c); };
      store(finished(load(y + c), s_, added), y + c);
    });
  }

  // The groups' sums += this group's (+ x, into y, after the last).
  void add_run_sums(bool last) {
    for_outputs([&](int64_t r, int64_t col) {
      T* const group_sums = this->group_sums(r, col);
      const T* const run_sums = out_.run_sums + ((r - band_.row) * w_.cols + col) * s_.out_channels;
      S* const y = this->y(r, col);
      const S* const x = w_.residual(r, col);
      for_vectors<V>(s_.out_channels, [&](int64_t c, auto load, auto store) MNV2_INLINE_LAMBDA {
        const V total = V::add(load(run_sums + c), load(group_sums + c));
        if (!last) return store(total, group_sums + c);
        const auto added = [&] MNV2_INLINE_LAMBDA { return load(x + c); };
        store(finished(total, s_, added), y + c);
      });
    });
  }

  // Calls f(row, column) for the band's output pixels.
  template <class F>
  void for_outputs(F f) const {
    for (int64_t r = band_.row; r < band_.row + band_.rows; ++r)
      for (int64_t col = 0; col < w_.cols; ++col) f(r, col);
  }
  S* y(int64_t r, int64_t c) const { return out_.y + (r * s_.out_width() + c) * s_.out_channels; }
  T* group_sums(int64_t r, int64_t c) const {
    return out_.group_sums + r * out_.group_sums_row + c * s_.out_channels;
  }

  const Window<S>& w_;
  const BlockShape& s_;
  const Outputs<S>& out_;
  const S* d_;  // [group/16][band pixels][16]
  Group group_;
  Band band_;
  PrefetchQueue& prefetch_;
  bool alone_;       // one task runs all groups of the tile
  bool in_scratch_;  // the runs' sums are added up in run_sums
  bool at_once_;     // register tiles apply the output's activation and add x
};

// One group's part of a band: d to the outputs, or to the sums of the groups so far.
template <class V, class S>
void project(const Window<S>& w, const Outputs<S>& out, const S* d, Group group, Band band,
             PrefetchQueue prefetch) {
  Projection<V, S>(w, out, d, group, band, prefetch).run();
}

// y = the groups' sums in order, then x: what one task adds when it runs all groups of a tile.
template <class V, class S>
void add_row(const BlockArgs<S>& args, const Plan& plan, int64_t row) {
  const BlockShape& s = args.shape;
  const int64_t groups = plan.groups(s), group_size = s.out_elements();
  const int64_t first = row * s.out_width() * s.out_channels;
  const S* x = args.x + row / s.out_height() * args.x_image + row % s.out_height() * args.x_row;
  for (int64_t col = 0; col < s.out_width(); ++col) {
    const int64_t pixel = first + col * s.out_channels;
    for_vectors<V>(s.out_channels, [&](int64_t c, auto load, auto store) MNV2_INLINE_LAMBDA {
      V sum = load(args.partial + pixel + c);
      for (int64_t g = 1; g < groups; ++g)
        sum = V::add(load(args.partial + g * group_size + pixel + c), sum);
      const auto added = [&] MNV2_INLINE_LAMBDA { return load(x + col * args.x_col + c); };
      store(finished(sum, s, added), args.y + pixel + c);
    });
  }
}

}  // namespace
