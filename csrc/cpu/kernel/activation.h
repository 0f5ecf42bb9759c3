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

// Bounds that an activation clips to; infinite for one that does not clip.
template <class T>
struct Clip {
  T low, high;

  explicit Clip(Activation a)
      : low(is_clip(a) ? T(row_of(a).bounds.low) : -std::numeric_limits<T>::infinity()),
        high(is_clip(a) ? T(row_of(a).bounds.high) : std::numeric_limits<T>::infinity()) {}
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

// Half the complementary error function of a / sqrt(2), for a >= 0: what a normal distribution has
// above a. With s = 4 / (4 + a) it is exp(-a^2 / 2) s P(2 s - 1); P interpolates at Chebyshev's nodes, to
// a relative error of 9e-8 in float and of 2e-16 in double.
template <class V>
MNV2_INLINE V upper_tail(V a) {
  using T = typename V::T;
  // Coefficients of P, the constant first.
  constexpr float kFloat[] = {
      0.1888212818f,   0.1519741489f,     0.09678438987f,    0.04663104608f,  0.01509882836f,
      0.001880313883f, -0.0008690491151f, -0.0003939380203f, 3.233503077e-5f, 4.065407891e-5f};
  constexpr double kDouble[] = {
      0.18882128260393786,     0.15197416049297303,    0.09678435018555673,
      0.046630464489912943,    0.01509914372258702,    0.0018850472417491558,
      -0.00086992308911269442, -0.0004077046156947422, 3.3336051887884281e-5,
      5.7773746687137117e-5,   -4.7691712833005364e-7, -8.7862470328908591e-6,
      1.7864506480482753e-7,   1.4803223555287571e-6,  -1.5622854202251648e-7,
      -2.5605922471413507e-7,  6.6171140316175892e-8,  3.9791098479487257e-8,
      -1.9686736076177095e-8,  -4.3547812948647284e-9, 4.0129856285706312e-9,
      1.0443709631083568e-10,  -4.214620484319719e-10, 3.7341198774887574e-11};
  const auto& coefficients = [&]() -> const auto& {
    if constexpr (sizeof(T) == 4)
      return kFloat;
    else
      return kDouble;
  }();
  constexpr int kCount = sizeof(T) == 4 ? std::size(kFloat) : std::size(kDouble);
  const V s = V::div(V::set1(4), V::add(a, V::set1(4)));
  const V u = V::fma(s, V::set1(2), V::set1(-1));
  V sum = V::set1(coefficients[kCount - 1]);
  for (int i = kCount - 2; i >= 0; --i) sum = V::fma(sum, u, V::set1(coefficients[i]));
  return multiplied(multiplied(s, sum),
                    exponential(multiplied(multiplied(a, V::set1(T(-0.5))), a)));
}

// Formula of an activation that does not clip. NaN passes through each.
template <Activation kind, class V>
MNV2_INLINE V formula(V v, [[maybe_unused]] double negative_slope) {
  using T = typename V::T;
  const V zero = V::set1(0);
  if constexpr (kind == Activation::kHardswish) {
    return multiplied(v, hardsigmoid(v));
  } else if constexpr (kind == Activation::kSilu) {
    return V::div(v, one_plus_exp_of_minus(v));
  } else if constexpr (kind == Activation::kLeakyRelu) {
    return V::fma(V::min(zero, v), V::set1(T(negative_slope)), V::max(zero, v));
  } else if constexpr (kind == Activation::kGelu) {
    // v above 0, less |v| times the normal distribution's part beyond |v|. The bound of 40, past which
    // that part is 0, keeps +inf from 0 * inf.
    const V magnitude = V::max(multiplied(v, V::set1(-1)), V::min(V::set1(40), v));
    return V::fma(multiplied(magnitude, V::set1(-1)), upper_tail(magnitude), V::max(zero, v));
  } else if constexpr (kind == Activation::kGeluTanh) {
    // v / 2 (1 + tanh(u)) = v / (1 + exp(-2 u)), u = sqrt(2 / pi) (v + 0.044715 v^3).
    const V square = V::fma(multiplied(v, v), V::set1(T(0.044715)), V::set1(1));
    constexpr T kTwice = T(1.5957691216057308);  // 2 sqrt(2 / pi)
    return V::div(v, one_plus_exp_of_minus(multiplied(multiplied(v, V::set1(kTwice)), square)));
  } else {
    static_assert(kind != kind, "the activation needs a formula here");
  }
}

// Calls f with the kind as a constant, where it is no clip.
template <class F>
MNV2_INLINE void with_formula(Activation a, F f) {
  switch (a) {
#define MNV2_CASE(kind, ...)                                     \
  case Activation::kind:                                         \
    if constexpr (!is_clip(Activation::kind))                    \
      f(std::integral_constant<Activation, Activation::kind>{}); \
    return;
    MNV2_ACTIVATIONS(MNV2_CASE)
#undef MNV2_CASE
  }
}

template <class V>
MNV2_INLINE V activated(V v, ActivationFunction a) {
  if (is_clip(a.kind)) {
    const Clip<typename V::T> clip(a.kind);
    return clamp(v, V::set1(clip.low), V::set1(clip.high));
  }
  with_formula(a.kind,
               [&](auto kind) MNV2_INLINE_LAMBDA { v = formula<kind()>(v, a.negative_slope); });
  return v;
}

// What clipping leaves to do of an activation, in place, of the vectors at `count` places that lie `step`
// elements apart.
template <class V, class S>
__attribute__((noinline)) void activate(S* p, int64_t count, int64_t step, ActivationFunction a) {
  with_formula(a.kind, [&](auto kind) MNV2_INLINE_LAMBDA {
    transform<V>(p, count, step, [&](V v) { return formula<kind()>(v, a.negative_slope); });
  });
}

template <class V>
MNV2_INLINE V gate_of(V v, Gate gate) {
  switch (gate) {
    case Gate::kHardsigmoid:
      return hardsigmoid(v);
    case Gate::kHardsigmoidFifth: {  // v / 5 + 1 / 2, clipped to [0, 1]
      using T = typename V::T;
      return clamp(V::fma(v, V::set1(T(0.2)), V::set1(T(0.5))), V::set1(0), V::set1(1));
    }
    case Gate::kSigmoid:
      return V::div(V::set1(1), one_plus_exp_of_minus(v));
  }
  __builtin_unreachable();
}

}  // namespace
