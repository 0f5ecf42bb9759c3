// The ops of a block in training; mnv2_fused/training_ops.py says what each computes.
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../../block_fields.h"
#include "../tasks.h"
#include "tensors.h"

namespace mnv2_fused::cpu::training {
namespace {

// A block by its fields, in the order of block_fields.h.
BlockShape shape_of(IntHeaderOnlyArrayRef fields) {
  if (fields.size() != std::size(kBlockFields))
    fail("block must have ", std::size(kBlockFields), " values, got ", fields.size());
  BlockShape s{};
  for (size_t i = 0; i < fields.size(); ++i) {
    const BlockField& field = kBlockFields[i];
    if (field.values > 0) check_kind(field.name, fields[i], field.values);
    field.set(s, fields[i]);
  }
  check_slope(s.negative_slope);
  if (const std::string why = unsupported(s); !why.empty()) fail(why);
  if (s.expand == Expand::kStem) fail("a stem has no training kernel");
  if (s.squeeze_channels > 0) fail("a squeeze-and-excite is given by its gate");
  for (const Activation a : {s.activation, s.expand_activation})
    if (!has_derivative(a)) fail("no training kernel knows the derivative of ", row_of(a).name);
  if (s.batch < 1) fail("a batch must have at least one image");
  return s;
}

// One call of one pass.
template <class T>
class Call {
 public:
  Call(const Tensor& x, const std::optional<Tensor>& w_expand,
       const std::optional<Tensor>& b_expand, const Tensor& w_depthwise,
       IntHeaderOnlyArrayRef block)
      : s(shape_of(block)), hidden(s.hidden_panels() * kPanel), slots(slots_of(s)) {
    args.shape = s;
    args.x = activation<T>("x", x, {s.batch, s.in_channels, s.height, s.width});
    if (s.expand == Expand::kPointwise) {
      if (!w_expand || !b_expand) fail("w_expand and b_expand must be given with an expansion");
      args.w_expand = weights<T>("w_expand", *w_expand, {s.hidden_panels(), s.in_channels, kPanel});
      args.b_expand = weights<T>("b_expand", *b_expand, {hidden});
    }
    args.w_depthwise =
        weights<T>("w_depthwise", w_depthwise, {s.hidden_panels(), s.taps(), kPanel});
  }

  Sizes out_sizes() const { return {s.batch, s.out_channels, s.out_height(), s.out_width()}; }

  // of_d: [6][E/16 * 16], see Args.
  void set_norm(const Tensor& of_d, const std::optional<Tensor>& gate = {}) {
    if (gate) args.gate = weights<T>("gate", *gate, {s.batch, hidden});
    const T* at = weights<T>("of_d", of_d, {6, hidden});
    for (const T** p :
         {&args.scale, &args.shift, &args.mean, &args.inverse, &args.offset, &args.slope})
      *p = std::exchange(at, at + hidden);
  }
  void set_gradient(const Tensor& g, const Tensor& w_project) {
    args.g = activation<T>("g", g, out_sizes());
    args.w_project =
        weights<T>("w_project", w_project, {s.hidden_panels(), s.out_channels, kPanel});
  }

  // Memory for `count` elements of each slot.
  template <class R>
  R* of_slots(int64_t count) {
    memory_.push_back(buffer(slots * count * int64_t{sizeof(R)}));
    return static_cast<R*>(memory_.back().mutable_data_ptr());
  }

  void run(void (*pass)(const Args<T>&, const Layout&, int64_t, T*)) {
    const Kernels<T>& k = kernels<T>();
    const Layout layout(s, k.lanes, sizeof(T), pass == k.backward_expand);
    const int64_t slice = round_up(layout.total() * int64_t{sizeof(T)}, 256);
    const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), slots);
    const Tensor scratch = buffer(slice * workers);
    char* const first = static_cast<char*>(scratch.mutable_data_ptr());
    for_tasks(slots, workers, [&](int64_t slot, int64_t worker) {
      pass(args, layout, slot, reinterpret_cast<T*>(first + worker * slice));
    });
  }

  // The slots' results added up in order, [rows, E] of [slots][rows_of_slot][E/16 * 16].
  template <class R>
  Tensor summed(const R* parts, int64_t rows, int64_t rows_of_slot = 0) {
    const int64_t pitch = std::max(rows, rows_of_slot) * hidden;
    const Tensor sum = dense({rows, s.hidden_channels}, type_of<R>);
    R* const to = static_cast<R*>(sum.mutable_data_ptr());
    const int64_t rows_a_task = ceil_div(rows, torch::stable::get_num_threads());
    torch::stable::parallel_for(0, rows, rows_a_task, [&](int64_t row, int64_t end) {
      for (; row < end; ++row)
        for (int64_t c = 0; c < s.hidden_channels; ++c) {
          double total = 0;
          for (int64_t slot = 0; slot < slots; ++slot)
            total += double(parts[slot * pitch + row * hidden + c]);
          to[row * s.hidden_channels + c] = R(total);
        }
    });
    return sum;
  }

  const BlockShape s;
  const int64_t hidden, slots;
  Args<T> args;

 private:
  std::vector<Tensor> memory_;
};

// The mean of d, and its variance, over all images: [2, E] float64.
Tensor statistics(const Tensor& x, const std::optional<Tensor>& w_expand,
                  const std::optional<Tensor>& b_expand, const Tensor& w_depthwise,
                  IntHeaderOnlyArrayRef block) {
  return with_dtype("training_statistics", x, [&]<class T>(T) {
    Call<T> call(x, w_expand, b_expand, w_depthwise, block);
    const double* const parts = call.args.sums = call.template of_slots<double>(2 * call.hidden);
    call.run(kernels<T>().statistics);
    const double pixels = double(call.s.out_height() * call.s.out_width());
    return joined(parts, call.slots, call.hidden, call.s.hidden_channels, [&](int64_t slot) {
      const int64_t begin = call.s.batch * slot / call.slots;
      return double(call.s.batch * (slot + 1) / call.slots - begin) * pixels;
    });
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
    call.args.w_output = weights<T>("w_output", w_output,
                                    {ceil_div(call.s.out_channels, kPanel), call.hidden, kPanel});
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
    const BlockShape& s = call.s;
    const bool expands = s.expand == Expand::kPointwise;
    // Without w_input, x of an expansion gets no gradient.
    const bool with_x = !expands || w_input;
    if (expands && w_input) {
      call.args.w_input =
          weights<T>("w_input", *w_input, {ceil_div(s.in_channels, kPanel), call.hidden, kPanel});
    }
    const double* const sums = call.args.sums = call.template of_slots<double>(2 * call.hidden);
    const int64_t terms = expands ? s.in_channels : 0;
    const T* const dw_expand = call.args.dw_expand =
        call.template of_slots<T>(std::max<int64_t>(terms, 1) * call.hidden);
    const T* const dw_depthwise = call.args.dw_depthwise =
        call.template of_slots<T>(s.taps() * call.hidden);
    const Tensor g_x = with_x ? empty({s.batch, s.in_channels, s.height, s.width}, type_of<T>, true)
                              : dense({0}, type_of<T>);
    call.args.g_x = with_x ? static_cast<T*>(g_x.mutable_data_ptr()) : nullptr;
    call.run(kernels<T>().backward_expand);
    return std::make_tuple(g_x, call.summed(sums, 1, 2), call.summed(dw_expand, terms),
                           call.summed(dw_depthwise, s.taps()));
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
