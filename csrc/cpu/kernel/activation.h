// Activations of vectors: those that clip, which a product applies to its sums in registers, and those
// that come after it, by way of memory.
#pragma once

#include "elements.h"

namespace {

// NaN passes through, as in torch: x86's max and min return the second operand where either is NaN.
template <class V>
MNV2_INLINE V clamp(V v, V low, V high) {
  return V::min(high, V::max(low, v));
}
template <class V>
MNV2_INLINE V relu6(V v) {
  return clamp(v, V::set1(0), V::set1(6));
}
template <class V>
MNV2_INLINE V multiplied(V a, V b) {
  return V::fma(a, b, V::set1(0));
}

// Whether an activation does nothing but clip.
constexpr bool is_clip(Activation a) {
  switch (a) {
    case Activation::kRelu6:
    case Activation::kRelu:
    case Activation::kIdentity:
      return true;
    case Activation::kHardswish:
    case Activation::kSilu:
      return false;
  }
  __builtin_unreachable();
}
// Bounds that an activation clips to; infinite for one that does not clip.
template <class T>
struct Clip {
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();
  T low = -kInfinity, high = kInfinity;

  explicit Clip(Activation a) {
    switch (a) {
      case Activation::kRelu6:
        low = 0;
        high = 6;
        return;
      case Activation::kRelu:
        low = 0;
        return;
      case Activation::kIdentity:
      case Activation::kHardswish:
      case Activation::kSilu:
        return;
    }
    __builtin_unreachable();
  }
};

// exp(x) = 2^n e^r with the nearest n and |r| <= ln(2) / 2. The series of e^r has as many terms as T
// has digits for. The result is infinite where T is; below that, the smallest normal number.
template <class V>
MNV2_INLINE V exponential(V x) {
  using T = typename V::T;
  constexpr bool kFloat = sizeof(T) == 4;
  constexpr T kLowest = kFloat ? -87 : -708, kHighest = kFloat ? 89 : 710;
  // Magic number: the sum of it and n has n in its lowest bits.
  constexpr T kMagic = kFloat ? T(0x1.8p23) : T(0x1.8p52);
  // ln(2) in two parts; the product of n and the first is exact.
  constexpr T kLn2High = kFloat ? T(0x1.63p-1) : T(0x1.62e42feep-1);
  constexpr T kLn2Low = kFloat ? T(-0x1.bd0105c610ca8p-13) : T(0x1.a39ef35793c76p-33);
  constexpr int kTerms = kFloat ? 7 : 13;
  const V t = clamp(x, V::set1(kLowest), V::set1(kHighest));
  const V bits = V::fma(t, V::set1(T(0x1.71547652b82fep0)), V::set1(kMagic));
  const V n = V::add(bits, V::set1(-kMagic));
  const V r = V::fma(n, V::set1(-kLn2Low), V::fma(n, V::set1(-kLn2High), t));
  V sum = V::set1(1);
  for (int i = kTerms; i > 0; --i)  // 1 + r / i * sum
    sum = V::fma(multiplied(r, V::set1(T(1) / T(i))), sum, V::set1(1));
  return multiplied(sum, V::power_of_two(bits));
}
template <class V>
MNV2_INLINE V one_plus_exp_of_minus(V v) {
  return V::add(V::set1(1), exponential(multiplied(v, V::set1(-1))));
}
template <class V>
MNV2_INLINE V hardsigmoid(V v) {
  using T = typename V::T;
  return multiplied(relu6(V::add(v, V::set1(3))), V::set1(T(1) / T(6)));
}

template <class V>
MNV2_INLINE V activated(V v, Activation a) {
  switch (a) {
    case Activation::kRelu6:
    case Activation::kRelu:
    case Activation::kIdentity: {
      const Clip<typename V::T> clip(a);
      return clamp(v, V::set1(clip.low), V::set1(clip.high));
    }
    case Activation::kHardswish:
      return multiplied(v, hardsigmoid(v));
    case Activation::kSilu:
      return V::div(v, one_plus_exp_of_minus(v));
  }
  __builtin_unreachable();
}

// What clipping leaves to do of an activation, in place, of the vectors at `count` places that lie `step`
// elements apart.
template <class V, class S>
__attribute__((noinline)) void activate(S* p, int64_t count, int64_t step, Activation a) {
  switch (a) {
    case Activation::kRelu6:
    case Activation::kRelu:
    case Activation::kIdentity:
      return;
    case Activation::kHardswish:
      return transform<V>(p, count, step, [](V v) { return activated(v, Activation::kHardswish); });
    case Activation::kSilu:
      return transform<V>(p, count, step, [](V v) { return activated(v, Activation::kSilu); });
  }
}

template <class V>
MNV2_INLINE V gate_of(V v, Gate gate) {
  switch (gate) {
    case Gate::kHardsigmoid:
      return hardsigmoid(v);
    case Gate::kSigmoid:
      return V::div(V::set1(1), one_plus_exp_of_minus(v));
  }
  __builtin_unreachable();
}

}  // namespace
