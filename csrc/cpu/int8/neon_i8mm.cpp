// 8-bit integers on 64-bit Arm with dot products of uint8 and int8, see vectors_neon.h.
#include "args.h"

#ifdef MNV2_NEON_DOTS
#include <arm_neon.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+i8mm")
#define MNV2_INLINE inline __attribute__((always_inline))
#define V_KEEP "+w"

namespace mnv2_fused::cpu::int8::neon_i8mm {
namespace {
struct Dots {
  using Bytes = uint8x16_t;
  static MNV2_INLINE int32x4_t dot(int32x4_t sum, Bytes a, int8x16_t b) {
    return vusdotq_s32(sum, a, b);
  }
};
}  // namespace
#include "../kernel/window.h"
#include "kernel.h"
#include "vectors_neon.h"

constinit const Kernels kKernels = kernels_of_vectors<I32x4<Dots>>();

}  // namespace mnv2_fused::cpu::int8::neon_i8mm
#pragma GCC pop_options
#endif
