// 8-bit integers in plain C++, four at a time: what every other instruction set is compared with.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "args.h"

#define MNV2_INLINE inline __attribute__((always_inline))
#ifndef MNV2_MOST_ROWS
#define MNV2_MOST_ROWS 4  // more are no faster without registers for them
#endif

namespace mnv2_fused::cpu::int8::portable {
namespace {

struct I32x8 {
  using T = int32_t;
  using In = uint8_t;
  using Half = I32x8;
  using Value = I32x8;    // four uint8 in a lane
  using Weights = I32x8;  // four int8
  static constexpr int64_t kLanes = 8;
  static constexpr int kRegisters = 8;
  typedef int32_t Lanes __attribute__((vector_size(16)));
  Lanes v[2];

  // Calls f(lane) for each lane and returns their results.
  template <class F>
  static MNV2_INLINE I32x8 of_lanes(F f) {
    I32x8 r;
    for (int i = 0; i < kLanes; ++i) r.v[i / 4][i % 4] = f(i);
    return r;
  }
  MNV2_INLINE int32_t operator[](int i) const { return v[i / 4][i % 4]; }

  struct F {
    typedef float Lanes __attribute__((vector_size(16)));
    Lanes v[2];

    // Results are kept from being fused with the operations behind them.
    static MNV2_INLINE F kept(F a) {
      asm("" : "+m"(a.v));
      return a;
    }
    static MNV2_INLINE F load(const float* p) {
      F r;
      std::memcpy(r.v, p, sizeof(r.v));
      return r;
    }
    static MNV2_INLINE F set1(float s) { return {{Lanes{} + s, Lanes{} + s}}; }
    static MNV2_INLINE F mul(F a, F b) { return kept({{a.v[0] * b.v[0], a.v[1] * b.v[1]}}); }
    static MNV2_INLINE F add(F a, F b) { return {{a.v[0] + b.v[0], a.v[1] + b.v[1]}}; }
    static MNV2_INLINE F sub(F a, F b) { return {{a.v[0] - b.v[0], a.v[1] - b.v[1]}}; }
    static MNV2_INLINE F div(F a, F b) { return {{a.v[0] / b.v[0], a.v[1] / b.v[1]}}; }
    static MNV2_INLINE F neg(F a) { return {{-a.v[0], -a.v[1]}}; }
    // b where a is NaN.
    static MNV2_INLINE F max(F a, F b) {
      return {{a.v[0] > b.v[0] ? a.v[0] : b.v[0], a.v[1] > b.v[1] ? a.v[1] : b.v[1]}};
    }
    static MNV2_INLINE F min(F a, F b) {
      return {{a.v[0] < b.v[0] ? a.v[0] : b.v[0], a.v[1] < b.v[1] ? a.v[1] : b.v[1]}};
    }
    // To nearest even, of values below 2^22: there the sum's last bit is 1. Those far outside of 16 bits
    // are brought near.
    static MNV2_INLINE I32x8 round(F a) {
      const F magic = set1(12582912.0f), most = set1(65536.0f);
      const F r = kept(add(min(max(a, neg(most)), most), magic));
      return of_lanes([&](int i) { return int32_t(r.v[i / 4][i % 4] - 12582912.0f); });
    }
    MNV2_INLINE void store(float* p, int64_t n) const {
      std::memcpy(p, v, n < kLanes ? size_t(n) * sizeof(float) : sizeof(v));
    }
  };

  static MNV2_INLINE I32x8 load(const T* p) {
    I32x8 r;
    std::memcpy(r.v, p, sizeof(r.v));
    return r;
  }
  MNV2_INLINE void store(T* p) const { std::memcpy(p, v, sizeof(v)); }
  static MNV2_INLINE I32x8 set1(T s) { return {{Lanes{} + s, Lanes{} + s}}; }
  static MNV2_INLINE I32x8 add(I32x8 a, I32x8 b) { return {{a.v[0] + b.v[0], a.v[1] + b.v[1]}}; }
  static MNV2_INLINE I32x8 dot(I32x8 sum, Value a, Weights b) {
    for (int half = 0; half < 2; ++half)
      for (int byte = 0; byte < 4; ++byte)
        sum.v[half] += ((a.v[half] >> (8 * byte)) & 255) * ((b.v[half] << (24 - 8 * byte)) >> 24);
    return sum;
  }
  static MNV2_INLINE Weights weights(const int8_t* p) {
    I32x8 r;
    std::memcpy(r.v, p, sizeof(r.v));
    return little_endian(r);
  }
  static MNV2_INLINE Value value(const T* p) { return load(p); }
  static MNV2_INLINE Value broadcast(const In* p) {
    return set1(int32_t(p[0] | uint32_t(p[1]) << 8 | uint32_t(p[2]) << 16 | uint32_t(p[3]) << 24));
  }
  // Of the peak meter: the compiler forgets what it knows of a value.
  static MNV2_INLINE void hide(Value& a) { asm volatile("" : "+m"(a.v)); }
  static MNV2_INLINE I32x8 little_endian(I32x8 r) {
    if constexpr (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__) return r;
    return of_lanes([&](int i) { return int32_t(__builtin_bswap32(uint32_t(r[i]))); });
  }
  // Two pixels of 8 channels in 16 bits.
  struct Pair {
    int16_t v[2][kLanes];

    static MNV2_INLINE int16_t saturated(int32_t s) {
      return int16_t(s < INT16_MIN ? INT16_MIN : s > INT16_MAX ? INT16_MAX : s);
    }
    static MNV2_INLINE Pair set1(int16_t s) {
      Pair r;
      for (auto& pixel : r.v)
        for (int16_t& value : pixel) value = s;
      return r;
    }
    static MNV2_INLINE Pair add(Pair a, Pair b) {
      for (int pixel = 0; pixel < 2; ++pixel)
        for (int i = 0; i < kLanes; ++i)
          a.v[pixel][i] = saturated(int32_t{a.v[pixel][i]} + b.v[pixel][i]);
      return a;
    }
    MNV2_INLINE uint32_t byte(int pixel, int i) const {
      const int16_t s = v[pixel][i];
      return uint32_t(s < 0 ? 0 : s > kHighest ? kHighest : s);
    }
  };
  static MNV2_INLINE Pair pair(I32x8 a, I32x8 b) {
    Pair r;
    for (int i = 0; i < kLanes; ++i) {
      r.v[0][i] = Pair::saturated(a[i]);
      r.v[1][i] = Pair::saturated(b[i]);
    }
    return r;
  }
  static MNV2_INLINE I32x8 quads(Pair a, Pair b) {
    return of_lanes([&](int i) {
      return int32_t(a.byte(0, i) | a.byte(1, i) << 8 | b.byte(0, i) << 16 | b.byte(1, i) << 24);
    });
  }
  static MNV2_INLINE void store_pixels(Pair a, Pair b, In* p) {
    for (int pixel = 0; pixel < 2; ++pixel)
      for (int i = 0; i < kLanes; ++i) {
        p[pixel * kPanel + i] = In(a.byte(pixel, i));
        p[(2 + pixel) * kPanel + i] = In(b.byte(pixel, i));
      }
  }
  static MNV2_INLINE F to_float(I32x8 a) {
    F r;
    for (int half = 0; half < 2; ++half) r.v[half] = __builtin_convertvector(a.v[half], F::Lanes);
    return r;
  }
  static MNV2_INLINE F power_of_two(I32x8 n) {
    I32x8 bits = add(n, set1(127));
    for (int half = 0; half < 2; ++half) bits.v[half] <<= 23;
    F r;
    std::memcpy(r.v, bits.v, sizeof(r.v));
    return r;
  }
  MNV2_INLINE void narrow(In* p) const { store_bytes(p, kLanes); }
  static MNV2_INLINE I32x8 load_in(const In* p) { return load_bytes(p, kLanes); }
  MNV2_INLINE void store_bytes(uint8_t* p, int64_t n) const {
    for (int i = 0; i < kLanes; ++i)
      if (i < n) p[i] = uint8_t((*this)[i]);
  }
  static MNV2_INLINE I32x8 load_bytes(const uint8_t* p, int64_t n) {
    return of_lanes([&](int i) { return i < n ? int32_t(p[i]) : 0; });
  }
  static MNV2_INLINE void widen(const uint8_t* x, In* out) { std::memcpy(out, x, kPanel); }
};

}  // namespace

#define V_KEEP "+m"
#include "../kernel/window.h"
#include "kernel.h"

constinit const Kernels kKernels = kernels_of_vectors<I32x8>();

}  // namespace mnv2_fused::cpu::int8::portable
