// The fields of a block by name, for Python, which compares them with its own table on import
// (mnv2_fused/encoding.py).
#pragma once

#include <bit>
#include <cstddef>
#include <iterator>
#include <utility>

#include "block.h"

namespace mnv2_fused {

constexpr const char* kExpandNames[] = {"none", "pointwise", "stem"};
constexpr int64_t kExpands = std::size(kExpandNames);
constexpr const char* kGateNames[] = {"hardsigmoid", "sigmoid", "hardsigmoid_fifth"};
static_assert(std::size(kGateNames) == kGates, "every Gate has a name");

// A field of BlockShape by its name, as an integer, a double by its bits: what Python calls a planner
// with.
template <class T>
constexpr int64_t to_integer(T value) {
  return int64_t(value);
}
template <>
constexpr int64_t to_integer(double value) {
  return std::bit_cast<int64_t>(value);
}
template <class T>
constexpr T from_integer(int64_t value) {
  return T(value);
}
template <>
constexpr double from_integer(int64_t value) {
  return std::bit_cast<double>(value);
}
struct BlockField {
  const char* name;
  int64_t values;  // of an enumeration; 0 for any number
  int64_t (*get)(const BlockShape&);
  void (*set)(BlockShape&, int64_t);
};
#define MNV2_FIELD(field, values)                                           \
  {#field, values, [](const BlockShape& s) { return to_integer(s.field); }, \
   [](BlockShape& s, int64_t value) { s.field = from_integer<decltype(s.field)>(value); }}
inline constexpr BlockField kBlockFields[] = {
    MNV2_FIELD(batch, 0),
    MNV2_FIELD(height, 0),
    MNV2_FIELD(width, 0),
    MNV2_FIELD(in_channels, 0),
    MNV2_FIELD(hidden_channels, 0),
    MNV2_FIELD(out_channels, 0),
    MNV2_FIELD(stride, 0),
    MNV2_FIELD(expand, kExpands),
    MNV2_FIELD(residual, 2),
    MNV2_FIELD(image_height, 0),
    MNV2_FIELD(image_width, 0),
    MNV2_FIELD(kernel, 0),
    MNV2_FIELD(dilation, 0),
    MNV2_FIELD(pad_left, 0),
    MNV2_FIELD(pad_right, 0),
    MNV2_FIELD(pad_top, 0),
    MNV2_FIELD(pad_bottom, 0),
    MNV2_FIELD(activation, kActivations),
    MNV2_FIELD(expand_activation, kActivations),
    MNV2_FIELD(out_activation, kActivations),
    MNV2_FIELD(squeeze_channels, 0),
    MNV2_FIELD(squeeze_activation, kActivations),
    MNV2_FIELD(gate, kGates),
    MNV2_FIELD(negative_slope, 0),
    MNV2_FIELD(column_stride, 0),
    MNV2_FIELD(activates_sum, 2),
};
#undef MNV2_FIELD

// The table has every field: BlockShape takes as many initializers, and not one more.
struct AnyField {
  template <class T>
  operator T() const;
};
template <size_t... I>
constexpr bool takes_fields(std::index_sequence<I...>) {
  return requires { BlockShape{(void(I), AnyField{})...}; };
}
static_assert(takes_fields(std::make_index_sequence<std::size(kBlockFields)>{}) &&
                  !takes_fields(std::make_index_sequence<std::size(kBlockFields) + 1>{}),
              "kBlockFields must have every field of BlockShape");

}  // namespace mnv2_fused
