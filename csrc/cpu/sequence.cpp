// The op of layers in a row on the CPU.
#include <algorithm>
#include <vector>

#include "../layers.h"
#include "op.h"

namespace mnv2_fused::cpu {
namespace {

struct Layer : LayerShape {
  BlockRun run;             // of the block
  const char* weights[10];  // in the order of the layer's packed tensors; the rest is null
  int64_t first_bytes;      // of the weights that a kernel reads first

  BlockPointers pointers() const {
    const char* const* w = weights;
    BlockPointers p{};
    if (kind != kBlockWithoutExpand) {
      p.w_expand = *w++;
      p.b_expand = *w++;
    }
    for (const void** at : {&p.w_depthwise, &p.b_depthwise, &p.w_project, &p.b_project}) *at = *w++;
    if (block.squeeze_channels > 0)
      for (const void** at : {&p.w_squeeze, &p.b_squeeze, &p.w_excite, &p.b_excite}) *at = *w++;
    return p;
  }
};

// Weights of all layers in one row of bytes, handed out layer by layer; see sequence/weights.py's join.
class Weights {
 public:
  explicit Weights(const char* first) : first_(first) {}
  // Bytes handed out.
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
    *at_++ = first_ + size_;
    size_ += round_up(bytes, 64);
  }

  const char* first_;
  int64_t size_ = 0;
  const char** at_ = nullptr;
};

// One-pixel images as the pixels of one image.
ActivationView as_pixels(const ActivationView& x) {
  return {{1, x.sizes[1], x.sizes[0], 1}, {0, x.strides[1], x.strides[0], 0}, x.data};
}

// Layers in a row, by the kernels that each would run alone, in one buffer for what lies between.
Tensor sequence_cpu(const Tensor& x,              // [N, C, H, W]
                    const Tensor& weights,        // [bytes], of all layers
                    IntHeaderOnlyArrayRef layers  // seven values of each, and those that follow
) {
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
    const std::vector<LayerShape> shapes = layer_shapes(layers, sizes_of(x));
    std::vector<Layer> all;
    all.reserve(shapes.size());
    Weights packed(static_cast<const char*>(weights.const_data_ptr()));
    for (const LayerShape& shape : shapes) {
      Layer& l = all.emplace_back(Layer{shape, {}, {}, 0});
      if (l.is_block())
        l.run = BlockRun(l.block, machine,
                         [&](const BlockShape& s) { return cached_plan(s, machine); });
      packed.give<S>(l);
    }
    const Sizes sizes = all.back().y;
    if (packed.size() != weights.numel())
      fail("these layers take ", packed.size(), " bytes of weights for x of this dtype, got ",
           weights.numel(),
           "; pack them for it and join them with mnv2_fused.sequence.weights.join");
    if (x.size(0) == 0) return empty(sizes, type, true);

    // Tensors between layers start at the two ends of one buffer, in turn.
    const auto bytes = [](const Layer& l) {
      return round_up(l.y_elements() * int64_t{sizeof(S)}, 256);
    };
    int64_t between = 0, scratch = 0;
    for (size_t i = 0; i < all.size(); ++i) {
      if (i + 1 < all.size())
        between = std::max(between, bytes(all[i]) + (i > 0 ? bytes(all[i - 1]) : 0));
      const int64_t sums = all[i].kind == kPooled && depth<S> > 1 ? all[i].y_elements() : 0;
      scratch = std::max(
          scratch, all[i].is_block() ? scratch_bytes<S>(all[i].run) : sums * int64_t{sizeof(T)});
    }
    const Tensor memory = buffer(between + scratch);
    char* const first = static_cast<char*>(memory.mutable_data_ptr());

    Tensor source = type == kStored ? x : torch::stable::to(x, kStored);
    if (all[0].kind != kStemAndBlock) source = with_channels_together(source);
    const Tensor result = empty(sizes, kStored, true);
    ActivationView in = activation_of(source);
    for (size_t i = 0; i < all.size(); ++i) {
      const Layer& l = all[i];
      void* out = i % 2 ? first + between - bytes(l) : first;
      if (i + 1 == all.size()) out = result.mutable_data_ptr();
      S* const y = static_cast<S*>(out);
      const Next next =
          i + 1 < all.size() ? Next{all[i + 1].weights[0], all[i + 1].first_bytes} : Next{};
      if (l.is_block())
        run_block(l.run, in, l.pointers(), y, first + between, next);
      else
        run_pointwise(l.pointwise, l.kind == kLinear ? as_pixels(in) : in, l.weights[0],
                      l.weights[1], y, reinterpret_cast<T*>(first + between), next);
      in = {l.y, {l.y[1] * l.y[2] * l.y[3], 1, l.y[3] * l.y[1], l.y[1]}, y};
    }
    if (type == kStored) return result;
    Tensor y = empty(sizes, type, true);
    return torch::stable::copy_(y, result);
  });
}

}  // namespace
}  // namespace mnv2_fused::cpu

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CPU, m) {
  m.impl("sequence", TORCH_BOX(&mnv2_fused::cpu::sequence_cpu));
}
