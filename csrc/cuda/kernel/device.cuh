// Operations of a GPU beyond C++: shared memory, asynchronous copies, tensor cores, packed numbers.
// tests/cuda_emulation has a twin of this file that a CPU can run.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace mnv2_fused::cuda {

#define MNV2_DEVICE __device__ __forceinline__
#define MNV2_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

extern __shared__ __align__(128) char shared_memory[];

// Compilers for generations from 10.0 on fit less into the same number of registers.
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

// Wait for the end of the kernel before this one in the stream: from 9.0 on a kernel may start while the
// one before it ends. Before this call nothing may be read that the kernel before may have written, and
// nothing may be written that the kernel before may read.
MNV2_DEVICE void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Permission for the next kernel to start, once all thread blocks have called this or ended. Only after
// grid_dependency_wait(): no kernel may run beside the last but one.
MNV2_DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Weights: global memory that no kernel of this call writes.
template <class V>
MNV2_DEVICE V load_global(const V* at) {
  return __ldg(at);
}
// Global memory that an earlier kernel may have written, and that no thread of this launch writes. Loads
// avoid the cache for constants, which may hold data from before the start of this kernel.
template <class V>
MNV2_DEVICE V load_written(const V* at) {
  return *at;
}
template <class V>
MNV2_DEVICE void store_global(V* at, V value) {
  *at = value;
}

// Asynchronous copy of 16 bytes from global to shared memory, both aligned; see wait_copies.
MNV2_DEVICE void copy_16(int offset, const void* from) {
#if __CUDA_ARCH__ >= 800
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared_memory + offset));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#else
  *reinterpret_cast<uint4*>(shared_memory + offset) = __ldg(static_cast<const uint4*>(from));
#endif
}
// Wait for all copies of this thread. Other threads see the data after the next barrier.
MNV2_DEVICE void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// blockIdx.x and threadIdx.x, read again at each call, so that no register holds results of them from
// one use to the next.
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

// Barrier of all threads of the block.
MNV2_DEVICE void barrier() { __syncthreads(); }
// Barrier that returns whether `mine` is true in any thread.
MNV2_DEVICE bool barrier_any(bool mine) { return __syncthreads_or(mine); }

// Exchanges among the 32 lanes of a warp; every lane must call.
MNV2_DEVICE float shuffle(float value, int lane) { return __shfl_sync(~0u, value, lane); }
MNV2_DEVICE uint32_t shuffle_xor(uint32_t value, int mask) {
  return __shfl_xor_sync(~0u, value, mask);
}

// Products of a warp on tensor cores, c += a b: fragments as PTX lays them out over the lanes, sums in
// float. m16n8k8.
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
// m16n8k8 of floats; the tensor core ignores their last 13 bits.
MNV2_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Pairs of numbers in a register, the first in the low half. pack rounds to nearest even.
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
// Clip to any bounds that keeps a NaN.
MNV2_DEVICE float clip(float v, float low, float high) {
#if __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(low));
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(high));
  return v;
#else
  return v != v ? v : fminf(fmaxf(v, low), high);
#endif
}
// Fast versions: all bits of a float but the last two or three, where the result is not 0 or infinite.
MNV2_DEVICE float exponential(float v) { return __expf(v); }
MNV2_DEVICE float fast_divide(float a, float b) { return __fdividef(a, b); }

// ReLU6 of two numbers, then packed: clamping and rounding commute.
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

// Nearest float whose last 13 bits are zeros, the bits that the tensor core ignores.
MNV2_DEVICE uint32_t round_tf32(uint32_t v) {
#if __CUDA_ARCH__ >= 800
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(v) : "f"(__uint_as_float(v)));
#endif
  return v;
}

MNV2_DEVICE uint32_t bits_of(float v) { return __float_as_uint(v); }
MNV2_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

}  // namespace mnv2_fused::cuda
