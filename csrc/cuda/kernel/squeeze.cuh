// The two products between the passes of a squeeze-and-excite: small, of pooled channels, in float.
#pragma once

#include "activation.cuh"

namespace mnv2_fused::cuda {

// blockIdx: image, panel of out. 64 channels at a time: four threads sum the rows of each channel, then
// every 16 of the 256 threads multiply four channels by the panel's weights. The order of sums is fixed.
MNV2_KERNEL(int(kSqueezeThreads), 1)
squeeze_product_kernel(const SqueezeProductArgs a) {
  constexpr int kChunk = 64, kParts = int(kSqueezeThreads) / kChunk;
  constexpr int kSums = int(kSqueezeThreads / kPanel), kEach = kChunk / kSums;
  const int thread = threadIdx.x, image = blockIdx.x, panel = blockIdx.y;
  const int col = thread % int(kPanel);
  const float* const in = a.in + int64_t(image) * a.rows * a.in_pitch;
  const float* const weight = a.weight + int64_t(panel) * a.in_channels * kPanel + col;
  grid_dependency_wait();
  launch_dependents();
  float sum = 0;
  for (int first = 0; first < a.in_channels; first += kChunk) {
    const int channel = first + thread % kChunk;
    float rows = 0;
    if (channel < a.in_channels) {
      for (int row = thread / kChunk; row < a.rows; row += kParts)
        rows += load_written(in + int64_t(row) * a.in_pitch + channel);
    }
    barrier();  // nobody reads the chunk before
    store_shared(thread * 4, rows);
    barrier();  // this chunk's sums are there
    for (int k = 0; k < kEach; ++k) {
      const int at = thread / int(kPanel) * kEach + k;
      if (first + at >= a.in_channels) break;
      float mean = 0;
      for (int part = 0; part < kParts; ++part)
        mean += load_shared<float>((part * kChunk + at) * 4);
      sum += mean * a.scale * load_global(weight + int64_t(first + at) * kPanel);
    }
  }
  barrier();  // nobody reads the last chunk
  store_shared(thread * 4, sum);
  barrier();  // all sums are there
  if (thread >= int(kPanel)) return;
  const int channel = panel * int(kPanel) + col;
  float v = load_global(a.bias + channel);
  for (int part = 0; part < kSums; ++part) v += load_shared<float>((part * int(kPanel) + col) * 4);
  v = a.gated ? gate_of(v, a.gate) : activated(v, a.activation);
  store_global(a.out + int64_t(image) * int64_t(gridDim.y) * kPanel + channel, v);
}

}  // namespace mnv2_fused::cuda
