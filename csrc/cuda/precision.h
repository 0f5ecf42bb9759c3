// Precisions of the CUDA kernel. No torch, no CUDA.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace mnv2_fused::cuda {

// Storage of activations, and the arithmetic of their 1x1 products: tensor cores, except for
// kFloat32, which is exact.
enum class Precision : int8_t { kHalf, kBFloat16, kTf32, kFloat32 };
constexpr int64_t kPrecisions = 4;

// Bytes of an activation.
constexpr int64_t element_size(Precision p) {
  switch (p) {
    case Precision::kHalf:
    case Precision::kBFloat16:
      return 2;
    case Precision::kTf32:
    case Precision::kFloat32:
      return 4;
  }
  throw std::invalid_argument("precision must be float16, bfloat16, tf32 or float32");
}

}  // namespace mnv2_fused::cuda
