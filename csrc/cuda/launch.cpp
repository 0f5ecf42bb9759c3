// From the precision a call asks for to the one its kernel is compiled for.
#include "launch.h"

#include <atomic>

namespace mnv2_fused::cuda {
namespace {

std::atomic<bool> g_early_starts{true};

}  // namespace

bool early_starts() { return g_early_starts.load(std::memory_order_relaxed); }
void allow_early_starts(bool allowed) { g_early_starts.store(allowed, std::memory_order_relaxed); }

void launch(Precision precision, const BlockShape& shape, const Plan& plan, const Call& call,
            void* stream) {
  switch (precision) {
    case Precision::kHalf:
      return launch_as<Precision::kHalf>(shape, plan, call, stream);
    case Precision::kBFloat16:
      return launch_as<Precision::kBFloat16>(shape, plan, call, stream);
    case Precision::kTf32:
      return launch_as<Precision::kTf32>(shape, plan, call, stream);
    case Precision::kFloat32:
      return launch_as<Precision::kFloat32>(shape, plan, call, stream);
  }
}

}  // namespace mnv2_fused::cuda
