// Torch tensors as every binding sees them: through the stable ABI, with checks that say what to do.
#pragma once

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"  // in torch's headers
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#pragma GCC diagnostic pop

#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "block.h"

namespace mnv2_fused {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream message;
  (message << ... << args);
  throw std::runtime_error(message.str());
}

template <class List>
std::string list_of(const List& values) {
  std::ostringstream text;
  text << '[';
  const char* separator = "";
  for (const int64_t value : values) {
    text << separator << value;
    separator = ", ";
  }
  text << ']';
  return text.str();
}

using Sizes = std::array<int64_t, 4>;  // [N, C, H, W]
inline std::string to_string(const Sizes& sizes) { return list_of(sizes); }
inline std::string to_string(const Tensor& t) { return list_of(t.sizes()); }

// Names and tensors that a caller may have left out: where a schema says Tensor, torch takes None.
inline void check_given(std::initializer_list<std::pair<const char*, const Tensor*>> tensors) {
  for (const auto& [name, t] : tensors)
    if (!t->defined()) fail(name, " must be a tensor, got None");
}

// Whether a call leaves its plan to the planner: no values, or zeros, since AOTInductor (torch 2.11)
// hands no empty list over.
inline bool is_automatic(IntHeaderOnlyArrayRef plan) {
  return std::all_of(plan.begin(), plan.end(), [](int64_t value) { return value == 0; });
}

// Arguments of the op beside tensors, stride, residual and plan; block.py says what each is.
struct Options {
  int64_t dilation;
  IntHeaderOnlyArrayRef padding;  // left, right, top, bottom; empty for as much as keeps the size
  int64_t activation, out_activation, squeeze_activation, gate;
  double negative_slope;
  int64_t expand_activation;  // -1: as activation
  int64_t column_stride;      // 0: as stride
  bool activates_sum;
};

// An activation, or gate, by its number.
inline int64_t check_kind(const char* name, int64_t value, int64_t count) {
  if (value < 0 || value >= count)
    fail(name, " must be 0 to ", count - 1, " (see mnv2_fused.block), got ", value);
  return value;
}

inline double check_slope(double slope) {
  if (!std::isfinite(slope)) fail("negative_slope must be finite, got ", slope);
  return slope;
}

// Options put into a shape whose kernel size is known.
inline void set_options(BlockShape& s, const Options& options) {
  const auto activation = [](const char* name, int64_t value) {
    return Activation(check_kind(name, value, kActivations));
  };
  s.dilation = options.dilation;
  s.activation = activation("activation", options.activation);
  s.expand_activation = options.expand_activation == -1
                            ? s.activation
                            : activation("expand_activation", options.expand_activation);
  s.out_activation = activation("out_activation", options.out_activation);
  s.squeeze_activation = activation("squeeze_activation", options.squeeze_activation);
  s.gate = Gate(check_kind("gate", options.gate, kGates));
  s.negative_slope = check_slope(options.negative_slope);
  s.column_stride = options.column_stride;
  s.activates_sum = options.activates_sum;
  const auto& p = options.padding;
  if (!p.empty() && p.size() != 4)
    fail("padding must be [left, right, top, bottom] or empty, got ", p.size(), " values");
  const int64_t around = (s.extent() - 1) / 2;
  s.pad_left = p.empty() ? around : p[0];
  s.pad_right = p.empty() ? around : p[1];
  s.pad_top = p.empty() ? around : p[2];
  s.pad_bottom = p.empty() ? around : p[3];
}

// The same, with the kernel of depthwise weights [E/16, taps, 16].
inline void set_options(BlockShape& s, const Options& options, const Tensor& w_depthwise) {
  const int64_t taps = w_depthwise.dim() == 3 ? w_depthwise.size(1) : 0;
  std::string layouts;
  s.kernel = 0;
  for (const int64_t size : kKernelSizes) {
    if (taps == size * size) s.kernel = size;
    layouts +=
        (layouts.empty() ? "[E/16, " : " or [E/16, ") + std::to_string(size * size) + ", 16]";
  }
  if (s.kernel == 0)
    fail("w_depthwise must be ", layouts, ", got ", to_string(w_depthwise),
         "; pack weights with mnv2_fused.pack");
  set_options(s, options);
}

// Fails unless x has four dimensions.
inline Sizes sizes_of(const Tensor& x) {
  if (x.dim() != 4)
    fail("x must be [N, C_in, H, W], got ", to_string(x), "; add a batch with x[None]");
  return {x.size(0), x.size(1), x.size(2), x.size(3)};
}

inline void check_sizes(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
  bool same = t.dim() == int64_t(sizes.size()) && t.is_contiguous();
  int64_t dim = 0;
  for (const int64_t size : sizes) same = same && t.size(dim++) == size;
  if (!same)
    fail(name, " must be contiguous ", list_of(sizes), ", got ", to_string(t),
         "; pack weights with mnv2_fused.pack");
}

// Torch's strides test behind suggest_memory_format, which the stable ABI lacks: channels_last where
// strides ascend over C, W, H, N; ambiguous cases go to the contiguous format.
inline bool is_channels_last(const Tensor& x) {
  if (x.stride(1) == 0) return false;
  int64_t least = 0;
  for (const int64_t d : {1, 3, 2, 0}) {
    const int64_t size = x.size(d), stride = x.stride(d);
    if (size == 0 || stride < least || (d == 0 && least == x.stride(1))) return false;
    least = size > 1 ? stride * size : stride;
  }
  return true;
}

// x itself where the channels of a pixel lie together, else a copy where they do.
inline Tensor with_channels_together(const Tensor& x) {
  if (x.stride(1) == 1 || x.size(1) == 1) return x;
  return torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
}

}  // namespace mnv2_fused
