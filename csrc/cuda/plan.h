// The planner for GPUs: block shape + GPU -> how one call is tiled. Pure; no CUDA, no torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../block.h"
#include "precision.h"

namespace mnv2_fused::cuda {

// Limits of a device. All but the last two come from its properties.
struct Gpu {
  int64_t capability;  // 90 for compute capability 9.0
  int64_t multiprocessors;
  int64_t shared_per_block;           // most bytes of shared memory that a block may ask for
  int64_t shared_per_multiprocessor;  // bytes
  int64_t threads_per_multiprocessor;
  int64_t l2_bytes;
  double clock;             // cycles of a multiprocessor, a second
  double memory_bandwidth;  // bytes of global memory, a second
  bool operator==(const Gpu&) const = default;
};

// One thread block computes all output channels of a tile, or those of its out block. Outputs are cut
// into strips, one column wide; eight strips are a warp's (drawn in kernel/tile.cuh).
struct Plan {
  int64_t images, tile_rows, tile_cols;  // outputs of a thread block, dilated apart
  int64_t strip_rows;                    // 2 or 4
  int64_t group;                         // expanded channels at a time, a multiple of kPanel
  int64_t splits;                        // thread blocks that share a tile's groups
  int64_t out_panels;                    // panels of output channels that a kernel's registers hold
  int64_t out_blocks;                    // thread blocks that share the output channels
  int64_t warps;                         // of a thread block
  int64_t thread_blocks;                 // in all
  int64_t shared_bytes;                  // of a thread block
  int64_t blocks_per_sm;                 // thread blocks that a multiprocessor runs at once
  int64_t partial_bytes;                 // of global memory, for the sums of each split
  int64_t squeeze_bytes;                 // of global memory, for d's sums and the gate
  int64_t bytes_never_written;           // the expanded tensors that an unfused block writes
  int64_t bytes;                         // that have to move between global memory and the GPU
  double recompute;                      // expanded pixels computed / expanded pixels needed
  double seconds;                        // estimated
};

// The plan of least estimated time. Throws std::invalid_argument when none fits.
Plan make_plan(const BlockShape& shape, Precision precision, const Gpu& gpu);

// The plan with images, tile_rows, tile_cols, strip_rows, group and splits forced.
Plan make_plan(const BlockShape& shape, Precision precision, const Gpu& gpu,
               const std::vector<int64_t>& forced);

// Why the kernel cannot take this shape in this precision on such a GPU; empty when it can.
std::string unsupported(const BlockShape& shape, Precision precision, int64_t capability);

}  // namespace mnv2_fused::cuda
