// 8-bit integers on AVX2 with AVX-VNNI, see vectors_256.h. No fused multiply-add: the target has none.
#include "args.h"

#ifdef MNV2_AVX_VNNI
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#pragma GCC push_options
#pragma GCC target("avx2,avxvnni")
#define MNV2_INLINE inline __attribute__((always_inline))
#define V_KEEP "+x"

namespace mnv2_fused::cpu::int8::avx2_vnni {
namespace {
MNV2_INLINE __m256i dot_of_bytes(__m256i sum, __m256i a, __m256i b) {
  return _mm256_dpbusd_avx_epi32(sum, a, b);
}
}  // namespace
#include "../kernel/window.h"
#include "kernel.h"
#include "vectors_256.h"

constinit const Kernels kKernels = kernels_of_vectors<I32x8<true>>();

}  // namespace mnv2_fused::cpu::int8::avx2_vnni
#pragma GCC pop_options
#endif
