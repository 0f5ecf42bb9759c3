// Training on AVX-512 (F, VL): 32 registers.
#if defined(__x86_64__)
// GCC 12 warns inside its own header: its "undefined" vectors are read before being written.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "args.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512vl,avx512bw,avx512dq,prefer-vector-width=512")
#define MNV2_INLINE inline __attribute__((always_inline))

namespace mnv2_fused::cpu::training::avx512 {
#include "../avx512_vectors.h"
#include "kernel.h"

constinit const AllKernels kKernels{training_kernels_of<F32x16>(), training_kernels_of<F64x8>()};

}  // namespace mnv2_fused::cpu::training::avx512
#pragma GCC pop_options
#endif
