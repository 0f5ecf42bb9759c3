// Errors of CUDA calls.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace mnv2_fused::cuda {

// Throws std::runtime_error with CUDA's words unless the call succeeded.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, which the next call would report again
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

}  // namespace mnv2_fused::cuda
