// 16-byte vectors of 64-bit Arm, for what includes it inside a namespace of its own, after <arm_neon.h>.
#pragma once

namespace {

// p[0], ..., p[n - 1], then zeros.
template <class T, int64_t kLanes>
struct Partial {
  T lanes[kLanes]{};

  MNV2_INLINE Partial(const T* p, int64_t n) {
    for (int64_t i = 0; i < kLanes; ++i)
      if (i < n) lanes[i] = p[i];
  }
};
template <class T, int64_t kLanes>
MNV2_INLINE void copy_partial(const T (&lanes)[kLanes], T* p, int64_t n) {
  for (int64_t i = 0; i < kLanes; ++i)
    if (i < n) p[i] = lanes[i];
}

struct F32x4 {
  using T = float;
  using Half = F32x4;
  static constexpr int64_t kLanes = 4;
  static constexpr int kRegisters = 32;
  float32x4_t v;

  static MNV2_INLINE F32x4 load(const T* p) { return {vld1q_f32(p)}; }
  static MNV2_INLINE F32x4 load_partial(const T* p, int64_t n) {
    return load(Partial<T, kLanes>(p, n).lanes);
  }
  MNV2_INLINE void store(T* p) const { vst1q_f32(p, v); }
  MNV2_INLINE void store_partial(T* p, int64_t n) const {
    T lanes[kLanes];
    store(lanes);
    copy_partial(lanes, p, n);
  }
  static MNV2_INLINE F32x4 set1(T s) { return {vdupq_n_f32(s)}; }
  static MNV2_INLINE F32x4 fma(F32x4 a, F32x4 b, F32x4 c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
  static MNV2_INLINE F32x4 add(F32x4 a, F32x4 b) { return {vaddq_f32(a.v, b.v)}; }
  // NaN where either is one.
  static MNV2_INLINE F32x4 min(F32x4 a, F32x4 b) { return {vminq_f32(a.v, b.v)}; }
  static MNV2_INLINE F32x4 max(F32x4 a, F32x4 b) { return {vmaxq_f32(a.v, b.v)}; }
  static MNV2_INLINE F32x4 div(F32x4 a, F32x4 b) { return {vdivq_f32(a.v, b.v)}; }
  static MNV2_INLINE F32x4 reciprocal(F32x4 a) { return div(set1(1), a); }
  // x where low < v < high or v is NaN, else 0.
  static MNV2_INLINE F32x4 where_between(F32x4 v, F32x4 low, F32x4 high, F32x4 x) {
    const auto outside = vorrq_u32(vcleq_f32(v.v, low.v), vcgeq_f32(v.v, high.v));
    return {vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(x.v), outside))};
  }
  // 2^n from the sum of n and 1.5 * 2^(bits of the mantissa), in whose last bits n lies.
  static MNV2_INLINE F32x4 power_of_two(F32x4 bits) {
    const uint32x4_t exponent = vshlq_n_u32(vreinterpretq_u32_f32(bits.v), 23);
    return {vreinterpretq_f32_u32(vaddq_u32(exponent, vdupq_n_u32(0x3f800000)))};
  }
};

struct F64x2 {
  using T = double;
  using Half = F64x2;
  static constexpr int64_t kLanes = 2;
  static constexpr int kRegisters = 32;
  float64x2_t v;

  static MNV2_INLINE F64x2 load(const T* p) { return {vld1q_f64(p)}; }
  static MNV2_INLINE F64x2 load_partial(const T* p, int64_t n) {
    return load(Partial<T, kLanes>(p, n).lanes);
  }
  MNV2_INLINE void store(T* p) const { vst1q_f64(p, v); }
  MNV2_INLINE void store_partial(T* p, int64_t n) const {
    T lanes[kLanes];
    store(lanes);
    copy_partial(lanes, p, n);
  }
  static MNV2_INLINE F64x2 set1(T s) { return {vdupq_n_f64(s)}; }
  static MNV2_INLINE F64x2 fma(F64x2 a, F64x2 b, F64x2 c) { return {vfmaq_f64(c.v, a.v, b.v)}; }
  static MNV2_INLINE F64x2 add(F64x2 a, F64x2 b) { return {vaddq_f64(a.v, b.v)}; }
  static MNV2_INLINE F64x2 min(F64x2 a, F64x2 b) { return {vminq_f64(a.v, b.v)}; }
  static MNV2_INLINE F64x2 max(F64x2 a, F64x2 b) { return {vmaxq_f64(a.v, b.v)}; }
  static MNV2_INLINE F64x2 div(F64x2 a, F64x2 b) { return {vdivq_f64(a.v, b.v)}; }
  static MNV2_INLINE F64x2 reciprocal(F64x2 a) { return div(set1(1), a); }
  // x where low < v < high or v is NaN, else 0.
  static MNV2_INLINE F64x2 where_between(F64x2 v, F64x2 low, F64x2 high, F64x2 x) {
    const auto outside = vorrq_u64(vcleq_f64(v.v, low.v), vcgeq_f64(v.v, high.v));
    return {vreinterpretq_f64_u64(vbicq_u64(vreinterpretq_u64_f64(x.v), outside))};
  }
  static MNV2_INLINE F64x2 power_of_two(F64x2 bits) {
    const uint64x2_t exponent = vshlq_n_u64(vreinterpretq_u64_f64(bits.v), 52);
    return {vreinterpretq_f64_u64(vaddq_u64(exponent, vdupq_n_u64(0x3ffull << 52)))};
  }
};

// Neighbouring elements, one a lane.
struct WideBFloat16 {
  static constexpr int64_t kLanes = F32x4::kLanes;

  static MNV2_INLINE F32x4 load(const BFloat16* p) {
    uint16x4_t bits;
    std::memcpy(&bits, p, sizeof(bits));
    return {vreinterpretq_f32_u32(vshll_n_u16(bits, 16))};
  }
  static MNV2_INLINE F32x4 load_partial(const BFloat16* p, int64_t n) {
    return load(Partial<BFloat16, kLanes>(p, n).lanes);
  }
};

}  // namespace
