#include "run.h"

#include "../plan_cache.h"

namespace mnv2_fused::cuda {

Precision precision_of(ScalarType type, bool tf32, const Gpu& gpu) {
  switch (type) {
    case ScalarType::Half:
      return Precision::kHalf;
    case ScalarType::BFloat16:
      return Precision::kBFloat16;
    case ScalarType::Float:  // rounding to TF32 is allowed, not required
      return tf32 && gpu.capability >= 80 ? Precision::kTf32 : Precision::kFloat32;
    case ScalarType::Double:
      fail("x must be float16, bfloat16 or float32 on a GPU, got float64; use backend='eager'");
    default:
      fail("x must be float16, bfloat16 or float32 on a GPU; convert it with x.half()");
  }
}

void check_shape(const BlockShape& s, Precision precision, const Gpu& gpu, const Sizes& x) {
  if (const std::string why = unsupported(s, precision, gpu.capability); !why.empty())
    fail(why, "; x is ", to_string(x), " (use backend='eager' for what no kernel takes)");
}

Plan cached_plan(const BlockShape& shape, Precision precision, int device) {
  struct Key {
    BlockShape shape;
    Precision precision;
    int device;
    size_t hash() const { return hash_of({int64_t(precision), device}, hash_of(shape)); }
    bool operator==(const Key&) const = default;
  };
  static PlanCache<Key, Plan> plans;
  return plans.get({shape, precision, device},
                   [&] { return make_plan(shape, precision, gpu_at(device)); });
}

Tensor empty(IntHeaderOnlyArrayRef sizes, ScalarType type, int device, MemoryFormat format) {
  return torch::stable::empty(sizes, type, std::nullopt,
                              torch::stable::Device(torch::headeronly::DeviceType::CUDA, device),
                              std::nullopt, format);
}
Tensor empty_bytes(int64_t bytes, int device) {
  return empty({&bytes, 1}, ScalarType::Byte, device, MemoryFormat::Contiguous);
}

Input input_of(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(2), x.stride(3), x.stride(1)};
}

void* current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

}  // namespace mnv2_fused::cuda
