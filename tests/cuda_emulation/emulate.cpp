// The CUDA kernel on the CPU, for emulation.py: one precision's kernels a library, EMULATED_PRECISION;
// of those only one where EMULATED_STRIDE, EMULATED_TILES and EMULATED_OUT_PANELS say which.
#include <string>

#include "launch.h"
#include "variants.cuh"

using namespace mnv2_fused;
using namespace mnv2_fused::cuda;

namespace {

constexpr Precision kPrecision = Precision::EMULATED_PRECISION;

template <class F>
bool with_emulated_kernel(int64_t stride, const Plan& plan, F f) {
#ifdef EMULATED_STRIDE
  if (stride != EMULATED_STRIDE || plan.strip_rows != 2 * EMULATED_TILES ||
      plan.out_panels != EMULATED_OUT_PANELS)
    return false;
  f(inverted_residual_kernel<kPrecision, EMULATED_STRIDE, EMULATED_TILES, EMULATED_OUT_PANELS>);
  return true;
#else
  return with_kernel<kPrecision>(stride, plan, f);
#endif
}

std::string g_error;

}  // namespace

extern "C" {

struct Buffer {
  void* data;  // null when there is none
  int64_t bytes;
};

// Buffers: x, w_expand, b_expand, w_depthwise, b_depthwise, w_project, b_project; then y, partial.
// Returns what is wrong with the kernel, or null.
const char* emulate(const BlockShape* shape, const Plan* plan, const Buffer* buffers,
                    const int64_t* x_strides, uint64_t seed) try {
  Args args = make_args(*shape, *plan, kPrecision);
  args.x = buffers[0].data;
  args.x_image = x_strides[0], args.x_row = x_strides[1], args.x_col = x_strides[2];
  args.w_expand = buffers[1].data;
  args.b_expand = static_cast<const float*>(buffers[2].data);
  args.w_depthwise = static_cast<const float*>(buffers[3].data);
  args.b_depthwise = static_cast<const float*>(buffers[4].data);
  args.w_project = buffers[5].data;
  args.b_project = static_cast<const float*>(buffers[6].data);
  args.y = buffers[7].data;
  args.partial = static_cast<float*>(buffers[8].data);
  find_vectors(args, kPrecision);

  const auto memory = [&](bool adding) {
    std::vector<emulation::Range> ranges;
    for (int i = 0; i < 7; ++i) ranges.push_back({buffers[i].data, buffers[i].bytes});
    const bool split = plan->splits > 1;
    if (adding || !split) ranges.push_back({buffers[7].data, buffers[7].bytes, true});
    if (split) ranges.push_back({buffers[8].data, buffers[8].bytes, !adding});
    return ranges;
  };
  const dim3 grid{unsigned(plan->thread_blocks / plan->splits / plan->out_blocks),
                  unsigned(plan->splits), unsigned(plan->out_blocks)};
  const bool found = with_emulated_kernel(shape->stride, *plan, [&](Kernel kernel) {
    emulation::run(
        grid, int(plan->warps * kLanes), int(plan->shared_bytes), memory(false),
        [&] { kernel(args); }, seed);
  });
  if (!found) throw std::runtime_error("no kernel is compiled for this plan");
  if (plan->splits > 1)
    emulation::run(
        {unsigned(add_blocks(*shape)), 1, 1}, int(kAddThreads), 0, memory(true),
        [&] { add_splits_kernel<kPrecision>(args); }, seed);
  return nullptr;
} catch (const std::exception& error) {
  g_error = error.what();
  return g_error.c_str();
}
}
