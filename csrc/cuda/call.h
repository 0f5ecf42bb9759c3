// Arguments of one call, made of shape, plan and pointers. No torch, no CUDA.
#pragma once

#include <algorithm>
#include <array>
#include <initializer_list>

#include "args.h"
#include "plan.h"

namespace mnv2_fused::cuda {

// Arguments but pointers, strides, and what find_vectors finds.
inline Args make_args(const BlockShape& s, const Plan& p, Precision precision) {
  Args a{};
  a.batch = int32_t(s.batch);
  a.height = int32_t(s.height);
  a.width = int32_t(s.width);
  a.out_height = int32_t(s.out_height());
  a.out_width = int32_t(s.out_width());
  a.in_channels = int32_t(s.in_channels);
  a.hidden_channels = int32_t(s.hidden_channels);
  a.out_channels = int32_t(s.out_channels);
  a.images = int32_t(p.images);
  a.tile_rows = int32_t(p.tile_rows);
  a.tile_cols = int32_t(p.tile_cols);
  a.group_panels = int32_t(p.group / kPanel);
  a.splits = int32_t(p.splits);
  a.in_panels = int32_t(expand_panels(s));
  a.hidden_panels = int32_t(s.hidden_panels());
  a.out_panels = int32_t(ceil_div(s.out_channels, kPanel));
  const int64_t groups = ceil_div(s.hidden_channels, p.group);
  a.panels_each = int32_t(ceil_div(groups, p.splits) * a.group_panels);
  a.e_rows = int32_t(in_rows(round_up(p.tile_rows, p.strip_rows), s.stride, s.kernel));
  a.e_cols = int32_t(in_rows(p.tile_cols, s.stride, s.kernel));
  a.shared = shared_layout(
      s, precision,
      {p.images, p.tile_rows, p.tile_cols, p.strip_rows, a.group_panels, p.out_panels});
  a.residual = s.residual;
  a.pad_top = int32_t(s.pad_top);
  a.pad_left = int32_t(s.pad_left);
  a.dilation = int32_t(s.dilation);
  a.activation = activation_args(s.function(s.activation));
  a.stem = s.expand == Expand::kStem;
  a.expand_activation = activation_args(s.function(s.expand_activation));
  a.image_height = int32_t(s.image_height);
  a.image_width = int32_t(s.image_width);
  a.image_rows =
      int32_t(stem_rows(std::min<int64_t>(in_rows(p.tile_rows, s.stride, s.kernel), s.height)));
  a.out_activation = activation_args(s.function(s.out_activation));
  a.activates_sum = s.residual && s.activates_sum;
  return a;
}

// Sets whether pixels of x and y are aligned multiples of 16 bytes, by pointers and strides.
inline void find_vectors(Args& a, Precision precision) {
  const auto whole = [&](const void* data, std::initializer_list<int64_t> elements) {
    bool found = reinterpret_cast<uintptr_t>(data) % 16 == 0;
    for (const int64_t n : elements) found = found && n * element_size(precision) % 16 == 0;
    return found;
  };
  a.x_vectors = whole(a.x, {a.in_channels, a.x_image, a.x_row, a.x_col});
  a.y_vectors = whole(a.y, {a.out_channels});
}

// Memory of a squeeze-and-excite between its passes, in floats, in this order.
struct SqueezeMemory {
  int64_t pooled, squeezed, gate;

  SqueezeMemory(const BlockShape& s, int64_t tiles, int64_t warps)
      : pooled(tiles * warps * s.hidden_panels() * kPanel),
        squeezed(s.batch * s.squeeze_panels() * kPanel),
        gate(s.batch * s.hidden_panels() * kPanel) {}
  int64_t total() const { return pooled + squeezed + gate; }
};
// Thread blocks that share neither outputs nor expanded channels.
inline int64_t tiles_of(const Plan& p) { return p.thread_blocks / p.splits / p.out_blocks; }

// Packed weights of a squeeze-and-excite; null without one.
struct SqueezeWeights {
  const float *w_squeeze, *b_squeeze, *w_excite, *b_excite;
};
// Products between the two passes. memory: of SqueezeMemory.
struct SqueezeProducts {
  SqueezeProductArgs squeeze, excite;
};
inline SqueezeProducts squeeze_products(const BlockShape& s, const Plan& p, const SqueezeWeights& w,
                                        float* memory) {
  const SqueezeMemory sizes(s, tiles_of(p), p.warps);
  float *const squeezed = memory + sizes.pooled, *const gate = squeezed + sizes.squeezed;
  const int64_t rows = tiles_of(p) / std::max<int64_t>(s.batch, 1) * p.warps;
  const ActivationArgs activation = activation_args(s.function(s.squeeze_activation));
  return {
      {memory, w.w_squeeze, w.b_squeeze, squeezed, int32_t(rows),
       int32_t(s.hidden_panels() * kPanel), int32_t(s.hidden_channels), int32_t(s.squeeze_channels),
       1 / float(s.out_height() * s.out_width()), false, activation, s.gate},
      {squeezed, w.w_excite, w.b_excite, gate, 1, int32_t(s.squeeze_panels() * kPanel),
       int32_t(s.squeeze_channels), int32_t(s.hidden_channels), 1, true, activation, s.gate}};
}

// Packed weights of a block in the order of fold.PackedWeights; null for absent ones.
constexpr int64_t kWeights = 10;
using WeightPointers = std::array<const void*, kWeights>;
// Bytes of each weight; 0 for absent ones.
inline std::array<int64_t, kWeights> weight_bytes(const BlockShape& s, Precision precision) {
  const int64_t fragment = kPanel * kPanel * element_size(precision), vector = kPanel * 4;
  const int64_t panels = s.hidden_panels(), in = expand_panels(s);
  const int64_t squeeze = s.squeeze_panels(), squeezed = s.squeeze_channels > 0 ? panels : 0;
  return {panels * in * fragment,
          in > 0 ? panels * vector + s.in_channels * 4 : 0,
          panels * s.taps() * vector,
          (s.hidden_channels + kPanel) * 4,
          panels * ceil_div(s.out_channels, kPanel) * fragment,
          s.out_channels * 4,
          squeeze * s.hidden_channels * vector,
          squeeze * vector,
          squeezed * s.squeeze_channels * vector,
          squeezed * vector};
}

// Activations, by element strides.
struct Input {
  const void* data;
  int64_t image, row, col, channel;
};

// Arguments of all kernels of one block.
struct Call {
  Args args;
  SqueezeProducts products;  // of a squeeze-and-excite
  // Whether the kernel before this call on the stream is one of ours: it writes no weights, so that this
  // call may start before its end.
  bool follows = false;
};
// partial, pooled: memory of the plan's partial_bytes and squeeze_bytes; null for none.
inline Call make_call(const BlockShape& s, const Plan& p, Precision precision, const Input& x,
                      const WeightPointers& w, void* y, void* partial, void* pooled) {
  const auto floats = [&](size_t i) { return static_cast<const float*>(w[i]); };
  float* const sums = static_cast<float*>(pooled);
  Call call{.args = make_args(s, p, precision),
            .products = squeeze_products(s, p, {floats(6), floats(7), floats(8), floats(9)}, sums)};
  Args& a = call.args;
  a.x = x.data;
  a.x_image = x.image;
  a.x_row = x.row;
  a.x_col = x.col;
  a.x_channel = x.channel;
  a.w_expand = w[0];
  a.b_expand = floats(1);
  a.w_depthwise = floats(2);
  a.b_depthwise = floats(3);
  a.w_project = w[4];
  a.b_project = floats(5);
  a.y = y;
  if (p.partial_bytes > 0) a.partial = static_cast<float*>(partial);
  if (s.squeeze_channels > 0) {
    a.pooled = sums;
    a.gate = call.products.excite.out;
  }
  find_vectors(a, precision);
  return call;
}

// Threads of add_splits_kernel, each of four channels of a pixel.
constexpr int64_t kAddThreads = 256;
inline int64_t add_blocks(const BlockShape& s) {
  return ceil_div(s.batch * s.out_height() * s.out_width() * ceil_div(s.out_channels, 4),
                  kAddThreads);
}

}  // namespace mnv2_fused::cuda
