// One tile of one image on 8-bit integers, and what else a network takes. Included by each instruction
// set's file behind its V; see avx2.cpp.
#pragma once

#include "depthwise.h"
#include "expand.h"
#include "project.h"
#include "quantize.h"

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
  const Ring of(s, w.cols);
  const Scratch parts(s, plan, sizeof(In));
  const auto take = [&](int64_t bytes) { return std::exchange(scratch, scratch + bytes); };
  auto* const ring = reinterpret_cast<int32_t*>(take(parts.ring));
  auto* const padding = reinterpret_cast<int32_t*>(take(parts.padding));
  auto* const sums = reinterpret_cast<int32_t*>(take(parts.sums));
  auto* const d = reinterpret_cast<In*>(take(parts.depthwise));
  auto* const x = reinterpret_cast<In*>(take(parts.row));
  const int64_t terms = Scratch::terms(s), cols = w.image_cols();
  const int64_t hidden = s.hidden_panels() * kPanel, out_pitch = round_up(s.out_channels, kPanel);
  pad<V>(padding, of.row(), s.expand == Expand::kNone ? a.x_zero : a.expand.zero);
  int32_t* const pooled = a.pass == Pass::kPool ? a.pooled + task * hidden : nullptr;
  if (pooled)
    for (int64_t c = 0; c < hidden; c += V::kLanes) V::set1(0).store(pooled + c);
  const int64_t image = task / (plan.tiles_across(s) * plan.tiles_down(s));
  // This tile's part of what is kept between passes.
  const int64_t before = (image * s.out_height() + w.row) * s.out_width() + w.col * w.rows;
  In* const kept = a.cached ? reinterpret_cast<In*>(a.cached) + before * hidden : nullptr;
  const bool one_group = plan.groups(s) == 1;
  const auto finish_rows = [&](int64_t row, int64_t rows) {
    const int64_t y_row = s.out_width() * s.out_channels;
    finish<V>(
        {sums, out_pitch, rows, w.cols, a.y + w.out + row * y_row, y_row, s.out_channels,
         s.residual ? w.residual(row, 0) : nullptr, a.x_row, a.x_col, a.x_zero, a.residual_scale},
        a.project, s.out_channels);
  };
  for (int64_t first = 0; first < s.hidden_channels; first += plan.group) {
    const Group group{first, least(plan.group, s.hidden_channels - first)};
    const int64_t panels = ceil_div(group.channels, kPanel);
    int64_t done = 0;
    for (int64_t row = 0; row < w.rows; row += plan.band_rows) {
      const Band band{row, least(plan.band_rows, w.rows - row)};
      const int64_t pixels = band.rows * w.cols;
      In* const of_band = kept ? kept + (first * w.rows + row * panels * kPanel) * w.cols : nullptr;
      if (pooled || !of_band) {
        const RowRange rows = w.inside_image({done, w.rows_under(band)});
        for (int64_t r = rows.from; r < rows.to; ++r) {
          const RingRow to{ring + r % w.ring_rows * of.row(), of.row(), of.panel(w.ring_rows)};
          switch (s.expand) {
            case Expand::kNone:
              copy_row<V>(w.x_row(r), a.x_col, w.left, cols, a.x_zero, group, to);
              break;
            case Expand::kPointwise:
              load_pixels<V>(w.x_row(r), a.x_col, cols, terms, x);
              expand_row<V>({x, cols * kPanel}, w.left, cols, terms, a.expand, group, to);
              break;
            case Expand::kStem:
              load_stem_row<V>(w, r, a.x_zero, x);
              expand_row<V>({x, cols * kPanel}, w.left, cols, terms, a.expand, group, to);
              break;
          }
        }
        done = w.rows_under(band);
        depthwise<V>(w, a.depthwise, ring, of, padding + kPanel, d, pooled, group, band);
        if (of_band) std::memcpy(of_band, d, size_t(panels * pixels * kPanel) * sizeof(In));
      }
      if (pooled) continue;
      if (a.factors)
        multiply_by_factors<V>(of_band ? of_band : d, d, panels, pixels,
                               a.factors + image * hidden + first, a.depthwise.zero);
      int32_t* const of_rows = one_group ? sums : sums + row * w.cols * out_pitch;
      project<V>(d, pixels, a.project, group, hidden, s.out_channels, of_rows);
      if (one_group) finish_rows(row, band.rows);
    }
  }
  if (!pooled && !one_group) finish_rows(0, w.rows);
}

// Rows [begin, end), a few at a time. scratch: kProductRows rows of terms and of sums.
template <class V>
void run_product(const ProductArgs& a, int64_t begin, int64_t end, char* scratch) {
  using In = typename V::In;
  const int64_t pitch = round_up(a.in, kPanel), out_pitch = round_up(a.out, kPanel);
  auto* const x = reinterpret_cast<In*>(scratch);
  auto* const sums = reinterpret_cast<int32_t*>(
      scratch + round_up(kProductRows * pitch * int64_t(sizeof(In)), 64));
  for (int64_t row = begin; row < end; row += kProductRows) {
    const int64_t rows = least(end - row, kProductRows);
    load_pixels<V>(a.x + row * a.in, a.in, rows, a.in, x);
    project<V>(x, rows, a.stage, {0, a.in}, pitch, a.out, sums);
    if (a.y)
      finish<V>({sums, out_pitch, 1, rows, a.y + row * a.pitch, 0, a.pitch, nullptr, 0, 0, 0, 0},
                a.stage, a.out);
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t* const of_row = sums + r * out_pitch;
      if (a.real) {
        for (int64_t c = 0; c < a.out; c += V::kLanes)
          V::F::mul(V::to_float(V::load(of_row + c)), V::F::load(a.stage.multiplier + c))
              .store(a.real + (row + r) * a.pitch + c, least(a.out - c, V::kLanes));
      } else if (a.sums) {
        with_bound(a.stage, true, [&](auto bound) {
          for (int64_t c = 0; c < a.out; c += V::kLanes) {
            V q[1] = {V::load(of_row + c)};
            requantize<V, bound()>(q, a.stage, c);
            V::add(V::load(a.sums + c), q[0]).store(a.sums + c);
          }
        });
      }
    }
  }
}

// Independent chains of dot products, as many as ../peak.h has.
constexpr int kChains = 12;

template <class V>
__attribute__((noinline)) int32_t dots(int64_t rounds) {
  int8_t weights[kQuad * V::kLanes]{};
  typename V::In quad[kQuad]{};
  asm volatile("" : : "r"(weights), "r"(quad) : "memory");  // zeros, but not for the compiler
  const auto b = V::weights(weights);
  auto a = V::broadcast(quad);
  V acc[1][kChains];
  unrolled<kChains>([&](auto i) MNV2_INLINE_LAMBDA { acc[0][i] = V::set1(i); });
  for (; rounds > 0; --rounds) {
    unrolled<kChains>([&](auto i) MNV2_INLINE_LAMBDA {
      V::hide(a);
      acc[0][i] = V::dot(acc[0][i], a, b);
    });
    keep(acc);
  }
  V sum = acc[0][0];
  unrolled<kChains - 1>([&](auto i) MNV2_INLINE_LAMBDA { sum = V::add(sum, acc[0][i + 1]); });
  int32_t lanes[V::kLanes];
  sum.store(lanes);
  return lanes[0];
}

template <class V>
constexpr Kernels kernels_of_vectors() {
  return {int64_t{sizeof(typename V::In)},
          V::kLanes,
          run_tile<V>,
          run_product<V>,
          quantize_row<V>,
          mean<V>,
          gate<V>,
          dots<V>,
          2 * kQuad * V::kLanes * kChains};
}

}  // namespace
