// Steps that the ops on one block and on a sequence share: checks of x, plans, memory.
#pragma once

#include "../tensors.h"
#include "call.h"
#include "gpu.h"

namespace mnv2_fused::cuda {

constexpr int64_t kAlignment = 16;  // bytes of the widest load

// x's precision. Fails for dtypes that no kernel takes.
Precision precision_of(ScalarType type, bool tf32, const Gpu& gpu);

// Fails, naming value and limit, where the kernel cannot take the shape. x: for the message.
void check_shape(const BlockShape& shape, Precision precision, const Gpu& gpu, const Sizes& x);

// make_plan, searched once per shape, precision and device.
Plan cached_plan(const BlockShape& shape, Precision precision, int device);

// Memory on a device.
Tensor empty(IntHeaderOnlyArrayRef sizes, ScalarType type, int device, MemoryFormat format);
Tensor empty_bytes(int64_t bytes, int device);

Input input_of(const Tensor& x);
void* current_stream(int device);

}  // namespace mnv2_fused::cuda
