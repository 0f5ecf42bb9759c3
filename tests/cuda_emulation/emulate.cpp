// The CUDA kernel on the CPU, for emulation.py: a library of one precision's kernels, EMULATED_PRECISION.
// Where EMULATED_FORM, EMULATED_STRIDE, EMULATED_TILES and EMULATED_OUT_PANELS are defined, of that one
// kernel and the kernel that pools for it.
#include <string>

#include "kernel/squeeze.cuh"
#include "kernels.cuh"
#include "sequence.h"

using namespace mnv2_fused;
using namespace mnv2_fused::cuda;

namespace {

constexpr Precision kPrecision = Precision::EMULATED_PRECISION;

Kernel emulated_kernel(const BlockShape& shape, const Plan& plan, Pass pass) {
#ifdef EMULATED_STRIDE
  constexpr Form kForm = Form::EMULATED_FORM;
  if (form_of(shape) != kForm || shape.stride != EMULATED_STRIDE ||
      plan.strip_rows != 2 * EMULATED_TILES || plan.out_panels != EMULATED_OUT_PANELS)
    return nullptr;
  if (pass == Pass::kLast)
    return inverted_residual_kernel<kPrecision, kForm, EMULATED_STRIDE, EMULATED_TILES,
                                    EMULATED_OUT_PANELS>;
  if constexpr (is_general(kForm))
    return inverted_residual_kernel<kPrecision, kForm, EMULATED_STRIDE, EMULATED_TILES, 0>;
  return nullptr;
#else
  return kernel_for<kPrecision>(shape, plan, pass);
#endif
}

using Ranges = std::vector<emulation::Range>;

// One block's kernels in turn. given: memory that each may read. Of results each may read only those of
// the kernel before it.
void run_block(const BlockShape& shape, const Plan& plan, const Call& call, const Ranges& given,
               emulation::Range y, uint64_t seed) {
  const Args& args = call.args;
  const SqueezeMemory sizes(shape, tiles_of(plan), plan.warps);
  const auto memory = [&](emulation::Range read, emulation::Range written) {
    Ranges ranges{read, written};
    ranges.insert(ranges.end(), given.begin(), given.end());
    return ranges;
  };
  const auto range = [](const void* data, int64_t elements, bool writable) {
    return emulation::Range{data, elements * 4, writable, !writable};
  };
  const auto run = [&](dim3 grid, int64_t threads, int64_t shared, const Ranges& ranges,
                       const std::function<void()>& kernel) {
    emulation::run(grid, int(threads), int(shared), ranges, kernel, seed);
  };
  const auto pass = [&](Pass which, unsigned out_blocks, const Ranges& ranges) {
    const dim3 grid{unsigned(tiles_of(plan)), unsigned(plan.splits), out_blocks};
    const Kernel kernel = emulated_kernel(shape, plan, which);
    if (!kernel) throw std::runtime_error("no kernel is compiled for this plan");
    run(grid, plan.warps * kLanes, plan.shared_bytes, ranges, [&] { kernel(args); });
  };

  emulation::Range gate{};
  if (shape.squeeze_channels > 0) {
    if (plan.squeeze_bytes != sizes.total() * 4)
      throw std::runtime_error("the plan's squeeze_bytes are not what is used");
    emulation::Range read = range(args.pooled, sizes.pooled, false);
    pass(Pass::kPool, 1, memory({}, range(args.pooled, sizes.pooled, true)));
    for (const SqueezeProductArgs& a : {call.products.squeeze, call.products.excite}) {
      const int64_t panels = ceil_div(a.out_channels, kPanel), made = shape.batch * panels * kPanel;
      run({unsigned(shape.batch), unsigned(panels), 1}, kSqueezeThreads, kSqueezeShared,
          memory(read, range(a.out, made, true)), [&] { squeeze_product_kernel(a); });
      read = range(a.out, made, false);
    }
    gate = read;
  }
  const bool split = plan.splits > 1;
  pass(Pass::kLast, unsigned(plan.out_blocks),
       memory(gate, split ? range(args.partial, plan.partial_bytes / 4, true) : y));
  if (split) {
    const Kernel adding = adding_kernel<kPrecision>(shape);
    run({unsigned(add_blocks(shape)), 1, 1}, kAddThreads, 0,
        memory(range(args.partial, plan.partial_bytes / 4, false), y), [&] { adding(args); });
  }
}

std::string g_error;
const char* failed(const std::exception& error) {
  g_error = error.what();
  return g_error.c_str();
}

}  // namespace

extern "C" {

struct Buffer {
  void* data;  // null when there is none
  int64_t bytes;
};

// Buffers: x, w_expand, b_expand, w_depthwise, b_depthwise, w_project, b_project, w_squeeze, b_squeeze,
// w_excite, b_excite; then y, partial, and what a squeeze-and-excite keeps, of plan.squeeze_bytes.
// x_strides: of image, row, column and channel. Returns what is wrong with the kernel, or null.
const char* emulate(const BlockShape* shape, const Plan* plan, const Buffer* buffers,
                    const int64_t* x_strides, uint64_t seed) try {
  WeightPointers weights{};
  Ranges given;
  for (size_t i = 0; i < 11; ++i) {
    given.push_back({buffers[i].data, buffers[i].bytes, false, i == 0});
    if (i > 0) weights[i - 1] = buffers[i].data;
  }
  for (size_t i = 0; const int64_t bytes : weight_bytes(*shape, kPrecision))
    if (buffers[++i].bytes != bytes)
      throw std::runtime_error("weights are not of weight_bytes: " + std::to_string(i));
  const Input x{buffers[0].data, x_strides[0], x_strides[1], x_strides[2], x_strides[3]};
  const Call call = make_call(*shape, *plan, kPrecision, x, weights, buffers[11].data,
                              buffers[12].data, buffers[13].data);
  run_block(*shape, *plan, call, given, {buffers[11].data, buffers[11].bytes, true}, seed);
  return nullptr;
} catch (const std::exception& error) {
  return failed(error);
}

// Bytes of memory that a sequence of blocks needs beside x, weights and y.
int64_t sequence_memory(const BlockShape* shapes, const Plan* plans, int64_t count) {
  size_t i = 0;
  return Sequence({shapes, shapes + count}, kPrecision, [&](const auto&) { return plans[i++]; })
      .memory();
}

// Buffers: x, weights, memory, y.
const char* emulate_sequence(const BlockShape* shapes, const Plan* plans, int64_t count,
                             const Buffer* buffers, const int64_t* x_strides, uint64_t seed) try {
  size_t i = 0;
  const Sequence sequence({shapes, shapes + count}, kPrecision,
                          [&](const auto&) { return plans[i++]; });
  if (sequence.weights() != buffers[1].bytes)
    throw std::runtime_error("weights() is not what is joined: " +
                             std::to_string(sequence.weights()));
  const Input x{buffers[0].data, x_strides[0], x_strides[1], x_strides[2], x_strides[3]};
  Ranges given{{buffers[0].data, buffers[0].bytes, false, true},
               {buffers[1].data, buffers[1].bytes}};
  sequence.run(x, static_cast<const char*>(buffers[1].data), static_cast<char*>(buffers[2].data),
               buffers[3].data, [&](const BlockLayer& layer, const Call& call) {
                 const int64_t bytes = layer.shape.out_elements() * element_size(kPrecision);
                 const emulation::Range y{call.args.y, bytes, true};
                 run_block(layer.shape, layer.plan, call, given, y, seed);
                 given.resize(2);
                 given.push_back({call.args.y, bytes, false, true});  // what the next one reads
               });
  return nullptr;
} catch (const std::exception& error) {
  return failed(error);
}
}
