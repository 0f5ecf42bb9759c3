// The twin of csrc/cuda/kernel/device.cuh that a CPU can run: the same functions, checked and slow.
#pragma once

#include <bit>
#include <cmath>

#include "thread_block.h"

namespace mnv2_fused::cuda {

#define MNV2_DEVICE inline
#define MNV2_KERNEL(threads, blocks) void

constexpr bool kFewRegisters = false;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

template <class V>
V load_shared(int offset, emulation::Site site = emulation::Site::current()) {
  V value;
  emulation::machine->at(site).read_shared(offset, sizeof(V), &value);
  return value;
}
template <class V>
void store_shared(int offset, V value, emulation::Site site = emulation::Site::current()) {
  emulation::machine->at(site).write_shared(offset, sizeof(V), &value);
}

inline void grid_dependency_wait(emulation::Site site = emulation::Site::current()) {
  emulation::machine->at(site).grid_dependency_wait();
}
inline void launch_dependents(emulation::Site site = emulation::Site::current()) {
  emulation::machine->at(site).launch_dependents();
}

template <class V>
V load_global(const V* at, emulation::Site site = emulation::Site::current()) {
  V value;
  emulation::machine->at(site).read_global(at, sizeof(V), &value, emulation::Through::kConstants);
  return value;
}
template <class V>
V load_written(const V* at, emulation::Site site = emulation::Site::current()) {
  V value;
  emulation::machine->at(site).read_global(at, sizeof(V), &value, emulation::Through::kData);
  return value;
}
template <class V>
void store_global(V* at, V value, emulation::Site site = emulation::Site::current()) {
  emulation::machine->at(site).write_global(at, sizeof(V), &value);
}

inline void copy_16(int offset, const void* from,
                    emulation::Site site = emulation::Site::current()) {
  emulation::machine->at(site).start_copy(offset, from);
}
inline void wait_copies(emulation::Site site = emulation::Site::current()) {
  emulation::machine->at(site).finish_copies();
}

inline int block_index() { return int(blockIdx.x); }
inline int thread_index() { return int(threadIdx.x); }

inline void barrier(emulation::Site site = emulation::Site::current()) {
  emulation::machine->at(site).barrier(false);
}

inline bool barrier_any(bool mine, emulation::Site site = emulation::Site::current()) {
  return emulation::machine->at(site).barrier(mine);
}

inline uint32_t bits_of(float v) { return std::bit_cast<uint32_t>(v); }
inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }

namespace emulation {

template <class V>
struct Exchange {
  V value;
  int lane;
  V result;
};
template <class V>
void exchange_lanes(void* const* lanes) {
  const auto of = [&](int lane) -> Exchange<V>& { return *static_cast<Exchange<V>*>(lanes[lane]); };
  for (int lane = 0; lane < kWarp; ++lane) {
    if (of(lane).lane < 0 || of(lane).lane >= kWarp) fail("exchanges with lane ", of(lane).lane);
    of(lane).result = of(of(lane).lane).value;
  }
}

inline float widened_half(uint32_t half) {
  const uint32_t magnitude = (half & 0x7fff) << 13;
  const bool finite = (half & 0x7c00) != 0x7c00;
  // The scale between the exponents' biases, by which denormal numbers come out right, too.
  const float v = finite ? float_of(magnitude) * 0x1p112f : float_of(magnitude | 0x7f800000);
  return half & 0x8000 ? -v : v;
}
inline uint32_t rounded_half(float v) {
  const uint32_t sign = bits_of(v) >> 16 & 0x8000, magnitude = bits_of(v) & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= bits_of(65520.f)) return sign | 0x7c00;
  // Half precision's denormal numbers are as far apart as floats from 0.5 to 1.
  if (magnitude < bits_of(0x1p-14f))
    return sign | (bits_of(float_of(magnitude) + .5f) - bits_of(.5f));
  return sign | ((magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13);
}
inline uint32_t rounded_bfloat16(float v) {
  return v != v ? 0x7fff : (bits_of(v) + 0x7fff + (bits_of(v) >> 16 & 1)) >> 16;
}

}  // namespace emulation

inline float shuffle(float value, int lane, emulation::Site site = emulation::Site::current()) {
  emulation::Exchange<float> operands{value, lane, 0};
  emulation::machine->at(site).warp_operation("shuffle", &operands,
                                              emulation::exchange_lanes<float>);
  return operands.result;
}
inline uint32_t shuffle_xor(uint32_t value, int mask,
                            emulation::Site site = emulation::Site::current()) {
  const int lane = threadIdx.x % emulation::kWarp;
  emulation::Exchange<uint32_t> operands{value, lane ^ mask, 0};
  emulation::machine->at(site).warp_operation("shuffle_xor", &operands,
                                              emulation::exchange_lanes<uint32_t>);
  return operands.result;
}

inline float2 unpack_half(uint32_t v) {
  return {emulation::widened_half(v & 0xffff), emulation::widened_half(v >> 16)};
}
inline float2 unpack_bfloat16(uint32_t v) { return {float_of(v << 16), float_of(v & 0xffff0000u)}; }
inline uint32_t pack_half(float low, float high) {
  return emulation::rounded_half(low) | emulation::rounded_half(high) << 16;
}
inline uint32_t pack_bfloat16(float low, float high) {
  return emulation::rounded_bfloat16(low) | emulation::rounded_bfloat16(high) << 16;
}

inline float relu6(float v) { return v != v ? v : std::min(std::max(v, 0.f), 6.f); }
inline float clip(float v, float low, float high) {
  return v != v ? v : std::min(std::max(v, low), high);
}
inline float exponential(float v) { return std::exp(v); }
inline float fast_divide(float a, float b) { return a / b; }
inline uint32_t pack_relu6_half(float low, float high) {
  return pack_half(relu6(low), relu6(high));
}
inline uint32_t pack_relu6_bfloat16(float low, float high) {
  return pack_bfloat16(relu6(low), relu6(high));
}

// Ties away from zero.
inline uint32_t round_tf32(uint32_t v) {
  return (v & 0x7fffffff) > 0x7f800000 ? 0x7fffffff : (v + 0x1000) & ~0x1fffu;
}

namespace emulation {

struct Fragments {
  float* c;
  uint32_t a[4], b[2];
};
// mma.m16n8k8 or k16, as lane 4 g + t holds it: in each register of a and b the n numbers that start
// at row g (+ 8) and k = n t (+ 4 n); of c, two at column 2 t.
template <int registers, int n, auto unpack>
void multiply(void* const* lanes) {
  constexpr int depth = 2 * n * registers;
  float a[16][depth], b[depth][8], c[16][8];
  const auto each = [&](auto&& visit) {
    for (int lane = 0; lane < kWarp; ++lane)
      visit(lane / 4, lane % 4, *static_cast<Fragments*>(lanes[lane]));
  };
  each([&](int g, int t, const Fragments& of) {
    for (int r = 0; r < registers; ++r) {
      const float2 v = unpack(of.a[r]);
      for (int i = 0; i < n; ++i) a[g + r % 2 * 8][n * t + r / 2 * 4 * n + i] = i ? v.y : v.x;
    }
    for (int r = 0; r < registers / 2; ++r) {
      const float2 v = unpack(of.b[r]);
      for (int i = 0; i < n; ++i) b[n * t + r * 4 * n + i][g] = i ? v.y : v.x;
    }
    for (int i = 0; i < 4; ++i) c[g + i / 2 * 8][2 * t + i % 2] = of.c[i];
  });
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < depth; ++k)
      for (int col = 0; col < 8; ++col) c[row][col] += a[row][k] * b[k][col];
  each([&](int g, int t, const Fragments& of) {
    for (int i = 0; i < 4; ++i) of.c[i] = c[g + i / 2 * 8][2 * t + i % 2];
  });
}

inline float2 truncated_tf32(uint32_t v) { return {float_of(v & ~0x1fffu), 0}; }

}  // namespace emulation

inline void mma_half_8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b,
                       emulation::Site site = emulation::Site::current()) {
  emulation::Fragments operands{c, {a0, a1}, {b}};
  emulation::machine->at(site).warp_operation("mma_half_8", &operands,
                                              emulation::multiply<2, 2, unpack_half>);
}
inline void mma_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                     emulation::Site site = emulation::Site::current()) {
  emulation::Fragments operands{c, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulation::machine->at(site).warp_operation("mma_half", &operands,
                                              emulation::multiply<4, 2, unpack_half>);
}
inline void mma_bfloat16_8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b,
                           emulation::Site site = emulation::Site::current()) {
  emulation::Fragments operands{c, {a0, a1}, {b}};
  emulation::machine->at(site).warp_operation("mma_bfloat16_8", &operands,
                                              emulation::multiply<2, 2, unpack_bfloat16>);
}
inline void mma_bfloat16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         emulation::Site site = emulation::Site::current()) {
  emulation::Fragments operands{c, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulation::machine->at(site).warp_operation("mma_bfloat16", &operands,
                                              emulation::multiply<4, 2, unpack_bfloat16>);
}
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                     emulation::Site site = emulation::Site::current()) {
  emulation::Fragments operands{c, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulation::machine->at(site).warp_operation("mma_tf32", &operands,
                                              emulation::multiply<4, 1, emulation::truncated_tf32>);
}

}  // namespace mnv2_fused::cuda
