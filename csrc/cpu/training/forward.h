// Behind d, forward: its statistics, act(a) and its sums, p.
#pragma once

#include "derivative.h"
#include "passes.h"
#include "product.h"
#include "sums.h"

namespace {

template <class V>
void Training<V>::add_statistics() {
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

// act(a): its sums, or times the gate in the place of d.
template <class V>
void Training<V>::activate_behind_norm() {
  with_activation(s_.activation, [&](auto kind) MNV2_INLINE_LAMBDA {
    for (int64_t v = 0; v < vectors(); ++v) activate_behind_norm_of<kind()>(v);
  });
}

template <class V>
template <Activation kind>
void Training<V>::activate_behind_norm_of(int64_t v) {
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

template <class V>
void Training<V>::project_band() {
  project<V, T>({activated(), activated_panel(), panels_, a_.w_output + channel() * kPanel,
                 hidden_ * kPanel, a_.p + band_offset(), s_.out_channels, first_ > 0},
                pixels());
}

}  // namespace
