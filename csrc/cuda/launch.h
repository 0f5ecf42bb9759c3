// Launch of the kernels of one block. No CUDA headers.
#pragma once

#include "call.h"
#include "plan.h"

namespace mnv2_fused::cuda {

// Entry points of kernels that take Args, as cudaLaunchKernelExC wants them; null where none is compiled.
struct BlockKernels {
  const void* pool;  // first pass of a squeeze-and-excite
  const void* last;
  const void* add_splits;
};
// Defined in kernels_<precision>.cu, one translation unit each.
template <Precision kPrecision>
BlockKernels kernels_of(const BlockShape& shape, const Plan& plan);
// The kernel that takes SqueezeProductArgs, in kernels_squeeze.cu.
const void* squeeze_product();

// Whether a kernel may start while the one before it ends (programmatic dependent launch); true unless
// set otherwise.
void allow_early_starts(bool allowed);

// Runs the plan on a stream (a cudaStream_t) of the current device. Throws std::runtime_error with
// CUDA's words and the plan.
void launch(Precision precision, const BlockShape& shape, const Plan& plan, const Call& call,
            void* stream);

}  // namespace mnv2_fused::cuda
