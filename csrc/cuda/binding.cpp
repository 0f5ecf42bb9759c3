// The op on an NVIDIA GPU: checks, plan, allocation, launch. A shared object of its own, since the
// CPU part has to load also where CUDA's libraries are missing.
#include <Python.h>
#include <cuda_runtime_api.h>

#include <mutex>
#include <optional>
#include <vector>

#include "../layers.h"
#include "../plan_cache.h"
#include "../tensors.h"
#include "sequence.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include <torch/csrc/stable/accelerator.h>
#pragma GCC diagnostic pop

namespace mnv2_fused::cuda {
namespace {

using torch::headeronly::DeviceType;

constexpr int64_t kFragment = kPanel * kPanel;
constexpr int64_t kAlignment = 16;  // bytes of the widest load

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else the next call would report it again
  fail(what, ": ", cudaGetErrorString(error));
}

int64_t attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "device attribute");
  return value;
}

Gpu read_gpu(int device) {
  const auto at = [&](cudaDeviceAttr name) { return attribute(name, device); };
  Gpu g{};
  g.capability = 10 * at(cudaDevAttrComputeCapabilityMajor) + at(cudaDevAttrComputeCapabilityMinor);
  g.processors = at(cudaDevAttrMultiProcessorCount);
  g.shared_per_block = at(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  g.shared_per_processor = at(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  g.threads_per_processor = at(cudaDevAttrMaxThreadsPerMultiProcessor);
  g.l2_bytes = at(cudaDevAttrL2CacheSize);
  // A copy on an H200 reached 0.87 of what its memory's clock and width give. Where a virtual GPU
  // does not tell them, an H200's share.
  constexpr double kReached = 0.87;
  const double memory = 2e3 * double(at(cudaDevAttrMemoryClockRate)) *
                        double(at(cudaDevAttrGlobalMemoryBusWidth)) / 8 * kReached;
  const double clock = 1e3 * double(at(cudaDevAttrClockRate));
  g.copy_bytes = memory > 0 ? memory : 4.3e12 / 132 * double(g.processors);
  g.clock = clock > 0 ? clock : 1.98e9;
  return g;
}

// Read once per device.
const Gpu& gpu_at(int device) {
  constexpr size_t kMost = 64;  // devices of a process, as torch has it
  static std::once_flag once[kMost];
  static Gpu gpus[kMost];
  if (device < 0 || size_t(device) >= kMost) fail("device must be 0 to 63, got ", device);
  std::call_once(once[device], [&] { gpus[device] = read_gpu(device); });
  return gpus[device];
}

Precision precision_of(ScalarType type, bool tf32, const Gpu& gpu) {
  switch (type) {
    case ScalarType::Half:
      return Precision::kHalf;
    case ScalarType::BFloat16:
      return Precision::kBFloat16;
    case ScalarType::Float:  // what may be rounded to TF32, need not be
      return tf32 && gpu.capability >= 80 ? Precision::kTf32 : Precision::kFloat32;
    case ScalarType::Double:
      fail("x must be float16, bfloat16 or float32 on a GPU, got float64; use backend='eager'");
    default:
      fail("x must be float16, bfloat16 or float32 on a GPU; convert it with x.half()");
  }
}

const char* name_of(ScalarType type) {
  return type == ScalarType::Half       ? "float16"
         : type == ScalarType::BFloat16 ? "bfloat16"
         : type == ScalarType::Float    ? "float32"
                                        : "another dtype";
}

struct Weights {
  const Tensor *w_expand, *b_expand;  // null without an expansion
  const Tensor *w_depthwise, *b_depthwise, *w_project, *b_project;
  const Tensor *w_squeeze, *b_squeeze, *w_excite, *b_excite;  // null without a squeeze-and-excite
};

void check_weight(const char* name, const Tensor* t, ScalarType type, int device) {
  if (!t) return;
  if (!t->is_cuda() || t->get_device_index() != device)
    fail("x is on cuda:", device, " but ", name, " is not; move one with .to()");
  if (t->scalar_type() != type)
    fail(name, " must be ", name_of(type), " for this x, got ", name_of(t->scalar_type()),
         "; pack the weights with mnv2_fused.pack(weights, x.dtype, 'cuda')");
  if (reinterpret_cast<uintptr_t>(t->const_data_ptr()) % kAlignment != 0)
    fail(name, " must start at a multiple of 16 bytes; clone() it");
}

void check_weights(const Weights& w, ScalarType type, int device) {
  check_weight("w_expand", w.w_expand, type, device);
  check_weight("w_project", w.w_project, type, device);
  check_weight("b_expand", w.b_expand, ScalarType::Float, device);
  check_weight("w_depthwise", w.w_depthwise, ScalarType::Float, device);
  check_weight("b_depthwise", w.b_depthwise, ScalarType::Float, device);
  check_weight("b_project", w.b_project, ScalarType::Float, device);
  check_weight("w_squeeze", w.w_squeeze, ScalarType::Float, device);
  check_weight("b_squeeze", w.b_squeeze, ScalarType::Float, device);
  check_weight("w_excite", w.w_excite, ScalarType::Float, device);
  check_weight("b_excite", w.b_excite, ScalarType::Float, device);
}

// The geometry that the packed weights carry, and x.
BlockShape block_shape(const Sizes& x, const Weights& w, int64_t stride, bool residual,
                       const Options& options) {
  if (w.b_depthwise->dim() != 1 || w.b_depthwise->size(0) <= kPanel || w.b_project->dim() != 1)
    fail("b_depthwise must be [E + 16] and b_project [C_out], got ", to_string(*w.b_depthwise),
         " and ", to_string(*w.b_project), "; pack weights with mnv2_fused.pack");
  const Expand expand = w.w_expand ? Expand::kPointwise : Expand::kNone;
  BlockShape s{x[0],   x[2],   x[3],    x[1], w.b_depthwise->size(0) - kPanel, w.b_project->size(0),
               stride, expand, residual};
  set_options(s, options, *w.w_depthwise);
  const int64_t panels = s.hidden_panels();
  if (w.w_squeeze) {
    if (w.w_excite->dim() != 3)
      fail("w_excite must be [E/16, S, 16], got ", to_string(*w.w_excite),
           "; pack weights with mnv2_fused.pack");
    s.squeeze_channels = w.w_excite->size(1);
    check_sizes("w_squeeze", *w.w_squeeze, {s.squeeze_panels(), s.hidden_channels, kPanel});
    check_sizes("b_squeeze", *w.b_squeeze, {s.squeeze_panels() * kPanel});
    check_sizes("w_excite", *w.w_excite, {panels, s.squeeze_channels, kPanel});
    check_sizes("b_excite", *w.b_excite, {panels * kPanel});
  }
  if (w.b_expand && w.b_expand->dim() != 1)
    fail("b_expand must be [E/16 * 16 + C_in], got ", to_string(*w.b_expand),
         "; pack weights with mnv2_fused.pack");
  const int64_t takes = w.b_expand ? w.b_expand->size(0) - panels * kPanel : s.hidden_channels;
  if (takes != x[1]) fail("x must have ", takes, " channels, got ", x[1], " in ", to_string(x));
  if (w.w_expand) {
    check_sizes("w_expand", *w.w_expand, {panels, ceil_div(x[1], kPanel), kFragment});
    check_sizes("b_expand", *w.b_expand, {panels * kPanel + x[1]});
  }
  check_sizes("w_depthwise", *w.w_depthwise, {panels, s.taps(), kPanel});
  check_sizes("b_depthwise", *w.b_depthwise, {s.hidden_channels + kPanel});
  check_sizes("w_project", *w.w_project, {panels, ceil_div(s.out_channels, kPanel), kFragment});
  check_sizes("b_project", *w.b_project, {s.out_channels});
  return s;
}

void check_shape(const BlockShape& s, Precision precision, const Gpu& gpu, const Sizes& x) {
  if (const std::string why = unsupported(s, precision, gpu.capability); !why.empty())
    fail(why, "; x is ", to_string(x), " (use backend='eager' for what no kernel takes)");
}

// make_plan, searched once per shape, precision and device.
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
                              torch::stable::Device(DeviceType::CUDA, device), std::nullopt,
                              format);
}

const void* data(const Tensor* t) { return t ? t->const_data_ptr() : nullptr; }
Input input_of(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(2), x.stride(3), x.stride(1)};
}
void* stream_of(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

void launch_here(const BlockShape& shape, Precision precision, const Plan& plan, const Call& call,
                 int device, void* stream) {
  try {
    launch(precision, shape, plan, call, stream);
  } catch (const std::runtime_error& error) {
    fail(error.what(), "; plan: tile ", plan.tile_rows, "x", plan.tile_cols, " of ", plan.images,
         " images, strips of ", plan.strip_rows, " rows, group ", plan.group, ", ", plan.splits,
         " splits, ", plan.thread_blocks, " thread blocks of ", plan.warps, " warps and ",
         plan.shared_bytes, " bytes of shared memory, on cuda:", device,
         " (use backend='eager' to go on without this kernel)");
  }
}

void run(const BlockShape& shape, Precision precision, const Plan& plan, const Tensor& x,
         const Weights& w, const Tensor& y, int device) {
  std::optional<Tensor> partial, squeezed;
  const auto take = [&](std::optional<Tensor>& memory, const int64_t& bytes) -> void* {
    if (bytes == 0) return nullptr;
    memory = empty({&bytes, 1}, ScalarType::Byte, device, MemoryFormat::Contiguous);
    return memory->mutable_data_ptr();
  };
  void* const sums = take(partial, plan.partial_bytes);
  void* const pooled = take(squeezed, plan.squeeze_bytes);
  const WeightPointers pointers{data(w.w_expand),    data(w.b_expand),  data(w.w_depthwise),
                                data(w.b_depthwise), data(w.w_project), data(w.b_project),
                                data(w.w_squeeze),   data(w.b_squeeze), data(w.w_excite),
                                data(w.b_excite)};
  const Call call =
      make_call(shape, plan, precision, input_of(x), pointers, y.mutable_data_ptr(), sums, pooled);
  launch_here(shape, precision, plan, call, device, stream_of(device));
}

Tensor inverted_residual(const Tensor& x, const Weights& w, int64_t stride, bool residual,
                         IntHeaderOnlyArrayRef forced, const Options& options, bool tf32) {
  const Sizes sizes = sizes_of(x);
  const ScalarType type = x.scalar_type();
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Gpu& gpu = gpu_at(device);
  const Precision precision = precision_of(type, tf32, gpu);
  check_weights(w, type, device);
  const BlockShape shape = block_shape(sizes, w, stride, residual, options);
  check_shape(shape, precision, gpu, sizes);

  const Sizes y_sizes{shape.batch, shape.out_channels, shape.out_height(), shape.out_width()};
  const IntHeaderOnlyArrayRef y_list(y_sizes.data(), y_sizes.size());
  const bool channels_last = is_channels_last(x);
  const auto format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  if (shape.batch == 0) return empty(y_list, type, device, format);
  const Plan plan = forced.empty()
                        ? cached_plan(shape, precision, device)
                        : make_plan(shape, precision, gpu, {forced.begin(), forced.end()});
  const Tensor result = empty(y_list, type, device, MemoryFormat::ChannelsLast);
  run(shape, precision, plan, with_channels_together(x), w, result, device);
  if (channels_last) return result;
  Tensor y = empty(y_list, type, device, format);
  return torch::stable::copy_(y, result);
}

Tensor inverted_residual_cuda(const Tensor& x,                         // [N, C_in, H, W]
                              const std::optional<Tensor>& w_expand,   // [E/16, C_in/16, 256]
                              const std::optional<Tensor>& b_expand,   // [E/16 * 16 + C_in]
                              const Tensor& w_depthwise,               // [E/16, 9 or 25, 16]
                              const Tensor& b_depthwise,               // [E + 16]
                              const Tensor& w_project,                 // [E/16, C_out/16, 256]
                              const Tensor& b_project,                 // [C_out]
                              const std::optional<Tensor>& w_squeeze,  // [S/16, E, 16]
                              const std::optional<Tensor>& b_squeeze,  // [S/16 * 16]
                              const std::optional<Tensor>& w_excite,   // [E/16, S, 16]
                              const std::optional<Tensor>& b_excite,   // [E/16 * 16]
                              int64_t stride, bool residual, IntHeaderOnlyArrayRef forced,
                              int64_t dilation, IntHeaderOnlyArrayRef padding, int64_t activation,
                              int64_t out_activation, int64_t squeeze_activation, int64_t gate,
                              bool tf32) {
  try {
    if (w_expand.has_value() != b_expand.has_value())
      fail("w_expand and b_expand must both be given or both be None");
    for (const auto* t : {&b_squeeze, &w_excite, &b_excite})
      if (t->has_value() != w_squeeze.has_value())
        fail("w_squeeze, b_squeeze, w_excite and b_excite must all be given or all be None");
    const auto given = [](const std::optional<Tensor>& t) { return t ? &*t : nullptr; };
    const Weights w{given(w_expand), given(b_expand), &w_depthwise,     &b_depthwise,
                    &w_project,      &b_project,      given(w_squeeze), given(b_squeeze),
                    given(w_excite), given(b_excite)};
    const Options options{dilation, padding, activation, out_activation, squeeze_activation, gate};
    return inverted_residual(x, w, stride, residual, forced, options, tf32);
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string("mnv2_fused::inverted_residual_cuda: ") + error.what());
  }
}

// Blocks in a row, the first of which may have a network's stem in front of it.
Tensor sequence(const Tensor& x, const Tensor& weights, IntHeaderOnlyArrayRef layers, bool tf32) {
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
        "mnv2_fused.runs.join makes it");
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
         weights.numel(), "; pack them for it and join them with mnv2_fused.runs.join");
  const int64_t bytes = std::max<int64_t>(sequence.memory(), 1);
  const Tensor memory = empty({&bytes, 1}, ScalarType::Byte, device, MemoryFormat::Contiguous);
  const bool stem = blocks[0].expand == Expand::kStem;
  const Tensor source = stem ? x : with_channels_together(x);
  void* const stream = stream_of(device);
  sequence.run(input_of(source), static_cast<const char*>(weights.const_data_ptr()),
               static_cast<char*>(memory.mutable_data_ptr()), result.mutable_data_ptr(),
               [&](const BlockLayer& layer, const Call& call) {
                 launch_here(layer.shape, precision, layer.plan, call, device, stream);
               });
  return result;
}

Tensor sequence_cuda(const Tensor& x,               // [N, C, H, W]
                     const Tensor& weights,         // [bytes], of all layers
                     IntHeaderOnlyArrayRef layers,  // as ops.LayerKind says
                     bool tf32) {
  try {
    return sequence(x, weights, layers, tf32);
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string("mnv2_fused::sequence_cuda: ") + error.what());
  }
}

}  // namespace
}  // namespace mnv2_fused::cuda

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CUDA, m) {
  m.impl("inverted_residual_cuda", TORCH_BOX(&mnv2_fused::cuda::inverted_residual_cuda));
  m.impl("sequence_cuda", TORCH_BOX(&mnv2_fused::cuda::sequence_cuda));
}

namespace {

PyObject* allow_early_starts(PyObject*, PyObject* allowed) {
  const int truth = PyObject_IsTrue(allowed);
  if (truth < 0) return nullptr;
  mnv2_fused::cuda::allow_early_starts(truth);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"allow_early_starts", allow_early_starts, METH_O,
     "Whether a kernel of a call may start while the one before it ends."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

// Importing it registers the op; it holds what `python -m mnv2_fused info` tells of the build.
PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  PyObject* const module = PyModule_Create(&definition);
  if (module) {
    PyModule_AddIntConstant(module, "toolkit", CUDART_VERSION);
    PyModule_AddStringConstant(module, "architectures", MNV2_FUSED_ARCHITECTURES);
  }
  return module;
}
