// Every op schema, and the CPU binding: checks, allocation, call. The only CPU file that sees
// torch.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"  // in torch's headers
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#pragma GCC diagnostic pop

#include <array>
#include <atomic>
#include <mutex>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <unordered_map>

#include "cpu/isa.h"

namespace mnv2_fused {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream message;
  message << "mnv2_fused::inverted_residual: ";
  (message << ... << args);
  throw std::runtime_error(message.str());
}

std::string to_string(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

// Packed weights carry the geometry: see fold.py for their layout.
BlockShape shape_of(const Tensor& x, const std::optional<Tensor>& w_expand,
                    const std::optional<Tensor>& b_expand, const Tensor& w_depthwise,
                    const Tensor& b_depthwise, const Tensor& w_project, const Tensor& b_project,
                    int64_t stride, bool residual) {
  if (x.dim() != 4)
    fail("x must be [N, C_in, H, W], got ", to_string(x), "; add a batch with x[None]");
  if (w_project.dim() != 3 || b_project.dim() != 1)
    fail("w_project must be [C_out/16, E, 16] and b_project [C_out], got ", to_string(w_project),
         " and ", to_string(b_project));
  if (w_expand.has_value() != b_expand.has_value())
    fail("w_expand and b_expand must both be given or both be None");
  if (w_expand && w_expand->dim() != 3)
    fail("w_expand must be [E/16, C_in, 16], got ", to_string(*w_expand));
  const int64_t takes = w_expand ? w_expand->size(1) : w_project.size(1);
  if (x.size(1) != takes)
    fail("x must have ", takes, " channels, got ", x.size(1), " in ", to_string(x));
  const BlockShape s{x.size(0),         x.size(2),         x.size(3), x.size(1),
                     w_project.size(1), b_project.size(0), stride,    w_expand.has_value(),
                     residual};
  if (const std::string why = unsupported(s); !why.empty())
    fail(why, "; x is ", to_string(x), " (use backend='eager' for what no kernel takes)");
  const int64_t panels = s.hidden_panels();
  const auto check = [](const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
    bool same = t.dim() == int64_t(sizes.size()) && t.is_contiguous();
    int64_t dim = 0;
    for (const int64_t size : sizes) same = same && t.size(dim++) == size;
    if (same) return;
    std::ostringstream expected;
    for (const int64_t size : sizes) expected << (expected.tellp() ? ", " : "") << size;
    fail(name, " must be contiguous [", expected.str(), "], got ", to_string(t),
         "; pack weights with mnv2_fused.pack");
  };
  if (s.expand) {
    check("w_expand", *w_expand, {panels, s.in_channels, kPanel});
    check("b_expand", *b_expand, {panels * kPanel});
  }
  check("w_depthwise", w_depthwise, {panels, 9, kPanel});
  check("b_depthwise", b_depthwise, {panels * kPanel});
  check("w_project", w_project, {ceil_div(s.out_channels, kPanel), s.hidden_channels, kPanel});
  check("b_project", b_project, {s.out_channels});
  return s;
}

// The strides test behind torch's suggest_memory_format, which the stable ABI lacks: channels_last
// when strides ascend over C, W, H, N, with ambiguous cases going to the contiguous format.
bool is_channels_last(const Tensor& x) {
  if (x.stride(1) == 0) return false;
  int64_t least = 0;
  for (const int64_t d : {1, 3, 2, 0}) {
    const int64_t size = x.size(d), stride = x.stride(d);
    if (size == 0 || stride < least || (d == 0 && least == x.stride(1))) return false;
    least = size > 1 ? stride * size : stride;
  }
  return true;
}

// Plans are searched once per shape and machine state.
Plan cached_plan(const BlockShape& shape, const Machine& machine) {
  struct Key {
    BlockShape shape;
    Machine machine;
    bool operator==(const Key&) const = default;
  };
  struct Hash {
    size_t operator()(const Key& k) const {
      const BlockShape& s = k.shape;
      size_t h = 0;
      for (const int64_t v : {s.batch, s.height, s.width, s.in_channels, s.hidden_channels,
                              s.out_channels, s.stride, int64_t{s.expand} * 2 + int64_t{s.residual},
                              k.machine.threads, k.machine.lanes, k.machine.element_size})
        h = (h ^ size_t(v)) * size_t{0x9E3779B97F4A7C15};
      return h;
    }
  };
  constexpr size_t kMost = 4096;  // shapes; past it a caller with endless shapes starts afresh
  static std::mutex mutex;
  static std::unordered_map<Key, Plan, Hash> plans;
  const Key key{shape, machine};
  {
    const std::lock_guard lock(mutex);
    if (const auto it = plans.find(key); it != plans.end()) return it->second;
  }
  const Plan plan = make_plan(shape, machine);
  const std::lock_guard lock(mutex);
  if (plans.size() >= kMost) plans.clear();
  plans.emplace(key, plan);
  return plan;
}

template <class T>
void run(const BlockShape& shape, const cpu::Isa& isa, cpu::RunTile<T> run_tile,
         cpu::AddRow<T> add_row, IntHeaderOnlyArrayRef forced, const Tensor& x,
         const std::optional<Tensor>& w_expand, const std::optional<Tensor>& b_expand,
         const Tensor& w_depthwise, const Tensor& b_depthwise, const Tensor& w_project,
         const Tensor& b_project, const Tensor& y) {
  const auto data = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
  const Machine machine =
      cpu::machine_for(isa, torch::stable::get_num_threads(), sizeof(T), cpu::l2_bytes());
  if (!forced.empty() && forced.size() != 4)
    fail("plan must be [tile_rows, tile_cols, group, splits], got ", forced.size(), " values");
  const Plan plan = forced.empty()
                        ? cached_plan(shape, machine)
                        : make_plan(shape, machine, forced[0], forced[1], forced[2], forced[3]);
  // Each worker's slice starts on its own cache line.
  const int64_t slice = round_up(plan.scratch_bytes / int64_t{sizeof(T)}, 64);
  const int64_t scratch_size = slice * plan.workers + plan.partial_bytes / int64_t{sizeof(T)};
  const Tensor scratch = torch::stable::empty({&scratch_size, 1}, y.scalar_type());
  T* const buffer = static_cast<T*>(scratch.mutable_data_ptr());
  const BlockArgs<T> args{shape,
                          data(x),
                          x.stride(0),
                          x.stride(2),
                          x.stride(3),
                          w_expand ? data(*w_expand) : nullptr,
                          b_expand ? data(*b_expand) : nullptr,
                          data(w_depthwise),
                          data(b_depthwise),
                          data(w_project),
                          data(b_project),
                          static_cast<T*>(y.mutable_data_ptr()),
                          buffer + slice * plan.workers};
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, plan.workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < plan.tasks;)
        run_tile(args, plan, task, buffer + worker * slice);
  });
  if (plan.splits == 1) return;
  const int64_t rows = shape.batch * shape.out_height();
  torch::stable::parallel_for(0, rows, ceil_div(rows, plan.workers), [&](int64_t row, int64_t end) {
    for (; row < end; ++row) add_row(args, plan, row);
  });
}

Tensor inverted_residual_cpu(const Tensor& x,                        // [N, C_in, H, W]
                             const std::optional<Tensor>& w_expand,  // [E/16, C_in, 16]
                             const std::optional<Tensor>& b_expand,  // [E/16 * 16]
                             const Tensor& w_depthwise,              // [E/16, 9, 16]
                             const Tensor& b_depthwise,              // [E/16 * 16]
                             const Tensor& w_project,                // [C_out/16, E, 16]
                             const Tensor& b_project,                // [C_out]
                             int64_t stride, bool residual, IntHeaderOnlyArrayRef plan) {
  const BlockShape shape = shape_of(x, w_expand, b_expand, w_depthwise, b_depthwise, w_project,
                                    b_project, stride, residual);
  const ScalarType type = x.scalar_type();
  const bool half = type == ScalarType::Half || type == ScalarType::BFloat16;
  if (!half && type != ScalarType::Float && type != ScalarType::Double)
    fail("x must be float32, float64, float16 or bfloat16 on the CPU; convert it with x.float()");
  // Half-precision x is widened here: the products run in float32 from float32 weights.
  const ScalarType compute = half ? ScalarType::Float : type;
  for (const Tensor* w : {w_expand ? &*w_expand : nullptr, b_expand ? &*b_expand : nullptr,
                          &w_depthwise, &b_depthwise, &w_project, &b_project}) {
    if (!w) continue;
    if (!w->is_cpu()) fail("x is on the CPU, so the packed weights must be too");
    if (w->scalar_type() != compute)
      fail("packed weights must be ", compute == ScalarType::Float ? "float32" : "float64",
           " for this x; pack them with mnv2_fused.pack(weights, x.dtype)");
  }

  const bool channels_last = is_channels_last(x);
  const std::array<int64_t, 4> y_sizes{shape.batch, shape.out_channels, shape.out_height(),
                                       shape.out_width()};
  const IntHeaderOnlyArrayRef sizes(y_sizes.data(), y_sizes.size());
  const auto allocate = [&](ScalarType dtype, bool last) {
    return torch::stable::empty(sizes, dtype, std::nullopt, std::nullopt, std::nullopt,
                                last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  };
  if (shape.batch == 0) return allocate(type, channels_last);

  // The kernel reads any strides as long as a pixel's channels lie together.
  Tensor source = half ? torch::stable::to(x, compute) : x;
  if (source.stride(1) != 1 && shape.in_channels > 1)
    source = torch::stable::contiguous(source, MemoryFormat::ChannelsLast);
  const Tensor result = allocate(compute, true);
  const cpu::Isa& isa = cpu::active();
  if (compute == ScalarType::Float)
    run<float>(shape, isa, isa.run_f32, isa.add_f32, plan, source, w_expand, b_expand, w_depthwise,
               b_depthwise, w_project, b_project, result);
  else
    run<double>(shape, isa, isa.run_f64, isa.add_f64, plan, source, w_expand, b_expand, w_depthwise,
                b_depthwise, w_project, b_project, result);
  if (!half && channels_last) return result;
  Tensor y = allocate(type, channels_last);
  return torch::stable::copy_(y, result);
}

}  // namespace
}  // namespace mnv2_fused

STABLE_TORCH_LIBRARY(mnv2_fused, m) {
  m.def(
      "inverted_residual(Tensor x, Tensor? w_expand, Tensor? b_expand, Tensor w_depthwise, "
      "Tensor b_depthwise, Tensor w_project, Tensor b_project, int stride, bool residual, "
      "int[] plan=[]) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CPU, m) {
  m.impl("inverted_residual", TORCH_BOX(&mnv2_fused::inverted_residual_cpu));
}
