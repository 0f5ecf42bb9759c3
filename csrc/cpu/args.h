// Arguments of the CPU kernels. Plain data: no torch.
#pragma once

#include "../block.h"

namespace mnv2_fused::cpu {

// A bfloat16 element as it is stored.
struct BFloat16 {
  uint16_t bits;
};
// Type in which products of S are summed.
template <class S>
struct ComputeOf {
  using T = S;
};
template <>
struct ComputeOf<BFloat16> {
  using T = float;
};
template <class S>
using Compute = typename ComputeOf<S>::T;
// Input channels of a product that lie side by side in packed weights: [C/16][K/depth][16][depth].
template <class S>
constexpr int64_t depth = sizeof(Compute<S>) / sizeof(S);

// Packed weights are [C/16][K][16], for BFloat16 [C/16][ceil(K/2)][16][2].
template <class S, class T = Compute<S>>
struct BlockArgs {
  BlockShape shape;
  const S* x;                     // [N, H, W, C_in] by the strides below
  int64_t x_image, x_row, x_col;  // element strides
  int64_t x_channel;              // 1 except for a stem
  const S* w_expand;           // K = C_in, of a stem 9 * C_in (C_in rounded up to an even number)
  const T* b_expand;           // [E/16 * 16]
  const T* w_depthwise;        // [E/16][taps][16]
  int64_t w_depthwise_panel;   // elements between its panels
  const T* b_depthwise;        // [E/16 * 16]
  const S* w_project;          // K = E
  const T* b_project;          // [C_out]
  S* y;                        // [N, H', W', C_out], dense
  T* partial;                  // [groups, N, H', W', C_out], when the plan splits the groups
  const void* next = nullptr;  // weights that the next layer reads first, to fetch meanwhile
  int64_t next_bytes = 0;
  // Of a block with a squeeze-and-excite, whose depthwise result is d:
  Pass pass = Pass::kLast;
  const T* gate = nullptr;  // [N, E], the last pass's factors of d
  S* cached = nullptr;      // [N, H', W', E/16 * 16] in the tiles' order: d, from pass to pass
  T* pooled = nullptr;      // [N, H', tiles across, E/16 * 16], d's sums over each tile's rows
};

template <class S, class T = Compute<S>>
struct PointwiseArgs {
  PointwiseShape shape;
  int64_t parts;                  // tasks that share an image's output channels
  const S* x;                     // [N, H, W, C_in] by the strides below, channels contiguous
  int64_t x_image, x_row, x_col;  // element strides
  const S* weight;                // K = C_in
  const T* bias;                  // [C_out/16 * 16]
  S* y;                           // [N, H, W, C_out], dense; [N, C_out] when pooled
  T* sums;                     // [N, C_out] of a large pooled image: y itself unless it is narrower
  const void* next = nullptr;  // weights that the next layer reads first, to fetch meanwhile
  int64_t next_bytes = 0;
};

}  // namespace mnv2_fused::cpu
