// The kernel for AVX2 + FMA: 16 registers of 8 floats.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "isa.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define MNV2_INLINE inline __attribute__((always_inline))

namespace mnv2_fused::cpu::avx2 {
namespace {

struct F32x8 {
  using T = float;
  using Half = F32x8;
  static constexpr int64_t kLanes = 8;
  static constexpr int kRegisters = 16;
  __m256 v;

  static MNV2_INLINE __m256i mask(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static MNV2_INLINE F32x8 load(const T* p) { return {_mm256_loadu_ps(p)}; }
  static MNV2_INLINE F32x8 load_partial(const T* p, int64_t n) {
    return {_mm256_maskload_ps(p, mask(n))};
  }
  MNV2_INLINE void store(T* p) const { _mm256_storeu_ps(p, v); }
  MNV2_INLINE void store_partial(T* p, int64_t n) const { _mm256_maskstore_ps(p, mask(n), v); }
  static MNV2_INLINE F32x8 set1(T s) { return {_mm256_set1_ps(s)}; }
  static MNV2_INLINE F32x8 fma(F32x8 a, F32x8 b, F32x8 c) {
    return {_mm256_fmadd_ps(a.v, b.v, c.v)};
  }
  static MNV2_INLINE F32x8 add(F32x8 a, F32x8 b) { return {_mm256_add_ps(a.v, b.v)}; }
  static MNV2_INLINE F32x8 min(F32x8 a, F32x8 b) { return {_mm256_min_ps(a.v, b.v)}; }
  static MNV2_INLINE F32x8 max(F32x8 a, F32x8 b) { return {_mm256_max_ps(a.v, b.v)}; }
};

struct F64x4 {
  using T = double;
  using Half = F64x4;
  static constexpr int64_t kLanes = 4;
  static constexpr int kRegisters = 16;
  __m256d v;

  static MNV2_INLINE __m256i mask(int64_t n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
  }
  static MNV2_INLINE F64x4 load(const T* p) { return {_mm256_loadu_pd(p)}; }
  static MNV2_INLINE F64x4 load_partial(const T* p, int64_t n) {
    return {_mm256_maskload_pd(p, mask(n))};
  }
  MNV2_INLINE void store(T* p) const { _mm256_storeu_pd(p, v); }
  MNV2_INLINE void store_partial(T* p, int64_t n) const { _mm256_maskstore_pd(p, mask(n), v); }
  static MNV2_INLINE F64x4 set1(T s) { return {_mm256_set1_pd(s)}; }
  static MNV2_INLINE F64x4 fma(F64x4 a, F64x4 b, F64x4 c) {
    return {_mm256_fmadd_pd(a.v, b.v, c.v)};
  }
  static MNV2_INLINE F64x4 add(F64x4 a, F64x4 b) { return {_mm256_add_pd(a.v, b.v)}; }
  static MNV2_INLINE F64x4 min(F64x4 a, F64x4 b) { return {_mm256_min_pd(a.v, b.v)}; }
  static MNV2_INLINE F64x4 max(F64x4 a, F64x4 b) { return {_mm256_max_pd(a.v, b.v)}; }
};

}  // namespace

#define V_KEEP "+x"
#include "kernel.h"
#include "peak.h"

}  // namespace mnv2_fused::cpu::avx2
#pragma GCC pop_options

namespace mnv2_fused::cpu {

const Isa kAvx2{
    "avx2",
    32,
    [] { return bool(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")); },
    {&avx2::run_tile<avx2::F32x8>, &avx2::add_row<avx2::F32x8>, &avx2::run_pointwise<avx2::F32x8>},
    {&avx2::run_tile<avx2::F64x4>, &avx2::add_row<avx2::F64x4>, &avx2::run_pointwise<avx2::F64x4>},
    &avx2::multiply_add<avx2::F32x8>,
    2 * 8 * avx2::kChains,
};

}  // namespace mnv2_fused::cpu
#endif
