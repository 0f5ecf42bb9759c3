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
#ifdef MNV2_EMULATED_AVX512
#define V_KEEP "+m"
#else
#define V_KEEP "+v"
#endif

namespace mnv2_fused::cpu::int8::avx512_vnni {
namespace {

struct I32x16 {
  using T = int32_t;
  using In = uint8_t;
  using Half = I32x16;
  using Value = I32x16;    // four uint8 in a lane
  using Weights = I32x16;  // four int8
  static constexpr int64_t kLanes = 16;
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
  static MNV2_INLINE I32x16 dot(I32x16 sum, Value a, Weights b) {
    return {_mm512_dpbusd_epi32(sum.v, a.v, b.v)};
  }
  static MNV2_INLINE Weights weights(const int8_t* p) { return {_mm512_loadu_si512(p)}; }
  static MNV2_INLINE Value value(const T* p) { return load(p); }
  static MNV2_INLINE Value broadcast(const In* p) {
    int quad;
    std::memcpy(&quad, p, sizeof(quad));
    return {_mm512_set1_epi32(quad)};
  }
  // Of the peak meter: the compiler forgets what it knows of a value.
  static MNV2_INLINE void hide(Value& a) { asm volatile("" : V_KEEP(a.v)); }

  // Two pixels of 16 channels in 16 bits: in each 128-bit part, four channels of one, then of the other.
  struct Pair {
    __m512i v;
    static MNV2_INLINE Pair set1(int16_t s) { return {_mm512_set1_epi16(s)}; }
    static MNV2_INLINE Pair add(Pair a, Pair b) { return {_mm512_adds_epi16(a.v, b.v)}; }
  };
  static MNV2_INLINE Pair pair(I32x16 a, I32x16 b) { return {_mm512_packs_epi32(a.v, b.v)}; }
  static MNV2_INLINE I32x16 quads(Pair a, Pair b) {
    const __m512i by_channel =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    return {_mm512_shuffle_epi8(_mm512_packus_epi16(a.v, b.v), by_channel)};
  }
  static MNV2_INLINE void store_pixels(Pair a, Pair b, In* p) {
    const __m512i by_pixel =
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(by_pixel, _mm512_packus_epi16(a.v, b.v)));
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
  static MNV2_INLINE __mmask16 first(int64_t n) { return __mmask16((1 << n) - 1); }
  MNV2_INLINE void store_bytes(uint8_t* p, int64_t n) const {
    n >= kLanes ? narrow(p) : _mm_mask_storeu_epi8(p, first(n), _mm512_cvtepi32_epi8(v));
  }
  static MNV2_INLINE I32x16 load_bytes(const uint8_t* p, int64_t n) {
    if (n >= kLanes) return load_in(p);
    return {_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), p))};
  }
  static MNV2_INLINE void widen(const uint8_t* x, In* out) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
};

}  // namespace
#include "../kernel/window.h"
#include "kernel.h"

constinit const Kernels kKernels = kernels_of_vectors<I32x16>();

}  // namespace mnv2_fused::cpu::int8::avx512_vnni
#ifndef MNV2_EMULATED_AVX512
#pragma GCC diagnostic pop
#pragma GCC pop_options
#endif
#endif
