// Vectors of 16 bytes that the compiler knows. Included like kernel.h.
#pragma once

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
  static MNV2_INLINE Vector16 div(Vector16 a, Vector16 b) { return {a.v / b.v}; }
  static MNV2_INLINE Vector16 reciprocal(Vector16 a) { return div(set1(1), a); }
  // x where low < v < high or v is NaN, else 0.
  static MNV2_INLINE Vector16 where_between(Vector16 v, Vector16 low, Vector16 high, Vector16 x) {
    return {(v.v <= low.v) | (v.v >= high.v) ? Lanes{} : x.v};
  }
  // 2^n from the sum of n and 1.5 * 2^(bits of the mantissa), in whose last bits n lies.
  static MNV2_INLINE Vector16 power_of_two(Vector16 bits) {
    using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    typedef Word Words __attribute__((vector_size(16)));
    constexpr int kMantissa = std::numeric_limits<T>::digits - 1;
    constexpr Word kOne = Word(std::numeric_limits<T>::max_exponent - 1) << kMantissa;
    Words words;
    std::memcpy(&words, &bits.v, 16);
    words = (words << kMantissa) + kOne;
    Vector16 power;
    std::memcpy(&power.v, &words, 16);
    return power;
  }
};

}  // namespace
