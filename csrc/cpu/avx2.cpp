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
  // By parts: a masked store takes a Zen core more than ten cycles.
  MNV2_INLINE void store_partial(T* p, int64_t n) const {
    __m128 rest = _mm256_castps256_ps128(v);
    if (n & 4) {
      _mm_storeu_ps(p, rest);
      rest = _mm256_extractf128_ps(v, 1);
      p += 4;
    }
    if (n & 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), rest);
      rest = _mm_movehl_ps(rest, rest);
      p += 2;
    }
    if (n & 1) _mm_store_ss(p, rest);
  }
  static MNV2_INLINE F32x8 set1(T s) { return {_mm256_set1_ps(s)}; }
  static MNV2_INLINE F32x8 fma(F32x8 a, F32x8 b, F32x8 c) {
    return {_mm256_fmadd_ps(a.v, b.v, c.v)};
  }
  static MNV2_INLINE F32x8 add(F32x8 a, F32x8 b) { return {_mm256_add_ps(a.v, b.v)}; }
  static MNV2_INLINE F32x8 min(F32x8 a, F32x8 b) { return {_mm256_min_ps(a.v, b.v)}; }
  static MNV2_INLINE F32x8 max(F32x8 a, F32x8 b) { return {_mm256_max_ps(a.v, b.v)}; }
  static MNV2_INLINE F32x8 div(F32x8 a, F32x8 b) { return {_mm256_div_ps(a.v, b.v)}; }
  // 2^n from the sum of n and 1.5 * 2^(bits of the mantissa), in whose last bits n lies.
  static MNV2_INLINE F32x8 power_of_two(F32x8 bits) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(bits.v), 23);
    return {_mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f800000)))};
  }
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
  MNV2_INLINE void store_partial(T* p, int64_t n) const {
    __m128d rest = _mm256_castpd256_pd128(v);
    if (n & 2) {
      _mm_storeu_pd(p, rest);
      rest = _mm256_extractf128_pd(v, 1);
      p += 2;
    }
    if (n & 1) _mm_store_sd(p, rest);
  }
  static MNV2_INLINE F64x4 set1(T s) { return {_mm256_set1_pd(s)}; }
  static MNV2_INLINE F64x4 fma(F64x4 a, F64x4 b, F64x4 c) {
    return {_mm256_fmadd_pd(a.v, b.v, c.v)};
  }
  static MNV2_INLINE F64x4 add(F64x4 a, F64x4 b) { return {_mm256_add_pd(a.v, b.v)}; }
  static MNV2_INLINE F64x4 min(F64x4 a, F64x4 b) { return {_mm256_min_pd(a.v, b.v)}; }
  static MNV2_INLINE F64x4 max(F64x4 a, F64x4 b) { return {_mm256_max_pd(a.v, b.v)}; }
  static MNV2_INLINE F64x4 div(F64x4 a, F64x4 b) { return {_mm256_div_pd(a.v, b.v)}; }
  static MNV2_INLINE F64x4 power_of_two(F64x4 bits) {
    const __m256i exponent = _mm256_slli_epi64(_mm256_castpd_si256(bits.v), 52);
    return {_mm256_castsi256_pd(_mm256_add_epi64(exponent, _mm256_set1_epi64x(0x3ffll << 52)))};
  }
};

// Pairs of bfloat16, one product of a pair at a time: its low half is the first element.
template <class V>
struct Bf16;

template <>
struct Bf16<F32x8> {
  static constexpr int kParts = 2;

  static MNV2_INLINE F32x8 widen(__m128i bits) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  // To the nearest, ties to even; a NaN stays one.
  static MNV2_INLINE __m128i narrow(F32x8 v) {
    const __m256i bits = _mm256_castps_si256(v.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i nearest = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256 nan = _mm256_cmp_ps(v.v, v.v, _CMP_UNORD_Q);
    const __m256i chosen =
        _mm256_blendv_epi8(nearest, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(nan));
    return _mm_packus_epi32(_mm256_castsi256_si128(chosen), _mm256_extracti128_si256(chosen, 1));
  }
  static MNV2_INLINE F32x8 load(const BFloat16* p) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static MNV2_INLINE F32x8 load_partial(const BFloat16* p, int64_t n) {
    BFloat16 lanes[8]{};
    std::memcpy(lanes, p, size_t(n) * sizeof(BFloat16));
    return load(lanes);
  }
  static MNV2_INLINE void store(F32x8 v, BFloat16* p) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v));
  }
  static MNV2_INLINE void store_partial(F32x8 v, BFloat16* p, int64_t n) {
    BFloat16 lanes[8];
    store(v, lanes);
    std::memcpy(p, lanes, size_t(n) * sizeof(BFloat16));
  }
  template <int kPart>
  static MNV2_INLINE F32x8 half(__m256i pairs) {
    return {_mm256_castsi256_ps(kPart ? _mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000)))
                                      : _mm256_slli_epi32(pairs, 16))};
  }
  template <int kPart>
  static MNV2_INLINE F32x8 value(const BFloat16* p) {
    int pair;
    std::memcpy(&pair, p, sizeof(pair));
    return half<kPart>(_mm256_set1_epi32(pair));
  }
  template <int kPart>
  static MNV2_INLINE F32x8 weights(const BFloat16* p) {
    return half<kPart>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static MNV2_INLINE F32x8 multiply_add(F32x8 value, F32x8 weights, F32x8 sum) {
    return F32x8::fma(value, weights, sum);
  }
};

}  // namespace

#define MNV2_BFLOAT16
#define V_KEEP "+x"
#include "kernel.h"
#include "peak.h"

constinit const Kernels<float> kF32 = kernels_of<F32x8, float>();
constinit const Kernels<double> kF64 = kernels_of<F64x4, double>();
constinit const Kernels<BFloat16> kBf16 = kernels_of<F32x8, BFloat16>();

}  // namespace mnv2_fused::cpu::avx2
#pragma GCC pop_options
#endif
