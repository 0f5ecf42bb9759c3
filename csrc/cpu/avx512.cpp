// The kernel for AVX-512 (F, VL): 32 registers of 16 floats.
#if defined(__x86_64__)
// GCC 12 warns inside its own header: its "undefined" vectors are read before being written.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "isa.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512vl,avx512bw,avx512dq,prefer-vector-width=512")
#define MNV2_INLINE inline __attribute__((always_inline))

namespace mnv2_fused::cpu::avx512 {
#include "avx512_vectors.h"

#define V_KEEP "+v"
#include "kernel.h"
#include "peak.h"

constinit const Kernels<float> kF32 = kernels_of<F32x16, float>();
constinit const Kernels<double> kF64 = kernels_of<F64x8, double>();

}  // namespace mnv2_fused::cpu::avx512
#pragma GCC pop_options
#endif
