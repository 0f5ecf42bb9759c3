// The layers that a sequence op names, checked; the same on every device.
#pragma once

#include <vector>

#include "tensors.h"

namespace mnv2_fused {

// What `layers` of a sequence names (LayerKind in ops.py).
enum LayerKind : int64_t {
  kBlock,
  kBlockWithoutExpand,
  kStemAndBlock,
  kPointwise,
  kPooled,
  kLinear
};

struct LayerShape {
  LayerKind kind;
  BlockShape block;
  PointwiseShape pointwise;
  Sizes y;

  bool is_block() const { return kind < kPointwise; }
  int64_t y_elements() const { return y[0] * y[1] * y[2] * y[3]; }
};

// Shapes of `layers`, the first of which takes x. Fails where the values are not what ops.py says, or no
// kernel takes one of the layers.
std::vector<LayerShape> layer_shapes(IntHeaderOnlyArrayRef layers, const Sizes& x);

// Fails, naming value and limit, where no kernel takes a block on x.
void check(const BlockShape& shape, const Sizes& x);
PointwiseShape pointwise_shape(const Sizes& x, int64_t out, Activation activation, bool pool);

}  // namespace mnv2_fused
