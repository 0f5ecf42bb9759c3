// Behind d, backward: gradients of a, d, act(e), e and x, and of the weights.
#pragma once

#include "derivative.h"
#include "filter.h"
#include "passes.h"
#include "product.h"
#include "sums.h"

namespace {

// q = g w_project
template <class V>
void Training<V>::project_gradient() {
  const int64_t panel = out_panel(a_.kept_q);
  product<V>(
      pixels(), vectors(), g_band(), s_.out_channels, 1, a_.w_project + channel() * s_.out_channels,
      s_.out_channels * kPanel, s_.out_channels, Dense<T>{q_, kPanel},
      [](T*, int64_t) MNV2_INLINE_LAMBDA { return V::set1(0); },
      [&](T* at, int64_t v, V sum)
          MNV2_INLINE_LAMBDA { sum.store(at + vector_offset<V>(v, panel)); });
}

// The gradient of a, q act'(a), and from it: in the pass of the projection its sums, and act(a) in the
// scratch of d; in that of the expansion d's gradient.
template <class V>
void Training<V>::behind_norm() {
  with_activation(s_.activation, [&](auto kind) MNV2_INLINE_LAMBDA {
    for (int64_t v = 0; v < vectors(); ++v) behind_norm_of<kind()>(v);
  });
}

template <class V>
template <Activation kind>
void Training<V>::behind_norm_of(int64_t v) {
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
      T* to = gradient_row(row_ + r) + vector_offset<V>(v, l_.grad_panel()) + l_.grad_left * kPanel;
      for (int64_t i = r * s_.out_width(); i < (r + 1) * s_.out_width(); ++i, to += step) {
        const V value = V::load(d + i * kPanel);
        const V g = gradient(i, V::fma(value, scale, shift));
        V::fma(g, scale, V::fma(normalised(value), slope, offset)).store(to);
      }
    }
  }
}

// dw[i] += sum over pixels of narrow[pixel][i] * wide[pixel], for `rows` channels i.
template <class V>
void Training<V>::add_outer(const T* narrow, int64_t rows, const T* wide, int64_t panel,
                            int64_t pixels, T* dw) {
  product<V>(
      rows, vectors(), narrow, 1, rows, wide, panel, pixels, Dense<T>{dw + channel(), hidden_},
      [](T* at, int64_t v) MNV2_INLINE_LAMBDA { return V::load(at + v * V::kLanes); },
      [](T* at, int64_t v, V sum) MNV2_INLINE_LAMBDA { sum.store(at + v * V::kLanes); });
}

template <class V>
void Training<V>::add_project_weights() {
  add_outer(g_band(), s_.out_channels, of_band_, l_.out_panel(), pixels(), dw_project_);
}

template <class V>
void Training<V>::add_depthwise_weights() {
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
template <class V>
void Training<V>::expand_gradient(int64_t end) {
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
    project<V, T>({g_e_, l_.in_panel(), panels_, a_.w_input + channel() * kPanel, hidden_ * kPanel,
                   g_x_row(first), s_.in_channels, first_ > 0},
                  pixels);
}

// The transposed depthwise convolution, rows of the image. f(row)(col, g): what is stored of each sum.
template <class V>
template <class F>
void Training<V>::each_row(int64_t v, int64_t first, int64_t end, F f) {
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
template <class V>
void Training<V>::clipped_gradient(int64_t v, int64_t first, int64_t end) {
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
template <class V>
template <Activation kind>
void Training<V>::formula_gradient(int64_t v, int64_t first, int64_t end) {
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
template <class V>
void Training<V>::store_gradient(int64_t pixels, T* g_x) {
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

}  // namespace
