// Layers beside the block: a 1x1 convolution, its activation, and the mean over its pixels.
#pragma once

#include "expand.h"

namespace {

// One image's share of the output channels: all its pixels, so that a mean over them is summed in the
// same order however many tasks there are.
template <class V, class S>
class Pointwise {
  using T = typename V::T;
  // Pixels whose inputs stay in L2 while every weight passes by.
  static constexpr int64_t kBlock = 256;
  // Pixels of one sum of formulas: all of the usual head; of a larger one as many as there are such
  // sums in a block, to keep the digits.
  static constexpr int64_t kUsual = 64, kSummed = 16;
  static constexpr int64_t kPerPanel = kPanel / V::kLanes;

 public:
  Pointwise(const PointwiseArgs<S>& args, int64_t task)
      : a_(args), s_(args.shape), image_(task / args.parts), pixels_(s_.height * s_.width) {
    const int64_t part = task % a_.parts;
    begin_ = s_.panels() * part / a_.parts * kPerPanel;
    end_ = s_.panels() * (part + 1) / a_.parts * kPerPanel;
  }

  void run() {
    for (int64_t block = 0; block < pixels_; block += kBlock) {
      const int64_t count = pixels_ - block < kBlock ? pixels_ - block : kBlock;
      for_pieces(end_ - begin_, kMaxVectors<V>, [&](int64_t piece, int n) {
        const int64_t vector = begin_ + piece;
        if (vector * V::kLanes >= s_.out_channels) return;
        with_vectors<V>(n, [&](auto N) {
          if (s_.pool)
            pooled<N>(vector, block, count);
          else if (is_clip(s_.activation))
            every_pixel<N>(vector, block, count);
          else
            every_pixel_activated<N>(vector, block, count);
        });
      });
    }
  }

 private:
  template <class O>
  ExpandTile<S, O> tile(int64_t vector) const {
    ExpandTile<S, O> t;
    t.weights = a_.weight;
    t.bias = a_.bias;
    t.in_channels = s_.in_channels;
    if (s_.linear) t.longest = kLongestLinearSum;
    t.vector = vector;
    t.panel = kPanel;
    const Clip<T> clip(s_.activation);
    t.low = clip.low;
    t.high = clip.high;
    return t;
  }

  // What is read next: the weights of the vectors behind these, or behind the last the next layer's.
  Region read_next(int64_t after, int64_t vectors, int64_t block, int64_t count) const {
    const int64_t panel = round_up(s_.in_channels, kDepth<S>) * kPanel;
    const int64_t bytes = panel * int64_t{sizeof(S)};
    if (block == 0 && after < end_)
      return {a_.weight + after / kPerPanel * panel, ceil_div(vectors, kPerPanel) * bytes, bytes,
              bytes};
    if (block + count >= pixels_ && after >= end_ && a_.next_bytes > 0)
      return Region::dense(a_.next, a_.next_bytes);
    return {};
  }

  // Calls f(pixel, rows) for pieces of a block, t.x and t.prefetch set.
  template <class O, class F>
  void for_pixels(ExpandTile<S, O>& t, int64_t vectors, int64_t block, int64_t count, int most,
                  F f) const {
    int64_t row = block / s_.width, col = block % s_.width;
    PrefetchQueue prefetch(read_next(t.vector + vectors, vectors, block, count),
                           ceil_div(count, most));
    for_pieces(count, most, [&](int64_t pixel, int rows) {
      for (int i = 0; i < rows;) {
        t.x.fill(i, a_.x + image_ * a_.x_image + row * a_.x_row + col * a_.x_col, a_.x_col);
        const int64_t run = rows - i < s_.width - col ? rows - i : s_.width - col;
        i += int(run);
        col += run;
        if (col == s_.width) {
          col = 0;
          ++row;
        }
      }
      t.prefetch = prefetch.next(s_.in_channels);
      f(pixel, rows);
    });
  }

  template <int N>
  void pooled(int64_t vector, int64_t block, int64_t count) const {
    const int64_t channel = vector * V::kLanes;
    // One order of summation, however many vectors this piece happens to have.
    constexpr int kRows = max_rows<V>(kMaxVectors<V>);
    T results[kRows * N * V::kLanes];
    ExpandTile<S, T> t = tile<T>(vector);
    // What clips is summed up by the product's own kernel, else pixels come one by one. The kernels
    // add the vector's own offset.
    const bool clips = is_clip(s_.activation);
    t.expanded.fill(0, results - channel, clips ? 0 : N * V::kLanes);
    const auto table = clips ? expand_table<V, S, T, N, true>(Rows<V, N>{})
                             : expand_table<V, S, T, N, false>(Rows<V, N>{});
    // One pixel after the other, a sum of many loses digits: some of them, and it begins anew.
    const int64_t summed = pixels_ <= kUsual ? kUsual : kSummed;
    V sums[N], earlier[N];
    unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA { earlier[j] = sums[j] = V::set1(0); });
    const auto begin_anew = [&] {
      unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
        earlier[j] = V::add(earlier[j], sums[j]);
        sums[j] = V::set1(0);
      });
    };
    int64_t end = summed;
    for_pixels(t, N, block, count, kRows, [&](int64_t pixel, int rows) {
      if (!clips && pixel >= end) {
        begin_anew();
        end += summed;
      }
      table[rows - 1](t);
      const int pixels = clips ? 1 : rows;
      if (!clips) activate<V>(results, rows * N, V::kLanes, s_.function());
      for (int i = 0; i < pixels; ++i)
        unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
          sums[j] = V::add(sums[j], V::load(results + (i * N + j) * V::kLanes));
        });
    });
    begin_anew();
    const V scale = V::set1(T(1) / T(pixels_));
    unrolled<N>([&](auto j) MNV2_INLINE_LAMBDA {
      const int64_t offset = image_ * s_.out_channels + channel + j * V::kLanes;
      const int64_t lanes = s_.out_channels - (channel + j * V::kLanes);
      if (lanes <= 0) return;
      const bool full = lanes >= V::kLanes;
      T* const p = a_.sums + offset;
      V sum = earlier[j];
      if (block > 0) sum = V::add(sum, full ? V::load(p) : V::load_partial(p, lanes));
      if (block + count < pixels_) {
        full ? sum.store(p) : sum.store_partial(p, lanes);
        return;
      }
      sum = V::fma(sum, scale, V::set1(0));
      S* const y = a_.y + offset;
      full ? Elements<V, S>::store(sum, y) : Elements<V, S>::store_partial(sum, y, lanes);
    });
  }

  template <int N>
  void every_pixel(int64_t vector, int64_t block, int64_t count) const {
    const int64_t channel = vector * V::kLanes, channels = s_.out_channels - channel;
    const bool full = channels >= N * V::kLanes;
    S results[kMostRows * N * V::kLanes];  // outputs that fill no vector
    S* const y = a_.y + (image_ * pixels_ + block) * s_.out_channels + channel;
    ExpandTile<S, S> t = tile<S>(vector);
    const auto table = expand_table<V, S, S, N, false>(Rows<V, N>{});
    for_pixels(t, N, block, count, max_rows<V>(N), [&](int64_t pixel, int rows) {
      // The kernel adds the vector's own offset.
      t.expanded.fill(0, (full ? y + pixel * s_.out_channels : results) - channel,
                      full ? s_.out_channels : N * V::kLanes);
      table[rows - 1](t);
      if (full) return;
      for (int i = 0; i < rows; ++i)
        std::memcpy(y + (pixel + i) * s_.out_channels, results + i * N * V::kLanes,
                    size_t(channels) * sizeof(S));
    });
  }

  // By way of sums, which are rounded to S once.
  template <int N>
  void every_pixel_activated(int64_t vector, int64_t block, int64_t count) const {
    const int64_t channel = vector * V::kLanes;
    T results[kMostRows * N * V::kLanes];
    S* y = a_.y + (image_ * pixels_ + block) * s_.out_channels + channel;
    ExpandTile<S, T> t = tile<T>(vector);
    t.expanded.fill(0, results - channel,
                    N * V::kLanes);  // the kernel adds the vector's own offset
    const auto table = expand_table<V, S, T, N, false>(Rows<V, N>{});
    const int64_t left = s_.out_channels - channel;
    const int64_t channels = left < N * V::kLanes ? left : N * V::kLanes;
    for_pixels(t, N, block, count, max_rows<V>(N), [&](int64_t, int rows) {
      table[rows - 1](t);
      activate<V>(results, rows * N, V::kLanes, s_.function());
      for (int i = 0; i < rows; ++i, y += s_.out_channels)
        for_vectors<V>(channels, [&](int64_t c, auto, auto store) MNV2_INLINE_LAMBDA {
          store(V::load(results + i * N * V::kLanes + c), y + c);
        });
    });
  }

  const PointwiseArgs<S>& a_;
  const PointwiseShape& s_;
  int64_t image_, pixels_;
  int64_t begin_, end_;  // vectors
};

template <class V, class S>
void run_pointwise(const PointwiseArgs<S>& args, int64_t task) {
  Pointwise<V, S>(args, task).run();
}

}  // namespace
