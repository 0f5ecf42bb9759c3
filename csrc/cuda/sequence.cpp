// The op on blocks in a row, the first of which may have a network's stem in front of it.
#include "sequence.h"

#include <vector>

#include "../layers.h"
#include "launch.h"
#include "run.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"  // in torch's header
#include <torch/csrc/stable/accelerator.h>
#pragma GCC diagnostic pop

namespace mnv2_fused::cuda {
namespace {

Tensor sequence_cuda(const Tensor& x,               // [N, C, H, W]
                     const Tensor& weights,         // [bytes], of all layers
                     IntHeaderOnlyArrayRef layers,  // as ops.LayerKind says
                     bool tf32) try {
  const Sizes sizes = sizes_of(x);
  const ScalarType type = x.scalar_type();
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Precision precision = precision_of(type, tf32, gpu_at(device));
  if (!weights.is_cuda() || weights.get_device_index() != device)
    fail("x is on cuda:", device, " but the packed weights are not; move one with .to()");
  if (weights.scalar_type() != ScalarType::Byte || weights.dim() != 1 || !weights.is_contiguous() ||
      reinterpret_cast<uintptr_t>(weights.const_data_ptr()) % kAlignment != 0)
    fail(
        "weights must be one contiguous row of bytes that starts at a multiple of 16, as "
        "mnv2_fused.sequence.weights.join makes it");
  std::vector<BlockShape> blocks;
  Sizes y_sizes = sizes;
  for (const LayerShape& layer : layer_shapes(layers, sizes)) {
    if (!layer.is_block())
      fail("on a GPU layers must be blocks, kinds 0 to 2, got ", layer.kind,
           "; run others by themselves");
    check_shape(layer.block, precision, gpu_at(device), sizes);
    blocks.push_back(layer.block);
    y_sizes = layer.y;
  }
  const IntHeaderOnlyArrayRef y_list(y_sizes.data(), y_sizes.size());
  const Tensor result = empty(y_list, type, device, MemoryFormat::ChannelsLast);
  if (sizes[0] == 0) return result;
  const Sequence sequence(blocks, precision, [&](const BlockShape& shape) {
    return cached_plan(shape, precision, device);
  });
  if (sequence.weights() != weights.numel())
    fail("these layers take ", sequence.weights(), " bytes of weights for x of this dtype, got ",
         weights.numel(), "; pack them for it and join them with mnv2_fused.sequence.weights.join");
  const Tensor memory = empty_bytes(std::max<int64_t>(sequence.memory(), 1), device);
  const bool stem = blocks[0].expand == Expand::kStem;
  const Tensor source = stem ? x : with_channels_together(x);
  void* const stream = current_stream(device);
  sequence.run(input_of(source), static_cast<const char*>(weights.const_data_ptr()),
               static_cast<char*>(memory.mutable_data_ptr()), result.mutable_data_ptr(),
               [&](const BlockLayer& layer, const Call& call) {
                 launch(precision, layer.shape, layer.plan, call, stream);
               });
  return result;
} catch (const std::exception& error) {
  throw std::runtime_error(std::string("mnv2_fused::sequence_cuda: ") + error.what());
}

}  // namespace
}  // namespace mnv2_fused::cuda

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CUDA, m) {
  m.impl("sequence_cuda", TORCH_BOX(&mnv2_fused::cuda::sequence_cuda));
}
