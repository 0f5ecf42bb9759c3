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

namespace {

struct F64x8 {
  using T = double;
  using Half = F64x8;
  static constexpr int64_t kLanes = 8;
  static constexpr int kRegisters = 32;
  __m512d v;

  static MNV2_INLINE __mmask8 mask(int64_t n) { return __mmask8((1u << n) - 1); }
  static MNV2_INLINE F64x8 load(const T* p) { return {_mm512_loadu_pd(p)}; }
  static MNV2_INLINE F64x8 load_partial(const T* p, int64_t n) {
    return {_mm512_maskz_loadu_pd(mask(n), p)};
  }
  MNV2_INLINE void store(T* p) const { _mm512_storeu_pd(p, v); }
  MNV2_INLINE void store_partial(T* p, int64_t n) const { _mm512_mask_storeu_pd(p, mask(n), v); }
  static MNV2_INLINE F64x8 set1(T s) { return {_mm512_set1_pd(s)}; }
  static MNV2_INLINE F64x8 fma(F64x8 a, F64x8 b, F64x8 c) {
    return {_mm512_fmadd_pd(a.v, b.v, c.v)};
  }
  static MNV2_INLINE F64x8 add(F64x8 a, F64x8 b) { return {_mm512_add_pd(a.v, b.v)}; }
  static MNV2_INLINE F64x8 min(F64x8 a, F64x8 b) { return {_mm512_min_pd(a.v, b.v)}; }
  static MNV2_INLINE F64x8 max(F64x8 a, F64x8 b) { return {_mm512_max_pd(a.v, b.v)}; }
  static MNV2_INLINE F64x8 div(F64x8 a, F64x8 b) { return {_mm512_div_pd(a.v, b.v)}; }
  // 2^n from the sum of n and 1.5 * 2^(bits of the mantissa), in whose last bits n lies.
  static MNV2_INLINE F64x8 power_of_two(F64x8 bits) {
    const __m512i exponent = _mm512_slli_epi64(_mm512_castpd_si512(bits.v), 52);
    return {_mm512_castsi512_pd(_mm512_add_epi64(exponent, _mm512_set1_epi64(0x3ffll << 52)))};
  }
};

}  // namespace

#define V_KEEP "+v"
#include "kernel.h"
#include "peak.h"

constinit const Kernels<float> kF32 = kernels_of<F32x16, float>();
constinit const Kernels<double> kF64 = kernels_of<F64x8, double>();

}  // namespace mnv2_fused::cpu::avx512
#pragma GCC pop_options
#endif
