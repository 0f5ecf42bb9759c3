// One layer as every kernel and planner sees it. Plain data: no torch, no CUDA.
#pragma once

#include <cstdint>
#include <string>

#include "activations.h"

namespace mnv2_fused {

// Channels per packed weight panel (one AVX-512 vector of float, two AVX2 vectors, one mma tile).
constexpr int64_t kPanel = 16;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The stem convolution: 3x3, padding 1, this stride.
constexpr int64_t kStemStride = 2;

// Source of the expanded tensor: the input itself (t = 1), a 1x1 convolution, or the network's stem.
enum class Expand : int8_t { kNone, kPointwise, kStem };

// Numbers that the op takes: in the order of spec.py's GATES.
enum class Gate : int8_t { kHardsigmoid, kSigmoid, kHardsigmoidFifth };
constexpr int64_t kGates = 3;

// Sizes of a depthwise kernel, ascending.
constexpr int64_t kKernelSizes[] = {3, 5, 7};
constexpr int kKernelSizeCount = sizeof(kKernelSizes) / sizeof(kKernelSizes[0]);
constexpr int64_t kMostKernelSize = kKernelSizes[kKernelSizeCount - 1];
constexpr bool is_kernel_size(int64_t size) {
  for (const int64_t known : kKernelSizes)
    if (size == known) return true;
  return false;
}

// Expand -> depthwise (-> squeeze-and-excite) -> 1x1 project (+ x when residual).
struct BlockShape {
  int64_t batch, height, width;  // of the expanded tensor
  int64_t in_channels, hidden_channels, out_channels;
  int64_t stride;  // of the depthwise convolution: from row to row
  Expand expand;
  bool residual;
  int64_t image_height = 0, image_width = 0;  // of x, which a stem shrinks
  // Of the depthwise convolution, too. Zeros lie around the expanded tensor.
  int64_t kernel = 3, dilation = 1;
  int64_t pad_left = 1, pad_right = 1, pad_top = 1, pad_bottom = 1;
  Activation activation = Activation::kRelu6;         // of the depthwise convolution
  Activation expand_activation = Activation::kRelu6;  // of the expansion, also if that is a stem
  Activation out_activation = Activation::kIdentity;  // of the projection
  int64_t squeeze_channels = 0;                       // of a squeeze-and-excite; 0 without one
  Activation squeeze_activation = Activation::kRelu;
  Gate gate = Gate::kHardsigmoid;
  double negative_slope = kNegativeSlope;  // of every leaky_relu among the activations
  int64_t column_stride = 0;               // from column to column; 0: as `stride`
  bool activates_sum = false;              // out_activation comes after x is added, not before

  // Rows, and columns, that the depthwise kernel spans.
  int64_t extent() const { return dilation * (kernel - 1) + 1; }
  int64_t taps() const { return kernel * kernel; }
  int64_t out_height() const { return (height + pad_top + pad_bottom - extent()) / stride + 1; }
  int64_t out_width() const {
    return (width + pad_left + pad_right - extent()) / stride_across() + 1;
  }
  int64_t stride_across() const { return column_stride > 0 ? column_stride : stride; }
  int64_t hidden_panels() const { return ceil_div(hidden_channels, kPanel); }
  int64_t squeeze_panels() const { return ceil_div(squeeze_channels, kPanel); }
  int64_t out_elements() const { return batch * out_height() * out_width() * out_channels; }
  // Products that one expanded element sums.
  int64_t expand_terms(int64_t depth = 1) const {
    const int64_t channels = round_up(in_channels, depth);
    return expand == Expand::kNone ? 0 : channels * (expand == Expand::kStem ? 9 : 1);
  }
  ActivationFunction function(Activation a) const { return {a, negative_slope}; }
  bool operator==(const BlockShape&) const = default;
};

// Passes of a block: one, the last. With a squeeze-and-excite a first pass sums up the depthwise
// convolution's result d; the gate follows from the sums; the last pass multiplies d by it and projects.
enum class Pass : int8_t { kLast, kPool };

// 1x1 convolution -> activation (-> mean over the pixels when pool): the head of the network. Over
// images as pixels: a layer of its classifier.
struct PointwiseShape {
  int64_t batch, height, width;
  int64_t in_channels, out_channels;
  Activation activation;
  bool pool;
  bool linear = false;  // a layer of vectors: the rows of one image
  double negative_slope = kNegativeSlope;

  int64_t panels() const { return ceil_div(out_channels, kPanel); }
  ActivationFunction function() const { return {activation, negative_slope}; }
};

// Kernel sizes for messages: "3 or 5".
std::string kernel_sizes();
// Reason why no kernel takes this shape, or an empty string.
std::string unsupported(const BlockShape& shape);
// The part of that reason which counts elements.
std::string too_large(int64_t batch, int64_t height, int64_t width, int64_t channels);

}  // namespace mnv2_fused
