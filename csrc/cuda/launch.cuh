// The launch, for one precision's kernels.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "launch.h"
#include "variants.cuh"

namespace mnv2_fused::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else the next call would report it again
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

template <Precision kPrecision>
void launch_as(const BlockShape& shape, const Plan& plan, const Call& call, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  unsigned out_blocks = 1;
  const auto run = [&](Kernel kernel) {
    const dim3 grid(unsigned(tiles_of(plan)), unsigned(plan.splits), out_blocks);
    // Past this a kernel has to ask.
    if (plan.shared_bytes > 48 * 1024)
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(plan.shared_bytes)),
            "shared memory");
    kernel<<<grid, unsigned(plan.warps * kLanes), size_t(plan.shared_bytes), on>>>(call.args);
    check(cudaGetLastError(), "launch");
  };
  const auto pass = [&](Pass which) {
    if (!with_kernel<kPrecision>(shape, plan, which, run))
      throw std::runtime_error("no kernel is compiled for this plan");
  };
  if (shape.squeeze_channels > 0) {
    pass(Pass::kPool);
    launch_products(shape.batch, call.products, stream);
  }
  out_blocks = unsigned(plan.out_blocks);
  pass(Pass::kLast);
  if (plan.splits == 1) return;
  const Adding adding = adding_kernel<kPrecision>(shape);
  adding<<<unsigned(add_blocks(shape)), unsigned(kAddThreads), 0, on>>>(call.args);
  check(cudaGetLastError(), "launch of the sum over splits");
}

}  // namespace mnv2_fused::cuda
