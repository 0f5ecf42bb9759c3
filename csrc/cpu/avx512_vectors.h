// Vectors in AVX-512 registers. Included like kernel.h.
#pragma once

namespace {

struct F32x8 {
  using T = float;
  using Half = F32x8;
  static constexpr int64_t kLanes = 8;
  static constexpr int kRegisters = 32;
  __m256 v;

  static MNV2_INLINE __mmask8 mask(int64_t n) { return __mmask8((1u << n) - 1); }
  static MNV2_INLINE F32x8 load(const T* p) { return {_mm256_loadu_ps(p)}; }
  static MNV2_INLINE F32x8 load_partial(const T* p, int64_t n) {
    return {_mm256_maskz_loadu_ps(mask(n), p)};
  }
  MNV2_INLINE void store(T* p) const { _mm256_storeu_ps(p, v); }
  MNV2_INLINE void store_partial(T* p, int64_t n) const { _mm256_mask_storeu_ps(p, mask(n), v); }
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
    const __mmask8 outside = __mmask8(_mm256_cmp_ps_mask(v.v, low.v, _CMP_LE_OQ) |
                                      _mm256_cmp_ps_mask(v.v, high.v, _CMP_GE_OQ));
    return {_mm256_maskz_mov_ps(__mmask8(~outside), x.v)};
  }
  // 2^n from the sum of n and 1.5 * 2^(bits of the mantissa), in whose last bits n lies.
  static MNV2_INLINE F32x8 power_of_two(F32x8 bits) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(bits.v), 23);
    return {_mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f800000)))};
  }
};

struct F32x16 {
  using T = float;
  using Half = F32x8;
  static constexpr int64_t kLanes = 16;
  static constexpr int kRegisters = 32;
  __m512 v;

  static MNV2_INLINE __mmask16 mask(int64_t n) { return __mmask16((1u << n) - 1); }
  static MNV2_INLINE F32x16 load(const T* p) { return {_mm512_loadu_ps(p)}; }
  static MNV2_INLINE F32x16 load_partial(const T* p, int64_t n) {
    return {_mm512_maskz_loadu_ps(mask(n), p)};
  }
  MNV2_INLINE void store(T* p) const { _mm512_storeu_ps(p, v); }
  MNV2_INLINE void store_partial(T* p, int64_t n) const { _mm512_mask_storeu_ps(p, mask(n), v); }
  static MNV2_INLINE F32x16 set1(T s) { return {_mm512_set1_ps(s)}; }
  static MNV2_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
  }
  static MNV2_INLINE F32x16 add(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
  static MNV2_INLINE F32x16 min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
  static MNV2_INLINE F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
  static MNV2_INLINE F32x16 div(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
  // Of a finite number, to a unit in the last place or two: a division takes four times as long.
  static MNV2_INLINE F32x16 reciprocal(F32x16 a) {
    const __m512 near = _mm512_rcp14_ps(a.v);
    const __m512 off = _mm512_fnmadd_ps(a.v, near, _mm512_set1_ps(1));
    return {_mm512_fmadd_ps(near, off, near)};
  }
  // x where low < v < high or v is NaN, else 0.
  static MNV2_INLINE F32x16 where_between(F32x16 v, F32x16 low, F32x16 high, F32x16 x) {
    const __mmask16 outside = __mmask16(_mm512_cmp_ps_mask(v.v, low.v, _CMP_LE_OQ) |
                                        _mm512_cmp_ps_mask(v.v, high.v, _CMP_GE_OQ));
    return {_mm512_maskz_mov_ps(__mmask16(~outside), x.v)};
  }
  // 2^n from the sum of n and 1.5 * 2^(bits of the mantissa), in whose last bits n lies.
  static MNV2_INLINE F32x16 power_of_two(F32x16 bits) {
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(bits.v), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(0x3f800000)))};
  }
};

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
  static MNV2_INLINE F64x8 reciprocal(F64x8 a) { return div(set1(1), a); }
  // x where low < v < high or v is NaN, else 0.
  static MNV2_INLINE F64x8 where_between(F64x8 v, F64x8 low, F64x8 high, F64x8 x) {
    const __mmask8 outside = __mmask8(_mm512_cmp_pd_mask(v.v, low.v, _CMP_LE_OQ) |
                                      _mm512_cmp_pd_mask(v.v, high.v, _CMP_GE_OQ));
    return {_mm512_maskz_mov_pd(__mmask8(~outside), x.v)};
  }
  // 2^n from the sum of n and 1.5 * 2^(bits of the mantissa), in whose last bits n lies.
  static MNV2_INLINE F64x8 power_of_two(F64x8 bits) {
    const __m512i exponent = _mm512_slli_epi64(_mm512_castpd_si512(bits.v), 52);
    return {_mm512_castsi512_pd(_mm512_add_epi64(exponent, _mm512_set1_epi64(0x3ffll << 52)))};
  }
};

}  // namespace
