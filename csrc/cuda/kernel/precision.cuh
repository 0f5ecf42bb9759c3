// Traits of a precision: storage of activations, four channels at a time, and their conversions.
#pragma once

#include "../precision.h"
#include "thread.cuh"

namespace mnv2_fused::cuda {

// Element: one channel of one pixel. Quad: four neighbouring channels, one load of a lane.
template <Precision kPrecision>
struct PrecisionTraits;

// Four-byte elements: TF32 rounds operands only inside a product.
struct FloatTraits {
  using Element = float;
  using Quad = uint4;
  static MNV2_DEVICE float4 widen(Quad q) {
    return {float_of(q.x), float_of(q.y), float_of(q.z), float_of(q.w)};
  }
  static MNV2_DEVICE Quad narrow(float4 v) {
    return {bits_of(v.x), bits_of(v.y), bits_of(v.z), bits_of(v.w)};
  }
  static MNV2_DEVICE Quad narrow_relu6(float4 v) {
    return narrow({relu6(v.x), relu6(v.y), relu6(v.z), relu6(v.w)});
  }
  static MNV2_DEVICE float widen(Element v) { return v; }
  static MNV2_DEVICE Element narrow(float v) { return v; }
  static MNV2_DEVICE Quad quad(const Element (&v)[4]) {
    return {bits_of(v[0]), bits_of(v[1]), bits_of(v[2]), bits_of(v[3])};
  }
};
template <>
struct PrecisionTraits<Precision::kTf32> : FloatTraits {};
template <>
struct PrecisionTraits<Precision::kFloat32> : FloatTraits {};

// Two-byte elements, two to a register. Pair: conversions and products of one type.
template <class Pair>
struct PairTraits : Pair {
  using Element = uint16_t;
  using Quad = uint2;
  static MNV2_DEVICE float4 widen(Quad q) {
    const float2 a = Pair::unpack(q.x), b = Pair::unpack(q.y);
    return {a.x, a.y, b.x, b.y};
  }
  static MNV2_DEVICE Quad narrow(float4 v) { return {Pair::pack(v.x, v.y), Pair::pack(v.z, v.w)}; }
  static MNV2_DEVICE Quad narrow_relu6(float4 v) {
    return {Pair::pack_relu6(v.x, v.y), Pair::pack_relu6(v.z, v.w)};
  }
  static MNV2_DEVICE float widen(Element v) { return Pair::unpack(v).x; }
  static MNV2_DEVICE Element narrow(float v) { return Element(Pair::pack(v, 0)); }
  static MNV2_DEVICE Quad quad(const Element (&v)[4]) {
    return {v[0] | uint32_t(v[1]) << 16, v[2] | uint32_t(v[3]) << 16};
  }
  // Whether a number of a pair is infinite or NaN.
  static MNV2_DEVICE bool is_infinite(uint32_t pair) {
    constexpr uint32_t kLow = Pair::kExponent, kHigh = kLow << 16;
    return (pair & kLow) == kLow || (pair & kHigh) == kHigh;
  }
};

struct HalfPair {
  static constexpr uint32_t kExponent = 0x7c00;
  static MNV2_DEVICE float2 unpack(uint32_t v) { return unpack_half(v); }
  static MNV2_DEVICE uint32_t pack(float low, float high) { return pack_half(low, high); }
  static MNV2_DEVICE uint32_t pack_relu6(float low, float high) {
    return pack_relu6_half(low, high);
  }
  static MNV2_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_half(c, a, b0, b1);
  }
  static MNV2_DEVICE void mma_8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    mma_half_8(c, a0, a1, b);
  }
};
template <>
struct PrecisionTraits<Precision::kHalf> : PairTraits<HalfPair> {};

struct BFloat16Pair {
  static constexpr uint32_t kExponent = 0x7f80;
  static MNV2_DEVICE float2 unpack(uint32_t v) { return unpack_bfloat16(v); }
  static MNV2_DEVICE uint32_t pack(float low, float high) { return pack_bfloat16(low, high); }
  static MNV2_DEVICE uint32_t pack_relu6(float low, float high) {
    return pack_relu6_bfloat16(low, high);
  }
  static MNV2_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_bfloat16(c, a, b0, b1);
  }
  static MNV2_DEVICE void mma_8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    mma_bfloat16_8(c, a0, a1, b);
  }
};
template <>
struct PrecisionTraits<Precision::kBFloat16> : PairTraits<BFloat16Pair> {};

}  // namespace mnv2_fused::cuda
