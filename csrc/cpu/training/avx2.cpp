// Training on AVX2 + FMA: 16 registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "args.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define MNV2_INLINE inline __attribute__((always_inline))

namespace mnv2_fused::cpu::training::avx2 {
#include "../avx2_vectors.h"
#include "kernel.h"

constinit const AllKernels kKernels{training_kernels_of<F32x8>(), training_kernels_of<F64x4>()};

}  // namespace mnv2_fused::cpu::training::avx2
#pragma GCC pop_options
#endif
