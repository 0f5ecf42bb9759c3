// What the kernel is told about a call, and how it divides shared memory. No torch, no CUDA.
#pragma once

#include <cstdint>
#include <iterator>
#include <limits>

#include "plan.h"

namespace mnv2_fused::cuda {

constexpr int64_t kLanes = 32;
// Of a thread block's outputs, each a column of 2 or 4.
constexpr int64_t kStripsPerWarp = 8;

// What a kernel takes: MobileNetV2's block alone, or any with a depthwise convolution of 3x3, or 5x5; or
// MobileNetV2's stem and first block.
enum class Form : int8_t { kMobileNetV2, kThree, kFive, kStem };
inline Form form_of(const BlockShape& s) {
  if (s.kernel == 5) return Form::kFive;
  bool plain = s.dilation == 1 && s.squeeze_channels == 0 && s.activation == Activation::kRelu6 &&
               s.stem_activation == Activation::kRelu6 && s.out_activation == Activation::kIdentity;
  for (const int64_t pad : {s.pad_left, s.pad_right, s.pad_top, s.pad_bottom})
    plain = plain && pad == 1;
  if (!plain) return Form::kThree;
  if (s.expand != Expand::kStem) return Form::kMobileNetV2;
  return s.stride == 1 && s.out_channels <= 2 * kPanel ? Form::kStem : Form::kThree;
}
constexpr bool is_general(Form form) { return form == Form::kThree || form == Form::kFive; }
constexpr int64_t kernel_of(Form form) { return form == Form::kFive ? 5 : 3; }

// A kernel that is compiled. Its limit is a processor's 65536 registers: a lane's sums alone are
// 8 tiles * out_panels of them, the depthwise and the expansion take 60 to 90 beside.
struct Variant {
  int64_t tiles;       // of 16 outputs that a warp sums at once
  int64_t out_panels;  // of these outputs
  int64_t most_warps;  // of a thread block
  int64_t resident;    // thread blocks of so many warps that a processor's registers hold
  int64_t expand_tiles, expand_panels;  // that a warp expands at once
};
constexpr Variant kVariants[] = {
    {2, 2, 7, 2, 2, 2}, {2, 4, 6, 2, 2, 2},  {1, 4, 7, 2, 2, 2},  {1, 6, 7, 2, 2, 1},
    {2, 6, 4, 2, 2, 2}, {1, 10, 6, 2, 2, 1}, {2, 10, 8, 1, 2, 2}, {1, 20, 8, 1, 2, 2},
};
// The same of any other block: few and small, since each is compiled for both kernels and strides.
// Without outputs: the first pass of a squeeze-and-excite, which sums up d.
constexpr Variant kGeneralVariants[] = {
    {1, 4, 6, 2, 2, 1},
    {1, 10, 6, 2, 2, 1},
    {1, 0, 6, 2, 2, 1},
};
constexpr Variant kStemVariants[] = {{2, 2, 7, 2, 2, 2}, {1, 2, 7, 2, 2, 2}};
// A stem takes registers, which a lane with many sums does not have.
constexpr bool takes_stem(Form form, const Variant& v) {
  return form == Form::kStem || (is_general(form) && v.out_panels <= 4);
}
// Exact float32 multiplies with twice the registers, so that two tiles or 20 panels are too many.
constexpr bool compiled(const Variant& v, Precision p) {
  return p != Precision::kFloat32 || (v.tiles == 1 && v.out_panels <= 10);
}
template <Form kForm>
constexpr auto& variants_of() {
  if constexpr (kForm == Form::kMobileNetV2)
    return kVariants;
  else if constexpr (kForm == Form::kStem)
    return kStemVariants;
  else
    return kGeneralVariants;
}
// f(each of these).
template <class F>
constexpr void for_variants_of(Form form, F f) {
  const auto all = [&](const auto& variants) {
    for (const Variant& v : variants) f(v);
  };
  if (form == Form::kMobileNetV2)
    all(kVariants);
  else if (form == Form::kStem)
    all(kStemVariants);
  else
    all(kGeneralVariants);
}
constexpr Variant variant_of(int64_t tiles, int64_t out_panels, Precision p,
                             Form form = Form::kMobileNetV2) {
  Variant found{};
  for_variants_of(form, [&](Variant v) {
    if (v.tiles != tiles || v.out_panels != out_panels) return;
    if (p == Precision::kFloat32) v.expand_tiles = 1;
    if (v.out_panels == 10 &&
        (p == Precision::kFloat32 || (p == Precision::kTf32 && is_general(form))))
      v.most_warps = 4;
    if (element_size(p) == 4) {
      v.expand_panels = 1;
      if (v.resident == 2 && v.most_warps > 6) v.most_warps = 6;
    }
    found = v;
  });
  return found;
}

// Rows and columns under the depthwise windows of a tile.
constexpr int64_t in_rows(int64_t out_rows, int64_t stride, int64_t kernel) {
  return (out_rows - 1) * stride + kernel;
}

// A stem is an expansion, too: of a panel for each row of its windows, in which lie four pixels of four
// channels. The fourth of both, the image's channels that there are not, are zeros.
constexpr int64_t kStemKernel = 3, kStemChannels = 4;
constexpr int64_t stem_rows(int64_t e_rows) { return in_rows(e_rows, kStemStride, kStemKernel); }
// Panels of what the expansion multiplies, 0 without one.
inline int64_t expand_panels(const BlockShape& s) {
  return s.expand == Expand::kNone   ? 0
         : s.expand == Expand::kStem ? kStemKernel
                                     : ceil_div(s.in_channels, kPanel);
}

// Taps of a panel in half precision, words for each of 8 kinds of lanes: of each column 8, or 12 of
// five taps. 28 and 60 of them put the eight into different banks.
constexpr int64_t column_words(int64_t kernel) { return kernel == 5 ? 12 : 8; }
constexpr int64_t tap_words(int64_t kernel) { return kernel == 5 ? 60 : 28; }

// A thread block's shared memory, in bytes from its start.
struct SharedLayout {
  int32_t x_panel;  // of all pixels, the 16 channels of a panel; of a stem, a row of the image
  int32_t e, e_panel;
  int32_t weights, stage;  // two stages, one computed with while the other is filled
  // Within a stage.
  int32_t w_project, w_depthwise, b_expand, b_depthwise;
  int32_t taps;     // of the depthwise, as tensor cores take them
  int32_t places;   // where in e each pixel of x belongs
  int32_t windows;  // of a stem: where in the image each pixel's begins
  int32_t zeros;    // of a stem: what stands for a window's fourth column
  int32_t bytes;
};

// height, width: of what is dilated apart in the image.
constexpr SharedLayout shared_layout(int64_t element, int64_t in_panels, int64_t out_panels,
                                     int64_t stride, int64_t strip_rows, int64_t images,
                                     int64_t tile_rows, int64_t tile_cols, int64_t group_panels,
                                     int64_t height, int64_t width, int64_t kernel, bool stem) {
  const auto smaller = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const int64_t rows = in_rows(round_up(tile_rows, strip_rows), stride, kernel);
  const int64_t cols = in_rows(tile_cols, stride, kernel);
  const int64_t x_rows = smaller(in_rows(tile_rows, stride, kernel), height),
                x_cols = smaller(cols, width), pixels = images * x_rows * x_cols;
  const int64_t fragment = kPanel * kPanel * element;
  SharedLayout l{};
  if (stem) {
    l.x_panel = int32_t(stem_rows(x_cols) * kStemChannels * element);
    l.e = int32_t(round_up(images * stem_rows(x_rows) * l.x_panel, 16));
  } else {
    l.x_panel = int32_t(pixels * kPanel * element);
    l.e = int32_t(in_panels) * l.x_panel;
  }
  l.e_panel = int32_t(images * rows * cols * kPanel * element);
  l.weights = l.e + int32_t(group_panels) * l.e_panel;
  l.w_project = int32_t(group_panels * in_panels * fragment);
  l.w_depthwise = l.w_project + int32_t(group_panels * out_panels * fragment);
  l.b_expand = l.w_depthwise + int32_t(group_panels * kernel * kernel * kPanel * 4);
  l.b_depthwise = l.b_expand + int32_t(group_panels * kPanel * 4);
  l.stage = l.b_depthwise + int32_t(group_panels * kPanel * 4);
  l.taps = l.weights + 2 * l.stage;
  l.places = l.taps + int32_t(element == 2 ? group_panels * 8 * tap_words(kernel) * 4 : 0);
  l.windows = l.places + int32_t(round_up(pixels * 2, 16));
  l.zeros = l.windows + (stem ? int32_t(round_up(pixels * 2, 16)) : 0);
  l.bytes = l.zeros + (stem ? 16 : 0);
  return l;
}

// relu6, relu and identity are one clip.
struct ActivationArgs {
  Activation kind;
  float low, high;
};
inline ActivationArgs activation_args(Activation kind) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  return {kind, kind == Activation::kIdentity ? -kInfinity : 0,
          kind == Activation::kRelu6 ? 6 : kInfinity};
}

struct Args {
  const void* x;                  // [N, H, W, C_in] by the strides below, channels contiguous
  int64_t x_image, x_row, x_col;  // element strides
  int64_t x_channel;              // of a stem, whose channels lie anywhere
  // Fragments of kPanel x kPanel weights each, zeros where there is no channel; see fold.py.
  const void* w_expand;      // [E/16, C_in/16, 256], of a stem [E/16, 3, 256]; null when t = 1
  const float* b_expand;     // [E/16 * 16]
  const float* w_depthwise;  // [E/16, 9, 16]
  const float* b_depthwise;  // [E/16 * 16]
  const void* w_project;     // [E/16, C_out/16, 256]
  const float* b_project;    // [C_out]
  void* y;                   // [N, H', W', C_out], dense
  float* partial;            // [splits, N, H', W', C_out], when there are several
  int32_t batch, height, width, out_height, out_width;
  int32_t in_channels, hidden_channels, out_channels;
  int32_t images, tile_rows, tile_cols, group_panels, splits;  // of the plan
  int32_t in_panels;                                           // 0 when t = 1 without a stem
  int32_t hidden_panels, out_panels;
  int32_t panels_each;     // of hidden channels, for a split
  int32_t e_rows, e_cols;  // under a tile's windows, whole strips of it
  SharedLayout shared;
  bool residual;
  bool x_vectors, y_vectors;  // whether pixels of x and y come in aligned 16 bytes
  // Of a block beyond MobileNetV2's:
  int32_t pad_top, pad_left, dilation;
  ActivationArgs activation, expand_activation, out_activation;
  const float* gate;  // [N, E/16 * 16], what d is multiplied by; or null
  float* pooled;  // [tiles of all images, warps, E/16 * 16], d's sums, in the first of two passes
  bool stem;      // whether x is the image that a stem makes e of
  int32_t image_height, image_width;
  int32_t image_rows;  // of it under a tile's windows
};

// out = f(W mean(in) + b), one of the two products of a squeeze-and-excite.
struct ProductArgs {
  const float* in;      // [N, rows, in_pitch], whose rows are summed and scaled
  const float* weight;  // [C_out/16, C_in, 16]
  const float* bias;    // [C_out/16 * 16]
  float* out;           // [N, C_out/16 * 16]
  int32_t rows, in_pitch, in_channels, out_channels;
  float scale;
  bool gated;  // whether f is the gate, not the activation
  ActivationArgs activation;
  Gate gate;
};
constexpr int64_t kProductThreads = 256, kProductShared = kProductThreads * 4;

}  // namespace mnv2_fused::cuda
