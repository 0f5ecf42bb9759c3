// The depthwise convolution: d = activation(depthwise(e) + b_d), of one panel and one strip.
#pragma once

#include "load.cuh"
#include "product.cuh"

namespace mnv2_fused::cuda {

// One panel's depthwise for a lane, as offsets in shared memory.
struct DepthwiseAt {
  int e;       // the quad at the strip's first row and column
  int e_line;  // bytes of a row of e
  int odd;     // bytes from a column to the one beside it
  int bias;
};

MNV2_DEVICE void multiply_add(float4& sum, const float4& a, const float4& b) {
  sum.x += a.x * b.x;
  sum.y += a.y * b.y;
  sum.z += a.z * b.z;
  sum.w += a.w * b.w;
}

// Bytes from the first column of the windows to column `col`; see e_column for stride 2.
template <int kStride, int kPixel>
MNV2_DEVICE int beside_first(int col, int odd) {
  return kStride == 1 ? col * kPixel : col == 1 ? odd : (col == 3 ? odd : 0) + col / 2 * kPixel;
}

// Widened loads and multiply-adds of float. finish(row, sum): a quad of d for each row of the strip.
// taps: offset of the panel's taps for the lane's quad.
template <class C, class Finish>
MNV2_DEVICE void depthwise(typename C::Quad (&d)[C::kTiles][2], const DepthwiseAt& at, int taps,
                           Finish finish) {
  using Quad = typename C::Quad;
  constexpr int kKernel = C::kKernel, kStride = C::kStride, kRows = C::kRows;
  float4 sum[kRows];
  sum[0] = load_shared<float4>(at.bias);
#pragma unroll
  for (int o = 1; o < kRows; ++o) sum[o] = sum[0];
  // Column by column, which leaves only one column's taps in registers. For two-byte elements this path
  // is the exception for infinite input, which gets no registers of its own.
#pragma unroll sizeof(Quad) == 8 || kKernel == 5 ? 1 : 3
  for (int col = 0; col < kKernel; ++col) {
    const int beside = beside_first<kStride, C::kPixel>(col, at.odd);
    float4 tap[kKernel];
#pragma unroll
    for (int k = 0; k < kKernel; ++k)
      tap[k] = load_shared<float4>(taps + (kKernel * k + col) * int(kPanel) * 4);
#pragma unroll
    for (int row = 0; row < (kRows - 1) * kStride + kKernel; ++row) {
      const float4 v = C::Traits::widen(load_shared<Quad>(at.e + row * at.e_line + beside));
#pragma unroll
      for (int o = 0; o < kRows; ++o) {
        const int k = row - o * kStride;
        if (k >= 0 && k < kKernel) multiply_add(sum[o], v, tap[k]);
      }
    }
  }
#pragma unroll
  for (int o = 0; o < kRows; ++o) d[o / 2][o % 2] = finish(o, sum[o]);
}

// The taps as diagonal matrices in the fragments of a product. Lane 4 g + t has rows 2 t and 2 t + 1 of
// column g, so only lanes with g / 2 == t have anything. Column g is channel 4 (g / 2) + 2 j + g % 2, of
// the first (j = 0) or second pair of a quad. Words of each g, for each column of the window:
//
//   | j = 0: rows 0 to 3 | j = 1: rows 0 to 3 |  and, of five rows,  | j = 0: row 4 | j = 1: row 4 | - | - |
template <class C>
MNV2_DEVICE void make_taps(const SharedLayout& l, const Group& group) {
  constexpr int kKernel = C::kKernel, kColumn = C::kColumnWords, kWords = kKernel * kColumn;
  for (int i = threadIdx.x; i < group.panels * 8 * kWords; i += thread_count()) {
    const int word = i % kWords, g = i / kWords % 8, panel = i / (8 * kWords);
    const int col = word / kColumn, within = word % kColumn;
    const int row = within < 8 ? within % 4 : 4, j = within < 8 ? within / 4 : within - 8;
    if (row >= kKernel || j > 1) continue;
    const int tap = panel * C::kTaps + row * kKernel + col;
    const int channel = g / 2 * 4 + j * 2 + g % 2;
    const float w =
        load_shared<float>(group.stage + l.w_depthwise + (tap * int(kPanel) + channel) * 4);
    const int at = l.taps + ((panel * 8 + g) * C::kTapWords + word) * 4;
    store_shared(at, g % 2 ? C::Traits::pack(0, w) : C::Traits::pack(w, 0));
  }
}

// The same as `depthwise` on tensor cores: a tap of 8 channels is a product with a diagonal matrix. Seven
// of eight terms are zeros, yet it takes a third of the instructions of widened multiply-adds. taps:
// offset of those of the lane's g.
template <class C, class Finish>
MNV2_DEVICE void depthwise_product(typename C::Quad (&d)[C::kTiles][2], const DepthwiseAt& at,
                                   int taps, Finish finish) {
  using N = typename C::Traits;
  using Quad = typename C::Quad;
  constexpr int kKernel = C::kKernel, kStride = C::kStride, kTiles = C::kTiles;
  static_assert(kKernel == 3 || kKernel == 5, "a new kernel size needs its products here");
  constexpr int kLines = (C::kRows - 1) * kStride + kKernel, kColumn = C::kColumnWords * 4;
  const int lane = lane_index();
  Sums c[kTiles];
  const float4 b = load_shared<float4>(at.bias);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) start_at(c[i], b);
  const uint32_t diagonal = lane / 8 == lane % 4 ? ~0u : 0u;
#pragma unroll kFewRegisters || kKernel == 5 ? 1 : 3
  for (int col = 0; col < kKernel; ++col) {
    const int beside = beside_first<kStride, C::kPixel>(col, at.odd);
    Quad q[kLines];
#pragma unroll
    for (int line = 0; line < kLines; ++line)
      q[line] = load_shared<Quad>(at.e + line * at.e_line + beside);
    const uint4 w0 = load_shared<uint4>(taps + col * kColumn),
                w1 = load_shared<uint4>(taps + col * kColumn + 16);
    uint2 fifth = {};
    if constexpr (kKernel == 5) fifth = load_shared<uint2>(taps + col * kColumn + 32);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const Quad* const up = q + 2 * i * kStride;
      const Quad* const low = up + kStride;
      const uint32_t first[4] = {up[0].x, low[0].x, up[1].x, low[1].x};
      const uint32_t second[4] = {up[0].y, low[0].y, up[1].y, low[1].y};
      N::mma(c[i][0], first, w0.x & diagonal, w0.y & diagonal);
      if constexpr (kKernel == 3) {
        N::mma_8(c[i][0], up[2].x, low[2].x, w0.z & diagonal);
        N::mma(c[i][1], second, w1.x & diagonal, w1.y & diagonal);
        N::mma_8(c[i][1], up[2].y, low[2].y, w1.z & diagonal);
      } else {
        const uint32_t third[4] = {up[2].x, low[2].x, up[3].x, low[3].x};
        const uint32_t fourth[4] = {up[2].y, low[2].y, up[3].y, low[3].y};
        N::mma(c[i][0], third, w0.z & diagonal, w0.w & diagonal);
        N::mma_8(c[i][0], up[4].x, low[4].x, fifth.x & diagonal);
        N::mma(c[i][1], second, w1.x & diagonal, w1.y & diagonal);
        N::mma(c[i][1], fourth, w1.z & diagonal, w1.w & diagonal);
        N::mma_8(c[i][1], up[4].y, low[4].y, fifth.y & diagonal);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int lower = 0; lower < 2; ++lower)
      d[i][lower] = finish(2 * i + lower, quad_of(c[i], lower));
  }
}

}  // namespace mnv2_fused::cuda
