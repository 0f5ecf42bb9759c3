// Rows of act(e), or of x where nothing expands, and of d.
#pragma once

#include "derivative.h"
#include "filter.h"
#include "passes.h"
#include "product.h"

namespace {

// Where the pixels of some rows lie in a ring.
template <class V>
struct Training<V>::RingPixels {
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

// Rows of act(e) up to `end`, and of e where it is kept.
template <class V>
void Training<V>::expand(int64_t end) {
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

template <class V>
template <class F>
void Training<V>::expand_rows(int64_t first, int64_t end, T* ring, F f) {
  const T* const bias = a_.b_expand + channel();
  const int64_t panel = ring_panel();
  product<V>((end - first) * s_.width, vectors(), x_row(first), s_.in_channels, 1,
             a_.w_expand + channel() * s_.in_channels, s_.in_channels * kPanel, s_.in_channels,
             RingPixels{ring, *this, first},
             [&](T*, int64_t v) MNV2_INLINE_LAMBDA { return V::load(bias + v * V::kLanes); },
             [&](T* at, int64_t v, V sum)
                 MNV2_INLINE_LAMBDA { f(sum).store(at + vector_offset<V>(v, panel)); });
}

template <class V>
void Training<V>::activate(T* ring, int64_t row) {
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

template <class V>
void Training<V>::copy(const T* x, T* to) {
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

template <class V>
void Training<V>::depthwise() {
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

}  // namespace
