// Choice of a compiled kernel for a plan.
#pragma once

#include <iterator>
#include <utility>

#include "kernel.cuh"
#include "plan.h"

namespace mnv2_fused::cuda {

using Kernel = void (*)(Args);

template <Precision kPrecision, Form kForm>
Kernel kernel_of_form(int64_t stride, int64_t strip_rows, int64_t out_panels) {
  constexpr auto& kAll = variants_of<kForm>();
  Kernel found = nullptr;
  const auto look_at = [&]<size_t kIndex>() {
    constexpr Variant v = kAll[kIndex];
    if constexpr (compiled(v, kPrecision)) {
      if (strip_rows != 2 * v.tiles || out_panels != v.out_panels) return;
      if (stride == 1)
        found = inverted_residual_kernel<kPrecision, kForm, 1, v.tiles, v.out_panels>;
      if constexpr (kForm != Form::kStem)
        if (stride == 2)
          found = inverted_residual_kernel<kPrecision, kForm, 2, v.tiles, v.out_panels>;
    }
  };
  [&]<size_t... kIndex>(std::index_sequence<kIndex...>) {
    (look_at.template operator()<kIndex>(), ...);
  }(std::make_index_sequence<std::size(kAll)>());
  return found;
}

// The kernel of one pass, or null when none is compiled for this plan.
template <Precision kPrecision>
Kernel kernel_for(const BlockShape& s, const Plan& plan, Pass pass) {
  const int64_t rows = plan.strip_rows, panels = pass == Pass::kPool ? 0 : plan.out_panels;
  switch (form_of(s)) {
    case Form::kMobileNetV2:
      return kernel_of_form<kPrecision, Form::kMobileNetV2>(s.stride, rows, panels);
    case Form::kGeneral3x3:
      return kernel_of_form<kPrecision, Form::kGeneral3x3>(s.stride, rows, panels);
    case Form::kGeneral5x5:
      return kernel_of_form<kPrecision, Form::kGeneral5x5>(s.stride, rows, panels);
    case Form::kStem:
      return kernel_of_form<kPrecision, Form::kStem>(s.stride, rows, panels);
  }
  return nullptr;
}

// The kernel that adds splits.
template <Precision kPrecision>
Kernel adding_kernel(const BlockShape& s) {
  return s.out_activation == Activation::kIdentity ? add_splits_kernel<kPrecision, false>
                                                   : add_splits_kernel<kPrecision, true>;
}

}  // namespace mnv2_fused::cuda
