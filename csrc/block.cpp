#include "block.h"

#include <algorithm>

namespace mnv2_fused {
namespace {

// Past every image that has use for it; an extent stays far from 64 bits.
constexpr int64_t kMostDilation = int64_t{1} << 16;

}  // namespace

std::string kernel_sizes() {
  std::string all;
  for (const int64_t size : kKernelSizes) {
    const bool last = size == kMostKernelSize;
    all += (all.empty() ? "" : last ? " or " : ", ") + std::to_string(size);
  }
  return all;
}

std::string unsupported(const BlockShape& s) {
  const auto text = [](const char* name, int64_t value, const std::string& limit) {
    return std::string(name) + " must be " + limit + ", got " + std::to_string(value);
  };
  if (s.stride != 1 && s.stride != 2) return text("stride", s.stride, "1 or 2");
  if (s.column_stride < 0 || s.column_stride > 2)
    return text("column_stride", s.column_stride, "1 or 2, or 0 for that of the rows");
  if (s.batch < 0) return text("batch", s.batch, "at least 0");
  if (s.height < 1) return text("height", s.height, "at least 1");
  if (s.width < 1) return text("width", s.width, "at least 1");
  if (s.in_channels < 1) return text("in_channels", s.in_channels, "at least 1");
  if (s.hidden_channels < 1) return text("hidden_channels", s.hidden_channels, "at least 1");
  if (s.out_channels < 1) return text("out_channels", s.out_channels, "at least 1");
  if (s.expand == Expand::kNone && s.hidden_channels != s.in_channels)
    return text("hidden_channels", s.hidden_channels, "equal to in_channels without an expansion");
  if (s.expand == Expand::kStem &&
      (s.residual || s.height != (s.image_height - 1) / kStemStride + 1 ||
       s.width != (s.image_width - 1) / kStemStride + 1))
    return "a stem halves the image and has no residual";
  if (s.expand == Expand::kStem)
    if (const std::string why = too_large(s.batch, s.image_height, s.image_width, 1); !why.empty())
      return why;
  if (!is_kernel_size(s.kernel)) return text("kernel", s.kernel, kernel_sizes());
  if (s.dilation < 1 || s.dilation > kMostDilation)
    return text("dilation", s.dilation, "1 to 2^16");
  if (s.dilation > 1 && std::max(s.stride, s.stride_across()) > 1)
    return text("dilation", s.dilation, "1 where the depthwise convolution has stride 2");
  for (const int64_t pad : {s.pad_left, s.pad_right, s.pad_top, s.pad_bottom})
    if (pad < 0 || pad >= s.extent())
      return "padding must be 0 to " + std::to_string(s.extent() - 1) + ", got " +
             std::to_string(pad);
  if (s.squeeze_channels < 0) return text("squeeze_channels", s.squeeze_channels, "at least 0");
  if (s.residual && (std::max(s.stride, s.stride_across()) != 1 || s.in_channels != s.out_channels))
    return "a residual needs stride 1 and in_channels equal to out_channels, got stride " +
           std::to_string(std::max(s.stride, s.stride_across())) + ", " +
           std::to_string(s.in_channels) + " and " + std::to_string(s.out_channels);
  const std::string large =
      too_large(s.batch, s.height, s.width,
                std::max({s.in_channels, s.hidden_channels, s.out_channels, s.squeeze_channels}));
  if (!large.empty()) return large;
  if (s.height + s.pad_top + s.pad_bottom < s.extent() ||
      s.width + s.pad_left + s.pad_right < s.extent())
    return "with its padding the image must reach the kernel's " + std::to_string(s.extent()) +
           " rows and columns, got " + std::to_string(s.height) + " and " +
           std::to_string(s.width) + " without";
  if (s.residual && (s.out_height() != s.height || s.out_width() != s.width))
    return "a residual needs padding that keeps the image's size";
  return "";
}

std::string too_large(int64_t batch, int64_t height, int64_t width, int64_t channels) {
  // Past all memory; below these no product here leaves 64 bits.
  constexpr int64_t kPixels = int64_t{1} << 36;
  int64_t pixels = 1;
  for (const int64_t d : {std::max<int64_t>(batch, 1), height, width}) {
    if (d > kPixels || pixels > kPixels / std::max<int64_t>(d, 1))
      return "batch x height x width must be at most 2^36";
    pixels *= d;
  }
  if (channels > int64_t{1} << 18) return "channel counts must be at most 2^18";
  return "";
}

}  // namespace mnv2_fused
