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
#include "avx2_vectors.h"

namespace {

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
