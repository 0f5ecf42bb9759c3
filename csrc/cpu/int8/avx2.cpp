// 8-bit integers on AVX2, see vectors_256.h. No fused multiply-add: the target has none.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "args.h"

#pragma GCC push_options
#pragma GCC target("avx2")
#define MNV2_INLINE inline __attribute__((always_inline))
#define V_KEEP "+x"

namespace mnv2_fused::cpu::int8::avx2 {
namespace {
[[maybe_unused]] MNV2_INLINE __m256i dot_of_bytes(__m256i sum, __m256i, __m256i) {
  return sum;  // no such instruction; never called
}
}  // namespace
#include "../kernel/window.h"
#include "kernel.h"
#include "vectors_256.h"

constinit const Kernels kKernels = kernels_of_vectors<I32x8<false>>();

}  // namespace mnv2_fused::cpu::int8::avx2
#pragma GCC pop_options
#endif
