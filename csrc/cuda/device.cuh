// What the kernel needs of a GPU beyond C++: shared memory, asynchronous copies, tensor cores,
// packed numbers. The tests have a twin of this file that a CPU can run (tests/cuda_emulation).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace mnv2_fused::cuda {

#define MNV2_DEVICE __device__ __forceinline__
#define MNV2_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

extern __shared__ __align__(128) char shared_memory[];

// Compilers for other generations find less room in as many registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kFewRegisters = true;
#else
constexpr bool kFewRegisters = false;
#endif

// Shared memory, by byte offset.
template <class V>
MNV2_DEVICE V load_shared(int offset) {
  return *reinterpret_cast<const V*>(shared_memory + offset);
}
template <class V>
MNV2_DEVICE void store_shared(int offset, V value) {
  *reinterpret_cast<V*>(shared_memory + offset) = value;
}

// From 9.0 on a kernel may start while the one before it in the stream ends. Waits for its end: before
// that, nothing may be read that it may have written, and nothing written that it may read.
MNV2_DEVICE void previous_finishes() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the kernel behind this one start, once all thread blocks have come here or ended. Only after
// previous_finishes(), so that no kernel runs beside the last but one.
MNV2_DEVICE void next_may_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Weights: global memory that no kernel of this call writes.
template <class V>
MNV2_DEVICE V load_global(const V* at) {
  return __ldg(at);
}
// Global memory that a kernel before this one may have written, but no thread of this launch does. Not
// through the cache for constants, which may hold what was there when this kernel started.
template <class V>
MNV2_DEVICE V load_written(const V* at) {
  return *at;
}
template <class V>
MNV2_DEVICE void store_global(V* at, V value) {
  *at = value;
}

// 16 bytes from global to shared memory, both aligned, while the thread goes on; see
// copies_finish.
MNV2_DEVICE void copy_16(int offset, const void* from) {
#if __CUDA_ARCH__ >= 800
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared_memory + offset));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#else
  *reinterpret_cast<uint4*>(shared_memory + offset) = __ldg(static_cast<const uint4*>(from));
#endif
}
// Waits for all copies of this thread. Other threads see them after the next barrier.
MNV2_DEVICE void copies_finish() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// blockIdx.x and threadIdx.x, read anew at each call: what is made of them need not stay in registers
// from one use to the next.
MNV2_DEVICE int block_index() {
  int index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}
MNV2_DEVICE int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// Every thread of the block.
MNV2_DEVICE void barrier() { __syncthreads(); }
// The same; whether any of them says so.
MNV2_DEVICE bool barrier_any(bool mine) { return __syncthreads_or(mine); }

// Among the 32 lanes of a warp, all of which call.
MNV2_DEVICE float from_lane(float value, int lane) { return __shfl_sync(~0u, value, lane); }
MNV2_DEVICE uint32_t exchange(uint32_t value, int mask) {
  return __shfl_xor_sync(~0u, value, mask);
}

// c += a b by a warp: fragments as PTX lays them out over the lanes, sums in float. m16n8k8.
MNV2_DEVICE void mma_half_8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}
// m16n8k16.
MNV2_DEVICE void mma_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  mma_half_8(c, a[0], a[1], b0);
  mma_half_8(c, a[2], a[3], b1);
#endif
}
MNV2_DEVICE void mma_bfloat16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
MNV2_DEVICE void mma_bfloat16_8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
#endif
}
// m16n8k8 of floats, of which the tensor core ignores the last 13 bits.
MNV2_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Two numbers in a register, the first in its low half. pack rounds to nearest even.
MNV2_DEVICE float2 unpack_half(uint32_t v) {
  return __half22float2(*reinterpret_cast<const __half2*>(&v));
}
MNV2_DEVICE float2 unpack_bfloat16(uint32_t v) {
  return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)};
}
MNV2_DEVICE uint32_t pack_half(float low, float high) {
  const __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}
MNV2_DEVICE uint32_t pack_bfloat16(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

// ReLU6 that keeps a NaN, as torch's does.
MNV2_DEVICE float relu6(float v) {
#if __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(v));
  asm("min.NaN.f32 %0, %0, 0f40C00000;" : "+f"(v));
  return v;
#else
  return v != v ? v : fminf(fmaxf(v, 0.f), 6.f);
#endif
}
// The same of any bounds.
MNV2_DEVICE float clip(float v, float low, float high) {
#if __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(low));
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(high));
  return v;
#else
  return v != v ? v : fminf(fmaxf(v, low), high);
#endif
}
// Of a float's precision but for the last two or three bits, where the result is not 0 or infinite.
MNV2_DEVICE float exponential(float v) { return __expf(v); }
MNV2_DEVICE float divide(float a, float b) { return __fdividef(a, b); }

// ReLU6 of two numbers that are packed: clamping and rounding commute.
MNV2_DEVICE uint32_t pack_relu6_half(float low, float high) {
#if __CUDA_ARCH__ >= 800
  uint32_t v;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  asm("min.NaN.f16x2 %0, %0, %1;" : "+r"(v) : "r"(0x46004600u));
  return v;
#else
  return pack_half(relu6(low), relu6(high));
#endif
}
MNV2_DEVICE uint32_t pack_relu6_bfloat16(float low, float high) {
#if __CUDA_ARCH__ >= 800
  uint32_t v;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  asm("min.NaN.bf16x2 %0, %0, %1;" : "+r"(v) : "r"(0x40C040C0u));
  return v;
#else
  return pack_bfloat16(relu6(low), relu6(high));
#endif
}

// The nearest float whose last 13 bits are zeros, as far as the tensor core looks.
MNV2_DEVICE uint32_t round_tf32(uint32_t v) {
#if __CUDA_ARCH__ >= 800
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(v) : "f"(__uint_as_float(v)));
#endif
  return v;
}

MNV2_DEVICE uint32_t bits_of(float v) { return __float_as_uint(v); }
MNV2_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

}  // namespace mnv2_fused::cuda
