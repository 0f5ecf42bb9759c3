#include "launch.cuh"

namespace mnv2_fused::cuda {
template void launch_as<Precision::kHalf>(const BlockShape&, const Plan&, const Call&, void*);
}  // namespace mnv2_fused::cuda
