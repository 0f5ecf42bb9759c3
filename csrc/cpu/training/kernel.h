// The passes of a block in training over the images of one slot. Included by each instruction set's file
// behind its V; see avx2.cpp.
//
//   statistics         x -> act(e) -> d: its mean, and its squares
//   pool               the same, then act(a): its sums over each image
//   project            the same, then p = w_project (gate act(a))
//   backward_project   the same, then q = g w_project and from it the gradient of a, summed up; dw_project
//   backward_expand    the same, then the gradients of d, of act(e), of e, of x; dw_depthwise, dw_expand
//
// Where memory is given for it, statistics keeps d for pool and project, and backward_project act(e), d and q for
// backward_expand.
//
// Each pass goes over chunks of expanded channels, and of each over the images, from top to bottom in
// bands of output rows.
#pragma once

#include <cmath>

#include "args.h"
#include "derivative.h"
#include "filter.h"
#include "narrow.h"
#include "product.h"
#include "sums.h"

namespace {

enum class Step { kStatistics, kPool, kProject, kProjectBackward, kExpandBackward };

template <class V>
class Training {
  using T = typename V::T;
  static constexpr int64_t kPerPanel = kPanel / V::kLanes;
  static constexpr int64_t kPixelsInL1 = 64;

 public:
  Training(Step step, const Args<T>& args, const Layout& layout, int64_t slot, T* scratch)
      : step_(step), a_(args), s_(args.shape), l_(layout), hidden_(s_.hidden_panels() * kPanel) {
    const auto take = [&](int64_t count) { return std::exchange(scratch, scratch + count); };
    ring_ = take(l_.ring());
    sums_of_e_ = take(l_.keeps_e ? l_.ring() : 0);
    gradient_ = take(l_.grad());
    zeros_ = take(l_.zeros());
    of_band_ = take(l_.panels * l_.out_panel());
    q_of_band_ = take(l_.panels * l_.out_panel());
    g_e_ = take(l_.panels * l_.in_panel());
    const int64_t slots = slots_of(s_);
    first_image_ = s_.batch * slot / slots;
    end_image_ = s_.batch * (slot + 1) / slots;
    sums_ = a_.sums + slot * 2 * hidden_;
    if (step_ == Step::kPool) sums_of_image_ = kPooledSums;
    if (step_ == Step::kProjectBackward && a_.gate) sums_of_image_ = kGateSums;
    dw_project_ = a_.dw_project + slot * s_.out_channels * hidden_;
    dw_expand_ = a_.dw_expand + slot * s_.in_channels * hidden_;
    dw_depthwise_ = a_.dw_depthwise + slot * s_.taps() * hidden_;
    // Columns around the image stay zeros: nothing is written there.
    std::fill(ring_, ring_ + l_.ring(), T(0));
    if (step_ == Step::kExpandBackward) {
      std::fill(gradient_, gradient_ + l_.grad(), T(0));
      std::fill(zeros_, zeros_ + l_.zeros(), T(0));
    }
  }

  void run() {
    // All at once where none needs scratch.
    const int64_t most = projects_kept() ? a_.end_panel - a_.first_panel : l_.panels;
    for (first_ = a_.first_panel; first_ < a_.end_panel; first_ += most) {
      panels_ = least(most, a_.end_panel - first_);
      clear_results();
      for (image_ = first_image_; image_ < end_image_; ++image_) run_image();
    }
  }

 private:
  int64_t channel() const { return first_ * kPanel; }
  int64_t vectors() const { return panels_ * kPerPanel; }
  bool expands() const { return s_.expand != Expand::kNone; }

  // Of this chunk, in rows of all channels.
  template <class R>
  void clear(R* p, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r)
      std::fill_n(p + r * hidden_ + channel(), panels_ * kPanel, R(0));
  }
  void clear_results() {
    if (step_ != Step::kProject && sums_of_image_ == 0) clear(sums_, 2);
    if (step_ == Step::kProjectBackward) clear(dw_project_, s_.out_channels);
    if (step_ == Step::kExpandBackward) {
      clear(dw_depthwise_, s_.taps());
      if (expands()) clear(dw_expand_, s_.in_channels);
    }
    summed_ = 0;
  }

  void run_image() {
    const int64_t height = s_.out_height();
    expanded_rows_ = finished_rows_ = 0;
    const int64_t panel = image_ * (a_.end_panel - a_.first_panel) + first_ - a_.first_panel;
    expanded_ = a_.kept_e ? a_.kept_e + panel * ring_panel() : ring_;
    if (a_.kept_e && !reads()) clear_margins();
    if (sums_of_image_ > 0) {
      sums_ = a_.sums + image_ * sums_of_image_ * hidden_;
      clear(sums_, sums_of_image_);
    }
    for (int64_t row = 0; row < height; row += l_.band) {
      row_ = row;
      rows_ = least(l_.band, height - row);
      const bool last = row + rows_ == height;
      const int64_t reach = (row + rows_ - 1) * s_.stride - s_.pad_top + s_.extent();
      const int64_t at = (panel * s_.out_height() + row) * s_.out_width() * kPanel;
      d_ = a_.kept_d ? a_.kept_d + at : of_band_;
      q_ = a_.kept_q ? a_.kept_q + at : q_of_band_;
      const bool has_d = reads() && a_.kept_d, has_e = reads() && a_.kept_e;
      if (!has_e && !(has_d && step_ != Step::kExpandBackward)) expand(least(reach, s_.height));
      if (!has_d) depthwise();
      if (step_ == Step::kStatistics) {
        add_statistics();
      } else if (step_ == Step::kPool || step_ == Step::kProject) {
        activate_behind_norm();
        if (step_ == Step::kProject) project_band();
      } else {
        if (!reads() || !a_.kept_q) project_gradient();
        behind_norm();
        if (step_ == Step::kProjectBackward) {
          add_project_weights();
        } else {
          add_depthwise_weights();
          // Rows that no later band reaches.
          const int64_t end = last ? reach : (row + rows_) * s_.stride - s_.pad_top;
          expand_gradient(greatest(least(end, s_.height), 0));
        }
      }
    }
    // Rows of x that no tap reaches.
    if (step_ == Step::kExpandBackward && a_.g_x && finished_rows_ < s_.height)
      std::fill(g_x_row(finished_rows_), g_x_row(s_.height), T(0));
  }

  // In 32 bits, which divide in half the time.
  static int64_t place(int64_t row, int64_t rows) { return uint32_t(row) % uint32_t(rows); }
  bool projects_kept() const { return step_ == Step::kProject && a_.kept_d; }
  // Whether this pass reads what an earlier one has kept.
  bool reads() const { return step_ != Step::kStatistics && step_ != Step::kProjectBackward; }
  // Elements from one panel to the next: of d or q, of rings.
  int64_t out_panel(const T* kept) const {
    return kept ? s_.out_height() * s_.out_width() * kPanel : l_.out_panel();
  }
  int64_t ring_rows() const { return a_.kept_e ? s_.height : l_.ring_rows; }
  int64_t ring_panel() const { return ring_rows() * l_.ring_cols * kPanel; }
  T* ring_row(T* ring, int64_t row) const {
    return ring + place(row, ring_rows()) * l_.ring_cols * kPanel;
  }
  // Zeros around the image's columns, of an image that is kept.
  void clear_margins() {
    const int64_t end = l_.left + s_.width;
    T* row = expanded_;
    for (int64_t r = 0; r < panels_ * s_.height; ++r, row += l_.ring_cols * kPanel) {
      std::fill(row, row + l_.left * kPanel, T(0));
      std::fill(row + end * kPanel, row + l_.ring_cols * kPanel, T(0));
    }
  }
  T* gradient_row(int64_t row) const {
    return gradient_ + place(row, l_.grad_rows) * l_.grad_cols * kPanel;
  }
  const T* x_row(int64_t row) const {
    return a_.x + (image_ * s_.height + row) * s_.width * s_.in_channels;
  }
  T* g_x_row(int64_t row) const {
    return a_.g_x + (image_ * s_.height + row) * s_.width * s_.in_channels;
  }
  // Of g and p, where this band begins.
  int64_t band_offset() const {
    return (image_ * s_.out_height() + row_) * s_.out_width() * s_.out_channels;
  }
  const T* g_band() const { return a_.g + band_offset(); }
  int64_t pixels() const { return rows_ * s_.out_width(); }

  // Rows of act(e) up to `end`, and of e where it is kept.
  void expand(int64_t end) {
    const int64_t first = expanded_rows_;
    if (end <= first) return;
    expanded_rows_ = end;
    if (!expands()) {
      for (int64_t row = first; row < end; ++row)
        copy(x_row(row), ring_row(expanded_, row) + l_.left * kPanel);
    } else if (!is_clip(s_.expand_activation)) {
      T* const sums = l_.keeps_e ? sums_of_e_ : expanded_;
      // As many rows at a time as stay in L1, but enough pixels for tiles.
      const int64_t some = greatest(kPixelsInL1 / s_.width, 1);
      for (int64_t row = first; row < end; row += some) {
        const int64_t last = least(row + some, end);
        expand_rows(row, last, sums, [](V sum) MNV2_INLINE_LAMBDA { return sum; });
        for (int64_t r = row; r < last; ++r) activate(sums, r);
      }
    } else {
      const Clip<T> clip(s_.expand_activation);
      const V low = V::set1(clip.low), high = V::set1(clip.high);
      expand_rows(first, end, expanded_,
                  [&](V sum) MNV2_INLINE_LAMBDA { return clamp(sum, low, high); });
    }
  }
  // Where the pixels of some rows lie in a ring.
  struct RingPixels {
    T* first;  // the ring
    const Training& of;
    int64_t row;

    template <int R>
    MNV2_INLINE void fill(int64_t pixel, T* (&at)[R]) const {
      int64_t r = row + uint32_t(pixel) / uint32_t(of.s_.width);
      int64_t col = pixel - (r - row) * of.s_.width;
      T* p = of.ring_row(first, r) + (of.l_.left + col) * kPanel;
      unrolled<R>([&](auto i) MNV2_INLINE_LAMBDA {
        at[i] = p;
        p += kPanel;
        if (++col == of.s_.width && i + 1 < R) {
          col = 0;
          p = of.ring_row(first, ++r) + of.l_.left * kPanel;
        }
      });
    }
  };
  template <class F>
  void expand_rows(int64_t first, int64_t end, T* ring, F f) {
    const T* const bias = a_.b_expand + channel();
    const int64_t panel = ring_panel();
    product<V>((end - first) * s_.width, vectors(), x_row(first), s_.in_channels, 1,
               a_.w_expand + channel() * s_.in_channels, s_.in_channels * kPanel, s_.in_channels,
               RingPixels{ring, *this, first},
               [&](T*, int64_t v) MNV2_INLINE_LAMBDA { return V::load(bias + v * V::kLanes); },
               [&](T* at, int64_t v, V sum)
                   MNV2_INLINE_LAMBDA { f(sum).store(at + vector_offset<V>(v, panel)); });
  }
  void activate(T* ring, int64_t row) {
    const T* const sums = ring_row(ring, row) + l_.left * kPanel;
    T* const to = ring_row(expanded_, row) + l_.left * kPanel;
    with_activation(s_.expand_activation, [&](auto kind) MNV2_INLINE_LAMBDA {
      for (int64_t v = 0; v < vectors(); ++v) {
        const int64_t at = vector_offset<V>(v, ring_panel());
        for (int64_t col = 0; col < s_.width; ++col)
          value_of<kind()>(V::load(sums + at + col * kPanel), s_.negative_slope)
              .store(to + at + col * kPanel);
      }
    });
  }
  void copy(const T* x, T* to) {
    for (int64_t v = 0; v < vectors(); ++v) {
      const int64_t c = channel() + v * V::kLanes, lanes = s_.in_channels - c;
      T* const at = to + vector_offset<V>(v, ring_panel());
      for (int64_t col = 0; col < s_.width; ++col) {
        const T* const p = x + col * s_.in_channels + c;
        (lanes >= V::kLanes ? V::load(p) : V::load_partial(p, greatest(lanes, 0)))
            .store(at + col * kPanel);
      }
    }
  }

  // Rows of the kernel over output row `row` that lie in the image.
  template <class F>
  void for_kernel_rows(int64_t row, F f) const {
    for (int64_t ky = 0; ky < s_.kernel; ++ky) {
      const int64_t at = row * s_.stride - s_.pad_top + ky * s_.dilation;
      if (at >= 0 && at < s_.height) f(ky, at);
    }
  }
  const T* taps(int64_t v, int64_t ky) const {
    return a_.w_depthwise + vector_offset<V>(first_ * kPerPanel + v, s_.taps() * kPanel) +
           ky * s_.kernel * kPanel;
  }

  void depthwise() {
    for (int64_t v = 0; v < vectors(); ++v) {
      T* const from = expanded_ + vector_offset<V>(v, ring_panel());
      T* const to = d_ + vector_offset<V>(v, out_panel(a_.kept_d));
      for (int64_t r = 0; r < rows_; ++r) {
        Rows2d<T> rows;
        for_kernel_rows(row_ + r,
                        [&](int64_t ky, int64_t at) { rows.add(ring_row(from, at), taps(v, ky)); });
        T* const out = to + r * s_.out_width() * kPanel;
        filter_row<V>(s_.kernel, s_.stride_across(), rows, s_.dilation, s_.out_width(), out,
                      [](int64_t, V d) { return d; });
      }
    }
  }

  void add_statistics() {
    for (int64_t v = 0; v < vectors(); ++v) {
      const T* const at = d_ + vector_offset<V>(v, out_panel(a_.kept_d));
      const V origin = V::load(at), minus = multiplied(origin, V::set1(-1));
      V sum = V::set1(0), squares = V::set1(0);
      for (int64_t i = 0; i < pixels(); ++i) {
        const V off = V::add(V::load(at + i * kPanel), minus);
        sum = V::add(sum, off);
        squares = V::fma(off, off, squares);
      }
      double* const mean = sums_ + channel() + v * V::kLanes;
      join<V>(origin, sum, squares, double(summed_), double(pixels()), mean, mean + hidden_);
    }
    summed_ += pixels();
  }

  // Where act(a) goes: nobody reads d behind the projection.
  T* activated() const { return projects_kept() ? d_ : of_band_; }
  int64_t activated_panel() const {
    return projects_kept() ? out_panel(a_.kept_d) : l_.out_panel();
  }
  // act(a): its sums, or times the gate in the place of d.
  void activate_behind_norm() {
    with_activation(s_.activation, [&](auto kind) MNV2_INLINE_LAMBDA {
      for (int64_t v = 0; v < vectors(); ++v) activate_behind_norm_of<kind()>(v);
    });
  }
  template <Activation kind>
  void activate_behind_norm_of(int64_t v) {
    const int64_t c = channel() + v * V::kLanes;
    const V scale = V::load(a_.scale + c), shift = V::load(a_.shift + c);
    const T* at = d_ + vector_offset<V>(v, out_panel(a_.kept_d));
    T* to = activated() + vector_offset<V>(v, activated_panel());
    const T* const end = at + pixels() * kPanel;
    const auto value = [&](const T* d) MNV2_INLINE_LAMBDA {
      return value_of<kind>(V::fma(V::load(d), scale, shift), s_.negative_slope);
    };
    if (step_ == Step::kPool) {
      V sum = V::set1(0);
      for (; at < end; at += kPanel) sum = V::add(sum, value(at));
      add_lanes<V>(sum, sums_ + c);
    } else {
      const V gate = of_image(a_.gate, c, 1);
      for (; at < end; at += kPanel, to += kPanel) multiplied(value(at), gate).store(to);
    }
  }
  // Of [N][E/16 * 16], or `otherwise` where there is none.
  V of_image(const T* values, int64_t c, T otherwise) const {
    return values ? V::load(values + image_ * hidden_ + c) : V::set1(otherwise);
  }
  void project_band() {
    project<V, T>({activated(), activated_panel(), panels_, a_.w_output + channel() * kPanel,
                   hidden_ * kPanel, a_.p + band_offset(), s_.out_channels, first_ > 0},
                  pixels());
  }

  // q = g w_project
  void project_gradient() {
    const int64_t panel = out_panel(a_.kept_q);
    product<V>(
        pixels(), vectors(), g_band(), s_.out_channels, 1,
        a_.w_project + channel() * s_.out_channels, s_.out_channels * kPanel, s_.out_channels,
        Dense<T>{q_, kPanel}, [](T*, int64_t) MNV2_INLINE_LAMBDA { return V::set1(0); },
        [&](T* at, int64_t v, V sum)
            MNV2_INLINE_LAMBDA { sum.store(at + vector_offset<V>(v, panel)); });
  }

  // The gradient of a, q act'(a), and from it: in the pass of the projection its sums, and act(a) in the
  // scratch of d; in that of the expansion d's gradient.
  void behind_norm() {
    with_activation(s_.activation, [&](auto kind) MNV2_INLINE_LAMBDA {
      for (int64_t v = 0; v < vectors(); ++v) behind_norm_of<kind()>(v);
    });
  }
  template <Activation kind>
  void behind_norm_of(int64_t v) {
    const int64_t c = channel() + v * V::kLanes;
    const V scale = V::load(a_.scale + c), shift = V::load(a_.shift + c);
    const V inverse = V::load(a_.inverse + c);
    const V minus_mean = multiplied(V::load(a_.mean + c), V::set1(-1));
    const T* const d = d_ + vector_offset<V>(v, out_panel(a_.kept_d));
    const T* const q = q_ + vector_offset<V>(v, out_panel(a_.kept_q));
    T* const values = of_band_ + vector_offset<V>(v, l_.out_panel());
    const V gate = of_image(a_.gate, c, 1), of_pooled = of_image(a_.of_pooled, c, 0);
    const auto gradient = [&](int64_t i, V a) MNV2_INLINE_LAMBDA {
      const V of_value = V::fma(V::load(q + i * kPanel), gate, of_pooled);
      return times_derivative<kind>(of_value, a, s_.negative_slope);
    };
    const auto normalised = [&](V d) MNV2_INLINE_LAMBDA {
      return multiplied(V::add(d, minus_mean), inverse);
    };
    if (sums_of_image_ == kGateSums) {
      V sums[kGateSums];
      unrolled<kGateSums>([&](auto row) MNV2_INLINE_LAMBDA { sums[row] = V::set1(0); });
      for (int64_t i = 0; i < pixels(); ++i) {
        const V value = V::load(d + i * kPanel), a = V::fma(value, scale, shift);
        const V of_value = V::load(q + i * kPanel), result = value_of<kind>(a, s_.negative_slope);
        const V slope = times_derivative<kind>(V::set1(1), a, s_.negative_slope);
        const V g = times_derivative<kind>(of_value, a, s_.negative_slope);
        sums[0] = V::fma(result, of_value, sums[0]);
        sums[1] = V::add(sums[1], g);
        sums[2] = V::add(sums[2], slope);
        sums[3] = V::fma(g, normalised(value), sums[3]);
        sums[4] = V::fma(slope, normalised(value), sums[4]);
        multiplied(result, gate).store(values + i * kPanel);
      }
      unrolled<kGateSums>(
          [&](auto row) MNV2_INLINE_LAMBDA { add_lanes<V>(sums[row], sums_ + row * hidden_ + c); });
    } else if (step_ == Step::kProjectBackward) {
      V sum = V::set1(0), products = V::set1(0);
      for (int64_t i = 0; i < pixels(); ++i) {
        const V value = V::load(d + i * kPanel), a = V::fma(value, scale, shift);
        const V g = gradient(i, a);
        sum = V::add(sum, g);
        products = V::fma(g, normalised(value), products);
        value_of<kind>(a, s_.negative_slope).store(values + i * kPanel);
      }
      add_lanes<V>(sum, sums_ + c);
      add_lanes<V>(products, sums_ + hidden_ + c);
    } else {
      const V offset = V::load(a_.offset + c), slope = V::load(a_.slope + c);
      const int64_t step = s_.stride_across() * kPanel;
      for (int64_t r = 0; r < rows_; ++r) {
        T* to =
            gradient_row(row_ + r) + vector_offset<V>(v, l_.grad_panel()) + l_.grad_left * kPanel;
        for (int64_t i = r * s_.out_width(); i < (r + 1) * s_.out_width(); ++i, to += step) {
          const V value = V::load(d + i * kPanel);
          const V g = gradient(i, V::fma(value, scale, shift));
          V::fma(g, scale, V::fma(normalised(value), slope, offset)).store(to);
        }
      }
    }
  }
  // dw[i] += sum over pixels of narrow[pixel][i] * wide[pixel], for `rows` channels i.
  void add_outer(const T* narrow, int64_t rows, const T* wide, int64_t panel, int64_t pixels,
                 T* dw) {
    product<V>(
        rows, vectors(), narrow, 1, rows, wide, panel, pixels, Dense<T>{dw + channel(), hidden_},
        [](T* at, int64_t v) MNV2_INLINE_LAMBDA { return V::load(at + v * V::kLanes); },
        [](T* at, int64_t v, V sum) MNV2_INLINE_LAMBDA { sum.store(at + v * V::kLanes); });
  }
  void add_project_weights() {
    add_outer(g_band(), s_.out_channels, of_band_, l_.out_panel(), pixels(), dw_project_);
  }

  void add_depthwise_weights() {
    for (int64_t v = 0; v < vectors(); ++v) {
      T* const from = expanded_ + vector_offset<V>(v, ring_panel());
      for (int64_t r = row_; r < row_ + rows_; ++r) {
        const T* rows[kMostKernelSize];
        std::fill_n(rows, s_.kernel, zeros_);
        for_kernel_rows(r, [&](int64_t ky, int64_t at) { rows[ky] = ring_row(from, at); });
        filter_weights<V>(
            s_.kernel, rows,
            gradient_row(r) + vector_offset<V>(v, l_.grad_panel()) + l_.grad_left * kPanel,
            s_.stride_across(), s_.dilation, s_.out_width(),
            dw_depthwise_ + channel() + v * V::kLanes, hidden_);
      }
    }
  }

  // Gradients of act(e), of e and of x, rows up to `end`.
  void expand_gradient(int64_t end) {
    const int64_t first = finished_rows_;
    if (end <= first) return;
    finished_rows_ = end;
    const int64_t pixels = (end - first) * s_.width;
    const bool clips = expands() && !l_.keeps_e;
    for (int64_t v = 0; v < vectors(); ++v) {
      if (clips)
        clipped_gradient(v, first, end);
      else
        each_row(v, first, end, [](int64_t) { return [](int64_t, V g) { return g; }; });
    }
    if (!expands()) return store_gradient(pixels, g_x_row(first));
    if (!clips)
      with_activation(s_.expand_activation, [&](auto kind) MNV2_INLINE_LAMBDA {
        for (int64_t v = 0; v < vectors(); ++v) formula_gradient<kind()>(v, first, end);
      });
    add_outer(x_row(first), s_.in_channels, g_e_, l_.in_panel(), pixels, dw_expand_);
    if (a_.g_x)
      project<V, T>({g_e_, l_.in_panel(), panels_, a_.w_input + channel() * kPanel,
                     hidden_ * kPanel, g_x_row(first), s_.in_channels, first_ > 0},
                    pixels);
  }
  // The transposed depthwise convolution, rows of the image. f(row)(col, g): what is stored of each sum.
  template <class F>
  void each_row(int64_t v, int64_t first, int64_t end, F f) {
    T* const from = gradient_ + vector_offset<V>(v, l_.grad_panel());
    T* const to = g_e_ + vector_offset<V>(v, l_.in_panel());
    for (int64_t row = first; row < end; ++row) {
      Rows2d<T> rows;
      for (int64_t ky = 0; ky < s_.kernel; ++ky) {
        const int64_t at = row + s_.pad_top - ky * s_.dilation, r = at / s_.stride;
        if (at < 0 || at % s_.stride != 0 || r >= s_.out_height()) continue;
        rows.add(from + (gradient_row(r) - gradient_) + (s_.extent() - 1) * kPanel, taps(v, ky));
      }
      filter_row<V>(s_.kernel, 1, rows, -s_.dilation, s_.width,
                    to + (row - first) * s_.width * kPanel, f(row));
    }
  }
  // At once, from act(e).
  void clipped_gradient(int64_t v, int64_t first, int64_t end) {
    const Clip<T> clip(s_.expand_activation);
    const V low = V::set1(clip.low), high = V::set1(clip.high);
    V sum = V::set1(0);
    each_row(v, first, end, [&](int64_t row) MNV2_INLINE_LAMBDA {
      const T* const at =
          ring_row(expanded_, row) + vector_offset<V>(v, ring_panel()) + l_.left * kPanel;
      return [&sum, at, low, high](int64_t col, V g) MNV2_INLINE_LAMBDA {
        const V value = V::where_between(V::load(at + col * kPanel), low, high, g);
        sum = V::add(sum, value);
        return value;
      };
    });
    add_lanes<V>(sum, sums_ + channel() + v * V::kLanes);
  }
  // In place, from e.
  template <Activation kind>
  void formula_gradient(int64_t v, int64_t first, int64_t end) {
    if constexpr (!is_clip(kind)) {
      T* g = g_e_ + vector_offset<V>(v, l_.in_panel());
      V sum = V::set1(0);
      for (int64_t row = first; row < end; ++row) {
        const T* at =
            ring_row(sums_of_e_, row) + vector_offset<V>(v, ring_panel()) + l_.left * kPanel;
        for (int64_t col = 0; col < s_.width; ++col, at += kPanel, g += kPanel) {
          const V value = times_derivative<kind>(V::load(g), V::load(at), s_.negative_slope);
          sum = V::add(sum, value);
          value.store(g);
        }
      }
      add_lanes<V>(sum, sums_ + channel() + v * V::kLanes);
    }
  }
  // Without an expansion: channels side by side again.
  void store_gradient(int64_t pixels, T* g_x) {
    for (int64_t v = 0; v < vectors(); ++v) {
      const int64_t c = channel() + v * V::kLanes, lanes = s_.in_channels - c;
      if (lanes <= 0) return;
      const T* const from = g_e_ + vector_offset<V>(v, l_.in_panel());
      for (int64_t i = 0; i < pixels; ++i) {
        T* const to = g_x + i * s_.in_channels + c;
        const V value = V::load(from + i * kPanel);
        lanes >= V::kLanes ? value.store(to) : value.store_partial(to, lanes);
      }
    }
  }

  const Step step_;
  const Args<T>& a_;
  const BlockShape& s_;
  const Layout& l_;
  const int64_t hidden_;  // E/16 * 16
  int64_t first_image_, end_image_;
  double* sums_;
  T *dw_project_, *dw_expand_, *dw_depthwise_;  // of this slot
  T *ring_, *expanded_;                         // [panels][ring rows][ring cols][16]: act(e), or x
  T* sums_of_e_;                                // the same of e
  T* gradient_;                                 // [panels][grad rows][grad cols][16]: of d
  T* zeros_;                                    // a row of the ring
  T *of_band_, *q_of_band_;                     // [panels][band pixels][16]: act(a), mostly d; q
  T *d_, *q_;                                   // there, or in an image that is kept
  T* g_e_;  // [panels][rows of the image that a band finishes][16]

  int64_t first_ = 0, panels_ = 0;  // this chunk
  int64_t image_ = 0, row_ = 0, rows_ = 0;
  int64_t expanded_rows_ = 0, finished_rows_ = 0;
  int64_t summed_ = 0;         // pixels
  int64_t sums_of_image_ = 0;  // rows of sums for each image; 0: for all of the slot
};

template <class V, Step kStep>
void run_training(const Args<typename V::T>& args, const Layout& layout, int64_t slot,
                  typename V::T* scratch) {
  Training<V>(kStep, args, layout, slot, scratch).run();
}

template <class V, void (Narrow<V>::*kPass)()>
void run_narrow(const NarrowArgs<typename V::T>& args, int64_t slice) {
  (Narrow<V>(args, slice).*kPass)();
}
template <class V>
void run_centre(const NarrowArgs<typename V::T>& args, int64_t slice, typename V::T* scratch) {
  Narrow<V>(args, slice).centre(scratch);
}

template <class V>
constexpr Kernels<typename V::T> training_kernels_of() {
  using N = Narrow<V>;
  return {V::kLanes,
          &run_training<V, Step::kStatistics>,
          &run_training<V, Step::kPool>,
          &run_training<V, Step::kProject>,
          &run_training<V, Step::kProjectBackward>,
          &run_training<V, Step::kExpandBackward>,
          &run_narrow<V, &N::moments>,
          &run_narrow<V, &N::normalise>,
          &run_narrow<V, &N::gradient_sums>,
          &run_narrow<V, &N::gradient>,
          &run_centre<V>};
}

}  // namespace
