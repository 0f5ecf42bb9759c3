// Activations of sums in float.
#pragma once

#include "../args.h"
#include "thread.cuh"

namespace mnv2_fused::cuda {

MNV2_DEVICE float activated(float v, const ActivationArgs& f) {
  static_assert(kActivations == 5,
                "a new activation needs its formula here and in activation_args");
  if (f.kind == Activation::kHardswish) return v * (clip(v + 3, 0, 6) * (1 / 6.f));
  if (f.kind == Activation::kSilu) return fast_divide(v, 1 + exponential(-v));
  return clip(v, f.low, f.high);  // kRelu6, kRelu, kIdentity
}
MNV2_DEVICE float4 activated(float4 v, const ActivationArgs& f) {
  return {activated(v.x, f), activated(v.y, f), activated(v.z, f), activated(v.w, f)};
}

MNV2_DEVICE float gate_of(float v, Gate gate) {
  static_assert(kGates == 2, "a new gate needs its formula here");
  if (gate == Gate::kSigmoid) return fast_divide(1, 1 + exponential(-v));
  return clip(v + 3, 0, 6) * (1 / 6.f);  // kHardsigmoid
}

}  // namespace mnv2_fused::cuda
