// The op of layers in a row on the CPU.
#include <algorithm>
#include <memory>
#include <vector>

#include "../layers.h"
#include "../plan_cache.h"
#include "op.h"

namespace mnv2_fused::cpu {
namespace {

struct Layer : LayerShape {
  BlockRun run;  // of the block
  int64_t weights
      [10];  // where each packed tensor begins, in bytes; in the order of the layer's tensors
  int64_t first_bytes;  // of the weights that a kernel reads first

  // first: of the weights of all layers.
  BlockPointers pointers(const char* first) const {
    const int64_t* w = weights;
    BlockPointers p{};
    if (kind != kBlockWithoutExpand)
      for (const void** at : {&p.w_expand, &p.b_expand}) *at = first + *w++;
    for (const void** at : {&p.w_depthwise, &p.b_depthwise, &p.w_project, &p.b_project})
      *at = first + *w++;
    if (block.squeeze_channels > 0)
      for (const void** at : {&p.w_squeeze, &p.b_squeeze, &p.w_excite, &p.b_excite})
        *at = first + *w++;
    return p;
  }
};

// Places of the layers' weights in one row of bytes, given layer by layer; see sequence/weights.py's join.
class Weights {
 public:
  // Bytes given.
  int64_t size() const { return size_; }

  template <class S>
  void give(Layer& l) {
    constexpr int64_t kDepth = depth<S>, kStored = sizeof(S), kSum = sizeof(Compute<S>);
    at_ = l.weights;
    if (!l.is_block()) {
      const PointwiseShape& s = l.pointwise;
      const int64_t panel = round_up(s.in_channels, kDepth) * kPanel * kStored;
      take(s.panels() * panel);
      take(s.panels() * kPanel * kSum);
      l.first_bytes = std::min<int64_t>(s.panels(), 4) * panel;
      return;
    }
    const BlockShape& s = l.block;
    if (s.hidden_channels % kDepth != 0)
      fail("hidden_channels must be even for bfloat16, got ", s.hidden_channels,
           "; run this block by itself");
    const int64_t panels = s.hidden_panels();
    const int64_t panel = s.expand_terms(kDepth) * kPanel * kStored;
    if (s.expand != Expand::kNone) {
      take(panels * panel);
      take(panels * kPanel * kSum);
    }
    const int64_t taps = s.taps() * kPanel * kSum;
    take(panels * taps);
    take(panels * kPanel * kSum);
    take(ceil_div(s.out_channels, kPanel) * s.hidden_channels * kPanel * kStored);
    take(s.out_channels * kSum);
    if (s.squeeze_channels > 0) {
      take(s.squeeze_panels() * s.hidden_channels * kPanel * kSum);
      take(s.squeeze_panels() * kPanel * kSum);
      take(panels * s.squeeze_channels * kPanel * kSum);
      take(panels * kPanel * kSum);
    }
    l.first_bytes = l.run.plan.group / kPanel * (s.expand == Expand::kNone ? taps : panel);
  }

 private:
  void take(int64_t bytes) {
    *at_++ = size_;
    size_ += round_up(bytes, 64);
  }

  int64_t size_ = 0;
  int64_t* at_ = nullptr;
};

// Everything about a row of layers that its weights and x's values do not change.
struct Row {
  std::vector<Layer> layers;
  int64_t weight_bytes = 0;
  int64_t between =
      0;  // bytes for the tensors between layers, which start at the buffer's two ends, in turn
  int64_t scratch = 0;  // bytes
};

// Bytes of a layer's result, on cache lines of its own.
template <class S>
int64_t result_bytes(const Layer& l) {
  return round_up(l.y_elements() * int64_t{sizeof(S)}, 256);
}

template <class S>
Row make_row(IntHeaderOnlyArrayRef layers, const Sizes& x, const Machine& machine) {
  Row row;
  Weights packed;
  for (const LayerShape& shape : layer_shapes(layers, x)) {
    Layer& l = row.layers.emplace_back(Layer{shape, {}, {}, 0});
    if (l.is_block())
      l.run =
          BlockRun(l.block, machine, [&](const BlockShape& s) { return cached_plan(s, machine); });
    packed.give<S>(l);
  }
  row.weight_bytes = packed.size();
  if (x[0] == 0) return row;  // no images: nothing runs
  const std::vector<Layer>& all = row.layers;
  for (size_t i = 0; i < all.size(); ++i) {
    if (i + 1 < all.size())
      row.between = std::max(row.between,
                             result_bytes<S>(all[i]) + (i > 0 ? result_bytes<S>(all[i - 1]) : 0));
    const int64_t sums = all[i].kind == kPooled && depth<S> > 1 ? all[i].y_elements() : 0;
    row.scratch = std::max(row.scratch, all[i].is_block() ? scratch_bytes<S>(all[i].run)
                                                          : sums * int64_t{sizeof(Compute<S>)});
  }
  return row;
}

// make_row once for all calls alike: parsing a network's layers and finding their plans takes 20 us.
template <class S>
std::shared_ptr<const Row> cached_row(IntHeaderOnlyArrayRef layers, const Sizes& x,
                                      const Machine& machine) {
  struct Key {
    std::vector<int64_t> layers;
    Sizes x;
    Machine machine;
    size_t hash() const {
      size_t h = hash_of({x[0], x[1], x[2], x[3], machine.threads, machine.l2_bytes});
      for (const int64_t value : layers) h = hash_of({value}, h);
      return h;
    }
    bool operator==(const Key&) const = default;
  };
  constexpr size_t kMostRows = 256;  // some KB each
  static PlanCache<Key, std::shared_ptr<const Row>> rows(kMostRows);
  return rows.get({{layers.begin(), layers.end()}, x, machine},
                  [&] { return std::make_shared<const Row>(make_row<S>(layers, x, machine)); });
}

// Layers in a row, by the kernels that each would run alone, in one buffer for what lies between.
Tensor run_sequence(const Tensor& x,               // [N, C, H, W]
                    const Tensor& weights,         // [bytes], of all layers
                    IntHeaderOnlyArrayRef layers,  // seven values of each, and those that follow
                    bool flat  // whether the result is [N, C], as after a classifier
) {
  check_given({{"x", &x}, {"weights", &weights}});
  const ScalarType type = x.scalar_type();
  return dispatch("sequence", type, type, [&]<class S>(S) {
    using T = Compute<S>;
    constexpr ScalarType kStored = type_of<S>;
    if (!weights.is_cpu() || weights.scalar_type() != ScalarType::Byte || weights.dim() != 1 ||
        !weights.is_contiguous())
      fail(
          "weights must be one contiguous row of bytes on the CPU, as "
          "mnv2_fused.sequence.weights.join "
          "makes it");
    const Machine machine = current_machine<S>();
    const std::shared_ptr<const Row> row = cached_row<S>(layers, sizes_of(x), machine);
    const std::vector<Layer>& all = row->layers;
    const char* const packed = static_cast<const char*>(weights.const_data_ptr());
    const Sizes sizes = all.back().y;
    if (row->weight_bytes != weights.numel())
      fail("these layers take ", row->weight_bytes, " bytes of weights for x of this dtype, got ",
           weights.numel(),
           "; pack them for it and join them with mnv2_fused.sequence.weights.join");
    if (flat && sizes[2] * sizes[3] != 1)
      fail("flat is for a result of one pixel an image, this one is ", to_string(sizes));
    const auto result_of = [&](ScalarType dtype) {
      return flat ? empty({sizes[0], sizes[1]}, {sizes[1], 1}, dtype) : empty(sizes, dtype, true);
    };
    if (x.size(0) == 0) return result_of(type);

    const int64_t between = row->between;
    const Tensor memory = buffer(between + row->scratch);
    char* const first = static_cast<char*>(memory.mutable_data_ptr());

    Tensor source = type == kStored ? x : torch::stable::to(x, kStored);
    if (all[0].kind != kStemAndBlock) source = with_channels_together(source);
    const Tensor result = result_of(kStored);
    ActivationView in = activation_of(source);
    for (size_t i = 0; i < all.size(); ++i) {
      const Layer& l = all[i];
      void* out = i % 2 ? first + between - result_bytes<S>(l) : first;
      if (i + 1 == all.size()) out = result.mutable_data_ptr();
      S* const y = static_cast<S*>(out);
      const Next next = i + 1 < all.size()
                            ? Next{packed + all[i + 1].weights[0], all[i + 1].first_bytes}
                            : Next{};
      if (l.is_block())
        run_block(l.run, in, l.pointers(packed), y, first + between, next);
      else
        run_pointwise(l.pointwise, l.kind == kLinear ? as_rows(in) : in, packed + l.weights[0],
                      packed + l.weights[1], y, reinterpret_cast<T*>(first + between), next);
      in = {l.y, {l.y[1] * l.y[2] * l.y[3], 1, l.y[3] * l.y[1], l.y[1]}, y};
    }
    if (type == kStored) return result;
    Tensor y = result_of(type);
    return torch::stable::copy_(y, result);
  });
}

Tensor sequence_cpu(const Tensor& x, const Tensor& weights, IntHeaderOnlyArrayRef layers) {
  return run_sequence(x, weights, layers, false);
}

// The same for callers that keep `layers`: a list of hundreds of values takes some us to hand over.
Tensor sequence_row_cpu(const Tensor& x, const Tensor& weights, const Tensor& layers, bool flat) {
  check_given({{"layers", &layers}});
  if (!layers.is_cpu() || layers.scalar_type() != ScalarType::Long || layers.dim() != 1 ||
      !layers.is_contiguous())
    fail("layers must be one contiguous row of int64 on the CPU");
  const auto* const values = static_cast<const int64_t*>(layers.const_data_ptr());
  return run_sequence(x, weights, {values, static_cast<size_t>(layers.numel())}, flat);
}

}  // namespace
}  // namespace mnv2_fused::cpu

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CPU, m) {
  m.impl("sequence", TORCH_BOX(&mnv2_fused::cpu::sequence_cpu));
  m.impl("sequence_row", TORCH_BOX(&mnv2_fused::cpu::sequence_row_cpu));
}
