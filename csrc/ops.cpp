// Every op: schema, CPU implementation, registration.
#include <algorithm>
#include <optional>
#include <vector>

#include "binding.h"

namespace mnv2_fused {
namespace {

Tensor empty(const Sizes& sizes, ScalarType dtype, bool channels_last) {
  return torch::stable::empty(
      IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), dtype, std::nullopt, std::nullopt,
      std::nullopt, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Tensor buffer(int64_t bytes) { return torch::stable::empty({&bytes, 1}, ScalarType::Byte); }

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

template <class S>
void check_weights(const BlockTensors& w) {
  for (const Tensor* t : {w.w_expand, w.w_project})
    if (t) check_product_weight<S>(*t);
  for (const Tensor* t : {w.b_expand, w.w_depthwise, w.b_depthwise, w.b_project})
    if (t) check_other_weight<S>(*t);
}

Tensor inverted_residual_cpu(const Tensor& x,                        // [N, C_in, H, W]
                             const std::optional<Tensor>& w_expand,  // [E/16, C_in, 16]
                             const std::optional<Tensor>& b_expand,  // [E/16 * 16]
                             const Tensor& w_depthwise,              // [E/16, 9, 16]
                             const Tensor& b_depthwise,              // [E/16 * 16]
                             const Tensor& w_project,                // [C_out/16, E, 16]
                             const Tensor& b_project,                // [C_out]
                             int64_t stride, bool residual, IntHeaderOnlyArrayRef forced) {
  const ScalarType type = x.scalar_type();
  return dispatch("inverted_residual", type, w_project.scalar_type(), [&]<class S>(S) {
    if (w_expand.has_value() != b_expand.has_value())
      fail("w_expand and b_expand must both be given or both be None");
    const BlockTensors w{w_expand ? &*w_expand : nullptr,
                         b_expand ? &*b_expand : nullptr,
                         &w_depthwise,
                         &b_depthwise,
                         &w_project,
                         &b_project};
    check_weights<S>(w);
    const BlockShape shape = block_shape<S>(
        sizes_of(x), w, w_expand ? Expand::kPointwise : Expand::kNone, stride, residual);
    const Sizes y_sizes{shape.batch, shape.out_channels, shape.out_height(), shape.out_width()};
    const bool channels_last = is_channels_last(x);
    if (shape.batch == 0) return empty(y_sizes, type, channels_last);

    // The kernel reads any strides as long as a pixel's channels lie together.
    constexpr ScalarType kStored = type_of<S>;
    Tensor source = type == kStored ? x : torch::stable::to(x, kStored);
    if (source.stride(1) != 1 && shape.in_channels > 1)
      source = torch::stable::contiguous(source, MemoryFormat::ChannelsLast);
    if (!forced.empty() && forced.size() != 4)
      fail("plan must be [tile_rows, tile_cols, group, splits], got ", forced.size(), " values");
    const Machine machine = current_machine<S>();
    const Plan plan = forced.empty()
                          ? cached_plan(shape, machine)
                          : make_plan(shape, machine, forced[0], forced[1], forced[2], forced[3]);
    const Tensor scratch = buffer(scratch_bytes(plan));
    const Tensor result = empty(y_sizes, kStored, true);
    run_block(shape, plan, activation_of(source), w, static_cast<S*>(result.mutable_data_ptr()),
              scratch.mutable_data_ptr());
    if (type == kStored && channels_last) return result;
    Tensor y = empty(y_sizes, type, channels_last);
    return torch::stable::copy_(y, result);
  });
}

// What `layers` of a sequence names (LayerKind in ops.py), and how many weights each takes.
enum LayerKind : int64_t {
  kBlock,
  kBlockWithoutExpand,
  kStemAndBlock,
  kPointwise,
  kPooled,
  kLinear
};
constexpr int64_t kWeights[] = {6, 4, 6, 2, 2, 2};

struct Layer {
  LayerKind kind;
  const Tensor* weights;
  BlockTensors block_weights;
  BlockShape block;
  Plan plan;
  PointwiseShape pointwise;
  Sizes y;

  bool is_block() const { return kind < kPointwise; }
  int64_t y_elements() const { return y[0] * y[1] * y[2] * y[3]; }
  // The first group's expansion, or the first few panels of a 1x1.
  Next first_weights(int64_t element_size) const {
    const Tensor& w = weights[0];
    const int64_t panels = is_block() ? ceil_div(plan.group, kPanel) : 4;
    const int64_t bytes = w.stride(0) * element_size;
    return {w.const_data_ptr(), std::min(panels, w.size(0)) * bytes};
  }
};

// size: the stride of a block, the output channels of other layers.
template <class S>
Layer make_layer(LayerKind kind, int64_t size, bool residual, const Sizes& x, const Tensor* w,
                 const Machine& machine) {
  Layer l{};
  l.kind = kind;
  l.weights = w;
  if (l.is_block()) {
    const bool none = kind == kBlockWithoutExpand;
    const Tensor* const rest = none ? w : w + 2;
    l.block_weights = {
        none ? nullptr : w, none ? nullptr : w + 1, rest, rest + 1, rest + 2, rest + 3};
    const Expand expand = none             ? Expand::kNone
                          : kind == kBlock ? Expand::kPointwise
                                           : Expand::kStem;
    check_weights<S>(l.block_weights);
    l.block = block_shape<S>(x, l.block_weights, expand, size, residual);
    l.plan = cached_plan(l.block, machine);
    l.y = {x[0], l.block.out_channels, l.block.out_height(), l.block.out_width()};
  } else {
    if (kind == kLinear && (x[2] != 1 || x[3] != 1))
      fail("a linear layer takes one pixel an image, got ", to_string(x));
    check_product_weight<S>(w[0]);
    check_other_weight<S>(w[1]);
    l.pointwise = pointwise_shape<S>(x, w[0], w[1], size, kind != kLinear, kind == kPooled);
    // The images of a linear layer are the pixels of one.
    if (kind == kLinear) std::swap(l.pointwise.batch, l.pointwise.height);
    l.y = {x[0], size, kind == kPooled ? 1 : x[2], kind == kPooled ? 1 : x[3]};
  }
  return l;
}

// One-pixel images as the pixels of one image.
Activation as_pixels(const Activation& x) {
  return {{1, x.sizes[1], x.sizes[0], 1}, {0, x.strides[1], x.strides[0], 0}, x.data};
}

// Layers in a row, by the kernels that each would run alone, in one buffer for what lies between.
Tensor sequence_cpu(
    const Tensor& x,              // [N, C, H, W]
    std::vector<Tensor> weights,  // of all layers, one after the other
    IntHeaderOnlyArrayRef layers  // kind, stride or output channels, residual of each
) {
  const ScalarType type = x.scalar_type();
  // Every kind of layer ends with a product's weights and bias.
  const ScalarType packed =
      weights.size() < 2 ? ScalarType::Float : weights[weights.size() - 2].scalar_type();
  return dispatch("sequence", type, packed, [&]<class S>(S) {
    if (layers.empty() || layers.size() % 3 != 0)
      fail("layers must hold kind, stride or output channels, and residual of each layer, got ",
           layers.size(), " values");
    constexpr ScalarType kStored = type_of<S>;
    using T = Compute<S>;
    const Machine machine = current_machine<S>();
    std::vector<Layer> all;
    Sizes sizes = sizes_of(x);
    size_t used = 0;
    for (size_t i = 0; i < layers.size(); i += 3) {
      const int64_t kind = layers[i];
      if (kind < 0 || kind > kLinear) fail("layer kind must be 0 to 5, got ", kind);
      if (used + size_t(kWeights[kind]) > weights.size())
        fail("layer ", i / 3, " needs ", kWeights[kind], " weights, ", weights.size() - used,
             " are left of ", weights.size());
      all.push_back(make_layer<S>(LayerKind(kind), layers[i + 1], layers[i + 2] != 0, sizes,
                                  &weights[used], machine));
      used += size_t(kWeights[kind]);
      sizes = all.back().y;
    }
    if (used != weights.size()) fail("the layers take ", used, " weights, got ", weights.size());
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
      scratch = std::max(scratch, all[i].is_block() ? scratch_bytes(all[i].plan)
                                                    : sums * int64_t{sizeof(T)});
    }
    const Tensor memory = buffer(between + scratch);
    char* const first = static_cast<char*>(memory.mutable_data_ptr());

    Tensor source = type == kStored ? x : torch::stable::to(x, kStored);
    if (all[0].kind != kStemAndBlock && source.stride(1) != 1 && source.size(1) > 1)
      source = torch::stable::contiguous(source, MemoryFormat::ChannelsLast);
    const Tensor result = empty(sizes, kStored, true);
    Activation in = activation_of(source);
    for (size_t i = 0; i < all.size(); ++i) {
      const Layer& l = all[i];
      void* out = i % 2 ? first + between - bytes(l) : first;
      if (i + 1 == all.size()) out = result.mutable_data_ptr();
      S* const y = static_cast<S*>(out);
      const Next next = i + 1 < all.size() ? all[i + 1].first_weights(sizeof(S)) : Next{};
      if (l.is_block())
        run_block(l.block, l.plan, in, l.block_weights, y, first + between, next);
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

STABLE_TORCH_LIBRARY(mnv2_fused, m) {
  m.def(
      "inverted_residual(Tensor x, Tensor? w_expand, Tensor? b_expand, Tensor w_depthwise, "
      "Tensor b_depthwise, Tensor w_project, Tensor b_project, int stride, bool residual, "
      "int[] plan=[]) -> Tensor");
  m.def("sequence(Tensor x, Tensor[] weights, int[] layers) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CPU, m) {
  m.impl("inverted_residual", TORCH_BOX(&mnv2_fused::inverted_residual_cpu));
  m.impl("sequence", TORCH_BOX(&mnv2_fused::sequence_cpu));
}
