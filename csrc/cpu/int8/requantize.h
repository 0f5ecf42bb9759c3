// From int32 sums to uint8, in float32 operations of one order: mnv2_fused/int8/layers.py has their twins.
// Products and sums stay apart, since a fused multiply-add rounds otherwise: V::F::mul keeps its result.
#pragma once

namespace {

// Vectors of a panel.
template <class V>
constexpr int64_t kPerPanel = kPanel / V::kLanes;

template <class V>
MNV2_INLINE typename V::F exponential(typename V::F v) {
  using F = typename V::F;
  v = F::min(F::max(v, F::set1(-87.0f)), F::set1(87.0f));
  const V n = F::round(F::mul(v, F::set1(1.4426950408889634f)));
  const F whole = V::to_float(n);
  F r = F::sub(v, F::mul(whole, F::set1(0.693359375f)));
  r = F::sub(r, F::mul(whole, F::set1(-2.12194440054690583e-4f)));
  F p = F::set1(1.9875691500e-4f);
  for (const float c :
       {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f})
    p = F::add(F::mul(p, r), F::set1(c));
  p = F::add(F::add(F::mul(p, F::mul(r, r)), r), F::set1(1.0f));
  return F::mul(p, V::power_of_two(n));
}
template <class V>
MNV2_INLINE typename V::F ramp(typename V::F v) {  // min(max(v + 3, 0), 6)
  using F = typename V::F;
  return F::min(F::max(F::add(v, F::set1(3.0f)), F::set1(0.0f)), F::set1(6.0f));
}
template <class V>
MNV2_INLINE typename V::F sigmoid_divisor(typename V::F v) {
  using F = typename V::F;
  return F::add(exponential<V>(F::neg(v)), F::set1(1.0f));
}

template <class V>
MNV2_INLINE typename V::F function_of(typename V::F v, Activation a) {
  using F = typename V::F;
  if (a == Activation::kHardswish) return F::mul(F::mul(v, ramp<V>(v)), F::set1(float(1.0 / 6)));
  return F::div(v, sigmoid_divisor<V>(v));  // kSilu: the driver lets no other through
}

// What bounds a stage's values: the conversion to bytes alone, low and high, or these behind a function.
enum class Bound { kSaturation, kClip, kFunction };

// Calls f(std::integral_constant<Bound, ...>). exact: whether values are summed before they are bytes.
template <class F>
MNV2_INLINE void with_bound(const Stage& s, bool exact, F f) {
  if (s.activation.kind != Activation::kIdentity)
    return f(std::integral_constant<Bound, Bound::kFunction>{});
  if (s.saturates && !exact) return f(std::integral_constant<Bound, Bound::kSaturation>{});
  f(std::integral_constant<Bound, Bound::kClip>{});
}

// q - zero, by saturation not yet within its bounds.
template <class V, Bound kBound>
MNV2_INLINE V requantize(V sum, const Stage& s, int64_t channel, typename V::F added, bool adds) {
  using F = typename V::F;
  F v = F::mul(V::to_float(sum), F::load(s.multiplier + channel));
  if constexpr (kBound == Bound::kFunction)
    v = F::mul(function_of<V>(v, s.activation.kind), F::load(s.scale + channel));
  if (adds) v = F::add(v, added);
  if constexpr (kBound != Bound::kSaturation)
    v = F::min(F::max(v, F::load(s.low + channel)), F::load(s.high + channel));
  return F::round(v);
}
// The same of several vectors of one channel. Functions run in a loop, since unrolled they are long.
template <class V, Bound kBound, int kCount>
MNV2_INLINE void requantize(V (&sums)[kCount], const Stage& s, int64_t channel) {
  const auto one = [&](V sum) MNV2_INLINE_LAMBDA {
    return requantize<V, kBound>(sum, s, channel, V::F::set1(0), false);
  };
  if constexpr (kBound == Bound::kFunction) {
    int32_t values[kCount * V::kLanes];
    unrolled<kCount>([&](auto i) MNV2_INLINE_LAMBDA { sums[i].store(values + i * V::kLanes); });
    for (int32_t* at = values; at != values + kCount * V::kLanes; at += V::kLanes)
      one(V::load(at)).store(at);
    unrolled<kCount>([&](auto i) MNV2_INLINE_LAMBDA { sums[i] = V::load(values + i * V::kLanes); });
  } else {
    unrolled<kCount>([&](auto i) MNV2_INLINE_LAMBDA { sums[i] = one(sums[i]); });
  }
}

}  // namespace
