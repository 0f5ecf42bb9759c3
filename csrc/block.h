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

// A bfloat16 element as it is stored.
struct BFloat16 {
  uint16_t bits;
};
// What products of S are summed in.
template <class S>
struct ComputeOf {
  using T = S;
};
template <>
struct ComputeOf<BFloat16> {
  using T = float;
};
template <class S>
using Compute = typename ComputeOf<S>::T;
// Input channels of a product that lie side by side in packed weights: [C/16][K/depth][16][depth].
template <class S>
constexpr int64_t depth = sizeof(Compute<S>) / sizeof(S);

// The stem convolution: 3x3, padding 1, this stride.
constexpr int64_t kStemStride = 2;

// What makes the expanded tensor: the input itself (t = 1), a 1x1 convolution, or the network's stem.
enum class Expand : int8_t { kNone, kPointwise, kStem };

// In the order of block.py's ACTIVATIONS and GATES, which are what the op takes.
enum class Activation : int8_t { kRelu6, kRelu, kIdentity, kHardswish, kSilu };
constexpr int64_t kActivations = 5;
enum class Gate : int8_t { kHardsigmoid, kSigmoid };
constexpr int64_t kGates = 2;

// Expand -> depthwise (-> squeeze-and-excite) -> 1x1 project (+ x when residual).
struct BlockShape {
  int64_t batch, height, width;  // of the expanded tensor
  int64_t in_channels, hidden_channels, out_channels;
  int64_t stride;  // of the depthwise convolution
  Expand expand;
  bool residual;
  int64_t image_height = 0, image_width = 0;  // of x, which a stem shrinks
  // Of the depthwise convolution, too. Zeros lie around the expanded tensor.
  int64_t kernel = 3, dilation = 1;
  int64_t pad_left = 1, pad_right = 1, pad_top = 1, pad_bottom = 1;
  Activation activation = Activation::kRelu6;  // of the expansion and the depthwise convolution
  Activation stem_activation = Activation::kRelu6;  // of the expansion, if that is a stem
  Activation out_activation = Activation::kIdentity;
  int64_t squeeze_channels = 0;  // of a squeeze-and-excite; 0 without one
  Activation squeeze_activation = Activation::kRelu;
  Gate gate = Gate::kHardsigmoid;

  // Rows, and columns, that the depthwise kernel spans.
  int64_t extent() const { return dilation * (kernel - 1) + 1; }
  int64_t taps() const { return kernel * kernel; }
  int64_t out_height() const { return (height + pad_top + pad_bottom - extent()) / stride + 1; }
  int64_t out_width() const { return (width + pad_left + pad_right - extent()) / stride + 1; }
  int64_t hidden_panels() const { return ceil_div(hidden_channels, kPanel); }
  int64_t squeeze_panels() const { return ceil_div(squeeze_channels, kPanel); }
  int64_t out_elements() const { return batch * out_height() * out_width() * out_channels; }
  // Products that one expanded element sums.
  int64_t expand_terms(int64_t depth = 1) const {
    const int64_t channels = round_up(in_channels, depth);
    return expand == Expand::kNone ? 0 : channels * (expand == Expand::kStem ? 9 : 1);
  }
  bool operator==(const BlockShape&) const = default;
};

// A block runs in one pass. With a squeeze-and-excite a first one sums up d, and a last one, with the
// gate that follows from the sums, multiplies it and projects.
enum class Pass : int8_t { kLast, kPool };

// Packed weights are [C/16][K][16], for BFloat16 [C/16][ceil(K/2)][16][2].
template <class S, class T = Compute<S>>
struct BlockArgs {
  BlockShape shape;
  const S* x;                     // [N, H, W, C_in] by the strides below
  int64_t x_image, x_row, x_col;  // element strides
  int64_t x_channel;              // 1 except for a stem
  const S* w_expand;           // K = C_in, of a stem 9 * C_in (C_in rounded up to an even number)
  const T* b_expand;           // [E/16 * 16]
  const T* w_depthwise;        // [E/16][9][16]
  const T* b_depthwise;        // [E/16 * 16]
  const S* w_project;          // K = E
  const T* b_project;          // [C_out]
  S* y;                        // [N, H', W', C_out], dense
  T* partial;                  // [groups, N, H', W', C_out], when the plan splits the groups
  const void* next = nullptr;  // weights that the next layer reads first, to fetch meanwhile
  int64_t next_bytes = 0;
  // Of a block with a squeeze-and-excite:
  Pass pass = Pass::kLast;
  const T* gate = nullptr;  // [N, E], what the last pass multiplies d by
  S* kept = nullptr;        // [N, H', W', E/16 * 16] in the tiles' order: d, from pass to pass
  T* pooled = nullptr;      // [N, H', tiles across, E/16 * 16], d's sums over each tile's rows
};

// 1x1 convolution -> activation (-> mean over the pixels when pool): the head of the network. Over
// images as pixels: a layer of its classifier.
struct PointwiseShape {
  int64_t batch, height, width;
  int64_t in_channels, out_channels;
  Activation activation;
  bool pool;
  bool linear = false;  // a layer of vectors: the rows of one image

  int64_t panels() const { return ceil_div(out_channels, kPanel); }
};

template <class S, class T = Compute<S>>
struct PointwiseArgs {
  PointwiseShape shape;
  int64_t parts;                  // tasks that share an image's output channels
  const S* x;                     // [N, H, W, C_in] by the strides below, channels contiguous
  int64_t x_image, x_row, x_col;  // element strides
  const S* weight;                // K = C_in
  const T* bias;                  // [C_out/16 * 16]
  S* y;                           // [N, H, W, C_out], dense; [N, C_out] when pooled
  T* sums;                     // [N, C_out] of a large pooled image: y itself unless it is narrower
  const void* next = nullptr;  // weights that the next layer reads first, to fetch meanwhile
  int64_t next_bytes = 0;
};

}  // namespace mnv2_fused
