// The sum over splits: y = activation(sum of partial sums + b_p) (+ x).
#pragma once

#include "store.cuh"

namespace mnv2_fused::cuda {

// Splits are added in their order, so that every run gives the same bits; then bias, activation and
// residual. Four channels of a pixel a thread.
template <Precision kPrecision, bool kActivated>
MNV2_KERNEL(256, 1)
add_splits_kernel(const Args a) {
  using Element = typename PrecisionTraits<kPrecision>::Element;
  const int quads = int(ceil_div(a.out_channels, 4));
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t pixel = index / quads, pixels = int64_t(a.batch) * a.out_height * a.out_width;
  grid_dependency_wait();
  launch_dependents();
  if (pixel >= pixels) return;
  const int channel = int(index % quads) * 4, left = a.out_channels - channel;
  float4 sum = {0, 0, 0, 0};
  for (int split = 0; split < a.splits; ++split)
    sum = added(sum, load_quad<Precision::kFloat32>(
                         a.partial + (split * pixels + pixel) * a.out_channels + channel, left,
                         a.out_channels % 4 == 0));
  sum = added(sum, load_floats(a.b_project + channel, left));
  if (kActivated && !a.activates_sum) sum = activated(sum, a.out_activation);
  if (a.residual) {
    const int64_t line = pixel / a.out_width;
    const Element* const x = static_cast<const Element*>(a.x) + line / a.out_height * a.x_image +
                             line % a.out_height * a.x_row + pixel % a.out_width * a.x_col +
                             channel;
    sum = added(sum, load_quad<kPrecision>(x, left, a.x_vectors));
  }
  if (kActivated && a.activates_sum) sum = activated(sum, a.out_activation);
  store_quad<kPrecision>(static_cast<Element*>(a.y) + pixel * a.out_channels + channel, sum, left);
}

}  // namespace mnv2_fused::cuda
