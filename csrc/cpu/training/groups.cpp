// The ops of a whole direction: groups of expanded channels go through two passes one after the other. The first pass
// keeps what the second one reads, which no other group needs: memory for one group, near as long as it is small.
#include <cmath>
#include <tuple>
#include <vector>

#include "call.h"

namespace mnv2_fused::cpu::training {
namespace {

// Bytes that are kept of a group, unless its register tiles would be narrow.
constexpr int64_t kGroupBytes = int64_t{1} << 20;

// Runs f(first channel, end channel) with the panels of each group. of_panel: elements that are kept of one.
template <class T, class F>
void for_groups(Call<T>& call, int64_t of_panel, F f) {
  const int64_t chunk = most_panels(kernels<T>().lanes), all = call.s.hidden_panels();
  const int64_t chunks = kGroupBytes / (chunk * of_panel * int64_t{sizeof(T)});
  const int64_t group = std::min(std::max<int64_t>(chunks, 1) * chunk, all);
  const Tensor memory = buffer(group * of_panel * int64_t{sizeof(T)});
  for (int64_t first = 0; first < all; first += group) {
    call.args.first_panel = first;
    call.args.end_panel = std::min(first + group, all);
    f(static_cast<T*>(memory.mutable_data_ptr()), first * kPanel,
      std::min(call.args.end_panel * kPanel, call.s.hidden_channels));
  }
}

// The norm behind d by the statistics of the batch, from its weight and bias [2, E]; then p with w_output, else the sums
// of act(a) over each image: p or [N, E/16 * 16]; mean and variance of d [2, E].
std::tuple<Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& w_expand,
                                   const std::optional<Tensor>& b_expand, const Tensor& w_depthwise,
                                   const Tensor& affine, double eps,
                                   const std::optional<Tensor>& w_output,
                                   IntHeaderOnlyArrayRef block) {
  return with_dtype("training_forward", x, [&]<class T>(T) {
    const Kernels<T>& k = kernels<T>();
    Call<T> call(x, w_expand, b_expand, w_depthwise, block);
    const BlockShape& s = call.s;
    const int64_t channels = s.hidden_channels;
    const double* const weight = weights<double>("affine", affine, {2, channels});
    const double* const bias = weight + channels;
    std::vector<T> folded(2 * call.hidden);
    T *const scale = folded.data(), *const shift = scale + call.hidden;
    call.args.scale = scale;
    call.args.shift = shift;
    const Tensor found = dense({2, channels}, ScalarType::Double);
    auto* const mean = static_cast<double*>(found.mutable_data_ptr());
    double* const variance = mean + channels;
    double* const parts = call.template of_slots<double>(2 * call.hidden);
    if (w_output) call.set_output(*w_output);
    const Tensor result = w_output ? empty(call.out_sizes(), type_of<T>, true)
                                   : dense({s.batch, call.hidden}, ScalarType::Double);
    if (w_output) call.args.p = static_cast<T*>(result.mutable_data_ptr());
    const int64_t of_panel = s.batch * s.out_height() * s.out_width() * kPanel;
    for_groups(call, of_panel, [&](T* kept, int64_t first, int64_t end) {
      call.args.kept_d = kept;
      call.args.sums = parts;
      call.run(k.statistics);
      for (int64_t c = first; c < end; ++c) {
        const Moments m = moments_of(parts + c, call.slots, call.hidden,
                                     [&](int64_t slot) { return call.values_of(slot); });
        mean[c] = m.mean;
        variance[c] = m.variance;
        const double factor = weight[c] / std::sqrt(m.variance + eps);
        scale[c] = T(factor);
        shift[c] = T(bias[c] - factor * m.mean);
      }
      if (!w_output) call.args.sums = static_cast<double*>(result.mutable_data_ptr());
      call.run(w_output ? k.project : k.pool);
    });
    return std::make_tuple(result, found);
  });
}

// Both passes backward. count: values in each channel of d, whose norm takes its statistics from them, else 0.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& x, const std::optional<Tensor>& w_expand, const std::optional<Tensor>& b_expand,
    const Tensor& w_depthwise, const Tensor& g, const Tensor& w_project, const Tensor& of_d,
    double count, const std::optional<Tensor>& w_input, IntHeaderOnlyArrayRef block) {
  return with_dtype("training_backward", x, [&]<class T>(T) {
    const Kernels<T>& k = kernels<T>();
    Call<T> call(x, w_expand, b_expand, w_depthwise, block);
    call.set_norm(of_d);
    call.set_gradient(g, w_project);
    const BlockShape& s = call.s;
    std::vector<T> added(2 * call.hidden);
    T *const offset = added.data(), *const slope = offset + call.hidden;
    call.args.offset = offset;
    call.args.slope = slope;
    double* const sums = call.template of_slots<double>(2 * call.hidden);
    const T* const dw_project = call.args.dw_project =
        call.template of_slots<T>(s.out_channels * call.hidden);
    ExpandResults<T> results(call, w_input);
    const int64_t of_d_panel = s.batch * s.out_height() * s.out_width() * kPanel;
    const bool keeps_e = s.expand != Expand::kNone && is_clip(s.expand_activation);
    const int64_t ring_cols = Layout(s, k.lanes, sizeof(T), false).ring_cols;
    const int64_t of_e_panel = keeps_e ? s.batch * s.height * ring_cols * kPanel : 0;
    for_groups(call, 2 * of_d_panel + of_e_panel, [&](T* kept, int64_t first, int64_t end) {
      const int64_t panels = call.args.end_panel - call.args.first_panel;
      call.args.kept_d = kept;
      call.args.kept_q = kept + panels * of_d_panel;
      call.args.kept_e = keeps_e ? kept + 2 * panels * of_d_panel : nullptr;
      call.args.sums = sums;
      call.run(k.backward_project);
      for (int64_t c = first; c < end && count > 0; ++c) {
        double total[2] = {};
        for (int64_t slot = 0; slot < call.slots; ++slot)
          for (int row : {0, 1}) total[row] += sums[(2 * slot + row) * call.hidden + c];
        const double share = -double(call.args.scale[c]) / count;
        offset[c] = T(share * total[0]);
        slope[c] = T(share * total[1]);
      }
      call.args.sums = results.sums;
      call.run(k.backward_expand);
    });
    return std::tuple_cat(
        std::make_tuple(call.summed(sums, 2), call.summed(dw_project, s.out_channels)),
        results.all());
  });
}

}  // namespace
}  // namespace mnv2_fused::cpu::training

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CPU, m) {
  m.impl("training_forward", TORCH_BOX(&mnv2_fused::cpu::training::forward));
  m.impl("training_backward", TORCH_BOX(&mnv2_fused::cpu::training::backward));
}
