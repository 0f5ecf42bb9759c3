// One call of the passes of a block: its arguments out of tensors, its images on threads, its sums put together.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../../block_fields.h"
#include "../tasks.h"
#include "tensors.h"

namespace mnv2_fused::cpu::training {

// A block by its fields, in the order of block_fields.h.
inline BlockShape shape_of(IntHeaderOnlyArrayRef fields) {
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
    args.end_panel = s.hidden_panels();
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

  void set_output(const Tensor& w_output) {
    args.w_output =
        weights<T>("w_output", w_output, {ceil_div(s.out_channels, kPanel), hidden, kPanel});
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
    if (scratch_bytes_ < slice * workers) {
      scratch_bytes_ = slice * workers;
      scratch_ = buffer(scratch_bytes_);
    }
    char* const first = static_cast<char*>(scratch_.mutable_data_ptr());
    for_tasks(slots, workers, [&](int64_t slot, int64_t worker) {
      pass(args, layout, slot, reinterpret_cast<T*>(first + worker * slice));
    });
  }
  // Values of each channel of d in a slot.
  double values_of(int64_t slot) const {
    const int64_t begin = s.batch * slot / slots, end = s.batch * (slot + 1) / slots;
    return double(end - begin) * double(s.out_height() * s.out_width());
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
        sum_parts(parts + row * hidden, slots, pitch, s.hidden_channels,
                  to + row * s.hidden_channels);
    });
    return sum;
  }

  const BlockShape s;
  const int64_t hidden, slots;
  Args<T> args;

 private:
  std::vector<Tensor> memory_;
  Tensor scratch_;
  int64_t scratch_bytes_ = 0;
};

// What the pass of the expansion's gradients gives. Without w_input, x of an expansion gets no gradient.
template <class T>
struct ExpandResults {
  ExpandResults(Call<T>& call, const std::optional<Tensor>& w_input) : call(call) {
    const BlockShape& s = call.s;
    const bool expands = s.expand == Expand::kPointwise, with_x = !expands || w_input;
    if (expands && w_input) {
      call.args.w_input =
          weights<T>("w_input", *w_input, {ceil_div(s.in_channels, kPanel), call.hidden, kPanel});
    }
    terms = expands ? s.in_channels : 0;
    sums = call.args.sums = call.template of_slots<double>(2 * call.hidden);
    call.args.dw_expand = call.template of_slots<T>(std::max<int64_t>(terms, 1) * call.hidden);
    call.args.dw_depthwise = call.template of_slots<T>(s.taps() * call.hidden);
    g_x = with_x ? empty({s.batch, s.in_channels, s.height, s.width}, type_of<T>, true)
                 : dense({0}, type_of<T>);
    call.args.g_x = with_x ? static_cast<T*>(g_x.mutable_data_ptr()) : nullptr;
  }
  // g_x, the sums of e's gradient [1, E], dw_expand [C_in, E], dw_depthwise [taps, E].
  std::tuple<Tensor, Tensor, Tensor, Tensor> all() {
    return {g_x, call.summed(sums, 1, 2), call.summed(call.args.dw_expand, terms),
            call.summed(call.args.dw_depthwise, call.s.taps())};
  }

  Call<T>& call;
  double* sums;
  int64_t terms;
  Tensor g_x;
};

}  // namespace mnv2_fused::cpu::training
