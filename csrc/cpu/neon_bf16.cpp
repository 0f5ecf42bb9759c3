// The kernel for bfloat16 on 64-bit Arm with its dot products of pairs.
#include "isa.h"

#ifdef MNV2_NEON_BF16
#include <arm_neon.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+bf16")
#define MNV2_INLINE inline __attribute__((always_inline))

namespace mnv2_fused::cpu::neon_bf16 {

#include "neon_vectors.h"

namespace {

template <class V>
struct Bf16;

template <>
struct Bf16<F32x4> : WideBFloat16 {
  static constexpr int kParts = 1;

  static MNV2_INLINE void store(F32x4 v, BFloat16* p) {
    const bfloat16x4_t bits = vcvt_bf16_f32(v.v);
    std::memcpy(p, &bits, sizeof(bits));
  }
  static MNV2_INLINE void store_partial(F32x4 v, BFloat16* p, int64_t n) {
    BFloat16 lanes[kLanes];
    store(v, lanes);
    copy_partial(lanes, p, n);
  }
  template <int>
  static MNV2_INLINE bfloat16x8_t value(const BFloat16* p) {
    uint32_t pair;
    std::memcpy(&pair, p, sizeof(pair));
    return vreinterpretq_bf16_u32(vdupq_n_u32(pair));
  }
  template <int>
  static MNV2_INLINE bfloat16x8_t weights(const BFloat16* p) {
    bfloat16x8_t pairs;
    std::memcpy(&pairs, p, sizeof(pairs));
    return pairs;
  }
  static MNV2_INLINE F32x4 multiply_add(bfloat16x8_t value, bfloat16x8_t weights, F32x4 sum) {
    return {vbfdotq_f32(sum.v, value, weights)};
  }
};

}  // namespace

#define MNV2_BFLOAT16
#define V_KEEP "+w"
#include "kernel.h"
#include "peak.h"

constinit const Kernels<BFloat16> kBf16 = kernels_of<F32x4, BFloat16>();

}  // namespace mnv2_fused::cpu::neon_bf16
#pragma GCC pop_options
#endif
