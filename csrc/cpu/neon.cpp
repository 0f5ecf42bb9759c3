// The kernel for 64-bit Arm: 32 registers of 4 floats.
#include "isa.h"

#ifdef MNV2_NEON
#include <arm_neon.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#define MNV2_INLINE inline __attribute__((always_inline))

namespace mnv2_fused::cpu::neon {

#include "neon_vectors.h"

namespace {

// Pairs of bfloat16, one product of a pair at a time: its low half is the first element.
template <class V>
struct Bf16;

template <>
struct Bf16<F32x4> : WideBFloat16 {
  static constexpr int kParts = 2;

  // To the nearest, ties to even; a NaN stays one.
  static MNV2_INLINE uint16x4_t narrow(F32x4 v) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v.v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t half = vaddq_u32(odd, vdupq_n_u32(0x7fff));
    const uint16x4_t nearest = vshrn_n_u32(vaddq_u32(bits, half), 16);
    return vbsl_u16(vmovn_u32(vceqq_f32(v.v, v.v)), nearest, vdup_n_u16(0x7fc0));
  }
  static MNV2_INLINE void store(F32x4 v, BFloat16* p) {
    const uint16x4_t bits = narrow(v);
    std::memcpy(p, &bits, sizeof(bits));
  }
  static MNV2_INLINE void store_partial(F32x4 v, BFloat16* p, int64_t n) {
    BFloat16 lanes[kLanes];
    store(v, lanes);
    copy_partial(lanes, p, n);
  }
  template <int kPart>
  static MNV2_INLINE F32x4 half(uint32x4_t pairs) {
    return {vreinterpretq_f32_u32(kPart ? vandq_u32(pairs, vdupq_n_u32(0xffff0000u))
                                        : vshlq_n_u32(pairs, 16))};
  }
  template <int kPart>
  static MNV2_INLINE F32x4 value(const BFloat16* p) {
    uint32_t pair;
    std::memcpy(&pair, p, sizeof(pair));
    return half<kPart>(vdupq_n_u32(pair));
  }
  template <int kPart>
  static MNV2_INLINE F32x4 weights(const BFloat16* p) {
    uint32x4_t pairs;
    std::memcpy(&pairs, p, sizeof(pairs));
    return half<kPart>(pairs);
  }
  static MNV2_INLINE F32x4 multiply_add(F32x4 value, F32x4 weights, F32x4 sum) {
    return F32x4::fma(value, weights, sum);
  }
};

}  // namespace

#define MNV2_BFLOAT16
#define V_KEEP "+w"
#include "kernel.h"
#include "peak.h"

constinit const Kernels<float> kF32 = kernels_of<F32x4, float>();
constinit const Kernels<double> kF64 = kernels_of<F64x2, double>();
constinit const Kernels<BFloat16> kBf16 = kernels_of<F32x4, BFloat16>();

}  // namespace mnv2_fused::cpu::neon
#endif
