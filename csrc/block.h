// What every kernel is told about one inverted-residual block. Plain data: no torch, no CUDA.
#pragma once

#include <cstdint>

namespace mnv2_fused {

// Channels per packed weight panel (one AVX-512 vector of float, two AVX2 vectors, one mma tile).
constexpr int64_t kPanel = 16;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// 1x1 expand (absent when !expand) -> 3x3 depthwise, padding 1 -> 1x1 project (+ x when residual).
struct BlockShape {
  int64_t batch, height, width;
  int64_t in_channels, hidden_channels, out_channels;
  int64_t stride;
  bool expand, residual;

  int64_t out_height() const { return (height - 1) / stride + 1; }
  int64_t out_width() const { return (width - 1) / stride + 1; }
  int64_t hidden_panels() const { return ceil_div(hidden_channels, kPanel); }
  int64_t out_elements() const { return batch * out_height() * out_width() * out_channels; }
  bool operator==(const BlockShape&) const = default;
};

template <class T>
struct BlockArgs {
  BlockShape shape;
  const T* x;                     // [N, H, W, C_in] by the strides below, channels contiguous
  int64_t x_image, x_row, x_col;  // element strides
  const T* w_expand;              // [E/16][C_in][16]
  const T* b_expand;              // [E/16 * 16]
  const T* w_depthwise;           // [E/16][9][16]
  const T* b_depthwise;           // [E/16 * 16]
  const T* w_project;             // [C_out/16][E][16]
  const T* b_project;             // [C_out]
  T* y;                           // [N, H', W', C_out], dense
  T* partial;                     // [groups, N, H', W', C_out], when the plan splits the groups
};

}  // namespace mnv2_fused
