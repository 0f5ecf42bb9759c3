// Kernels of one precision; each kernels_*.cu compiles one.
#pragma once

#include "kernels.cuh"
#include "launch.h"

namespace mnv2_fused::cuda {

template <Precision kPrecision>
BlockKernels kernels_of(const BlockShape& shape, const Plan& plan) {
  const auto address = [](Kernel kernel) { return reinterpret_cast<const void*>(kernel); };
  BlockKernels kernels{};
  if (shape.squeeze_channels > 0)
    kernels.pool = address(kernel_for<kPrecision>(shape, plan, Pass::kPool));
  kernels.last = address(kernel_for<kPrecision>(shape, plan, Pass::kLast));
  kernels.add_splits = address(adding_kernel<kPrecision>(shape));
  return kernels;
}

}  // namespace mnv2_fused::cuda
