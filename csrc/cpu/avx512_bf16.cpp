// The kernel for bfloat16 on AVX-512 with its dot products of pairs.
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
#pragma GCC target("avx2,fma,avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,prefer-vector-width=512")
#define MNV2_INLINE inline __attribute__((always_inline))

namespace mnv2_fused::cpu::avx512_bf16 {

#include "avx512_vectors.h"

namespace {

template <class V>
struct Bf16;

template <>
struct Bf16<F32x16> {
  static constexpr int kParts = 1;

  static MNV2_INLINE F32x16 widen(__m256i bits) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  static MNV2_INLINE __m256i narrow(F32x16 v) { return (__m256i)_mm512_cvtneps_pbh(v.v); }
  static MNV2_INLINE F32x16 load(const BFloat16* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static MNV2_INLINE F32x16 load_partial(const BFloat16* p, int64_t n) {
    return widen(_mm256_maskz_loadu_epi16(F32x16::mask(n), p));
  }
  static MNV2_INLINE void store(F32x16 v, BFloat16* p) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v));
  }
  static MNV2_INLINE void store_partial(F32x16 v, BFloat16* p, int64_t n) {
    _mm256_mask_storeu_epi16(p, F32x16::mask(n), narrow(v));
  }
  template <int>
  static MNV2_INLINE __m512bh value(const BFloat16* p) {
    int pair;
    std::memcpy(&pair, p, sizeof(pair));
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  template <int>
  static MNV2_INLINE __m512bh weights(const BFloat16* p) {
    return (__m512bh)_mm512_loadu_si512(p);
  }
  static MNV2_INLINE F32x16 multiply_add(__m512bh value, __m512bh weights, F32x16 sum) {
    return {_mm512_dpbf16_ps(sum.v, value, weights)};
  }
};

template <>
struct Bf16<F32x8> {
  static constexpr int kParts = 1;

  static MNV2_INLINE F32x8 widen(__m128i bits) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  static MNV2_INLINE __m128i narrow(F32x8 v) { return (__m128i)_mm256_cvtneps_pbh(v.v); }
  static MNV2_INLINE F32x8 load(const BFloat16* p) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static MNV2_INLINE F32x8 load_partial(const BFloat16* p, int64_t n) {
    return widen(_mm_maskz_loadu_epi16(F32x8::mask(n), p));
  }
  static MNV2_INLINE void store(F32x8 v, BFloat16* p) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v));
  }
  static MNV2_INLINE void store_partial(F32x8 v, BFloat16* p, int64_t n) {
    _mm_mask_storeu_epi16(p, F32x8::mask(n), narrow(v));
  }
  template <int>
  static MNV2_INLINE __m256bh value(const BFloat16* p) {
    int pair;
    std::memcpy(&pair, p, sizeof(pair));
    return (__m256bh)_mm256_set1_epi32(pair);
  }
  template <int>
  static MNV2_INLINE __m256bh weights(const BFloat16* p) {
    return (__m256bh)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static MNV2_INLINE F32x8 multiply_add(__m256bh value, __m256bh weights, F32x8 sum) {
    return {_mm256_dpbf16_ps(sum.v, value, weights)};
  }
};

}  // namespace

#define MNV2_BFLOAT16
#define V_KEEP "+v"
#include "kernel.h"
#include "peak.h"

constinit const Kernels<BFloat16> kBf16 = kernels_of<F32x16, BFloat16>();

}  // namespace mnv2_fused::cpu::avx512_bf16
#pragma GCC pop_options
#endif
