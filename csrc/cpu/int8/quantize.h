// Between float and 8-bit integers: an image, the mean of a channel, a gate. Included by each instruction set's
// file behind its V, by way of kernel.h.
#pragma once

#include "requantize.h"

namespace {

// How x becomes uint8.
template <class V>
struct Quantize {
  typename V::F scale, low, high;
  V zero;

  MNV2_INLINE V operator()(typename V::F x) const {
    using F = typename V::F;
    return V::add(F::round(F::min(F::max(F::mul(x, scale), low), high)), zero);
  }
  // Values side by side.
  MNV2_INLINE void run(const float* x, int64_t count, uint8_t* q) const {
    int64_t i = 0;
    for (; i + V::kLanes <= count; i += V::kLanes)
      (*this)(V::F::load(x + i)).store_bytes(q + i, V::kLanes);
    if (i == count) return;
    float rest[V::kLanes]{};
    std::memcpy(rest, x + i, size_t(count - i) * sizeof(float));
    (*this)(V::F::load(rest)).store_bytes(q + i, count - i);
  }
};

// Pixels of `kChannels` planes, or of `channels` where it is 0.
template <class V, int kChannels>
void quantize_planes(const Quantize<V>& quantize, const float* x, int64_t cols, int64_t channels,
                     int64_t channel_step, uint8_t* q) {
  constexpr int64_t kCols = 64;
  if constexpr (kChannels > 0) {
    uint8_t planes[kChannels][kCols];
    for (int64_t col = 0; col < cols; col += kCols, q += kCols * kChannels) {
      const int64_t n = least(cols - col, kCols);
      for (int c = 0; c < kChannels; ++c) quantize.run(x + col + c * channel_step, n, planes[c]);
      for (int64_t i = 0; i < n; ++i)
        for (int c = 0; c < kChannels; ++c) q[i * kChannels + c] = planes[c][i];
    }
  } else {
    uint8_t plane[kCols];
    for (int64_t col = 0; col < cols; col += kCols, q += kCols * channels) {
      const int64_t n = least(cols - col, kCols);
      for (int64_t c = 0; c < channels; ++c) {
        quantize.run(x + col + c * channel_step, n, plane);
        for (int64_t i = 0; i < n; ++i) q[i * channels + c] = plane[i];
      }
    }
  }
}

template <class V>
void quantize_row(const float* x, int64_t cols, int64_t channels, int64_t col_step,
                  int64_t channel_step, float inverse_scale, int32_t zero, uint8_t* q) {
  using F = typename V::F;
  const Quantize<V> quantize{F::set1(inverse_scale), F::set1(float(-zero)),
                             F::set1(float(kHighest - zero)), V::set1(zero)};
  if (channel_step == 1 && col_step == channels) return quantize.run(x, cols * channels, q);
  if (channel_step == 1) {
    for (int64_t col = 0; col < cols; ++col)
      quantize.run(x + col * col_step, channels, q + col * channels);
  } else if (col_step == 1) {
    channels == 3 ? quantize_planes<V, 3>(quantize, x, cols, channels, channel_step, q)
                  : quantize_planes<V, 0>(quantize, x, cols, channels, channel_step, q);
  } else {
    for (int64_t col = 0; col < cols; ++col)
      for (int64_t c = 0; c < channels; ++c)
        quantize.run(x + col * col_step + c * channel_step, 1, q + col * channels + c);
  }
}

// sums and scale: [count/16 * 16].
template <class V>
void mean(const int32_t* sums, int64_t count, const float* scale, float pixels, int32_t zero,
          uint8_t* q) {
  using F = typename V::F;
  const F low = F::set1(float(-zero)), high = F::set1(float(kHighest - zero));
  for (int64_t c = 0; c < count; c += V::kLanes) {
    const F factor = F::div(F::load(scale + c), F::set1(pixels));
    const F v = F::mul(V::to_float(V::load(sums + c)), factor);
    V::add(F::round(F::min(F::max(v, low), high)), V::set1(zero))
        .store_bytes(q + c, least(count - c, V::kLanes));
  }
}

// factors = gate(v) * scale; all [count/16 * 16].
template <class V>
void gate(const float* v, int64_t count, Gate kind, const float* scale, float* factors) {
  using F = typename V::F;
  for (int64_t c = 0; c < count; c += V::kLanes) {
    const F x = F::load(v + c);
    const F g = kind == Gate::kHardsigmoid ? F::mul(ramp<V>(x), F::set1(float(1.0 / 6)))
                                           : F::div(F::set1(1), sigmoid_divisor<V>(x));
    F::mul(g, F::load(scale + c)).store(factors + c, V::kLanes);
  }
}

}  // namespace
