// The ops of one pass each; mnv2_fused/training_ops says what each computes.
#include <algorithm>
#include <optional>
#include <tuple>

#include "call.h"

namespace mnv2_fused::cpu::training {
namespace {

// The mean of d, and its variance, over all images: [2, E] float64.
Tensor statistics(const Tensor& x, const std::optional<Tensor>& w_expand,
                  const std::optional<Tensor>& b_expand, const Tensor& w_depthwise,
                  IntHeaderOnlyArrayRef block) {
  return with_dtype("training_statistics", x, [&]<class T>(T) {
    Call<T> call(x, w_expand, b_expand, w_depthwise, block);
    const double* const parts = call.args.sums = call.template of_slots<double>(2 * call.hidden);
    call.run(kernels<T>().statistics);
    return joined(parts, call.slots, call.hidden, call.s.hidden_channels,
                  [&](int64_t slot) { return call.values_of(slot); });
  });
}

// Sums of act(a) over each image: [N, E/16 * 16] float64.
Tensor pool(const Tensor& x, const std::optional<Tensor>& w_expand,
            const std::optional<Tensor>& b_expand, const Tensor& w_depthwise, const Tensor& of_d,
            IntHeaderOnlyArrayRef block) {
  return with_dtype("training_pool", x, [&]<class T>(T) {
    Call<T> call(x, w_expand, b_expand, w_depthwise, block);
    call.set_norm(of_d);
    const Tensor sums = dense({call.s.batch, call.hidden}, ScalarType::Double);
    call.args.sums = static_cast<double*>(sums.mutable_data_ptr());
    call.run(kernels<T>().pool);
    return sums;
  });
}

Tensor project(const Tensor& x, const std::optional<Tensor>& w_expand,
               const std::optional<Tensor>& b_expand, const Tensor& w_depthwise, const Tensor& of_d,
               const Tensor& gate, const Tensor& w_output, IntHeaderOnlyArrayRef block) {
  return with_dtype("training_project", x, [&]<class T>(T) {
    Call<T> call(x, w_expand, b_expand, w_depthwise, block);
    call.set_norm(of_d, gate);
    call.set_output(w_output);
    const Tensor p = empty(call.out_sizes(), type_of<T>, true);
    call.args.p = static_cast<T*>(p.mutable_data_ptr());
    call.run(kernels<T>().project);
    return p;
  });
}

// With a gate the sums are of each image: [N, kGateSums, E/16 * 16].
std::tuple<Tensor, Tensor> backward_project(const Tensor& x, const std::optional<Tensor>& w_expand,
                                            const std::optional<Tensor>& b_expand,
                                            const Tensor& w_depthwise, const Tensor& g,
                                            const Tensor& w_project, const Tensor& of_d,
                                            const std::optional<Tensor>& gate,
                                            IntHeaderOnlyArrayRef block) {
  return with_dtype("training_backward_project", x, [&]<class T>(T) {
    Call<T> call(x, w_expand, b_expand, w_depthwise, block);
    call.set_norm(of_d, gate);
    call.set_gradient(g, w_project);
    const Tensor of_images =
        dense({gate ? call.s.batch : 0, kGateSums, call.hidden}, ScalarType::Double);
    const double* const sums = call.args.sums =
        gate ? static_cast<double*>(of_images.mutable_data_ptr())
             : call.template of_slots<double>(2 * call.hidden);
    const T* const dw = call.args.dw_project =
        call.template of_slots<T>(call.s.out_channels * call.hidden);
    call.run(kernels<T>().backward_project);
    return std::make_tuple(gate ? of_images : call.summed(sums, 2),
                           call.summed(dw, call.s.out_channels));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_expand(
    const Tensor& x, const std::optional<Tensor>& w_expand, const std::optional<Tensor>& b_expand,
    const Tensor& w_depthwise, const Tensor& g, const Tensor& w_project, const Tensor& of_d,
    const std::optional<Tensor>& gate, const std::optional<Tensor>& of_pooled,
    const std::optional<Tensor>& w_input, IntHeaderOnlyArrayRef block) {
  return with_dtype("training_backward_expand", x, [&]<class T>(T) {
    Call<T> call(x, w_expand, b_expand, w_depthwise, block);
    call.set_norm(of_d, gate);
    call.set_gradient(g, w_project);
    if (of_pooled)
      call.args.of_pooled = weights<T>("of_pooled", *of_pooled, {call.s.batch, call.hidden});
    ExpandResults<T> results(call, w_input);
    call.run(kernels<T>().backward_expand);
    return results.all();
  });
}

}  // namespace
}  // namespace mnv2_fused::cpu::training

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CPU, m) {
  m.impl("training_statistics", TORCH_BOX(&mnv2_fused::cpu::training::statistics));
  m.impl("training_pool", TORCH_BOX(&mnv2_fused::cpu::training::pool));
  m.impl("training_project", TORCH_BOX(&mnv2_fused::cpu::training::project));
  m.impl("training_backward_project", TORCH_BOX(&mnv2_fused::cpu::training::backward_project));
  m.impl("training_backward_expand", TORCH_BOX(&mnv2_fused::cpu::training::backward_expand));
}
