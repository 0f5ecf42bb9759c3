// Vectors in AVX2 registers. Included like kernel.h.
#pragma once

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
  static MNV2_INLINE F32x8 reciprocal(F32x8 a) { return div(set1(1), a); }
  // x where low < v < high or v is NaN, else 0.
  static MNV2_INLINE F32x8 where_between(F32x8 v, F32x8 low, F32x8 high, F32x8 x) {
    const auto outside =
        _mm256_or_ps(_mm256_cmp_ps(v.v, low.v, _CMP_LE_OQ), _mm256_cmp_ps(v.v, high.v, _CMP_GE_OQ));
    return {_mm256_andnot_ps(outside, x.v)};
  }
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
  static MNV2_INLINE F64x4 reciprocal(F64x4 a) { return div(set1(1), a); }
  // x where low < v < high or v is NaN, else 0.
  static MNV2_INLINE F64x4 where_between(F64x4 v, F64x4 low, F64x4 high, F64x4 x) {
    const auto outside =
        _mm256_or_pd(_mm256_cmp_pd(v.v, low.v, _CMP_LE_OQ), _mm256_cmp_pd(v.v, high.v, _CMP_GE_OQ));
    return {_mm256_andnot_pd(outside, x.v)};
  }
  // 2^n from the sum of n and 1.5 * 2^(bits of the mantissa), in whose last bits n lies.
  static MNV2_INLINE F64x4 power_of_two(F64x4 bits) {
    const __m256i exponent = _mm256_slli_epi64(_mm256_castpd_si256(bits.v), 52);
    return {_mm256_castsi256_pd(_mm256_add_epi64(exponent, _mm256_set1_epi64x(0x3ffll << 52)))};
  }
};

}  // namespace
