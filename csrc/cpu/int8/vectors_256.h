// Eight sums in a register of 256 bits, for the instruction sets that have no longer ones. Included behind
// the target's pragma.
#pragma once

#include <cstdint>
#include <cstring>

#include "args.h"

namespace {

// kBytes: whether one instruction, vpdpbusd, adds four exact products of bytes. Without it vpmaddwd adds two
// of 16-bit factors: activations are then 16 bits where products read them, of each quad elements 0, 2, 1
// and 3, and weights are parted into even and odd ones. vpmaddubsw, which takes bytes, saturates.
template <bool kBytes>
struct I32x8 {
  using T = int32_t;
  using In = std::conditional_t<kBytes, uint8_t, int16_t>;
  using Half = I32x8;
  static constexpr int64_t kLanes = 8;
  static constexpr int kRegisters = 16;
  __m256i v;

  // Four bytes in a lane; as 16 bits, the even ones and the odd ones.
  struct Bytes {
    __m256i v;
  };
  struct Words {
    __m256i even, odd;
  };
  using Value = std::conditional_t<kBytes, Bytes, Words>;
  using Weights = Value;

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
  static MNV2_INLINE I32x8 dot(I32x8 sum, Value a, Weights b) {
    if constexpr (kBytes) {
      return {dot_of_bytes(sum.v, a.v, b.v)};
    } else {
      const __m256i products =
          _mm256_add_epi32(_mm256_madd_epi16(a.even, b.even), _mm256_madd_epi16(a.odd, b.odd));
      return {_mm256_add_epi32(sum.v, products)};
    }
  }
  static MNV2_INLINE Weights weights(const int8_t* p) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (kBytes)
      return {bytes};
    else
      return {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
  }
  static MNV2_INLINE Value value(const T* p) {
    const __m256i bytes = load(p).v;
    if constexpr (kBytes)
      return {bytes};
    else
      return {_mm256_and_si256(bytes, _mm256_set1_epi16(255)), _mm256_srli_epi16(bytes, 8)};
  }
  static MNV2_INLINE Value broadcast(const In* p) {
    int parts[sizeof(In)];
    std::memcpy(parts, p, sizeof(parts));
    if constexpr (kBytes)
      return {_mm256_set1_epi32(parts[0])};
    else
      return {_mm256_set1_epi32(parts[0]), _mm256_set1_epi32(parts[1])};
  }
  // Of the peak meter: the compiler forgets what it knows of a value.
  static MNV2_INLINE void hide(Value& a) {
    if constexpr (kBytes)
      asm volatile("" : "+x"(a.v));
    else
      asm volatile("" : "+x"(a.even), "+x"(a.odd));
  }

  // Two pixels of 8 channels in 16 bits: in each 128-bit part, four channels of one, then of the other.
  struct Pair {
    __m256i v;
    static MNV2_INLINE Pair set1(int16_t s) { return {_mm256_set1_epi16(s)}; }
    static MNV2_INLINE Pair add(Pair a, Pair b) { return {_mm256_adds_epi16(a.v, b.v)}; }
  };
  static MNV2_INLINE Pair pair(I32x8 a, I32x8 b) { return {_mm256_packs_epi32(a.v, b.v)}; }
  static MNV2_INLINE I32x8 quads(Pair a, Pair b) {
    const __m256i by_channel = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    return {_mm256_shuffle_epi8(_mm256_packus_epi16(a.v, b.v), by_channel)};
  }
  static MNV2_INLINE void store_pixels(Pair a, Pair b, In* p) {
    if constexpr (kBytes) {
      const __m256i by_pixel = _mm256_permutevar8x32_epi32(
          _mm256_packus_epi16(a.v, b.v), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
      const __m128i low = _mm256_castsi256_si128(by_pixel);
      const __m128i high = _mm256_extracti128_si256(by_pixel, 1);
      _mm_storel_epi64(reinterpret_cast<__m128i*>(p), low);
      _mm_storeh_pd(reinterpret_cast<double*>(p + kPanel), _mm_castsi128_pd(low));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(p + 2 * kPanel), high);
      _mm_storeh_pd(reinterpret_cast<double*>(p + 3 * kPanel), _mm_castsi128_pd(high));
    } else {
      for (const Pair& pair : {a, b}) {
        const __m256i within = _mm256_min_epi16(_mm256_max_epi16(pair.v, _mm256_setzero_si256()),
                                                _mm256_set1_epi16(kHighest));
        const __m256i by_pixel = _mm256_permute4x64_epi64(swapped(within), 0xd8);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(by_pixel));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + kPanel),
                         _mm256_extracti128_si256(by_pixel, 1));
        p += 2 * kPanel;
      }
    }
  }
  // Elements 0, 2, 1 and 3 of each quad of 16-bit elements; twice, it changes nothing.
  static MNV2_INLINE __m256i swapped(__m256i quads) {
    return _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(quads, 0xd8), 0xd8);
  }
  static MNV2_INLINE __m128i swapped(__m128i quads) {
    return _mm_shufflehi_epi16(_mm_shufflelo_epi16(quads, 0xd8), 0xd8);
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
    if constexpr (kBytes)
      store_bytes(p, kLanes);
    else
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), swapped(halves()));
  }
  static MNV2_INLINE I32x8 load_in(const In* p) {
    if constexpr (kBytes)
      return load_bytes(p, kLanes);
    else
      return {_mm256_cvtepi16_epi32(swapped(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  MNV2_INLINE void store_bytes(uint8_t* p, int64_t n) const {
    const __m128i bytes = _mm_packus_epi16(halves(), halves());
    if (n >= kLanes) return _mm_storel_epi64(reinterpret_cast<__m128i*>(p), bytes);
    const long long all = _mm_cvtsi128_si64(bytes);
    std::memcpy(p, &all, size_t(n));
  }
  static MNV2_INLINE I32x8 load_bytes(const uint8_t* p, int64_t n) {
    long long all = 0;
    std::memcpy(&all, p, size_t(n < kLanes ? n : kLanes));
    return {_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(all))};
  }
  // kPanel bytes.
  static MNV2_INLINE void widen(const uint8_t* x, In* out) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    auto* const to = reinterpret_cast<__m128i*>(out);
    if constexpr (kBytes) {
      _mm_storeu_si128(to, bytes);
    } else {
      const __m128i even = _mm_and_si128(bytes, _mm_set1_epi16(255));
      const __m128i odd = _mm_srli_epi16(bytes, 8);
      _mm_storeu_si128(to, _mm_unpacklo_epi32(even, odd));
      _mm_storeu_si128(to + 1, _mm_unpackhi_epi32(even, odd));
    }
  }
};

}  // namespace
