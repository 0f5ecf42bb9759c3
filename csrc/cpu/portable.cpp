// The kernel on 16-byte compiler vectors: SSE2 on any x86-64, NEON on Arm, and whatever else
// GCC or Clang lowers them to.
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "isa.h"

#define MNV2_INLINE inline __attribute__((always_inline))

namespace mnv2_fused::cpu::portable {
namespace {

template <class Scalar>
struct Vector16 {
  using T = Scalar;
  using Half = Vector16;
  static constexpr int64_t kLanes = 16 / sizeof(T);
  static constexpr int kRegisters = 16;
  typedef T Lanes __attribute__((vector_size(16)));
  Lanes v;

  static MNV2_INLINE Vector16 load(const T* p) {
    Vector16 r;
    std::memcpy(&r.v, p, 16);
    return r;
  }
  static MNV2_INLINE Vector16 load_partial(const T* p, int64_t n) {
    Vector16 r = set1(0);
    for (int64_t i = 0; i < kLanes; ++i)
      if (i < n) r.v[i] = p[i];
    return r;
  }
  MNV2_INLINE void store(T* p) const { std::memcpy(p, &v, 16); }
  MNV2_INLINE void store_partial(T* p, int64_t n) const {
    for (int64_t i = 0; i < kLanes; ++i)
      if (i < n) p[i] = v[i];
  }
  static MNV2_INLINE Vector16 set1(T s) { return {Lanes{} + s}; }
  static MNV2_INLINE Vector16 fma(Vector16 a, Vector16 b, Vector16 c) { return {a.v * b.v + c.v}; }
  static MNV2_INLINE Vector16 add(Vector16 a, Vector16 b) { return {a.v + b.v}; }
  static MNV2_INLINE Vector16 min(Vector16 a, Vector16 b) { return {a.v < b.v ? a.v : b.v}; }
  static MNV2_INLINE Vector16 max(Vector16 a, Vector16 b) { return {a.v > b.v ? a.v : b.v}; }
};

}  // namespace

#if defined(__aarch64__)
#define V_KEEP "+w"
#else
#define V_KEEP "+x"
#endif
#include "kernel.h"
#include "peak.h"

}  // namespace mnv2_fused::cpu::portable

namespace mnv2_fused::cpu {

const Isa kPortable{
    "portable",
    16,
    [] { return true; },
    {&portable::run_tile<portable::Vector16<float>>, &portable::add_row<portable::Vector16<float>>,
     &portable::run_pointwise<portable::Vector16<float>>},
    {&portable::run_tile<portable::Vector16<double>>,
     &portable::add_row<portable::Vector16<double>>,
     &portable::run_pointwise<portable::Vector16<double>>},
    &portable::multiply_add<portable::Vector16<float>>,
    2 * 4 * portable::kChains,
};

}  // namespace mnv2_fused::cpu
