// Four sums in a register of 128 bits, for 64-bit Arm with dot products of bytes. Included behind the
// target's pragma.
#pragma once

#include <cstdint>
#include <cstring>

#include "args.h"

namespace {

// Dots::dot adds four products to a lane, Dots::Bytes are its activations: uint8, or int8 where no instruction
// multiplies both kinds. Then they are less 128, and 128 times a quad of weights is added.
template <class Dots>
struct I32x4 {
  static constexpr bool kMixed = std::is_same_v<typename Dots::Bytes, uint8x16_t>;
  using T = int32_t;
  using In = uint8_t;
  using Half = I32x4;
  static constexpr int64_t kLanes = 4;
  static constexpr int kRegisters = 32;
  int32x4_t v;

  // Four bytes in a lane.
  struct Value {
    typename Dots::Bytes v;
  };
  struct Weights {
    int8x16_t v;
    int32x4_t times_128;
  };

  struct F {
    float32x4_t v;
    static MNV2_INLINE F load(const float* p) { return {vld1q_f32(p)}; }
    static MNV2_INLINE F set1(float s) { return {vdupq_n_f32(s)}; }
    // Kept apart from an addition behind it: fused, both would round once.
    static MNV2_INLINE F mul(F a, F b) {
      F product{vmulq_f32(a.v, b.v)};
      asm("" : "+w"(product.v));
      return product;
    }
    static MNV2_INLINE F add(F a, F b) { return {vaddq_f32(a.v, b.v)}; }
    static MNV2_INLINE F sub(F a, F b) { return {vsubq_f32(a.v, b.v)}; }
    static MNV2_INLINE F div(F a, F b) { return {vdivq_f32(a.v, b.v)}; }
    static MNV2_INLINE F neg(F a) { return {vnegq_f32(a.v)}; }
    // b where a is NaN.
    static MNV2_INLINE F max(F a, F b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
    static MNV2_INLINE F min(F a, F b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
    static MNV2_INLINE I32x4 round(F a) { return {vcvtnq_s32_f32(a.v)}; }
    MNV2_INLINE void store(float* p, int64_t n) const {
      float lanes[kLanes];
      vst1q_f32(n < kLanes ? lanes : p, v);
      if (n < kLanes) std::memcpy(p, lanes, size_t(n) * sizeof(float));
    }
  };

  static MNV2_INLINE I32x4 load(const T* p) { return {vld1q_s32(p)}; }
  MNV2_INLINE void store(T* p) const { vst1q_s32(p, v); }
  static MNV2_INLINE I32x4 set1(T s) { return {vdupq_n_s32(s)}; }
  static MNV2_INLINE I32x4 add(I32x4 a, I32x4 b) { return {vaddq_s32(a.v, b.v)}; }
  static MNV2_INLINE I32x4 dot(I32x4 sum, Value a, Weights b) {
    if constexpr (!kMixed) sum.v = vaddq_s32(sum.v, b.times_128);
    return {Dots::dot(sum.v, a.v, b.v)};
  }
  static MNV2_INLINE Weights weights(const int8_t* p) {
    Weights w{vld1q_s8(p), {}};
    if constexpr (!kMixed)
      w.times_128 = vshlq_n_s32(Dots::dot(vdupq_n_s32(0), vdupq_n_s8(64), w.v), 1);
    return w;
  }
  static MNV2_INLINE Value value_of(uint8x16_t bytes) {
    if constexpr (kMixed)
      return {bytes};
    else
      return {vreinterpretq_s8_u8(veorq_u8(bytes, vdupq_n_u8(128)))};
  }
  static MNV2_INLINE Value value(const T* p) {
    return value_of(vreinterpretq_u8_s32(vld1q_s32(p)));
  }
  static MNV2_INLINE Value broadcast(const In* p) {
    int32_t quad;
    std::memcpy(&quad, p, sizeof(quad));
    return value_of(vreinterpretq_u8_s32(vdupq_n_s32(quad)));
  }
  // Of the peak meter: the compiler forgets what it knows of a value.
  static MNV2_INLINE void hide(Value& a) { asm volatile("" : "+w"(a.v)); }

  // Two pixels of 4 channels in 16 bits.
  struct Pair {
    int16x8_t v;
    static MNV2_INLINE Pair set1(int16_t s) { return {vdupq_n_s16(s)}; }
    static MNV2_INLINE Pair add(Pair a, Pair b) { return {vqaddq_s16(a.v, b.v)}; }
  };
  static MNV2_INLINE Pair pair(I32x4 a, I32x4 b) { return {vqmovn_high_s32(vqmovn_s32(a.v), b.v)}; }
  // Four pixels of 4 channels.
  static MNV2_INLINE uint8x16_t bytes(Pair a, Pair b) {
    return vqmovun_high_s16(vqmovun_s16(a.v), b.v);
  }
  static MNV2_INLINE I32x4 quads(Pair a, Pair b) {
    constexpr uint8_t kByChannel[] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    return {vreinterpretq_s32_u8(vqtbl1q_u8(bytes(a, b), vld1q_u8(kByChannel)))};
  }
  static MNV2_INLINE void store_pixels(Pair a, Pair b, In* p) {
    const uint32x4_t pixels = vreinterpretq_u32_u8(bytes(a, b));
    const uint32_t each[] = {vgetq_lane_u32(pixels, 0), vgetq_lane_u32(pixels, 1),
                             vgetq_lane_u32(pixels, 2), vgetq_lane_u32(pixels, 3)};
    for (int i = 0; i < 4; ++i) std::memcpy(p + i * kPanel, &each[i], sizeof(each[i]));
  }
  static MNV2_INLINE F to_float(I32x4 a) { return {vcvtq_f32_s32(a.v)}; }
  static MNV2_INLINE F power_of_two(I32x4 n) {
    return {vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n.v, vdupq_n_s32(127)), 23))};
  }
  MNV2_INLINE void narrow(In* p) const { store_bytes(p, kLanes); }
  static MNV2_INLINE I32x4 load_in(const In* p) { return load_bytes(p, kLanes); }
  MNV2_INLINE void store_bytes(uint8_t* p, int64_t n) const {
    const uint16x4_t words = vqmovun_s32(v);
    const uint8x8_t bytes = vqmovn_u16(vcombine_u16(words, words));
    const uint32_t all = vget_lane_u32(vreinterpret_u32_u8(bytes), 0);
    std::memcpy(p, &all, size_t(n < kLanes ? n : kLanes));
  }
  static MNV2_INLINE I32x4 load_bytes(const uint8_t* p, int64_t n) {
    uint32_t all = 0;
    std::memcpy(&all, p, size_t(n < kLanes ? n : kLanes));
    const uint16x8_t words = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(all)));
    return {vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(words)))};
  }
  // kPanel bytes.
  static MNV2_INLINE void widen(const uint8_t* x, In* out) { std::memcpy(out, x, kPanel); }
};

}  // namespace
