#include "gpu.h"

#include <cuda_runtime_api.h>

#include <mutex>
#include <stdexcept>
#include <string>

#include "error.h"

namespace mnv2_fused::cuda {
namespace {

// Twin of Gpu.of in gpus.py. The op needs its own: exported programs run it without Python. Python needs
// its own, too: the Triton backend plans where this library is not built.
Gpu read_gpu(int device) {
  const auto at = [&](cudaDeviceAttr name) -> int64_t {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device), "device attribute");
    return value;
  };
  Gpu g{};
  g.capability = 10 * at(cudaDevAttrComputeCapabilityMajor) + at(cudaDevAttrComputeCapabilityMinor);
  g.multiprocessors = at(cudaDevAttrMultiProcessorCount);
  g.shared_per_block = at(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  g.shared_per_multiprocessor = at(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  g.threads_per_multiprocessor = at(cudaDevAttrMaxThreadsPerMultiProcessor);
  g.l2_bytes = at(cudaDevAttrL2CacheSize);
  // A copy on an H200 reached 0.87 of what its memory's clock and width give. Virtual GPUs may not tell
  // clocks: the defaults are an H200's, by the number of multiprocessors.
  constexpr double kReached = 0.87;
  const double memory = 2e3 * double(at(cudaDevAttrMemoryClockRate)) *
                        double(at(cudaDevAttrGlobalMemoryBusWidth)) / 8 * kReached;
  const double clock = 1e3 * double(at(cudaDevAttrClockRate));
  g.memory_bandwidth = memory > 0 ? memory : 4.3e12 / 132 * double(g.multiprocessors);
  g.clock = clock > 0 ? clock : 1.98e9;
  return g;
}

}  // namespace

const Gpu& gpu_at(int device) {
  constexpr size_t kMost = 64;  // devices of a process, torch's own limit
  static std::once_flag once[kMost];
  static Gpu gpus[kMost];
  if (device < 0 || size_t(device) >= kMost)
    throw std::runtime_error("device must be 0 to 63, got " + std::to_string(device));
  std::call_once(once[device], [&] { gpus[device] = read_gpu(device); });
  return gpus[device];
}

}  // namespace mnv2_fused::cuda
