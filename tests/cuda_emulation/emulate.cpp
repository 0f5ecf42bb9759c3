// The CUDA kernel on the CPU, for emulation.py: one precision's kernels a library, EMULATED_PRECISION;
// of those only one where EMULATED_FORM, EMULATED_STRIDE, EMULATED_TILES and EMULATED_OUT_PANELS say
// which, and the one that pools for it.
#include <string>

#include "launch.h"
#include "products.cuh"
#include "variants.cuh"

using namespace mnv2_fused;
using namespace mnv2_fused::cuda;

namespace {

constexpr Precision kPrecision = Precision::EMULATED_PRECISION;

template <class F>
bool with_emulated_kernel(const BlockShape& shape, const Plan& plan, Pass pass, F f) {
#ifdef EMULATED_STRIDE
  constexpr Form kForm = Form::EMULATED_FORM;
  if (form_of(shape) != kForm || shape.stride != EMULATED_STRIDE ||
      plan.strip_rows != 2 * EMULATED_TILES || plan.out_panels != EMULATED_OUT_PANELS)
    return false;
  if (pass == Pass::kLast)
    f(inverted_residual_kernel<kPrecision, kForm, EMULATED_STRIDE, EMULATED_TILES,
                               EMULATED_OUT_PANELS>);
  else if constexpr (kForm != Form::kMobileNetV2)
    f(inverted_residual_kernel<kPrecision, kForm, EMULATED_STRIDE, EMULATED_TILES, 0>);
  return true;
#else
  return with_kernel<kPrecision>(shape, plan, pass, f);
#endif
}

std::string g_error;

}  // namespace

extern "C" {

struct Buffer {
  void* data;  // null when there is none
  int64_t bytes;
};

// Buffers: x, w_expand, b_expand, w_depthwise, b_depthwise, w_project, b_project, w_squeeze, b_squeeze,
// w_excite, b_excite; then y, partial, and what a squeeze-and-excite keeps, of plan.squeeze_bytes.
// Returns what is wrong with the kernel, or null.
const char* emulate(const BlockShape* shape, const Plan* plan, const Buffer* buffers,
                    const int64_t* x_strides, uint64_t seed) try {
  const auto floats = [&](int i) { return static_cast<float*>(buffers[i].data); };
  Args args = make_args(*shape, *plan, kPrecision);
  args.x = buffers[0].data;
  args.x_image = x_strides[0], args.x_row = x_strides[1], args.x_col = x_strides[2];
  args.w_expand = buffers[1].data;
  args.b_expand = floats(2);
  args.w_depthwise = floats(3);
  args.b_depthwise = floats(4);
  args.w_project = buffers[5].data;
  args.b_project = floats(6);
  args.y = buffers[11].data;
  args.partial = floats(12);
  args.pooled = floats(13);
  find_vectors(args, kPrecision);
  const SqueezeProducts products =
      squeeze_products(*shape, *plan, {floats(7), floats(8), floats(9), floats(10)}, floats(13));
  if (shape->squeeze_channels > 0) args.gate = products.excite.out;
  const SqueezeMemory sizes(*shape, tiles_of(*plan), plan->warps);

  // Everything that is given, and of what the kernels make only what the one before left.
  using Ranges = std::vector<emulation::Range>;
  const auto memory = [&](emulation::Range read, emulation::Range written) {
    Ranges ranges{read, written};
    for (int i = 0; i < 11; ++i) ranges.push_back({buffers[i].data, buffers[i].bytes});
    return ranges;
  };
  const auto range = [](const void* data, int64_t elements, bool writable) {
    return emulation::Range{data, elements * 4, writable};
  };
  const auto run = [&](dim3 grid, int64_t threads, int64_t shared, const Ranges& ranges,
                       const std::function<void()>& kernel) {
    emulation::run(grid, int(threads), int(shared), ranges, kernel, seed);
  };
  const auto pass = [&](Pass which, unsigned out_blocks, const Ranges& ranges) {
    const dim3 grid{unsigned(tiles_of(*plan)), unsigned(plan->splits), out_blocks};
    const bool found = with_emulated_kernel(*shape, *plan, which, [&](Kernel kernel) {
      run(grid, plan->warps * kLanes, plan->shared_bytes, ranges, [&] { kernel(args); });
    });
    if (!found) throw std::runtime_error("no kernel is compiled for this plan");
  };

  emulation::Range gate{};
  if (shape->squeeze_channels > 0) {
    if (buffers[13].bytes != sizes.total() * 4)
      throw std::runtime_error("the plan's squeeze_bytes are not what is used");
    emulation::Range read = range(args.pooled, sizes.pooled, false);
    pass(Pass::kPool, 1, memory({}, range(args.pooled, sizes.pooled, true)));
    for (const ProductArgs& a : {products.squeeze, products.excite}) {
      const int64_t panels = ceil_div(a.out_channels, kPanel),
                    made = shape->batch * panels * kPanel;
      run({unsigned(shape->batch), unsigned(panels), 1}, kProductThreads, kProductShared,
          memory(read, range(a.out, made, true)), [&] { product_kernel(a); });
      read = range(a.out, made, false);
    }
    gate = read;
  }
  const bool split = plan->splits > 1;
  pass(Pass::kLast, unsigned(plan->out_blocks),
       memory(gate, {buffers[split ? 12 : 11].data, buffers[split ? 12 : 11].bytes, true}));
  if (split) {
    const Adding adding = adding_kernel<kPrecision>(*shape);
    run({unsigned(add_blocks(*shape)), 1, 1}, kAddThreads, 0,
        memory({buffers[12].data, buffers[12].bytes}, {buffers[11].data, buffers[11].bytes, true}),
        [&] { adding(args); });
  }
  return nullptr;
} catch (const std::exception& error) {
  g_error = error.what();
  return g_error.c_str();
}
}
