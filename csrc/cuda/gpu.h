// Limits and rates of the GPUs of this machine.
#pragma once

#include "plan.h"

namespace mnv2_fused::cuda {

// Read once per device.
const Gpu& gpu_at(int device);

}  // namespace mnv2_fused::cuda
