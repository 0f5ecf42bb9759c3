#include "kernel/squeeze.cuh"
#include "launch.h"

namespace mnv2_fused::cuda {

const void* squeeze_product() { return reinterpret_cast<const void*>(squeeze_product_kernel); }

}  // namespace mnv2_fused::cuda
