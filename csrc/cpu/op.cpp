// The op of one block on the CPU.
#include "op.h"

#include <atomic>
#include <cstring>
#include <optional>

namespace mnv2_fused::cpu {
namespace {

// Bytes from which on the C library takes memory from the system at every call. Page by page its first
// touch costs a tenth of a large image's time, by huge pages nearly nothing.
constexpr int64_t kMapped = int64_t{32} << 20;
Tensor in_huge_pages(Tensor t, int64_t bytes) {
  if (bytes >= kMapped)
    cpu::advise_huge_pages(reinterpret_cast<uintptr_t>(t.mutable_data_ptr()), size_t(bytes));
  return t;
}

std::atomic<bool> poison = false;
std::atomic<int64_t> poisoned = 0;  // bytes
constexpr int kNaN = 0xFF;          // each byte of a NaN, whatever the dtype

}  // namespace

int64_t poison_new_memory(bool on) {
  poison = on;
  return poisoned.exchange(0);
}

// Not torch::stable::empty, which looks an op up by its name and takes its sizes one by one: with cold
// caches two of them take microseconds.
Tensor empty(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides, ScalarType dtype) {
  using torch::stable::detail::from, torch::stable::detail::to;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), to<int32_t>(from(dtype)),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  const Tensor t(handle);
  const int64_t bytes = t.numel() * int64_t(t.element_size());
  if (poison) {
    std::memset(t.mutable_data_ptr(), kNaN, size_t(bytes));
    poisoned += bytes;
  }
  return in_huge_pages(t, bytes);
}

Tensor empty(const Sizes& sizes, ScalarType dtype, bool channels_last) {
  const auto [n, c, h, w] = sizes;
  const Sizes strides =
      channels_last ? Sizes{h * w * c, 1, w * c, c} : Sizes{c * h * w, h * w, w, 1};
  return empty({sizes.data(), sizes.size()}, {strides.data(), strides.size()}, dtype);
}

Tensor buffer(int64_t bytes) {
  constexpr int64_t stride = 1;
  return empty({&bytes, 1}, {&stride, 1}, ScalarType::Byte);
}

namespace {

const Tensor* pointer(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }
const void* data(const Tensor* t) { return t ? t->const_data_ptr() : nullptr; }

Tensor inverted_residual_cpu(const Tensor& x,                         // [N, C_in, H, W]
                             const std::optional<Tensor>& w_expand,   // [E/16, C_in, 16]
                             const std::optional<Tensor>& b_expand,   // [E/16 * 16]
                             const Tensor& w_depthwise,               // [E/16, 9, 16]
                             const Tensor& b_depthwise,               // [E/16 * 16]
                             const Tensor& w_project,                 // [C_out/16, E, 16]
                             const Tensor& b_project,                 // [C_out]
                             const std::optional<Tensor>& w_squeeze,  // [S/16, E, 16]
                             const std::optional<Tensor>& b_squeeze,  // [S/16 * 16]
                             const std::optional<Tensor>& w_excite,   // [E/16, S, 16]
                             const std::optional<Tensor>& b_excite,   // [E/16 * 16]
                             int64_t stride, bool residual, IntHeaderOnlyArrayRef forced,
                             int64_t dilation, IntHeaderOnlyArrayRef padding, int64_t activation,
                             int64_t out_activation, int64_t squeeze_activation, int64_t gate,
                             double negative_slope, int64_t expand_activation,
                             int64_t column_stride, bool activates_sum) {
  check_given({{"x", &x},
               {"w_depthwise", &w_depthwise},
               {"b_depthwise", &b_depthwise},
               {"w_project", &w_project},
               {"b_project", &b_project}});
  const ScalarType type = x.scalar_type();
  return dispatch("inverted_residual", type, w_project.scalar_type(), [&]<class S>(S) {
    if (w_expand.has_value() != b_expand.has_value())
      fail("w_expand and b_expand must both be given or both be None");
    for (const auto* t : {&b_squeeze, &w_excite, &b_excite})
      if (t->has_value() != w_squeeze.has_value())
        fail("w_squeeze, b_squeeze, w_excite and b_excite must all be given or all be None");
    const BlockTensors w{pointer(w_expand),  pointer(b_expand),  &w_depthwise,
                         &b_depthwise,       &w_project,         &b_project,
                         pointer(w_squeeze), pointer(b_squeeze), pointer(w_excite),
                         pointer(b_excite)};
    const Options options{dilation,           padding,      activation,     out_activation,
                          squeeze_activation, gate,         negative_slope, expand_activation,
                          column_stride,      activates_sum};
    const BlockShape shape = block_shape<S>(sizes_of(x), w, stride, residual, options);
    const Sizes y_sizes{shape.batch, shape.out_channels, shape.out_height(), shape.out_width()};
    const bool channels_last = is_channels_last(x);
    if (shape.batch == 0) return empty(y_sizes, type, channels_last);

    // The kernel reads any strides as long as a pixel's channels lie together.
    constexpr ScalarType kStored = type_of<S>;
    const Tensor source =
        with_channels_together(type == kStored ? x : torch::stable::to(x, kStored));
    const bool automatic = is_automatic(forced);
    if (!automatic && forced.size() != 4)
      fail("plan must be [tile_rows, tile_cols, group, splits], got ", forced.size(), " values");
    const Machine machine = current_machine<S>();
    const BlockPointers pointers{data(w.w_expand),    data(w.b_expand),  data(w.w_depthwise),
                                 data(w.b_depthwise), data(w.w_project), data(w.b_project),
                                 data(w.w_squeeze),   data(w.b_squeeze), data(w.w_excite),
                                 data(w.b_excite)};
    const BlockRun run(shape, machine, [&](const BlockShape& s) {
      return automatic ? cached_plan(s, machine)
                       : make_plan(s, machine, forced[0], forced[1], forced[2], forced[3]);
    });
    const Tensor scratch = buffer(scratch_bytes<S>(run));
    const Tensor result = empty(y_sizes, kStored, true);
    run_block(run, activation_of(source), pointers, static_cast<S*>(result.mutable_data_ptr()),
              scratch.mutable_data_ptr());
    if (type == kStored && channels_last) return result;
    Tensor y = empty(y_sizes, type, channels_last);
    return torch::stable::copy_(y, result);
  });
}

}  // namespace
}  // namespace mnv2_fused::cpu

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CPU, m) {
  m.impl("inverted_residual", TORCH_BOX(&mnv2_fused::cpu::inverted_residual_cpu));
}
