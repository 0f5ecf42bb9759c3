// AVX-512's intrinsics that csrc/cpu/int8/avx512_vnni.cpp uses, on two halves of AVX2: for processors without.
#pragma once

#include <immintrin.h>

#include <cstdint>

struct Emulated512 {
  __m256 half[2];
};
struct Emulated512i {
  __m256i half[2];
};

#define EMULATED_BOTH(type, name, of_half)                                   \
  inline type emulated_##name(type a, type b) {                              \
    return {{of_half(a.half[0], b.half[0]), of_half(a.half[1], b.half[1])}}; \
  }
EMULATED_BOTH(Emulated512, mul_ps, _mm256_mul_ps)
EMULATED_BOTH(Emulated512, add_ps, _mm256_add_ps)
EMULATED_BOTH(Emulated512, sub_ps, _mm256_sub_ps)
EMULATED_BOTH(Emulated512, div_ps, _mm256_div_ps)
EMULATED_BOTH(Emulated512, xor_ps, _mm256_xor_ps)
EMULATED_BOTH(Emulated512, max_ps, _mm256_max_ps)
EMULATED_BOTH(Emulated512, min_ps, _mm256_min_ps)
EMULATED_BOTH(Emulated512i, add_epi32, _mm256_add_epi32)
EMULATED_BOTH(Emulated512i, adds_epi16, _mm256_adds_epi16)
EMULATED_BOTH(Emulated512i, packs_epi32, _mm256_packs_epi32)
EMULATED_BOTH(Emulated512i, packus_epi16, _mm256_packus_epi16)
EMULATED_BOTH(Emulated512i, shuffle_epi8, _mm256_shuffle_epi8)
#undef EMULATED_BOTH

#define EMULATED_ONE(to, name, from, of_half) \
  inline to emulated_##name(from a) { return {{of_half(a.half[0]), of_half(a.half[1])}}; }
EMULATED_ONE(Emulated512i, cvtps_epi32, Emulated512, _mm256_cvtps_epi32)
EMULATED_ONE(Emulated512, cvtepi32_ps, Emulated512i, _mm256_cvtepi32_ps)
EMULATED_ONE(Emulated512, castsi512_ps, Emulated512i, _mm256_castsi256_ps)
#undef EMULATED_ONE

inline Emulated512 emulated_loadu_ps(const float* p) {
  return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}};
}
inline void emulated_storeu_ps(float* p, Emulated512 v) {
  _mm256_storeu_ps(p, v.half[0]);
  _mm256_storeu_ps(p + 8, v.half[1]);
}
inline Emulated512 emulated_set1_ps(float s) { return {{_mm256_set1_ps(s), _mm256_set1_ps(s)}}; }
inline Emulated512i emulated_loadu_si512(const void* p) {
  const auto* const halves = static_cast<const __m256i*>(p);
  return {{_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)}};
}
inline void emulated_storeu_si512(void* p, Emulated512i v) {
  auto* const halves = static_cast<__m256i*>(p);
  _mm256_storeu_si256(halves, v.half[0]);
  _mm256_storeu_si256(halves + 1, v.half[1]);
}
inline Emulated512i emulated_set1_epi32(int s) {
  return {{_mm256_set1_epi32(s), _mm256_set1_epi32(s)}};
}
inline Emulated512i emulated_set1_epi16(short s) {
  return {{_mm256_set1_epi16(s), _mm256_set1_epi16(s)}};
}
template <class... Lanes>
inline Emulated512i emulated_setr_epi32(Lanes... values) {
  const int32_t lanes[16] = {values...};
  return emulated_loadu_si512(lanes);
}
inline Emulated512i emulated_broadcast_i32x4(__m128i part) {
  return {{_mm256_broadcastsi128_si256(part), _mm256_broadcastsi128_si256(part)}};
}
inline Emulated512i emulated_permutexvar_epi32(Emulated512i index, Emulated512i a) {
  int32_t from[16], lanes[16], to[16];
  emulated_storeu_si512(from, index);
  emulated_storeu_si512(lanes, a);
  for (int i = 0; i < 16; ++i) to[i] = lanes[from[i] & 15];
  return emulated_loadu_si512(to);
}
inline Emulated512i emulated_slli_epi32(Emulated512i a, int n) {
  return {{_mm256_slli_epi32(a.half[0], n), _mm256_slli_epi32(a.half[1], n)}};
}
inline __m128i emulated_cvtepi32_epi8(Emulated512i a) {
  int32_t lanes[16];
  emulated_storeu_si512(lanes, a);
  uint8_t bytes[16];
  for (int i = 0; i < 16; ++i) bytes[i] = uint8_t(lanes[i]);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
}
inline Emulated512i emulated_cvtepu8_epi32(__m128i a) {
  uint8_t bytes[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), a);
  int32_t lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = bytes[i];
  return emulated_loadu_si512(lanes);
}
// Masked lanes are neither read nor written.
inline __m128i emulated_maskz_loadu_epi8(unsigned mask, const void* p) {
  uint8_t bytes[16] = {};
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) bytes[i] = static_cast<const uint8_t*>(p)[i];
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
}
inline void emulated_mask_storeu_epi8(void* p, unsigned mask, __m128i a) {
  uint8_t bytes[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), a);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) static_cast<uint8_t*>(p)[i] = bytes[i];
}
inline Emulated512i emulated_dpbusd_epi32(Emulated512i sum, Emulated512i a, Emulated512i b) {
  int32_t lanes[16];
  uint8_t left[64];
  int8_t right[64];
  emulated_storeu_si512(lanes, sum);
  emulated_storeu_si512(left, a);
  emulated_storeu_si512(right, b);
  for (int i = 0; i < 64; ++i)
    lanes[i / 4] = int32_t(uint32_t(lanes[i / 4]) + uint32_t(int32_t(left[i]) * right[i]));
  return emulated_loadu_si512(lanes);
}

#define __m512 Emulated512
#define __m512i Emulated512i
#define _mm512_mul_ps emulated_mul_ps
#define _mm512_add_ps emulated_add_ps
#define _mm512_sub_ps emulated_sub_ps
#define _mm512_div_ps emulated_div_ps
#define _mm512_xor_ps emulated_xor_ps
#define _mm512_max_ps emulated_max_ps
#define _mm512_min_ps emulated_min_ps
#define _mm512_add_epi32 emulated_add_epi32
#define _mm512_adds_epi16 emulated_adds_epi16
#define _mm512_packs_epi32 emulated_packs_epi32
#define _mm512_packus_epi16 emulated_packus_epi16
#define _mm512_shuffle_epi8 emulated_shuffle_epi8
#define _mm512_cvtps_epi32 emulated_cvtps_epi32
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_castsi512_ps emulated_castsi512_ps
#define _mm512_loadu_ps emulated_loadu_ps
#define _mm512_storeu_ps emulated_storeu_ps
#define _mm512_set1_ps emulated_set1_ps
#define _mm512_loadu_si512 emulated_loadu_si512
#define _mm512_storeu_si512 emulated_storeu_si512
#define _mm512_set1_epi32 emulated_set1_epi32
#define _mm512_set1_epi16 emulated_set1_epi16
#undef _mm512_setr_epi32
#define _mm512_setr_epi32 emulated_setr_epi32
#define _mm512_broadcast_i32x4 emulated_broadcast_i32x4
#define _mm512_permutexvar_epi32 emulated_permutexvar_epi32
#define _mm512_slli_epi32 emulated_slli_epi32
#define _mm512_cvtepi32_epi8 emulated_cvtepi32_epi8
#define _mm512_cvtepu8_epi32 emulated_cvtepu8_epi32
#define _mm_maskz_loadu_epi8 emulated_maskz_loadu_epi8
#define _mm_mask_storeu_epi8 emulated_mask_storeu_epi8
#define _mm512_dpbusd_epi32 emulated_dpbusd_epi32
