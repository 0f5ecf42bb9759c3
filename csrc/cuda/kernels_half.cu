#include "kernels_of.cuh"

namespace mnv2_fused::cuda {
template BlockKernels kernels_of<Precision::kHalf>(const BlockShape&, const Plan&);
}  // namespace mnv2_fused::cuda
