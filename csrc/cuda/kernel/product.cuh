// 1x1 products of a warp: 16 pixels x 16 channels at a time.
#pragma once

#include "precision.cuh"

namespace mnv2_fused::cuda {

// Sums of a product over 16 channels by 16: of columns 4 t + 2 j and 4 t + 2 j + 1 for row lane / 4,
// then for that row + 8.
using Sums = float[2][4];

// Product of two-byte elements on tensor cores.
template <Precision kPrecision, int kTiles>
MNV2_DEVICE void multiply_pairs(Sums (&c)[kTiles],
                                const typename PrecisionTraits<kPrecision>::Quad (&a)[kTiles][2],
                                int w, int lane) {
  const uint4 b = load_shared<uint4>(w + lane * 16);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const uint32_t rows[4] = {a[i][0].x, a[i][1].x, a[i][0].y, a[i][1].y};
    PrecisionTraits<kPrecision>::mma(c[i][0], rows, b.x, b.y);
    PrecisionTraits<kPrecision>::mma(c[i][1], rows, b.z, b.w);
  }
}

// Product of floats on tensor cores, operands rounded to TF32.
template <int kTiles>
MNV2_DEVICE void multiply_tf32(Sums (&c)[kTiles], const uint4 (&a)[kTiles][2], int w, int lane) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint4 b = load_shared<uint4>(w + (j * 32 + lane) * 16);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const uint4 &up = a[i][0], &low = a[i][1];
      const uint32_t first[4] = {round_tf32(up.x), round_tf32(low.x), round_tf32(up.y),
                                 round_tf32(low.y)};
      const uint32_t second[4] = {round_tf32(up.z), round_tf32(low.z), round_tf32(up.w),
                                  round_tf32(low.w)};
      mma_tf32(c[i][j], first, round_tf32(b.x), round_tf32(b.y));
      mma_tf32(c[i][j], second, round_tf32(b.z), round_tf32(b.w));
    }
  }
}

// Multiply-adds of float: 16 terms are summed apart, since a sum over all channels would round each term
// to the size of the whole. Lanes pass each other their operands.
MNV2_DEVICE void multiply_exact(Sums& c, const uint4 (&a)[2], int w, int lane) {
  const int t = lane % 4;
  float row[2][16];
#pragma unroll
  for (int from = 0; from < 4; ++from) {
    const int source = lane - t + from;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float4 v = FloatTraits::widen(a[r]);
      row[r][4 * from] = shuffle(v.x, source);
      row[r][4 * from + 1] = shuffle(v.y, source);
      row[r][4 * from + 2] = shuffle(v.z, source);
      row[r][4 * from + 3] = shuffle(v.w, source);
    }
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int col = 0; col < 2; ++col) {
      float sum[2] = {0, 0};
#pragma unroll
      for (int from = 0; from < 4; ++from) {
        const float4 b = load_shared<float4>(w + (j * 32 + (2 * t + col) * 4 + from) * 16);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          sum[r] += row[r][4 * from] * b.x;
          sum[r] += row[r][4 * from + 1] * b.y;
          sum[r] += row[r][4 * from + 2] * b.z;
          sum[r] += row[r][4 * from + 3] * b.w;
        }
      }
      c[j][col] += sum[0];
      c[j][2 + col] += sum[1];
    }
  }
}

// c += a w for kTiles tiles of 16 rows; a: the lane's quads of row lane / 4 and of that row + 8;
// w: fragments of 16 x 16 weights in shared memory.
template <Precision kPrecision, int kTiles>
MNV2_DEVICE void multiply(Sums (&c)[kTiles],
                          const typename PrecisionTraits<kPrecision>::Quad (&a)[kTiles][2], int w,
                          int lane) {
  if constexpr (kPrecision == Precision::kHalf || kPrecision == Precision::kBFloat16) {
    multiply_pairs<kPrecision, kTiles>(c, a, w, lane);
  } else if constexpr (kPrecision == Precision::kTf32) {
    multiply_tf32<kTiles>(c, a, w, lane);
  } else {
    static_assert(kPrecision == Precision::kFloat32, "a new precision needs its product here");
    static_assert(kTiles == 1, "exact products have no registers for more");
    multiply_exact(c[0], a[0], w, lane);
  }
}

// Quad of the sums of row lane / 4 + 8 lower.
MNV2_DEVICE float4 quad_of(const Sums& c, int lower) {
  return {c[0][2 * lower], c[0][2 * lower + 1], c[1][2 * lower], c[1][2 * lower + 1]};
}

// Sums that start at one quad, in both rows.
MNV2_DEVICE void start_at(Sums& c, const float4& v) {
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    c[0][2 * lower] = v.x;
    c[0][2 * lower + 1] = v.y;
    c[1][2 * lower] = v.z;
    c[1][2 * lower + 1] = v.w;
  }
}

}  // namespace mnv2_fused::cuda
