#include "launch.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "error.h"
#include "variant.h"

namespace mnv2_fused::cuda {
namespace {

std::atomic<bool> g_early_starts{true};

// Largest dynamic shared memory that a kernel has without asking for more.
constexpr int64_t kDefaultShared = 48 * 1024;

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "device");
  return device;
}

// Whether a kernel's code on the current device waits for the kernel before it: code for 9.0 and later
// does, PTX of earlier architectures has no such instruction. Asked once per kernel and device.
bool waits(const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, bool> known;
  const int device = current_device();
  const std::lock_guard lock(mutex);
  const auto [at, added] = known.try_emplace({kernel, device});
  if (added) {
    cudaFuncAttributes attributes{};
    int driver = 0;
    check(cudaFuncGetAttributes(&attributes, kernel), "kernel");
    check(cudaDriverGetVersion(&driver), "driver");
    constexpr int kCaptures = 12030;  // the first driver whose graphs keep such launches
    at->second = attributes.ptxVersion >= 90 && driver >= kCaptures;
  }
  return at->second;
}

// follows: whether the kernel may start while the one before it ends.
template <class A>
void start(const void* kernel, dim3 grid, int64_t threads, int64_t shared, void* stream,
           bool follows, const A& arguments) {
  if (kernel == nullptr) throw std::runtime_error("no kernel is compiled for this plan");
  if (shared > kDefaultShared)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)),
          "shared memory");
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  if (follows && g_early_starts.load(std::memory_order_relaxed) && waits(kernel)) {
    config.attrs = &early;
    config.numAttrs = 1;
  }
  void* values[] = {const_cast<A*>(&arguments)};
  check(cudaLaunchKernelExC(&config, kernel, values), "launch");
}

BlockKernels compiled_kernels(Precision precision, const BlockShape& shape, const Plan& plan) {
  switch (precision) {
    case Precision::kHalf:
      return kernels_of<Precision::kHalf>(shape, plan);
    case Precision::kBFloat16:
      return kernels_of<Precision::kBFloat16>(shape, plan);
    case Precision::kTf32:
      return kernels_of<Precision::kTf32>(shape, plan);
    case Precision::kFloat32:
      return kernels_of<Precision::kFloat32>(shape, plan);
  }
  throw std::runtime_error("no kernel is compiled for this precision");
}

std::string text_of(const Plan& p) {
  std::ostringstream text;
  text << "plan: tile " << p.tile_rows << "x" << p.tile_cols << " of " << p.images
       << " images, strips of " << p.strip_rows << " rows, group " << p.group << ", " << p.splits
       << " splits, " << p.thread_blocks << " thread blocks of " << p.warps << " warps and "
       << p.shared_bytes << " bytes of shared memory, on cuda:" << current_device();
  return text.str();
}

}  // namespace

void allow_early_starts(bool allowed) { g_early_starts.store(allowed, std::memory_order_relaxed); }

void launch(Precision precision, const BlockShape& shape, const Plan& plan, const Call& call,
            void* stream) try {
  const BlockKernels kernels = compiled_kernels(precision, shape, plan);
  const dim3 tiles(unsigned(tiles_of(plan)), unsigned(plan.splits));
  const int64_t threads = plan.warps * kLanes;
  bool follows = call.follows;
  if (shape.squeeze_channels > 0) {
    start(kernels.pool, tiles, threads, plan.shared_bytes, stream, follows, call.args);
    for (const SqueezeProductArgs& a : {call.products.squeeze, call.products.excite}) {
      const dim3 grid(unsigned(shape.batch), unsigned(ceil_div(a.out_channels, kPanel)));
      start(squeeze_product(), grid, kSqueezeThreads, kSqueezeShared, stream, true, a);
    }
    follows = true;
  }
  const dim3 grid(tiles.x, tiles.y, unsigned(plan.out_blocks));
  start(kernels.last, grid, threads, plan.shared_bytes, stream, follows, call.args);
  if (plan.splits > 1)
    start(kernels.add_splits, dim3(unsigned(add_blocks(shape))), kAddThreads, 0, stream, true,
          call.args);
} catch (const std::runtime_error& error) {
  throw std::runtime_error(std::string(error.what()) + "; " + text_of(plan) +
                           " (use backend='eager' to go on without this kernel)");
}

}  // namespace mnv2_fused::cuda
