// A vector type's kernels, together with its multiply-add peak: what they are measured against.
// Included like kernel.h.
#pragma once

namespace {

// Independent chains: enough for 2 ports x 5 cycles of latency, few enough for 16 registers.
constexpr int kChains = 12;

template <class V, class S>
__attribute__((noinline)) typename V::T multiply_add(int64_t rounds) {
  using E = Elements<V, S>;
  V acc[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) acc[i] = V::set1(typename V::T(i));
  const S zeros[2 * V::kLanes]{};
  auto a = E::template value<0>(zeros), b = E::template weights<0>(zeros);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) {
      acc[i] = E::multiply_add(a, b, acc[i]);
      asm volatile("" : V_KEEP(acc[i].v));  // keeps the compiler from joining the chains
    }
  }
  V sum = acc[0];
#pragma GCC unroll 16
  for (int i = 1; i < kChains; ++i) sum = V::add(sum, acc[i]);
  typename V::T lanes[V::kLanes];
  sum.store(lanes);
  return lanes[0];
}

template <class V, class S>
constexpr Kernels<S> kernels_of() {
  constexpr int64_t kProducts = kDepth<S> / Elements<V, S>::kParts;
  return {&run_tile<V, S>,     &add_row<V, S>,
          &mean_of_rows<V>,    &activate_all<V>,
          &gate_all<V>,        &run_pointwise<V, S>,
          &multiply_add<V, S>, 2 * V::kLanes * kProducts * kChains,
          V::kLanes,           kProducts};
}

}  // namespace
