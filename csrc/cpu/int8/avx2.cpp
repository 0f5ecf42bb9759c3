// 8-bit integers on AVX2: 16 registers of 8 sums. vpmaddwd adds two exact products of 16-bit factors, so
// activations and weights are widened: vpmaddubsw, which takes bytes, saturates. No fused multiply-add:
// the target has none.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <utility>

#include "args.h"

#pragma GCC push_options
#pragma GCC target("avx2")
#define MNV2_INLINE inline __attribute__((always_inline))

namespace mnv2_fused::cpu::int8::avx2 {
namespace {

struct I32x8 {
  using T = int32_t;
  using In = int16_t;
  using Half = I32x8;
  static constexpr int64_t kLanes = 8;
  static constexpr int64_t kDepth = 2;
  static constexpr int kRegisters = 16;
  __m256i v;

  struct F {
    __m256 v;
    static MNV2_INLINE F load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static MNV2_INLINE F set1(float s) { return {_mm256_set1_ps(s)}; }
    static MNV2_INLINE F mul(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
    static MNV2_INLINE F add(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
    static MNV2_INLINE F sub(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
    static MNV2_INLINE F div(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
    static MNV2_INLINE F neg(F a) { return {_mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f))}; }
    // b where a is NaN.
    static MNV2_INLINE F max(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
    static MNV2_INLINE F min(F a, F b) { return {_mm256_min_ps(a.v, b.v)}; }
    static MNV2_INLINE I32x8 round(F a) { return {_mm256_cvtps_epi32(a.v)}; }
    MNV2_INLINE void store(float* p, int64_t n) const {
      float lanes[8];
      _mm256_storeu_ps(n < 8 ? lanes : p, v);
      if (n < 8) std::memcpy(p, lanes, size_t(n) * sizeof(float));
    }
  };

  static MNV2_INLINE I32x8 load(const T* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
  MNV2_INLINE void store(T* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static MNV2_INLINE I32x8 set1(T s) { return {_mm256_set1_epi32(s)}; }
  static MNV2_INLINE I32x8 add(I32x8 a, I32x8 b) { return {_mm256_add_epi32(a.v, b.v)}; }
  static MNV2_INLINE I32x8 dot(I32x8 sum, I32x8 a, I32x8 b) {
    return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(a.v, b.v))};
  }
  static MNV2_INLINE I32x8 weights(const In* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
  static MNV2_INLINE I32x8 broadcast(const In* p) {
    int pair;
    std::memcpy(&pair, p, sizeof(pair));
    return {_mm256_set1_epi32(pair)};
  }
  // The lanes' columns moved on by one, `last` behind them.
  static MNV2_INLINE I32x8 push(I32x8 lanes, I32x8 last) {
    return {_mm256_or_si256(_mm256_srli_epi32(lanes.v, 16), _mm256_slli_epi32(last.v, 16))};
  }
  static MNV2_INLINE F to_float(I32x8 a) { return {_mm256_cvtepi32_ps(a.v)}; }
  static MNV2_INLINE F power_of_two(I32x8 n) {
    return {
        _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.v, _mm256_set1_epi32(127)), 23))};
  }
  MNV2_INLINE __m128i halves() const {
    return _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  }
  MNV2_INLINE void narrow(In* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves());
  }
  static MNV2_INLINE I32x8 load_in(const In* p) {
    return {_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  MNV2_INLINE void store_bytes(uint8_t* p, int64_t n) const {
    const __m128i bytes = _mm_packus_epi16(halves(), halves());
    if (n >= 8) return _mm_storel_epi64(reinterpret_cast<__m128i*>(p), bytes);
    const long long all = _mm_cvtsi128_si64(bytes);
    std::memcpy(p, &all, size_t(n));
  }
  static MNV2_INLINE I32x8 load_bytes(const uint8_t* p, int64_t n) {
    long long all = 0;
    std::memcpy(&all, p, n < 8 ? size_t(n) : 8);
    return {_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(all))};
  }
  static MNV2_INLINE void widen(const uint8_t* x, int64_t n, In* out) {
    for (; n >= 16; n -= 16, x += 16, out += 16)
      _mm256_storeu_si256(
          reinterpret_cast<__m256i*>(out),
          _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
    if (n >= 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                       _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
      n -= 8, x += 8, out += 8;
    }
    for (int64_t i = 0; i < n; ++i) out[i] = x[i];
  }
};

}  // namespace

#define V_KEEP "+x"
#include "../kernel/window.h"
#include "kernel.h"

constinit const Kernels kKernels = kernels_of_vectors<I32x8>();

}  // namespace mnv2_fused::cpu::int8::avx2
#pragma GCC pop_options
#endif
