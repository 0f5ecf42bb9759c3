// Arguments of the kernels, as host and device agree on them. No torch, no CUDA.
#pragma once

#include <cstdint>

#include "../block.h"
#include "shared_layout.h"

namespace mnv2_fused::cuda {

// An activation: a clip to [low, high], or the formula of its kind.
struct ActivationArgs {
  Activation kind;
  float low, high;
  float negative_slope;
};
inline ActivationArgs activation_args(ActivationFunction f) {
  const auto [low, high] = row_of(f.kind).bounds;
  return {f.kind, float(low), float(high), float(f.negative_slope)};
}

struct Args {
  const void* x;                  // [N, H, W, C_in] by the strides below, channels contiguous
  int64_t x_image, x_row, x_col;  // element strides
  int64_t x_channel;              // with a stem, whose channels may lie apart
  // Weights in fragments of kPanel x kPanel; zeros for channels that do not exist; see fold.py.
  const void* w_expand;      // [E/16, C_in/16, 256], with a stem [E/16, 3, 256]; null when t = 1
  const float* b_expand;     // [E/16 * 16]
  const float* w_depthwise;  // [E/16, 9 or 25, 16]
  const float* b_depthwise;  // [E/16 * 16]
  const void* w_project;     // [E/16, C_out/16, 256]
  const float* b_project;    // [C_out]
  void* y;                   // [N, H', W', C_out], dense
  float* partial;            // [splits, N, H', W', C_out], with more than one split
  int32_t batch, height, width, out_height, out_width;
  int32_t in_channels, hidden_channels, out_channels;
  int32_t images, tile_rows, tile_cols, group_panels, splits;  // of the plan
  int32_t in_panels;                                           // 0 when t = 1 without a stem
  int32_t hidden_panels, out_panels;
  int32_t panels_each;     // hidden panels of one split
  int32_t e_rows, e_cols;  // under a tile's windows, for whole strips
  SharedLayout shared;
  bool residual;
  bool x_vectors, y_vectors;  // whether pixels of x and y are aligned multiples of 16 bytes
  // Blocks beyond MobileNetV2's:
  int32_t pad_top, pad_left, dilation;
  ActivationArgs activation, expand_activation, out_activation;
  const float* gate;   // [N, E/16 * 16], factors of d; or null
  float* pooled;       // [tiles of all images, warps, E/16 * 16], sums of d from the first pass
  bool activates_sum;  // whether x is added before the output's activation, not behind it
  bool stem;           // whether x is the image that a stem makes e of
  int32_t image_height, image_width;
  int32_t image_rows;  // under a tile's windows
};

// One of the two products of a squeeze-and-excite: out = f(W mean(in) + b).
struct SqueezeProductArgs {
  const float* in;      // [N, rows, in_pitch]; the mean is over rows, by `scale`
  const float* weight;  // [C_out/16, C_in, 16]
  const float* bias;    // [C_out/16 * 16]
  float* out;           // [N, C_out/16 * 16]
  int32_t rows, in_pitch, in_channels, out_channels;
  float scale;
  bool gated;  // whether f is `gate`, not `activation`
  ActivationArgs activation;
  Gate gate;
};
constexpr int64_t kSqueezeThreads = 256, kSqueezeShared = kSqueezeThreads * 4;

}  // namespace mnv2_fused::cuda
