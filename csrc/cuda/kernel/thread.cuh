// Position of a thread in its block, and small integer functions.
#pragma once

#ifdef __CUDACC__
#include "device.cuh"
#else
#include "emulated_device.h"
#endif

namespace mnv2_fused::cuda {

MNV2_DEVICE int thread_count() { return blockDim.x; }
MNV2_DEVICE int warp_count() { return thread_count() / 32; }
MNV2_DEVICE int warp_index() { return int(threadIdx.x) / 32; }
MNV2_DEVICE int lane_index() { return threadIdx.x % 32; }

MNV2_DEVICE int min(int a, int b) { return a < b ? a : b; }
MNV2_DEVICE int max(int a, int b) { return a > b ? a : b; }

}  // namespace mnv2_fused::cuda
