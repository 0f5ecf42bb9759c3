// The multiply-add peak of a vector type: what the kernel is measured against. Included like
// kernel.h.
#pragma once

namespace {

// Independent chains: enough for 2 ports x 5 cycles of latency, few enough for 16 registers.
constexpr int kChains = 12;

template <class V>
__attribute__((noinline)) float multiply_add(int64_t rounds) {
  V acc[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) acc[i] = V::set1(float(i));
  V a = V::set1(0.5f), b = V::set1(0.25f);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) {
      acc[i] = V::fma(a, acc[i], b);
      asm volatile("" : V_KEEP(acc[i].v));  // keeps the compiler from joining the chains
    }
  }
  V sum = acc[0];
#pragma GCC unroll 16
  for (int i = 1; i < kChains; ++i) sum = V::add(sum, acc[i]);
  float lanes[V::kLanes];
  sum.store(lanes);
  return lanes[0];
}

}  // namespace
