// One tile of one image on 8-bit integers, and what else a network takes. Included by each instruction
// set's file behind its V; see avx2.cpp.
#pragma once

#include "depthwise.h"
#include "expand.h"
#include "project.h"

namespace {

template <class V>
void run_tile(const BlockCall& a, const Plan& plan, int64_t task, char* scratch) {
  using In = typename V::In;
  const BlockShape& s = a.shape;
  cpu::BlockArgs<uint8_t> at{};
  at.shape = s;
  at.x = a.x;
  at.x_image = a.x_image;
  at.x_row = a.x_row;
  at.x_col = a.x_col;
  const Window<uint8_t> w(at, plan, task);
  const Scratch parts(s, plan, V::kDepth, sizeof(In));
  auto* const ring = reinterpret_cast<int32_t*>(scratch);
  auto* const sums = reinterpret_cast<int32_t*>(scratch + parts.ring);
  auto* const d = reinterpret_cast<In*>(scratch + parts.ring + parts.sums);
  auto* const rows = reinterpret_cast<In*>(scratch + parts.ring + parts.sums + parts.depthwise);
  const int64_t terms = Scratch::terms(s), pitch = round_up(terms, V::kDepth);
  const int64_t hidden = s.hidden_panels() * kPanel, out_pitch = round_up(s.out_channels, kPanel);
  const int32_t zero = s.expand == Expand::kNone ? a.x_zero : a.expand.zero;
  const V padding = padding_lanes<V>(zero);
  const auto pad = [&](int32_t* p, int64_t pixels) {
    for (int64_t i = 0; i < pixels * kPanel; i += V::kLanes) padding.store(p + i);
  };
  pad(ring, plan.expanded_elements(s) / kPanel);
  int32_t* const pooled = a.pass == Pass::kPool ? a.pooled + task * hidden : nullptr;
  if (pooled)
    for (int64_t c = 0; c < hidden; c += V::kLanes) V::set1(0).store(pooled + c);
  const int64_t image = task / (plan.tiles_across(s) * plan.tiles_down(s));
  for (int64_t first = 0; first < s.hidden_channels; first += plan.group) {
    const Group group{first, least(plan.group, s.hidden_channels - first)};
    const int64_t panels = ceil_div(group.channels, kPanel);
    int64_t done = 0;
    for (int64_t row = 0; row < w.rows; row += plan.band_rows) {
      const Band band{row, least(plan.band_rows, w.rows - row)};
      for (int64_t r = done; r < w.rows_under(band); ++r) {
        int32_t* const ring_row = ring + w.ring_offset(r);
        if (r < w.top || r >= w.bottom) {
          for (int64_t p = 0; p < panels; ++p) pad(ring_row + p * w.panel, w.in_cols);
          continue;
        }
        const uint8_t* const x = s.expand == Expand::kStem ? nullptr : w.x_row(r);
        switch (s.expand) {
          case Expand::kNone:
            copy_row<V>(w, x, group, ring_row, zero);
            break;
          case Expand::kPointwise:
            load_row<V>(x, a.x_col, w.image_cols(), terms, rows);
            expand_row<V>(w, rows, pitch, a.expand, group, ring_row);
            break;
          case Expand::kStem:
            load_stem_row<V>(w, r, a.x_zero, rows);
            expand_row<V>(w, rows, pitch, a.expand, group, ring_row);
            break;
        }
        pad_row<V>(w, group, ring_row, zero);
      }
      done = w.rows_under(band);
      depthwise<V>(w, a.depthwise, ring, d, pooled, group, band);
      if (pooled) continue;
      const int64_t pixels = band.rows * w.cols;
      if (a.factors)
        multiply_by_factors<V>(d, panels, pixels, a.factors + image * hidden + first,
                               a.depthwise.zero);
      project<V>(d, pixels, a.project, group, hidden, s.out_channels,
                 sums + row * w.cols * out_pitch);
    }
  }
  if (pooled) return;
  const auto finish = [&]<bool kClips>(std::bool_constant<kClips>) {
    for (int64_t r = 0; r < w.rows; ++r)
      for (int64_t c = 0; c < w.cols; ++c)
        finish_pixel<V, kClips>(sums + (r * w.cols + c) * out_pitch, a.project, s.out_channels,
                                s.residual ? w.residual(r, c) : nullptr, a.x_zero, a.residual_scale,
                                a.y + w.out + (r * s.out_width() + c) * s.out_channels);
  };
  clips(a.project) ? finish(std::true_type{}) : finish(std::false_type{});
}

// Rows [begin, end), a few at a time. scratch: kProductRows rows of terms and of sums.
template <class V>
void run_product(const ProductArgs& a, int64_t begin, int64_t end, char* scratch) {
  using In = typename V::In;
  const int64_t pitch = round_up(a.in, kPanel), out_pitch = round_up(a.out, kPanel);
  auto* const x = reinterpret_cast<In*>(scratch);
  auto* const sums = reinterpret_cast<int32_t*>(
      scratch + round_up(kProductRows * pitch * int64_t(sizeof(In)), 64));
  const int64_t panels = pitch / kPanel;
  for (int64_t row = begin; row < end; row += kProductRows) {
    const int64_t rows = least(end - row, kProductRows);
    // Panels of 16 terms, as the project stage reads them.
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t p = 0; p < panels; ++p) {
        In* const to = x + (p * rows + r) * kPanel;
        const int64_t count = least(a.in - p * kPanel, kPanel);
        V::widen(a.x + (row + r) * a.in + p * kPanel, count, to);
        for (int64_t k = count; k < kPanel; ++k) to[k] = 0;
      }
    project<V>(x, rows, a.stage, {0, a.in}, pitch, a.out, sums);
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t* const of_row = sums + r * out_pitch;
      if (a.real) {
        for (int64_t c = 0; c < a.out; c += V::kLanes)
          V::F::mul(V::to_float(V::load(of_row + c)), V::F::load(a.stage.multiplier + c))
              .store(a.real + (row + r) * a.pitch + c, least(a.out - c, V::kLanes));
      } else if (a.y) {
        uint8_t* const y = a.y + (row + r) * a.pitch;
        clips(a.stage) ? finish_pixel<V, true>(of_row, a.stage, a.out, nullptr, 0, 0, y)
                       : finish_pixel<V, false>(of_row, a.stage, a.out, nullptr, 0, 0, y);
      } else {
        const V zero = V::set1(-a.stage.zero);
        for (int64_t c = 0; c < out_pitch; c += V::kLanes) {
          const V sum = V::load(of_row + c);
          const V q = clips(a.stage) ? requantize<V, true>(sum, a.stage, c)
                                     : requantize<V, false>(sum, a.stage, c);
          V::add(V::load(a.sums + c), V::add(q, zero)).store(a.sums + c);
        }
      }
    }
  }
}

template <class V>
void quantize_row(const float* x, int64_t cols, int64_t channels, int64_t col_step,
                  int64_t channel_step, float inverse_scale, int32_t zero, uint8_t* q) {
  using F = typename V::F;
  constexpr int64_t kPixels = 64;
  const F scale = F::set1(inverse_scale), low = F::set1(float(-zero)),
          high = F::set1(float(kHighest - zero));
  float some[kPixels * 4 + V::kLanes] = {};
  const int64_t together = channels <= 4 ? kPixels : 1,
                step = channels <= 4 ? channels : kPixels * 4;
  for (int64_t col = 0; col < cols; col += together)
    for (int64_t c = 0; c < channels; c += step) {
      const int64_t n = least(cols - col, together), m = least(channels - c, step), count = n * m;
      const float* const first = x + col * col_step + c * channel_step;
      for (int64_t i = 0; i < n; ++i)
        for (int64_t k = 0; k < m; ++k) some[i * m + k] = first[i * col_step + k * channel_step];
      uint8_t* const to = q + col * channels + c;
      for (int64_t i = 0; i < count; i += V::kLanes) {
        const F v = F::min(F::max(F::mul(F::load(some + i), scale), low), high);
        V::add(F::round(v), V::set1(zero)).store_bytes(to + i, least(count - i, V::kLanes));
      }
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

template <class V>
constexpr Kernels kernels_of_vectors() {
  return {V::kDepth,      int64_t{sizeof(typename V::In)},
          V::kLanes,      run_tile<V>,
          run_product<V>, quantize_row<V>,
          mean<V>,        gate<V>};
}

}  // namespace
