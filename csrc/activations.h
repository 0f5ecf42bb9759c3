// Activations: the one table of them in C++. mnv2_fused/activations.py has the same names, in the same
// order. Plain data: no torch, no CUDA.
#pragma once

#include <cstdint>
#include <limits>

namespace mnv2_fused {

// Numbers of an activation are what the op takes and what exported programs hold: append, never reorder.
// The columns:
// - enumerator and name;
// - bounds: of an activation that does nothing but clip. CPU and CUDA kernels apply such a one to sums in
//   registers; any other one needs a formula in cpu/kernel/activation.h and in
//   cuda/kernel/activation.cuh, which do not compile without;
// - CPU: vector operations of the formula beside a clip's, with the way by memory; an exponential is
//   about 16 of them and a division 8. Only the choice of a plan rests on it, as on the next;
// - GPU: instructions of the formula for one element beside a clip's, four for an exponential or a
//   reciprocal, which a quarter of the lanes compute;
// - whether training has its derivative: of one that clips by its bounds, of any other one a formula in
//   cpu/training/derivative.h, which does not compile without.
#define MNV2_ACTIVATIONS(ROW)                                               \
  ROW(kRelu6, "relu6", (Bounds{0, 6}), 0, 0, true)                          \
  ROW(kRelu, "relu", (Bounds{0, kUnbounded}), 0, 0, true)                   \
  ROW(kIdentity, "identity", (Bounds{-kUnbounded, kUnbounded}), 0, 0, true) \
  ROW(kHardswish, "hardswish", kFormula, 6, 3, true)                        \
  ROW(kSilu, "silu", kFormula, 30, 9, true)                                 \
  ROW(kLeakyRelu, "leaky_relu", kFormula, 4, 1, true)                       \
  ROW(kGelu, "gelu", kFormula, 50, 20, false)                               \
  ROW(kGeluTanh, "gelu_tanh", kFormula, 36, 13, false)

#define MNV2_ENUMERATOR(kind, ...) kind,
enum class Activation : int8_t { MNV2_ACTIVATIONS(MNV2_ENUMERATOR) };
#undef MNV2_ENUMERATOR

constexpr double kUnbounded = std::numeric_limits<double>::infinity();
struct Bounds {
  double low, high;
};
constexpr Bounds kFormula{1, -1};  // no bounds at all

struct ActivationRow {
  const char* name;
  Bounds bounds;
  double cpu_operations, gpu_instructions;
  bool differentiated;
  constexpr bool clips() const { return bounds.low <= bounds.high; }
};
#define MNV2_ROW(kind, ...) {__VA_ARGS__},
inline constexpr ActivationRow kActivationRows[] = {MNV2_ACTIVATIONS(MNV2_ROW)};
#undef MNV2_ROW
constexpr int64_t kActivations = sizeof(kActivationRows) / sizeof(kActivationRows[0]);

constexpr const ActivationRow& row_of(Activation a) { return kActivationRows[int64_t(a)]; }
// Whether an activation does nothing but clip.
constexpr bool is_clip(Activation a) { return row_of(a).clips(); }
// Whether the kernels of training know the derivative.
constexpr bool has_derivative(Activation a) { return row_of(a).differentiated; }

// An activation with its parameter.
struct ActivationFunction {
  Activation kind;
  double negative_slope;  // of a leaky_relu
};
constexpr double kNegativeSlope = 0.01;  // where nothing else is said, as in torch

}  // namespace mnv2_fused
