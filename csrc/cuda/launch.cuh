// The launch, for one precision's kernels.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "launch.h"
#include "variants.cuh"

namespace mnv2_fused::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else the next call would report it again
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Whether a kernel's code, on the current device, waits for the one before it where it starts early:
// that of 9.0 and later does, PTX of earlier ones has no such instruction. Asked once.
inline bool waits(const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, bool> known;
  int device = 0;
  check(cudaGetDevice(&device), "device");
  const std::lock_guard lock(mutex);
  const auto [at, added] = known.try_emplace({kernel, device});
  if (added) {
    cudaFuncAttributes attributes{};
    int driver = 0;
    check(cudaFuncGetAttributes(&attributes, kernel), "kernel");
    check(cudaDriverGetVersion(&driver), "driver");
    constexpr int kCaptures = 12030;  // from here on graphs keep such launches
    at->second = attributes.ptxVersion >= 90 && driver >= kCaptures;
  }
  return at->second;
}

// follows: whether the kernel may start while the one before it ends (programmatic dependent launch).
template <class A>
void start(void (*kernel)(A), dim3 grid, int64_t threads, int64_t shared, void* stream,
           bool follows, const A& arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  if (follows && early_starts() && waits(reinterpret_cast<const void*>(kernel))) {
    config.attrs = &early;
    config.numAttrs = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, arguments), "launch");
}

template <Precision kPrecision>
void launch_as(const BlockShape& shape, const Plan& plan, const Call& call, void* stream) {
  unsigned out_blocks = 1;
  bool follows = call.follows;
  const auto run = [&](Kernel kernel) {
    const dim3 grid(unsigned(tiles_of(plan)), unsigned(plan.splits), out_blocks);
    // Past this a kernel has to ask.
    if (plan.shared_bytes > 48 * 1024)
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(plan.shared_bytes)),
            "shared memory");
    start(kernel, grid, plan.warps * kLanes, plan.shared_bytes, stream, follows, call.args);
    follows = true;
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
  start(adding_kernel<kPrecision>(shape), dim3(unsigned(add_blocks(shape))), kAddThreads, 0, stream,
        follows, call.args);
}

}  // namespace mnv2_fused::cuda
