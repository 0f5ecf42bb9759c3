#include "run.h"

#include <algorithm>
#include <utility>

#include "../layers.h"
#include "../plan_cache.h"
#include "tasks.h"

namespace mnv2_fused::cpu {
namespace {

// Bytes of one worker's slice of the scratch, which starts on its own cache lines.
int64_t slice_bytes(const Plan& plan) { return round_up(plan.scratch_bytes, 256); }

// "float32" for messages.
template <class S>
const char* name_of() {
  return type_of<S> == ScalarType::Float    ? "float32"
         : type_of<S> == ScalarType::Double ? "float64"
                                            : "bfloat16";
}

// Weights of products are stored as S, all others as the type of sums.
template <class S, class Packed>
void check_dtype(const Tensor& weight) {
  if (!weight.is_cpu()) fail("x is on the CPU, so the packed weights must be too");
  if (weight.scalar_type() != type_of<Packed>)
    fail("packed weights must be ", name_of<Packed>(), " where they are for ", name_of<S>(),
         " products; pack all of them with mnv2_fused.pack(weights, x.dtype)");
}

// Weights of a product over `terms` elements: [C/16, terms, 16], of pairs [C/16, terms/2, 16, 2].
template <class S>
void check_product(const char* name, const Tensor& t, int64_t panels, int64_t terms) {
  if constexpr (depth<S> == 1)
    check_sizes(name, t, {panels, terms, kPanel});
  else
    check_sizes(name, t, {panels, ceil_div(terms, depth<S>), kPanel, depth<S>});
}
template <class S>
constexpr int64_t kProductDims = depth<S> == 1 ? 3 : 4;
// Sizes of a product's weights, for messages.
template <class S>
std::string product_layout(const char* panels, const char* terms) {
  return std::string("[") + panels + ", " + terms + (depth<S> == 1 ? ", 16]" : "/2, 16, 2]");
}

}  // namespace

ActivationView activation_of(const Tensor& x) {
  return {sizes_of(x), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}, x.const_data_ptr()};
}

template <class S>
BlockShape block_shape(const Sizes& x, const BlockTensors& w, int64_t stride, bool residual,
                       const Options& options) {
  for (const Tensor* t : {w.w_expand, w.w_project})
    if (t) check_dtype<S, S>(*t);
  for (const Tensor* t : {w.b_expand, w.w_depthwise, w.b_depthwise, w.b_project, w.w_squeeze,
                          w.b_squeeze, w.w_excite, w.b_excite})
    if (t) check_dtype<S, Compute<S>>(*t);
  if (w.w_project->dim() != kProductDims<S> || w.b_project->dim() != 1)
    fail("w_project must be ", product_layout<S>("C_out/16", "E"), " and b_project [C_out], got ",
         to_string(*w.w_project), " and ", to_string(*w.b_project));
  const int64_t hidden = w.w_project->size(1) * depth<S>;
  int64_t takes = hidden;
  if (w.w_expand) {
    if (w.w_expand->dim() != kProductDims<S>)
      fail("w_expand must be ", product_layout<S>("E/16", "C_in"), ", got ",
           to_string(*w.w_expand));
    takes = w.w_expand->size(1) * depth<S>;
  }
  // Packed pairs do not tell an odd number from the next.
  const bool fits = w.w_expand ? round_up(x[1], depth<S>) == takes : x[1] == takes;
  if (!fits) fail("x must have ", takes, " channels, got ", x[1], " in ", to_string(x));
  BlockShape s{x[0],    x[2],
               x[3],    x[1],
               hidden,  w.b_project->size(0),
               stride,  w.w_expand ? Expand::kPointwise : Expand::kNone,
               residual};
  set_options(s, options, *w.w_depthwise);
  if (w.w_excite) {
    if (w.w_excite->dim() != 3 || w.w_excite->size(1) < 1)
      fail("w_excite must be [E/16, S, 16], got ", to_string(*w.w_excite));
    s.squeeze_channels = w.w_excite->size(1);
  }
  check(s, x);
  const int64_t panels = s.hidden_panels();
  if (w.w_expand) {
    check_product<S>("w_expand", *w.w_expand, panels, s.in_channels);
    check_sizes("b_expand", *w.b_expand, {panels * kPanel});
  }
  check_sizes("w_depthwise", *w.w_depthwise, {panels, s.taps(), kPanel});
  check_sizes("b_depthwise", *w.b_depthwise, {panels * kPanel});
  check_product<S>("w_project", *w.w_project, ceil_div(s.out_channels, kPanel), s.hidden_channels);
  check_sizes("b_project", *w.b_project, {s.out_channels});
  if (w.w_excite) {
    check_sizes("w_squeeze", *w.w_squeeze, {s.squeeze_panels(), hidden, kPanel});
    check_sizes("b_squeeze", *w.b_squeeze, {s.squeeze_panels() * kPanel});
    check_sizes("w_excite", *w.w_excite, {panels, s.squeeze_channels, kPanel});
    check_sizes("b_excite", *w.b_excite, {panels * kPanel});
  }
  return s;
}

template <class S>
Machine current_machine() {
  return cpu::kernels<S>(cpu::active()).machine(torch::stable::get_num_threads(), cpu::l2_bytes());
}

Plan cached_plan(const BlockShape& shape, const Machine& machine) {
  struct Key {
    BlockShape shape;
    Machine machine;
    size_t hash() const {
      return hash_of({machine.threads, machine.lanes, machine.element_size, machine.storage_size,
                      machine.depth},
                     hash_of(shape));
    }
    bool operator==(const Key&) const = default;
  };
  static PlanCache<Key, Plan> plans;
  return plans.get({shape, machine}, [&] { return make_plan(shape, machine); });
}

namespace {

// Memory of a squeeze-and-excite behind its workers' scratch and partial sums, in this order; each part
// starts on its own cache lines.
struct SqueezeMemory {
  int64_t cached, pooled, mean, squeezed, gate;  // bytes

  SqueezeMemory(const BlockShape& s, const Plan& plan, int64_t sum_size, int64_t storage_size)
      : cached(room(plan.cached_elements(s) * storage_size)),
        pooled(room(plan.pooled_elements(s) * sum_size)),
        mean(room(s.batch * s.hidden_panels() * kPanel * sum_size)),
        squeezed(room(s.batch * s.squeeze_channels * sum_size)),
        // Read by whole panels, past the last channel.
        gate(room((s.batch * s.hidden_channels + kPanel) * sum_size)) {}
  int64_t total() const { return cached + pooled + mean + squeezed + gate; }

 private:
  static int64_t room(int64_t bytes) { return round_up(bytes, 256); }
};

// gate = sigmoid(w_excite act(w_squeeze mean(d))), of every image.
template <class T>
void compute_gate(const BlockShape& s, const Plan& plan, const BlockPointers& w, const T* pooled,
                  T* mean, T* squeezed, T* gate) {
  const cpu::Kernels<T>& kernels = cpu::kernels<T>(cpu::active());
  const int64_t rows = s.out_height() * plan.tiles_across(s);
  const int64_t hidden = s.hidden_panels() * kPanel;
  const T scale = T(1) / T(s.out_height() * s.out_width());
  torch::stable::parallel_for(0, s.batch, 1, [&](int64_t image, int64_t end) {
    for (; image < end; ++image)
      kernels.mean_of_rows(pooled + image * rows * hidden, rows, hidden, scale,
                           mean + image * hidden);
  });
  // Images as the pixels of one.
  const auto product = [&](const T* x, int64_t in, int64_t pitch, const void* weight,
                           const void* bias, int64_t out, T* y) {
    run_pointwise<T>({1, s.batch, 1, in, out, Activation::kIdentity, false},
                     {{1, in, s.batch, 1}, {0, 1, pitch, 0}, x}, weight, bias, y, y);
  };
  product(mean, s.hidden_channels, hidden, w.w_squeeze, w.b_squeeze, s.squeeze_channels, squeezed);
  kernels.activate(squeezed, s.batch * s.squeeze_channels, s.function(s.squeeze_activation));
  product(squeezed, s.squeeze_channels, s.squeeze_channels, w.w_excite, w.b_excite,
          s.hidden_channels, gate);
  kernels.gate(gate, s.batch * s.hidden_channels, s.gate);
}

// Bytes of scratch that all workers of a plan need together.
int64_t workers_bytes(const Plan& plan) {
  return slice_bytes(plan) * plan.workers + plan.partial_bytes;
}

// Those, and the memory of a squeeze-and-excite behind them.
template <class S>
int64_t part_bytes(const BlockShape& shape, const Plan& plan) {
  if (shape.squeeze_channels == 0) return workers_bytes(plan);
  return workers_bytes(plan) + 256 +
         SqueezeMemory(shape, plan, sizeof(Compute<S>), sizeof(S)).total();
}

template <class S>
void run_part(const BlockShape& shape, const Plan& plan, const ActivationView& x,
              const BlockPointers& w, S* y, void* scratch, Next next) {
  using T = Compute<S>;
  const cpu::Kernels<S>& kernels = cpu::kernels<S>(cpu::active());
  const int64_t slice = slice_bytes(plan) / int64_t{sizeof(T)};
  T* const first = static_cast<T*>(scratch);
  BlockArgs<S> args{shape,
                    static_cast<const S*>(x.data),
                    x.strides[0],
                    x.strides[2],
                    x.strides[3],
                    x.strides[1],
                    static_cast<const S*>(w.w_expand),
                    static_cast<const T*>(w.b_expand),
                    static_cast<const T*>(w.w_depthwise),
                    (w.taps > 0 ? w.taps : shape.taps()) * kPanel,
                    static_cast<const T*>(w.b_depthwise),
                    static_cast<const S*>(w.w_project),
                    static_cast<const T*>(w.b_project),
                    y,
                    first + slice * plan.workers,
                    next.data,
                    next.bytes};
  const auto run_tiles = [&] {
    for_tasks(plan.tasks, plan.workers, [&](int64_t task, int64_t worker) {
      kernels.run_tile(args, plan, task, first + worker * slice);
    });
  };
  if (shape.squeeze_channels > 0) {
    const SqueezeMemory memory(shape, plan, sizeof(T), sizeof(S));
    char* at = static_cast<char*>(scratch) + round_up(workers_bytes(plan), 256);
    const auto take = [&](int64_t bytes) { return std::exchange(at, at + bytes); };
    char* const cached = take(memory.cached);
    args.cached = plan.caches_depthwise ? reinterpret_cast<S*>(cached) : nullptr;
    args.pooled = reinterpret_cast<T*>(take(memory.pooled));
    T* const mean = reinterpret_cast<T*>(take(memory.mean));
    T* const squeezed = reinterpret_cast<T*>(take(memory.squeezed));
    T* const gate = reinterpret_cast<T*>(take(memory.gate));
    args.pass = Pass::kPool;
    run_tiles();
    compute_gate<T>(shape, plan, w, args.pooled, mean, squeezed, gate);
    args.pass = Pass::kLast;
    args.gate = gate;
  }
  run_tiles();
  if (plan.splits == 1) return;
  const int64_t rows = shape.batch * shape.out_height();
  torch::stable::parallel_for(0, rows, ceil_div(rows, plan.workers), [&](int64_t row, int64_t end) {
    for (; row < end; ++row) kernels.add_row(args, plan, row);
  });
}

}  // namespace

template <class S>
int64_t scratch_bytes(const BlockRun& run) {
  const int64_t rest = run.rest.batch > 0 ? part_bytes<S>(run.rest, run.rest_plan) : 0;
  return std::max(part_bytes<S>(run.part, run.plan), rest);
}

template <class S>
void run_block(const BlockRun& run, ActivationView x, const BlockPointers& w, S* y, void* scratch,
               Next next) {
  if (run.of_pixels) {
    BlockPointers middle = w;
    const int64_t taps = run.rest.taps();
    middle.w_depthwise = static_cast<const Compute<S>*>(w.w_depthwise) + taps / 2 * kPanel;
    middle.taps = taps;
    return run_part(run.part, run.plan, as_columns(x), middle, y, scratch, next);
  }
  for (int64_t left = run.batch; left > 0; left -= run.part.batch) {
    const bool whole = left >= run.part.batch;
    const BlockShape& shape = whole ? run.part : run.rest;
    run_part(shape, whole ? run.plan : run.rest_plan, x, w, y, scratch,
             left <= run.part.batch ? next : Next{});
    x.data = static_cast<const S*>(x.data) + shape.batch * x.strides[0];
    y += shape.out_elements();
  }
}

template <class S>
void run_pointwise(const PointwiseShape& shape, const ActivationView& x, const void* weight,
                   const void* bias, S* y, Compute<S>* sums, Next next) {
  using T = Compute<S>;
  const cpu::Kernels<S>& kernels = cpu::kernels<S>(cpu::active());
  const int64_t threads = torch::stable::get_num_threads();
  // Whole images where there are enough of them, else each image's channels shared out.
  const int64_t parts = shape.batch % threads == 0 ? 1 : std::min<int64_t>(threads, shape.panels());
  if constexpr (std::is_same_v<S, T>) sums = y;
  const PointwiseArgs<S> args{shape,
                              parts,
                              static_cast<const S*>(x.data),
                              x.strides[0],
                              x.strides[2],
                              x.strides[3],
                              static_cast<const S*>(weight),
                              static_cast<const T*>(bias),
                              y,
                              sums,
                              next.data,
                              next.bytes};
  const int64_t tasks = shape.batch * parts;
  for_tasks(tasks, std::min(threads, tasks),
            [&](int64_t task, int64_t) { kernels.run_pointwise(args, task); });
}

#define MNV2_INSTANTIATE(S)                                                                    \
  template Machine current_machine<S>();                                                       \
  template int64_t scratch_bytes<S>(const BlockRun&);                                          \
  template BlockShape block_shape<S>(const Sizes&, const BlockTensors&, int64_t, bool,         \
                                     const Options&);                                          \
  template void run_block<S>(const BlockRun&, ActivationView, const BlockPointers&, S*, void*, \
                             Next);                                                            \
  template void run_pointwise<S>(const PointwiseShape&, const ActivationView&, const void*,    \
                                 const void*, S*, Compute<S>*, Next);
MNV2_INSTANTIATE(float)
MNV2_INSTANTIATE(double)
MNV2_INSTANTIATE(BFloat16)

}  // namespace mnv2_fused::cpu
