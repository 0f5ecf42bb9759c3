// Blocks in a row as one call: places of each block's weights, and memory between blocks. No torch, no
// CUDA.
#pragma once

#include <vector>

#include "call.h"

namespace mnv2_fused::cuda {

struct BlockLayer {
  BlockShape shape;
  Plan plan;
  int64_t weights[kWeights];  // bytes from the start of all weights; -1 for absent ones
};

class Sequence {
 public:
  // plan_of(shape): the plan in this precision.
  template <class F>
  Sequence(const std::vector<BlockShape>& shapes, Precision precision, F plan_of)
      : precision_(precision) {
    for (const BlockShape& s : shapes) {
      BlockLayer& l = layers_.emplace_back(BlockLayer{s, plan_of(s), {}});
      const auto sizes = weight_bytes(s, precision);
      for (size_t i = 0; i < sizes.size(); ++i) {
        l.weights[i] = sizes[i] > 0 ? weights_ : -1;
        weights_ += round_up(sizes[i], kJoined);
      }
      scratch_ = std::max(scratch_, round_up(l.plan.partial_bytes, kJoined) + l.plan.squeeze_bytes);
    }
    for (size_t i = 0; i + 1 < layers_.size(); ++i)
      between_ = std::max(between_, y_bytes(i) + (i > 0 ? y_bytes(i - 1) : 0));
  }

  // Bytes of all weights, and of a call's memory beside its result.
  int64_t weights() const { return weights_; }
  int64_t memory() const { return between_ + scratch_; }

  // Calls launch(layer, call) for each block. Results between blocks lie by turns at the start and at the
  // end of one part of `memory`:
  //
  //   | y of blocks 0, 2, ... ->      <- y of blocks 1, 3, ... | scratch of one block |
  template <class F>
  void run(Input x, const char* weights, char* memory, void* y, F launch) const {
    for (size_t i = 0; i < layers_.size(); ++i) {
      const BlockLayer& l = layers_[i];
      WeightPointers w{};
      for (int64_t k = 0; k < kWeights; ++k)
        if (l.weights[k] >= 0) w[size_t(k)] = weights + l.weights[k];
      void* out = i % 2 ? memory + between_ - y_bytes(i) : memory;
      if (i + 1 == layers_.size()) out = y;
      char* const scratch = memory + between_;
      Call call = make_call(l.shape, l.plan, precision_, x, w, out, scratch,
                            scratch + round_up(l.plan.partial_bytes, kJoined));
      call.follows = i > 0;
      launch(l, call);
      const BlockShape& s = l.shape;
      const int64_t row = s.out_width() * s.out_channels;
      x = {out, s.out_height() * row, row, s.out_channels, 1};
    }
  }

 private:
  static constexpr int64_t kJoined = 64;  // bytes, as sequence/weights.py's join aligns them

  int64_t y_bytes(size_t i) const {
    return round_up(layers_[i].shape.out_elements() * element_size(precision_), 256);
  }

  Precision precision_;
  std::vector<BlockLayer> layers_;
  int64_t weights_ = 0, between_ = 0, scratch_ = 0;
};

}  // namespace mnv2_fused::cuda
