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
void launch_as(const BlockShape& shape, const Plan& plan, const Args& args, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const dim3 grid(unsigned(plan.thread_blocks / plan.splits / plan.out_blocks),
                  unsigned(plan.splits), unsigned(plan.out_blocks));
  const auto run = [&](Kernel kernel) {
    // Past this a kernel has to ask.
    if (plan.shared_bytes > 48 * 1024)
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(plan.shared_bytes)),
            "shared memory");
    kernel<<<grid, unsigned(plan.warps * kLanes), size_t(plan.shared_bytes), on>>>(args);
    check(cudaGetLastError(), "launch");
  };
  if (!with_kernel<kPrecision>(shape.stride, plan, run))
    throw std::runtime_error("no kernel is compiled for this plan");
  if (plan.splits == 1) return;
  add_splits_kernel<kPrecision>
      <<<unsigned(add_blocks(shape)), unsigned(kAddThreads), 0, on>>>(args);
  check(cudaGetLastError(), "launch of the sum over splits");
}

}  // namespace mnv2_fused::cuda
