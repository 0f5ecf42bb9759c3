// Every op: schema, CPU implementation, registration.
#include <algorithm>
#include <optional>
#include <vector>

#include "binding.h"
#include "layers.h"

namespace mnv2_fused {
namespace {

// Memory that nobody has touched, which the C library takes from the system at every call past this
// size: page by page it costs a tenth of a large image's time, by huge pages nearly nothing.
constexpr int64_t kMapped = int64_t{32} << 20;
Tensor in_huge_pages(Tensor t, int64_t bytes) {
  if (bytes >= kMapped)
    cpu::advise_huge_pages(reinterpret_cast<uintptr_t>(t.mutable_data_ptr()), size_t(bytes));
  return t;
}

Tensor empty(const Sizes& sizes, ScalarType dtype, bool channels_last) {
  const Tensor t = torch::stable::empty(
      IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), dtype, std::nullopt, std::nullopt,
      std::nullopt, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  return in_huge_pages(t, t.numel() * t.element_size());
}

Tensor buffer(int64_t bytes) {
  return in_huge_pages(torch::stable::empty({&bytes, 1}, ScalarType::Byte), bytes);
}

// Calls f with an S that x and packed weights are of: bfloat16 x runs on bfloat16 products where the
// weights are packed for them, else half precision is widened to float. Whatever fails inside is
// reported under the op's name.
template <class F>
Tensor dispatch(const char* op, ScalarType x, ScalarType weights, F f) {
  try {
    switch (x) {
      case ScalarType::Float:
        return f(float{});
      case ScalarType::Double:
        return f(double{});
      case ScalarType::BFloat16:
        return weights == x ? f(BFloat16{}) : f(float{});
      case ScalarType::Half:
        return f(float{});
      default:
        fail(
            "x must be float32, float64, float16 or bfloat16 on the CPU; convert it with "
            "x.float()");
    }
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string("mnv2_fused::") + op + ": " + error.what());
  }
}

const Tensor* pointer(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }
const void* data(const Tensor* t) { return t ? t->const_data_ptr() : nullptr; }

Tensor inverted_residual_cpu(const Tensor& x,                         // [N, C_in, H, W]
                             const std::optional<Tensor>& w_expand,   // [E/16, C_in, 16]
                             const std::optional<Tensor>& b_expand,   // [E/16 * 16]
                             const Tensor& w_depthwise,               // [E/16, 9, 16]
                             const Tensor& b_depthwise,               // [E/16 * 16]
                             const Tensor& w_project,                 // [C_out/16, E, 16]
                             const Tensor& b_project,                 // [C_out]
                             const std::optional<Tensor>& w_squeeze,  // [S/16, E, 16]
                             const std::optional<Tensor>& b_squeeze,  // [S/16 * 16]
                             const std::optional<Tensor>& w_excite,   // [E/16, S, 16]
                             const std::optional<Tensor>& b_excite,   // [E/16 * 16]
                             int64_t stride, bool residual, IntHeaderOnlyArrayRef forced,
                             int64_t dilation, IntHeaderOnlyArrayRef padding, int64_t activation,
                             int64_t out_activation, int64_t squeeze_activation, int64_t gate) {
  const ScalarType type = x.scalar_type();
  return dispatch("inverted_residual", type, w_project.scalar_type(), [&]<class S>(S) {
    if (w_expand.has_value() != b_expand.has_value())
      fail("w_expand and b_expand must both be given or both be None");
    for (const auto* t : {&b_squeeze, &w_excite, &b_excite})
      if (t->has_value() != w_squeeze.has_value())
        fail("w_squeeze, b_squeeze, w_excite and b_excite must all be given or all be None");
    const BlockTensors w{pointer(w_expand),  pointer(b_expand),  &w_depthwise,
                         &b_depthwise,       &w_project,         &b_project,
                         pointer(w_squeeze), pointer(b_squeeze), pointer(w_excite),
                         pointer(b_excite)};
    const Options options{dilation, padding, activation, out_activation, squeeze_activation, gate};
    const BlockShape shape = block_shape<S>(sizes_of(x), w, stride, residual, options);
    const Sizes y_sizes{shape.batch, shape.out_channels, shape.out_height(), shape.out_width()};
    const bool channels_last = is_channels_last(x);
    if (shape.batch == 0) return empty(y_sizes, type, channels_last);

    // The kernel reads any strides as long as a pixel's channels lie together.
    constexpr ScalarType kStored = type_of<S>;
    const Tensor source =
        with_channels_together(type == kStored ? x : torch::stable::to(x, kStored));
    if (!forced.empty() && forced.size() != 4)
      fail("plan must be [tile_rows, tile_cols, group, splits], got ", forced.size(), " values");
    const Machine machine = current_machine<S>();
    const BlockPointers pointers{data(w.w_expand),    data(w.b_expand),  data(w.w_depthwise),
                                 data(w.b_depthwise), data(w.w_project), data(w.b_project),
                                 data(w.w_squeeze),   data(w.b_squeeze), data(w.w_excite),
                                 data(w.b_excite)};
    const BlockRun run(shape, machine, [&](const BlockShape& s) {
      return forced.empty() ? cached_plan(s, machine)
                            : make_plan(s, machine, forced[0], forced[1], forced[2], forced[3]);
    });
    const Tensor scratch = buffer(scratch_bytes<S>(run));
    const Tensor result = empty(y_sizes, kStored, true);
    run_block(run, activation_of(source), pointers, static_cast<S*>(result.mutable_data_ptr()),
              scratch.mutable_data_ptr());
    if (type == kStored && channels_last) return result;
    Tensor y = empty(y_sizes, type, channels_last);
    return torch::stable::copy_(y, result);
  });
}

struct Layer : LayerShape {
  BlockRun run;             // of the block
  const char* weights[10];  // in the order of the layer's packed tensors, at its end none
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

// Hands out a layer's weights from the bytes of all of them; see runs.join.
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
          "weights must be one contiguous row of bytes on the CPU, as mnv2_fused.runs.join "
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
           weights.numel(), "; pack them for it and join them with mnv2_fused.runs.join");
    if (x.size(0) == 0) return empty(sizes, type, true);

    // What comes and goes between layers starts at the two ends of one buffer, in turn.
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
}  // namespace mnv2_fused

// One block; its op by the CPU's kernels, by the Triton kernel, which Python implements, and by the
// CUDA kernel (cuda/binding.cpp). That one has ops of its own because its weights are packed
// otherwise, also in a derivative, and because whether float32 products may round to TF32 is a
// setting of torch that the stable ABI does not reach.
#define MNV2_BLOCK_ARGUMENTS                                                                \
  "(Tensor x, Tensor? w_expand, Tensor? b_expand, Tensor w_depthwise, Tensor b_depthwise, " \
  "Tensor w_project, Tensor b_project, Tensor? w_squeeze, Tensor? b_squeeze, "              \
  "Tensor? w_excite, Tensor? b_excite, int stride, bool residual, int[] plan=[], "          \
  "int dilation=1, int[] padding=[], int activation=0, int out_activation=2, "              \
  "int squeeze_activation=1, int gate=0"

STABLE_TORCH_LIBRARY(mnv2_fused, m) {
  m.def("inverted_residual" MNV2_BLOCK_ARGUMENTS ") -> Tensor");
  m.def("inverted_residual_triton" MNV2_BLOCK_ARGUMENTS ") -> Tensor");
  m.def("inverted_residual_cuda" MNV2_BLOCK_ARGUMENTS ", bool tf32=False) -> Tensor");
  m.def("sequence(Tensor x, Tensor weights, int[] layers) -> Tensor");
  m.def("sequence_cuda(Tensor x, Tensor weights, int[] layers, bool tf32=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CPU, m) {
  m.impl("inverted_residual", TORCH_BOX(&mnv2_fused::inverted_residual_cpu));
  m.impl("sequence", TORCH_BOX(&mnv2_fused::sequence_cpu));
}
