// The op on one block: checks, plan, memory, launch.
#include <optional>

#include "launch.h"
#include "run.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"  // in torch's header
#include <torch/csrc/stable/accelerator.h>
#pragma GCC diagnostic pop

namespace mnv2_fused::cuda {
namespace {

constexpr int64_t kFragment = kPanel * kPanel;

const char* name_of(ScalarType type) {
  return type == ScalarType::Half       ? "float16"
         : type == ScalarType::BFloat16 ? "bfloat16"
         : type == ScalarType::Float    ? "float32"
                                        : "another dtype";
}

struct Weights {
  const Tensor *w_expand, *b_expand;  // null without an expansion
  const Tensor *w_depthwise, *b_depthwise, *w_project, *b_project;
  const Tensor *w_squeeze, *b_squeeze, *w_excite, *b_excite;  // null without squeeze-and-excite
};

void check_weight(const char* name, const Tensor* t, ScalarType type, int device) {
  if (!t) return;
  if (!t->is_cuda() || t->get_device_index() != device)
    fail("x is on cuda:", device, " but ", name, " is not; move one with .to()");
  if (t->scalar_type() != type)
    fail(name, " must be ", name_of(type), " for this x, got ", name_of(t->scalar_type()),
         "; pack the weights with mnv2_fused.pack(weights, x.dtype, 'cuda')");
  if (reinterpret_cast<uintptr_t>(t->const_data_ptr()) % kAlignment != 0)
    fail(name, " must start at a multiple of 16 bytes; clone() it");
}

void check_weights(const Weights& w, ScalarType type, int device) {
  check_weight("w_expand", w.w_expand, type, device);
  check_weight("w_project", w.w_project, type, device);
  check_weight("b_expand", w.b_expand, ScalarType::Float, device);
  check_weight("w_depthwise", w.w_depthwise, ScalarType::Float, device);
  check_weight("b_depthwise", w.b_depthwise, ScalarType::Float, device);
  check_weight("b_project", w.b_project, ScalarType::Float, device);
  check_weight("w_squeeze", w.w_squeeze, ScalarType::Float, device);
  check_weight("b_squeeze", w.b_squeeze, ScalarType::Float, device);
  check_weight("w_excite", w.w_excite, ScalarType::Float, device);
  check_weight("b_excite", w.b_excite, ScalarType::Float, device);
}

// The block's geometry, of packed weights and x. Fails where they do not fit each other.
BlockShape block_shape(const Sizes& x, const Weights& w, int64_t stride, bool residual,
                       const Options& options) {
  if (w.b_depthwise->dim() != 1 || w.b_depthwise->size(0) <= kPanel || w.b_project->dim() != 1)
    fail("b_depthwise must be [E + 16] and b_project [C_out], got ", to_string(*w.b_depthwise),
         " and ", to_string(*w.b_project), "; pack weights with mnv2_fused.pack");
  const Expand expand = w.w_expand ? Expand::kPointwise : Expand::kNone;
  BlockShape s{x[0],   x[2],   x[3],    x[1], w.b_depthwise->size(0) - kPanel, w.b_project->size(0),
               stride, expand, residual};
  set_options(s, options, *w.w_depthwise);
  const int64_t panels = s.hidden_panels();
  if (w.w_squeeze) {
    if (w.w_excite->dim() != 3)
      fail("w_excite must be [E/16, S, 16], got ", to_string(*w.w_excite),
           "; pack weights with mnv2_fused.pack");
    s.squeeze_channels = w.w_excite->size(1);
    check_sizes("w_squeeze", *w.w_squeeze, {s.squeeze_panels(), s.hidden_channels, kPanel});
    check_sizes("b_squeeze", *w.b_squeeze, {s.squeeze_panels() * kPanel});
    check_sizes("w_excite", *w.w_excite, {panels, s.squeeze_channels, kPanel});
    check_sizes("b_excite", *w.b_excite, {panels * kPanel});
  }
  if (w.b_expand && w.b_expand->dim() != 1)
    fail("b_expand must be [E/16 * 16 + C_in], got ", to_string(*w.b_expand),
         "; pack weights with mnv2_fused.pack");
  const int64_t takes = w.b_expand ? w.b_expand->size(0) - panels * kPanel : s.hidden_channels;
  if (takes != x[1]) fail("x must have ", takes, " channels, got ", x[1], " in ", to_string(x));
  if (w.w_expand) {
    check_sizes("w_expand", *w.w_expand, {panels, ceil_div(x[1], kPanel), kFragment});
    check_sizes("b_expand", *w.b_expand, {panels * kPanel + x[1]});
  }
  check_sizes("w_depthwise", *w.w_depthwise, {panels, s.taps(), kPanel});
  check_sizes("b_depthwise", *w.b_depthwise, {s.hidden_channels + kPanel});
  check_sizes("w_project", *w.w_project, {panels, ceil_div(s.out_channels, kPanel), kFragment});
  check_sizes("b_project", *w.b_project, {s.out_channels});
  return s;
}

const void* data(const Tensor* t) { return t ? t->const_data_ptr() : nullptr; }

void run(const BlockShape& shape, Precision precision, const Plan& plan, const Tensor& x,
         const Weights& w, const Tensor& y, int device) {
  std::optional<Tensor> partial, squeezed;
  const auto take = [&](std::optional<Tensor>& memory, int64_t bytes) -> void* {
    if (bytes == 0) return nullptr;
    memory = empty_bytes(bytes, device);
    return memory->mutable_data_ptr();
  };
  void* const sums = take(partial, plan.partial_bytes);
  void* const pooled = take(squeezed, plan.squeeze_bytes);
  const WeightPointers pointers{data(w.w_expand),    data(w.b_expand),  data(w.w_depthwise),
                                data(w.b_depthwise), data(w.w_project), data(w.b_project),
                                data(w.w_squeeze),   data(w.b_squeeze), data(w.w_excite),
                                data(w.b_excite)};
  const Call call =
      make_call(shape, plan, precision, input_of(x), pointers, y.mutable_data_ptr(), sums, pooled);
  launch(precision, shape, plan, call, current_stream(device));
}

Tensor inverted_residual_cuda(const Tensor& x,                         // [N, C_in, H, W]
                              const std::optional<Tensor>& w_expand,   // [E/16, C_in/16, 256]
                              const std::optional<Tensor>& b_expand,   // [E/16 * 16 + C_in]
                              const Tensor& w_depthwise,               // [E/16, 9 or 25, 16]
                              const Tensor& b_depthwise,               // [E + 16]
                              const Tensor& w_project,                 // [E/16, C_out/16, 256]
                              const Tensor& b_project,                 // [C_out]
                              const std::optional<Tensor>& w_squeeze,  // [S/16, E, 16]
                              const std::optional<Tensor>& b_squeeze,  // [S/16 * 16]
                              const std::optional<Tensor>& w_excite,   // [E/16, S, 16]
                              const std::optional<Tensor>& b_excite,   // [E/16 * 16]
                              int64_t stride, bool residual, IntHeaderOnlyArrayRef forced,
                              int64_t dilation, IntHeaderOnlyArrayRef padding, int64_t activation,
                              int64_t out_activation, int64_t squeeze_activation, int64_t gate,
                              bool tf32, double negative_slope, int64_t expand_activation,
                              int64_t column_stride, bool activates_sum) try {
  check_given({{"x", &x},
               {"w_depthwise", &w_depthwise},
               {"b_depthwise", &b_depthwise},
               {"w_project", &w_project},
               {"b_project", &b_project}});
  if (w_expand.has_value() != b_expand.has_value())
    fail("w_expand and b_expand must both be given or both be None");
  for (const auto* t : {&b_squeeze, &w_excite, &b_excite})
    if (t->has_value() != w_squeeze.has_value())
      fail("w_squeeze, b_squeeze, w_excite and b_excite must all be given or all be None");
  const auto given = [](const std::optional<Tensor>& t) { return t ? &*t : nullptr; };
  const Weights w{given(w_expand), given(b_expand), &w_depthwise,     &b_depthwise,
                  &w_project,      &b_project,      given(w_squeeze), given(b_squeeze),
                  given(w_excite), given(b_excite)};
  const Options options{dilation,           padding,      activation,     out_activation,
                        squeeze_activation, gate,         negative_slope, expand_activation,
                        column_stride,      activates_sum};

  const Sizes sizes = sizes_of(x);
  const ScalarType type = x.scalar_type();
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Gpu& gpu = gpu_at(device);
  const Precision precision = precision_of(type, tf32, gpu);
  check_weights(w, type, device);
  const BlockShape shape = block_shape(sizes, w, stride, residual, options);
  check_shape(shape, precision, gpu, sizes);

  const Sizes y_sizes{shape.batch, shape.out_channels, shape.out_height(), shape.out_width()};
  const IntHeaderOnlyArrayRef y_list(y_sizes.data(), y_sizes.size());
  const bool channels_last = is_channels_last(x);
  const auto format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  if (shape.batch == 0) return empty(y_list, type, device, format);
  const Plan plan = is_automatic(forced)
                        ? cached_plan(shape, precision, device)
                        : make_plan(shape, precision, gpu, {forced.begin(), forced.end()});
  const Tensor result = empty(y_list, type, device, MemoryFormat::ChannelsLast);
  run(shape, precision, plan, with_channels_together(x), w, result, device);
  if (channels_last) return result;
  Tensor y = empty(y_list, type, device, format);
  return torch::stable::copy_(y, result);
} catch (const std::exception& error) {
  throw std::runtime_error(std::string("mnv2_fused::inverted_residual_cuda: ") + error.what());
}

}  // namespace
}  // namespace mnv2_fused::cuda

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CUDA, m) {
  m.impl("inverted_residual_cuda", TORCH_BOX(&mnv2_fused::cuda::inverted_residual_cuda));
}
