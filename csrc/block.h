// What every kernel is told about one layer. Plain data: no torch, no CUDA.
#pragma once

#include <cstdint>

namespace mnv2_fused {

// Channels per packed weight panel (one AVX-512 vector of float, two AVX2 vectors, one mma tile).
constexpr int64_t kPanel = 16;

// The most expanded channels whose products one accumulator sums: past it, every further one would be
// rounded to the size of a long sum.
constexpr int64_t kLongestProject = 256;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The stem convolution: 3x3, padding 1, this stride.
constexpr int64_t kStemStride = 2;

// What makes the expanded tensor: the input itself (t = 1), a 1x1 convolution, or the network's stem.
enum class Expand : int8_t { kNone, kPointwise, kStem };

// Expand -> 3x3 depthwise, padding 1 -> 1x1 project (+ x when residual).
struct BlockShape {
  int64_t batch, height, width;  // of the expanded tensor
  int64_t in_channels, hidden_channels, out_channels;
  int64_t stride;  // of the depthwise convolution
  Expand expand;
  bool residual;
  int64_t image_height = 0, image_width = 0;  // of x, which a stem shrinks

  int64_t out_height() const { return (height - 1) / stride + 1; }
  int64_t out_width() const { return (width - 1) / stride + 1; }
  int64_t hidden_panels() const { return ceil_div(hidden_channels, kPanel); }
  int64_t out_elements() const { return batch * out_height() * out_width() * out_channels; }
  // Products that one expanded element sums.
  int64_t expand_terms() const {
    return expand == Expand::kNone ? 0 : in_channels * (expand == Expand::kStem ? 9 : 1);
  }
  bool operator==(const BlockShape&) const = default;
};

template <class T>
struct BlockArgs {
  BlockShape shape;
  const T* x;                     // [N, H, W, C_in] by the strides below
  int64_t x_image, x_row, x_col;  // element strides
  int64_t x_channel;              // 1 except for a stem
  const T* w_expand;              // [E/16][C_in][16], of a stem [E/16][9 * C_in][16]
  const T* b_expand;              // [E/16 * 16]
  const T* w_depthwise;           // [E/16][9][16]
  const T* b_depthwise;           // [E/16 * 16]
  const T* w_project;             // [C_out/16][E][16]
  const T* b_project;             // [C_out]
  T* y;                           // [N, H', W', C_out], dense
  T* partial;                     // [groups, N, H', W', C_out], when the plan splits the groups
  const void* next = nullptr;     // weights that the next layer reads first, to fetch meanwhile
  int64_t next_bytes = 0;
};

// 1x1 convolution -> ReLU6 (-> mean over the pixels when pool): the head of the network. Without
// the ReLU6, over images as pixels: its classifier.
struct PointwiseShape {
  int64_t batch, height, width;
  int64_t in_channels, out_channels;
  bool relu6, pool;

  int64_t panels() const { return ceil_div(out_channels, kPanel); }
};

template <class T>
struct PointwiseArgs {
  PointwiseShape shape;
  int64_t parts;                  // tasks that share an image's output channels
  const T* x;                     // [N, H, W, C_in] by the strides below, channels contiguous
  int64_t x_image, x_row, x_col;  // element strides
  const T* weight;                // [C_out/16][C_in][16]
  const T* bias;                  // [C_out/16 * 16]
  T* y;                           // [N, H, W, C_out], dense; [N, C_out] when pooled
  const void* next = nullptr;     // weights that the next layer reads first, to fetch meanwhile
  int64_t next_bytes = 0;
};

}  // namespace mnv2_fused
