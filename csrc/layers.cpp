#include "layers.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace mnv2_fused {
namespace {

// Values of each layer: kind, C_in, E (of a block), C_out, stride, residual, and how many values follow.
// None follow where the rest is MobileNetV2's; else those of set_further, or for a layer that is no
// block its activation; behind either the bits of a double, the slope of a leaky_relu, or 0.01. Of a
// block three may follow that: activation of the expansion (-1: as of the depthwise convolution; of a
// stem it is among the values before), stride of the columns (0: as of the rows), and whether the
// output's activation is of the sum with x.
constexpr size_t kValues = 7, kBlockValues = 12, kLastValues = 3;

// Padding that TensorFlow calls SAME, before and behind.
void pad_as_tensorflow(int64_t size, int64_t extent, int64_t stride, int64_t& before,
                       int64_t& behind) {
  const int64_t total = std::max<int64_t>((ceil_div(size, stride) - 1) * stride + extent - size, 0);
  before = total / 2;
  behind = total - before;
}

// Kernel, dilation, padding left, right, top, bottom (-1: as TensorFlow's SAME), activation, of the
// output, channels of a squeeze-and-excite, its activation and gate, activation of a stem.
void set_further(BlockShape& s, const int64_t* values, double slope, const int64_t* last) {
  s.kernel = values[0];
  if (!is_kernel_size(s.kernel)) fail("kernel must be ", kernel_sizes(), ", got ", s.kernel);
  s.squeeze_channels = values[8];
  const int64_t of_stem = check_kind("stem activation", values[11], kActivations);
  const bool same = values[2] == -1;
  set_options(s, {values[1], same ? IntHeaderOnlyArrayRef() : IntHeaderOnlyArrayRef(values + 2, 4),
                  values[6], values[7], values[9], values[10], slope,
                  s.expand == Expand::kStem ? of_stem : last[0], last[1], last[2] != 0});
  if (!same || s.stride < 1 || s.column_stride < 0 || s.dilation < 1)
    return;  // which the check names
  pad_as_tensorflow(s.width, s.extent(), s.stride_across(), s.pad_left, s.pad_right);
  pad_as_tensorflow(s.height, s.extent(), s.stride, s.pad_top, s.pad_bottom);
}

// further: values[6] values.
LayerShape make_layer(const int64_t* values, const int64_t* further, const Sizes& x) {
  const int64_t in = values[1], out = values[3];
  if (values[0] < 0 || values[0] > kLinear) fail("layer kind must be 0 to 5, got ", values[0]);
  if (x[1] != in) fail("x must have ", in, " channels, got ", x[1], " in ", to_string(x));
  LayerShape l{};
  l.kind = LayerKind(values[0]);
  const int64_t most = l.is_block() ? kBlockValues : 1;
  const int64_t all = most + 1 + (l.is_block() ? int64_t(kLastValues) : 0);
  if (values[6] != 0 && values[6] != most && values[6] != most + 1 && values[6] != all)
    fail("a layer of kind ", values[0], " must have 0, ", most, l.is_block() ? ", " : " or ",
         most + 1, l.is_block() ? " or 16" : "", " further values, got ", values[6]);
  constexpr int64_t kUsual[kLastValues] = {-1, 0, 0};
  const double slope =
      check_slope(values[6] > most ? std::bit_cast<double>(further[most]) : kNegativeSlope);
  if (l.is_block()) {
    BlockShape& s = l.block;
    s = {x[0], x[2], x[3], in, values[2], out, values[4], Expand::kPointwise, values[5] != 0};
    if (l.kind == kBlockWithoutExpand) s.expand = Expand::kNone;
    if (l.kind == kStemAndBlock) {
      s.expand = Expand::kStem;
      s.image_height = x[2];
      s.image_width = x[3];
      s.height = (x[2] - 1) / kStemStride + 1;
      s.width = (x[3] - 1) / kStemStride + 1;
    }
    if (values[6] > 0)
      set_further(s, further, slope, values[6] == all ? further + most + 1 : kUsual);
    check(s, x);
    l.y = {x[0], out, s.out_height(), s.out_width()};
  } else {
    if (l.kind == kLinear && (x[2] != 1 || x[3] != 1))
      fail("a linear layer takes one pixel an image, got ", to_string(x));
    Activation activation = l.kind == kLinear ? Activation::kIdentity : Activation::kRelu6;
    if (values[6] > 0) activation = Activation(check_kind("activation", *further, kActivations));
    l.pointwise = pointwise_shape(x, out, activation, l.kind == kPooled);
    l.pointwise.linear = l.kind == kLinear;
    l.pointwise.negative_slope = slope;
    if (l.pointwise.linear) std::swap(l.pointwise.batch, l.pointwise.height);
    l.y = {x[0], out, l.kind == kPooled ? 1 : x[2], l.kind == kPooled ? 1 : x[3]};
  }
  return l;
}

}  // namespace

void check(const BlockShape& s, const Sizes& x) {
  const bool no_image = s.expand == Expand::kStem && (x[2] < 1 || x[3] < 1);
  const std::string why = no_image ? "height and width must be at least 1" : unsupported(s);
  if (!why.empty())
    fail(why, "; x is ", to_string(x), " (use backend='eager' for what no kernel takes)");
}

PointwiseShape pointwise_shape(const Sizes& x, int64_t out, Activation activation, bool pool) {
  const PointwiseShape s{x[0], x[2], x[3], x[1], out, activation, pool};
  if (s.height < 1 || s.width < 1 || s.in_channels < 1)
    fail("sizes must be at least 1, got x ", to_string(x));
  if (out < 1) fail("out_channels must be at least 1, got ", out);
  if (const std::string why = too_large(s.batch, s.height, s.width, std::max(s.in_channels, out));
      !why.empty())
    fail(why, ", got x ", to_string(x), " and ", out, " output channels");
  return s;
}

std::vector<LayerShape> layer_shapes(IntHeaderOnlyArrayRef layers, const Sizes& x) {
  if (layers.empty()) fail("layers must hold at least one layer");
  std::vector<LayerShape> all;
  all.reserve(layers.size() / kValues);
  for (size_t i = 0; i < layers.size();) {
    const int64_t* const values = layers.data() + i;
    const size_t left = layers.size() - i;
    if (left < kValues || values[6] < 0 || size_t(values[6]) > left - kValues)
      fail(
          "layers must hold kind, C_in, E, C_out, stride, residual and how many values follow, "
          "then those, of each layer; they end within layer ",
          all.size());
    all.push_back(make_layer(values, values + kValues, all.empty() ? x : all.back().y));
    i += kValues + size_t(values[6]);
  }
  return all;
}

}  // namespace mnv2_fused
