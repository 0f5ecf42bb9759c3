// One layer at a time, from torch tensors to the CPU kernels: checks, plans, calls.
#pragma once

#include <algorithm>

#include "../tensors.h"
#include "isa.h"

namespace mnv2_fused::cpu {

// A tensor between two layers: sizes, and element strides in the order of the sizes.
struct ActivationView {
  Sizes sizes, strides;
  const void* data;
};
ActivationView activation_of(const Tensor& x);
// One-pixel images as the pixels of one image: along its columns, and along its rows.
inline ActivationView as_columns(const ActivationView& x) {
  return {{1, x.sizes[1], 1, x.sizes[0]}, {0, x.strides[1], 0, x.strides[0]}, x.data};
}
inline ActivationView as_rows(const ActivationView& x) {
  return {{1, x.sizes[1], x.sizes[0], 1}, {0, x.strides[1], x.strides[0], 0}, x.data};
}

// Packed weights of one block; see fold.py for their layout. Weights of bfloat16 products hold pairs
// of channels in a fourth dimension.
struct BlockTensors {
  const Tensor *w_expand, *b_expand;  // null without an expansion
  const Tensor *w_depthwise, *b_depthwise, *w_project, *b_project;
  const Tensor *w_squeeze, *b_squeeze, *w_excite, *b_excite;  // null without a squeeze-and-excite
};
// The same in memory.
struct BlockPointers {
  const void *w_expand, *b_expand, *w_depthwise, *b_depthwise, *w_project, *b_project;
  const void *w_squeeze = nullptr, *b_squeeze = nullptr, *w_excite = nullptr, *b_excite = nullptr;
  int64_t taps = 0;  // of w_depthwise, where the shape's are fewer
};

// Shape of the block whose geometry the packed weights carry. Fails where the weights are not of S's
// dtypes, or disagree with each other or with x.
template <class S>
BlockShape block_shape(const Sizes& x, const BlockTensors& w, int64_t stride, bool residual,
                       const Options& options);

// Torch's names for S = float, double and BFloat16.
template <class S>
constexpr ScalarType type_of = std::is_same_v<S, float>    ? ScalarType::Float
                               : std::is_same_v<S, double> ? ScalarType::Double
                                                           : ScalarType::BFloat16;

// The machine that plans are made for: the instruction set in use and torch's threads.
template <class S>
Machine current_machine();
// make_plan, searched once per shape and machine.
Plan cached_plan(const BlockShape& shape, const Machine& machine);

// Parts of a batch: all images at once, or with a squeeze-and-excite as many at a time as leave its d
// in the caches. Images of one pixel run as the pixels of one image: a tile holds no pixels of two.
struct BlockRun {
  BlockShape part, rest;  // rest: the images left, 0 where the parts divide the batch
  Plan plan, rest_plan;
  int64_t batch;
  bool of_pixels;  // whether the parts' columns are images

  BlockRun() = default;
  // plan_of(shape): the plan for as many images.
  template <class F>
  BlockRun(const BlockShape& shape, const Machine& machine, F plan_of)
      : part(shape), rest(shape), plan{}, rest_plan{}, batch(shape.batch) {
    of_pixels = batch > 0 && takes_middle_taps(shape);
    if (of_pixels) part = as_one_image(shape, batch);
    if (shape.squeeze_channels > 0 && batch > 0) part.batch = squeezed_together(shape, machine);
    rest.batch = batch > 0 ? batch % images_of_part() : 0;
    plan = plan_of(part);
    if (rest.batch > 0) rest_plan = plan_of(rest);
  }

  int64_t images_of_part() const { return of_pixels ? batch : part.batch; }
};
// Bytes of scratch that a run needs.
template <class S>
int64_t scratch_bytes(const BlockRun& run);

// Memory that the next layer reads first: kernels fetch it into L2 meanwhile.
struct Next {
  const void* data = nullptr;
  int64_t bytes = 0;
};

template <class S>
void run_block(const BlockRun& run, ActivationView x, const BlockPointers& w, S* y, void* scratch,
               Next next = {});
// sums: [N, C_out] of a pooled layer where S is narrower than its sums, else unused.
template <class S>
void run_pointwise(const PointwiseShape& shape, const ActivationView& x, const void* weight,
                   const void* bias, S* y, Compute<S>* sums, Next next = {});

}  // namespace mnv2_fused::cpu
