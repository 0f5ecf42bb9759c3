// Derivatives of activations, as torch takes them: 0 where a value is clipped or lies on the bound.
#pragma once

#include "../kernel/activation.h"

namespace {

// 1 / (1 + exp(-v)). The bound keeps the quotient's divisor finite.
template <class V>
MNV2_INLINE V sigmoid(V v) {
  constexpr typename V::T kLowest = sizeof(typename V::T) == 4 ? -88 : -709;
  return V::reciprocal(one_plus_exp_of_minus(V::max(V::set1(kLowest), v)));
}

// g times the derivative at v. Of one that clips, v may be its result as well.
template <Activation kind, class V>
MNV2_INLINE V times_derivative(V g, V v, [[maybe_unused]] double negative_slope) {
  using T = typename V::T;
  [[maybe_unused]] constexpr T kInfinity = std::numeric_limits<T>::infinity();
  if constexpr (kind == Activation::kIdentity) {
    return g;
  } else if constexpr (is_clip(kind)) {
    const Clip<T> clip(kind);
    return V::where_between(v, V::set1(clip.low), V::set1(clip.high), g);
  } else if constexpr (kind == Activation::kHardswish) {
    // v / 3 + 1 / 2 between -3 and 3, then 1.
    const V slope = V::fma(v, V::set1(T(1) / T(3)), V::set1(T(0.5)));
    const V above = V::where_between(v, V::set1(std::nextafter(T(3), T(0))), V::set1(kInfinity), g);
    return V::fma(V::where_between(v, V::set1(-3), V::set1(3), slope), g, above);
  } else if constexpr (kind == Activation::kSilu) {
    // s + v s (1 - s) with s = 1 / (1 + exp(-v)).
    const V s = sigmoid(v);
    const V rest = V::fma(multiplied(s, V::set1(-1)), s, s);
    return multiplied(g, V::fma(v, rest, s));
  } else if constexpr (kind == Activation::kLeakyRelu) {
    const V above = V::where_between(v, V::set1(0), V::set1(kInfinity), g);
    const V lost = V::fma(above, V::set1(-1), g);
    return V::fma(lost, V::set1(T(negative_slope)), above);
  } else {
    static_assert(!has_derivative(kind), "the activation needs a derivative here");
    return g;
  }
}

// Calls f with the kind as a constant.
template <class F>
MNV2_INLINE void with_activation(Activation a, F f) {
  switch (a) {
#define MNV2_CASE(kind, ...)                                     \
  case Activation::kind:                                         \
    if constexpr (has_derivative(Activation::kind))              \
      f(std::integral_constant<Activation, Activation::kind>{}); \
    return;
    MNV2_ACTIVATIONS(MNV2_CASE)
#undef MNV2_CASE
  }
}

// The activation itself.
template <Activation kind, class V>
MNV2_INLINE V value_of(V v, double negative_slope) {
  if constexpr (is_clip(kind)) {
    const Clip<typename V::T> clip(kind);
    return clamp(v, V::set1(clip.low), V::set1(clip.high));
  } else if constexpr (kind == Activation::kSilu) {
    return multiplied(v, sigmoid(v));
  } else {
    return formula<kind>(v, negative_slope);
  }
}

}  // namespace
