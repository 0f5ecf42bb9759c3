// Training on 64-bit Arm: 32 registers of 16 bytes.
#include "../isa.h"

#ifdef MNV2_NEON
#include <arm_neon.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "args.h"

#define MNV2_INLINE inline __attribute__((always_inline))

namespace mnv2_fused::cpu::training::neon {
#include "../neon_vectors.h"
#include "kernel.h"

constinit const AllKernels kKernels{training_kernels_of<F32x4>(), training_kernels_of<F64x2>()};

}  // namespace mnv2_fused::cpu::training::neon
#endif
