// The kernel on 16-byte compiler vectors: SSE2 on any x86-64, NEON on Arm, and whatever else
// GCC or Clang lowers them to.
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "isa.h"

#define MNV2_INLINE inline __attribute__((always_inline))

namespace mnv2_fused::cpu::portable {
#include "portable_vectors.h"

namespace {

// Pairs of bfloat16, one product of a pair at a time.
template <class V>
struct Bf16 {
  static constexpr int kParts = 2;
  static constexpr int64_t kLanes = V::kLanes;
  typedef uint32_t Bits __attribute__((vector_size(16)));

  static MNV2_INLINE V from_bits(Bits bits) {
    V v;
    std::memcpy(&v.v, &bits, 16);
    return v;
  }
  // To the nearest, ties to even; a NaN stays one.
  static MNV2_INLINE BFloat16 narrow(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return {uint16_t(v != v ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
  static MNV2_INLINE V load_partial(const BFloat16* p, int64_t n) {
    Bits bits{};
    for (int64_t i = 0; i < kLanes; ++i)
      if (i < n) bits[i] = uint32_t{p[i].bits} << 16;
    return from_bits(bits);
  }
  static MNV2_INLINE V load(const BFloat16* p) { return load_partial(p, kLanes); }
  static MNV2_INLINE void store_partial(V v, BFloat16* p, int64_t n) {
    for (int64_t i = 0; i < kLanes; ++i)
      if (i < n) p[i] = narrow(v.v[i]);
  }
  static MNV2_INLINE void store(V v, BFloat16* p) { store_partial(v, p, kLanes); }
  // Of each pair the element at the lower address, then the other one.
  template <int kPart>
  static MNV2_INLINE V half(Bits pairs) {
    constexpr bool kHigh = (kPart != 0) == (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
    return from_bits(kHigh ? pairs & 0xffff0000u : pairs << 16);
  }
  template <int kPart>
  static MNV2_INLINE V value(const BFloat16* p) {
    uint32_t pair;
    std::memcpy(&pair, p, sizeof(pair));
    return half<kPart>(Bits{} + pair);
  }
  template <int kPart>
  static MNV2_INLINE V weights(const BFloat16* p) {
    Bits pairs;
    std::memcpy(&pairs, p, sizeof(pairs));
    return half<kPart>(pairs);
  }
  static MNV2_INLINE V multiply_add(V value, V weights, V sum) {
    return V::fma(value, weights, sum);
  }
};

}  // namespace

#define MNV2_BFLOAT16
#if defined(__aarch64__)
#define V_KEEP "+w"
#else
#define V_KEEP "+x"
#endif
#include "kernel.h"
#include "peak.h"

constinit const Kernels<float> kF32 = kernels_of<Vector16<float>, float>();
constinit const Kernels<double> kF64 = kernels_of<Vector16<double>, double>();
constinit const Kernels<BFloat16> kBf16 = kernels_of<Vector16<float>, BFloat16>();

}  // namespace mnv2_fused::cpu::portable
