// 8-bit integers on AVX-512 with VNNI: 32 registers of 16 sums. vpdpbusd adds four exact products of bytes.
#if defined(__x86_64__)
#ifndef MNV2_EMULATED_AVX512
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <utility>

#include "args.h"

#ifndef MNV2_EMULATED_AVX512
#pragma GCC push_options
// GCC 12 takes its own headers' undefined vectors for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#endif
#define MNV2_INLINE inline __attribute__((always_inline))

namespace mnv2_fused::cpu::int8::avx512_vnni {
namespace {

struct I32x16 {
  using T = int32_t;
  using In = uint8_t;
  using Half = I32x16;
  static constexpr int64_t kLanes = 16;
  static constexpr int64_t kDepth = 4;
  static constexpr int kRegisters = 32;
  __m512i v;

  struct F {
    __m512 v;
    static MNV2_INLINE F load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static MNV2_INLINE F set1(float s) { return {_mm512_set1_ps(s)}; }
    // Kept apart from an addition behind it: fused, both would round once.
    static MNV2_INLINE F mul(F a, F b) {
      F product{_mm512_mul_ps(a.v, b.v)};
#ifndef MNV2_EMULATED_AVX512
      asm("" : "+v"(product.v));
#endif
      return product;
    }
    static MNV2_INLINE F add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
    static MNV2_INLINE F sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
    static MNV2_INLINE F div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
    static MNV2_INLINE F neg(F a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))}; }
    // b where a is NaN.
    static MNV2_INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
    static MNV2_INLINE F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
    static MNV2_INLINE I32x16 round(F a) { return {_mm512_cvtps_epi32(a.v)}; }
    MNV2_INLINE void store(float* p, int64_t n) const {
      if (n >= kLanes) return _mm512_storeu_ps(p, v);
      float lanes[kLanes];
      _mm512_storeu_ps(lanes, v);
      std::memcpy(p, lanes, size_t(n) * sizeof(float));
    }
  };

  static MNV2_INLINE I32x16 load(const T* p) { return {_mm512_loadu_si512(p)}; }
  MNV2_INLINE void store(T* p) const { _mm512_storeu_si512(p, v); }
  static MNV2_INLINE I32x16 set1(T s) { return {_mm512_set1_epi32(s)}; }
  static MNV2_INLINE I32x16 add(I32x16 a, I32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
  // a: four uint8 in a lane, b: four int8.
  static MNV2_INLINE I32x16 dot(I32x16 sum, I32x16 a, I32x16 b) {
    return {_mm512_dpbusd_epi32(sum.v, a.v, b.v)};
  }
  static MNV2_INLINE I32x16 weights(const In* p) { return {_mm512_loadu_si512(p)}; }
  static MNV2_INLINE I32x16 broadcast(const In* p) {
    int quad;
    std::memcpy(&quad, p, sizeof(quad));
    return {_mm512_set1_epi32(quad)};
  }
  // The lanes' columns moved on by one, `last` behind them.
  static MNV2_INLINE I32x16 push(I32x16 lanes, I32x16 last) {
    return {_mm512_or_si512(_mm512_srli_epi32(lanes.v, 8), _mm512_slli_epi32(last.v, 24))};
  }
  static MNV2_INLINE F to_float(I32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
  static MNV2_INLINE F power_of_two(I32x16 n) {
    const __m512i biased = _mm512_add_epi32(n.v, _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
  }
  MNV2_INLINE void narrow(In* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
  }
  static MNV2_INLINE I32x16 load_in(const In* p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  MNV2_INLINE void store_bytes(uint8_t* p, int64_t n) const {
    if (n >= kLanes) return narrow(p);
    uint8_t bytes[kLanes];
    narrow(bytes);
    std::memcpy(p, bytes, size_t(n));
  }
  static MNV2_INLINE I32x16 load_bytes(const uint8_t* p, int64_t n) {
    if (n >= kLanes) return load_in(p);
    uint8_t bytes[kLanes]{};
    std::memcpy(bytes, p, size_t(n));
    return load_in(bytes);
  }
  static MNV2_INLINE void widen(const uint8_t* x, int64_t n, In* out) {
    std::memcpy(out, x, size_t(n));
  }
};

}  // namespace

#define V_KEEP "+v"
#include "../kernel/window.h"
#include "kernel.h"

constinit const Kernels kKernels = kernels_of_vectors<I32x16>();

}  // namespace mnv2_fused::cpu::int8::avx512_vnni
#ifndef MNV2_EMULATED_AVX512
#pragma GCC diagnostic pop
#pragma GCC pop_options
#endif
#endif
