// Tensors and dispatch that the CPU's ops share.
#pragma once

#include "run.h"

namespace mnv2_fused::cpu {

// New memory that holds nothing yet, in huge pages where it is large.
Tensor empty(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides, ScalarType dtype);
Tensor empty(const Sizes& sizes, ScalarType dtype, bool channels_last);
Tensor buffer(int64_t bytes);
// For tests: whether new memory is filled with NaN of any dtype, so that what is read before it is written
// shows. Returns the bytes that were filled since the last call.
int64_t poison_new_memory(bool on);

// Calls f with the S of the kernels for x and its packed weights. A bfloat16 x runs on bfloat16
// products where the weights are packed for them; else half precision is widened to float. Errors carry
// the op's name.
template <class F>
Tensor dispatch(const char* op, ScalarType x, ScalarType weights, F f) {
  try {
    switch (x) {
      case ScalarType::Float:
        return f(float{});
      case ScalarType::Double:
        return f(double{});
      case ScalarType::BFloat16:
        return weights == x ? f(BFloat16{}) : f(float{});
      case ScalarType::Half:
        return f(float{});
      default:
        fail(
            "x must be float32, float64, float16 or bfloat16 on the CPU; convert it with "
            "x.float()");
    }
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string("mnv2_fused::") + op + ": " + error.what());
  }
}

}  // namespace mnv2_fused::cpu
