// The kernels that are compiled, by what the plan says of them.
#pragma once

#include <iterator>
#include <utility>

#include "kernel.cuh"

namespace mnv2_fused::cuda {

using Kernel = void (*)(Args);
using Adding = void (*)(Args);

// Calls f(kernel) for the variant of this plan. false when there is none.
template <Precision kPrecision, Form kForm, class F>
bool with_kernel_of(int64_t stride, int64_t strip_rows, int64_t out_panels, F f) {
  constexpr auto& kAll = variants_of<kForm>();
  const auto matches = [&]<size_t kIndex>() {
    constexpr Variant v = kAll[kIndex];
    if constexpr (!compiled(v, kPrecision)) {
      return false;
    } else {
      if (strip_rows != 2 * v.tiles || out_panels != v.out_panels) return false;
      if (stride == 1) {
        f(inverted_residual_kernel<kPrecision, kForm, 1, v.tiles, v.out_panels>);
      } else if constexpr (kForm != Form::kStem) {
        f(inverted_residual_kernel<kPrecision, kForm, 2, v.tiles, v.out_panels>);
      }
      return true;
    }
  };
  return [&]<size_t... kIndex>(std::index_sequence<kIndex...>) {
    return (matches.template operator()<kIndex>() || ...);
  }(std::make_index_sequence<std::size(kAll)>());
}

template <Precision kPrecision, class F>
bool with_kernel(const BlockShape& s, const Plan& plan, Pass pass, F f) {
  const int64_t out_panels = pass == Pass::kPool ? 0 : plan.out_panels;
  switch (form_of(s)) {
    case Form::kMobileNetV2:
      return with_kernel_of<kPrecision, Form::kMobileNetV2>(s.stride, plan.strip_rows, out_panels,
                                                            f);
    case Form::kThree:
      return with_kernel_of<kPrecision, Form::kThree>(s.stride, plan.strip_rows, out_panels, f);
    case Form::kFive:
      return with_kernel_of<kPrecision, Form::kFive>(s.stride, plan.strip_rows, out_panels, f);
    case Form::kStem:
      return with_kernel_of<kPrecision, Form::kStem>(s.stride, plan.strip_rows, out_panels, f);
  }
  return false;
}

template <Precision kPrecision>
Adding adding_kernel(const BlockShape& s) {
  return s.out_activation == Activation::kIdentity ? Adding(add_splits_kernel<kPrecision, false>)
                                                   : Adding(add_splits_kernel<kPrecision, true>);
}

}  // namespace mnv2_fused::cuda
