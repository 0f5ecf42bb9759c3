// Host side of a call: what the kernel is told, and its launch. No CUDA headers.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "kernel.h"

namespace mnv2_fused::cuda {

// Everything but pointers and strides, and what find_vectors finds of them.
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
  a.in_panels = s.expand == Expand::kNone ? 0 : int32_t(ceil_div(s.in_channels, kPanel));
  a.hidden_panels = int32_t(s.hidden_panels());
  a.out_panels = int32_t(ceil_div(s.out_channels, kPanel));
  const int64_t groups = ceil_div(s.hidden_channels, p.group);
  a.panels_each = int32_t(ceil_div(groups, p.splits) * a.group_panels);
  a.e_rows = int32_t(in_rows(round_up(p.tile_rows, p.strip_rows), s.stride, s.kernel));
  a.e_cols = int32_t(in_rows(p.tile_cols, s.stride, s.kernel));
  a.shared = shared_layout(element_size(precision), a.in_panels, p.out_panels, s.stride,
                           p.strip_rows, p.images, p.tile_rows, p.tile_cols, a.group_panels,
                           ceil_div(s.height, s.dilation), ceil_div(s.width, s.dilation), s.kernel);
  a.residual = s.residual;
  a.pad_top = int32_t(s.pad_top);
  a.pad_left = int32_t(s.pad_left);
  a.dilation = int32_t(s.dilation);
  a.activation = activation_args(s.activation);
  a.out_activation = activation_args(s.out_activation);
  return a;
}

// Whether pixels of x and y come in aligned 16 bytes, once pointers and strides are known.
inline void find_vectors(Args& a, Precision precision) {
  const auto whole = [&](const void* data, std::initializer_list<int64_t> elements) {
    bool found = reinterpret_cast<uintptr_t>(data) % 16 == 0;
    for (const int64_t n : elements) found = found && n * element_size(precision) % 16 == 0;
    return found;
  };
  a.x_vectors = whole(a.x, {a.in_channels, a.x_image, a.x_row, a.x_col});
  a.y_vectors = whole(a.y, {a.out_channels});
}

// What a squeeze-and-excite keeps from pass to pass, floats in this order.
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
// The products between the two passes. memory: what SqueezeMemory says.
struct SqueezeProducts {
  ProductArgs squeeze, excite;
};
inline SqueezeProducts squeeze_products(const BlockShape& s, const Plan& p, const SqueezeWeights& w,
                                        float* memory) {
  const SqueezeMemory sizes(s, tiles_of(p), p.warps);
  float *const squeezed = memory + sizes.pooled, *const gate = squeezed + sizes.squeezed;
  const int64_t rows = tiles_of(p) / std::max<int64_t>(s.batch, 1) * p.warps;
  const ActivationArgs activation = activation_args(s.squeeze_activation);
  return {
      {memory, w.w_squeeze, w.b_squeeze, squeezed, int32_t(rows),
       int32_t(s.hidden_panels() * kPanel), int32_t(s.hidden_channels), int32_t(s.squeeze_channels),
       1 / float(s.out_height() * s.out_width()), false, activation, s.gate},
      {squeezed, w.w_excite, w.b_excite, gate, 1, int32_t(s.squeeze_panels() * kPanel),
       int32_t(s.squeeze_channels), int32_t(s.hidden_channels), 1, true, activation, s.gate}};
}

// Threads of add_splits_kernel, each of four channels of a pixel.
constexpr int64_t kAddThreads = 256;
inline int64_t add_blocks(const BlockShape& s) {
  return ceil_div(s.batch * s.out_height() * s.out_width() * ceil_div(s.out_channels, 4),
                  kAddThreads);
}

// Runs the plan on a stream (a cudaStream_t) of the current device. Throws std::runtime_error that
// says what CUDA says.
// products: of a block with a squeeze-and-excite.
void launch(Precision precision, const BlockShape& shape, const Plan& plan, const Args& args,
            const SqueezeProducts& products, void* stream);

// The same, one translation unit each.
template <Precision kPrecision>
void launch_as(const BlockShape& shape, const Plan& plan, const Args& args,
               const SqueezeProducts& products, void* stream);

// The products of a squeeze-and-excite, whatever the precision.
void launch_products(int64_t batch, const SqueezeProducts& products, void* stream);

}  // namespace mnv2_fused::cuda
