// Activations of sums in float.
#pragma once

#include "../args.h"
#include "thread.cuh"

namespace mnv2_fused::cuda {

// Formula of an activation that does not clip. NaN passes through each.
template <Activation kKind>
MNV2_DEVICE float formula(float v, [[maybe_unused]] float negative_slope) {
  if constexpr (kKind == Activation::kHardswish) {
    return v * (clip(v + 3, 0, 6) * (1 / 6.f));
  } else if constexpr (kKind == Activation::kSilu) {
    return fast_divide(v, 1 + exponential(-v));
  } else if constexpr (kKind == Activation::kLeakyRelu) {
    return v > 0 ? v : v * negative_slope;
  } else if constexpr (kKind == Activation::kGelu) {
    return v * 0.5f * (1 + erff(v * 0.70710678f));  // 1 / sqrt(2)
  } else if constexpr (kKind == Activation::kGeluTanh) {
    // v / 2 (1 + tanh(u)) = v / (1 + exp(-2 u)), u = sqrt(2 / pi) (v + 0.044715 v^3).
    const float minus_twice = -1.5957691f * v * (1 + 0.044715f * v * v);
    return fast_divide(v, 1 + exponential(minus_twice));
  } else {
    static_assert(kKind != kKind, "the activation needs a formula here");
  }
}

MNV2_DEVICE float activated(float v, const ActivationArgs& f) {
#define MNV2_IF(kind_, ...)                  \
  if constexpr (!is_clip(Activation::kind_)) \
    if (f.kind == Activation::kind_) return formula<Activation::kind_>(v, f.negative_slope);
  MNV2_ACTIVATIONS(MNV2_IF)
#undef MNV2_IF
  return clip(v, f.low, f.high);
}
MNV2_DEVICE float4 activated(float4 v, const ActivationArgs& f) {
  return {activated(v.x, f), activated(v.y, f), activated(v.z, f), activated(v.w, f)};
}

MNV2_DEVICE float gate_of(float v, Gate gate) {
  static_assert(kGates == 3, "a new gate needs its formula here");
  if (gate == Gate::kHardsigmoidFifth) return clip(0.2f * v + 0.5f, 0, 1);
  if (gate == Gate::kSigmoid) return fast_divide(1, 1 + exponential(-v));
  return clip(v + 3, 0, 6) * (1 / 6.f);  // kHardsigmoid
}

}  // namespace mnv2_fused::cuda
