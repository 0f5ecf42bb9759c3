// The kernels that are compiled, by what the plan says of them.
#pragma once

#include <iterator>
#include <utility>

#include "kernel.cuh"

namespace mnv2_fused::cuda {

using Kernel = void (*)(Args);

// Calls f(kernel) for the variant of this plan. false when there is none.
template <Precision kPrecision, class F>
bool with_kernel(int64_t stride, const Plan& plan, F f) {
  const auto matches = [&]<size_t kIndex>() {
    constexpr Variant v = kVariants[kIndex];
    if constexpr (!compiled(v, kPrecision)) {
      return false;
    } else {
      if (plan.strip_rows != 2 * v.tiles || plan.out_panels != v.out_panels) return false;
      f(stride == 1 ? Kernel(inverted_residual_kernel<kPrecision, 1, v.tiles, v.out_panels>)
                    : Kernel(inverted_residual_kernel<kPrecision, 2, v.tiles, v.out_panels>));
      return true;
    }
  };
  return [&]<size_t... kIndex>(std::index_sequence<kIndex...>) {
    return (matches.template operator()<kIndex>() || ...);
  }(std::make_index_sequence<std::size(kVariants)>());
}

}  // namespace mnv2_fused::cuda
