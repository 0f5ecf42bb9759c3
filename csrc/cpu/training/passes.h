// The images of one slot through one pass: where everything lies, and the order of steps. Stages are in expand.h,
// forward.h and backward.h; kernel.h says what each pass does.
#pragma once

#include "../kernel/elements.h"
#include "args.h"

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

  // Where act(a) goes: nobody reads d behind the projection.
  T* activated() const { return projects_kept() ? d_ : of_band_; }
  int64_t activated_panel() const {
    return projects_kept() ? out_panel(a_.kept_d) : l_.out_panel();
  }
  // Of [N][E/16 * 16], or `otherwise` where there is none.
  V of_image(const T* values, int64_t c, T otherwise) const {
    return values ? V::load(values + image_ * hidden_ + c) : V::set1(otherwise);
  }

  // expand.h
  struct RingPixels;
  void expand(int64_t end);
  template <class F>
  void expand_rows(int64_t first, int64_t end, T* ring, F f);
  void activate(T* ring, int64_t row);
  void copy(const T* x, T* to);
  void depthwise();

  // forward.h
  void add_statistics();
  void activate_behind_norm();
  template <Activation kind>
  void activate_behind_norm_of(int64_t v);
  void project_band();

  // backward.h
  void project_gradient();
  void behind_norm();
  template <Activation kind>
  void behind_norm_of(int64_t v);
  void add_outer(const T* narrow, int64_t rows, const T* wide, int64_t panel, int64_t pixels,
                 T* dw);
  void add_project_weights();
  void add_depthwise_weights();
  void expand_gradient(int64_t end);
  template <class F>
  void each_row(int64_t v, int64_t first, int64_t end, F f);
  void clipped_gradient(int64_t v, int64_t first, int64_t end);
  template <Activation kind>
  void formula_gradient(int64_t v, int64_t first, int64_t end);
  void store_gradient(int64_t pixels, T* g_x);

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

}  // namespace
