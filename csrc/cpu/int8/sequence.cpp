// The op of layers in a row on 8-bit integers. mnv2_fused/int8/packing.py lays out the weights.
#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "../../layers.h"
#include "../../plan_cache.h"
#include "../isa.h"
#include "../op.h"
#include "../tasks.h"
#include "args.h"

namespace mnv2_fused::cpu::int8 {
namespace {

constexpr int64_t kLine = 64;  // bytes: every part of the weights begins on a cache line

// At the beginning of a row's weights: how x becomes uint8, and the last layer's uint8 become y.
struct RowHeader {
  float x_inverse_scale;
  int32_t x_zero;
  float y_scale;
  int32_t y_zero;
};
// At the beginning of a layer's.
struct LayerHeader {
  int32_t x_zero;
  float residual_scale;
  int32_t real;  // whether a linear layer's result is float32
  int32_t pool_zero, mean_zero;
  int32_t gate;
};
// At the beginning of a stage's.
struct StageHeader {
  int32_t zero, activation, saturates;
};

// Reads a row of weights part by part.
class Reader {
 public:
  Reader(const char* first, int64_t size) : at_(first), left_(size) {}

  const char* take(int64_t bytes) {
    const int64_t room = round_up(bytes, kLine);
    if (room > left_) fail("the row of weights ends early; pack it with mnv2_fused.int8");
    left_ -= room;
    return std::exchange(at_, at_ + room);
  }
  template <class H>
  H header() {
    H h;
    std::memcpy(&h, take(sizeof(H)), sizeof(H));
    return h;
  }
  const float* floats(int64_t channels) {
    return reinterpret_cast<const float*>(take(round_up(channels, kPanel) * 4));
  }
  Stage stage(int64_t weight_bytes, int64_t channels) {
    const StageHeader h = header<StageHeader>();
    const auto kind = Activation(h.activation);
    if (kind != Activation::kIdentity && kind != Activation::kHardswish &&
        kind != Activation::kSilu)
      fail("no kernel on 8-bit integers computes activation ", h.activation);
    Stage s{};
    s.zero = h.zero;
    s.activation = {kind, kNegativeSlope};
    s.saturates = h.saturates != 0;
    s.weight = reinterpret_cast<const int8_t*>(take(weight_bytes));
    s.bias = reinterpret_cast<const int32_t*>(take(round_up(channels, kPanel) * 4));
    for (const float** at : {&s.multiplier, &s.low, &s.high, &s.scale}) *at = floats(channels);
    return s;
  }
  int64_t left() const { return left_; }

 private:
  const char* at_;
  int64_t left_;
};

const Kernels& kernels() { return cpu::active().integers(); }

int64_t product_bytes(int64_t out, int64_t terms) { return round_up(out, kPanel) * terms; }
// Terms of what run_product reads.
int64_t in_panels(int64_t in) { return round_up(in, kPanel); }

Plan plan_of(const BlockShape& shape, const Machine& machine) {
  struct Key {
    BlockShape shape;
    Machine machine;
    size_t hash() const { return hash_of({machine.threads, machine.lanes}, hash_of(shape)); }
    bool operator==(const Key&) const = default;
  };
  static PlanCache<Key, Plan> plans;
  return plans.get({shape, machine}, [&] {
    const Plan p = make_plan(shape, machine);
    // Sums are exact in any order, so groups need no tasks of their own to be added up by.
    return p.splits == 1 ? p : make_plan(shape, machine, p.tile_rows, p.tile_cols, p.group, 1);
  });
}

// Calls f(first row, row behind the last, first panel, panel behind the last, worker) over all of a product.
template <class F>
void for_product(int64_t rows, int64_t panels, F f) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t parts = ceil_div(rows, kProductRows);
  const int64_t across = parts >= threads ? 1 : std::min(threads, panels);
  for_tasks(parts * across, std::min(threads, parts * across), [&](int64_t task, int64_t worker) {
    const int64_t part = task / across, column = task % across;
    f(part * kProductRows, std::min(rows, (part + 1) * kProductRows), panels * column / across,
      panels * (column + 1) / across, worker);
  });
}
int64_t product_scratch(int64_t in, int64_t out) {
  return round_up(kProductRows * in_panels(in) * kernels().element, kLine) +
         round_up(kProductRows * round_up(out, kPanel) * 4, kLine);
}

// The channels from panel `first` on.
Stage from_panel(const Stage& s, int64_t first, int64_t terms) {
  Stage part = s;
  part.weight += product_bytes(first * kPanel, terms);
  part.bias += first * kPanel;
  for (const float** at : {&part.multiplier, &part.low, &part.high, &part.scale})
    *at += first * kPanel;
  return part;
}

class Row {
 public:
  Row(const Tensor& weights, std::vector<LayerShape> layers)
      : layers_(std::move(layers)),
        reader_(static_cast<const char*>(weights.const_data_ptr()), weights.numel()),
        threads_(torch::stable::get_num_threads()),
        header_(reader_.header<RowHeader>()) {}

  Tensor run(const Tensor& x) {
    const Sizes sizes = sizes_of(x), last = layers_.back().y;
    const Tensor y = empty(last, ScalarType::Float, true);
    if (sizes[0] == 0) return y;
    // Layers read one buffer and write the other, in turn.
    int64_t room[2] = {x.numel(), 0};
    for (size_t i = 0; i < layers_.size(); ++i)
      room[1 - i % 2] = std::max(room[1 - i % 2], layers_[i].y_elements());
    const int64_t second = round_up(room[0], kLine) + kLine;
    const Tensor memory = buffer(second + round_up(room[1], kLine) + kLine);
    auto* const first = static_cast<uint8_t*>(memory.mutable_data_ptr());
    uint8_t* const buffers[2] = {first, first + second};
    quantize(x, first);
    Sizes now = sizes;
    for (size_t i = 0; i < layers_.size(); ++i) {
      const LayerShape& l = layers_[i];
      const uint8_t* const in = buffers[i % 2];
      uint8_t* const out = buffers[1 - i % 2];
      const LayerHeader h = reader_.header<LayerHeader>();
      if (h.real && (i + 1 < layers_.size() || l.kind != kLinear))
        fail("only the last layer, if it is linear, may be float32");
      real_ = h.real != 0;
      l.is_block() ? run_block(l, h, now, in, out)
                   : run_product(l, h, now, in, out, static_cast<float*>(y.mutable_data_ptr()));
      now = l.y;
    }
    if (reader_.left() != 0)
      fail("the row of weights has ", reader_.left(), " bytes too many for these layers");
    if (!real_)
      dequantize(buffers[layers_.size() % 2], static_cast<float*>(y.mutable_data_ptr()), y.numel());
    return y;
  }

 private:
  // x as uint8, [N, H, W, C].
  void quantize(const Tensor& x, uint8_t* q) {
    const auto [n, c, height, width] = sizes_of(x);
    const auto* const data = static_cast<const float*>(x.const_data_ptr());
    const Sizes step{x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
    const int64_t channels = c, rows = height, cols = width;
    torch::stable::parallel_for(
        0, n * rows, ceil_div(n * rows, threads_), [&](int64_t row, int64_t end) {
          for (; row < end; ++row)
            kernels().quantize_row(data + row / rows * step[0] + row % rows * step[2], cols,
                                   channels, step[3], step[1], header_.x_inverse_scale,
                                   header_.x_zero, q + row * cols * channels);
        });
  }

  void dequantize(const uint8_t* q, float* y, int64_t count) {
    float table[256];
    for (int32_t i = 0; i < 256; ++i) table[i] = float(i - header_.y_zero) * header_.y_scale;
    torch::stable::parallel_for(0, count, ceil_div(count, threads_), [&](int64_t i, int64_t end) {
      for (; i < end; ++i) y[i] = table[q[i]];
    });
  }

  void run_block(const LayerShape& l, const LayerHeader& h, const Sizes& x, const uint8_t* in,
                 uint8_t* out) {
    const BlockShape& s = l.block;
    if (s.expand == Expand::kStem && s.in_channels > kMostStemChannels)
      fail("a stem takes at most ", kMostStemChannels, " channels on 8-bit integers, got ",
           s.in_channels);
    const Kernels& k = kernels();
    const int64_t hidden = s.hidden_panels() * kPanel;
    const int64_t dots = phases(s) * row_dots(s.kernel, s.dilation);
    BlockCall call{};
    call.shape = s;
    call.x = in;
    call.x_image = x[1] * x[2] * x[3];
    call.x_row = x[1] * x[3];
    call.x_col = x[1];
    call.x_zero = h.x_zero;
    call.residual_scale = h.residual_scale;
    if (s.expand != Expand::kNone)
      call.expand =
          reader_.stage(product_bytes(hidden, round_up(Scratch::terms(s), kQuad)), hidden);
    call.depthwise = reader_.stage(hidden * s.kernel * dots * kQuad, hidden);
    call.project = reader_.stage(product_bytes(s.out_channels, hidden), s.out_channels);
    if (s.activates_sum && s.residual && call.project.activation.kind != Activation::kIdentity)
      fail("only a clip may follow the sum with x on 8-bit integers");
    call.y = out;
    const Machine machine = k.machine(threads_, cpu::l2_bytes());
    if (s.squeeze_channels == 0) {
      const Plan plan = plan_of(s, machine);
      const Tensor scratch = scratch_of(s, plan);
      return run_tiles(call, plan, scratch);
    }
    run_squeezed(call, machine, h);
  }

  // Of each worker, one slice.
  static int64_t slice_of(const BlockShape& s, const Plan& plan) {
    return round_up(Scratch(s, plan, kernels().element).total(), 256);
  }
  static Tensor scratch_of(const BlockShape& s, const Plan& plan) {
    return buffer(slice_of(s, plan) * plan.workers);
  }
  static void run_tiles(const BlockCall& call, const Plan& plan, const Tensor& scratch) {
    const int64_t slice = slice_of(call.shape, plan);
    auto* const first = static_cast<char*>(scratch.mutable_data_ptr());
    for_tasks(plan.tasks, plan.workers, [&](int64_t task, int64_t worker) {
      kernels().run_tile(call, plan, task, first + worker * slice);
    });
  }

  // Squeeze-and-excite: the sums of d, factors of them, and the rest; some images at a time, so that what is
  // kept of d stays small.
  void run_squeezed(BlockCall call, const Machine& machine, const LayerHeader& h) {
    BlockShape& s = call.shape;
    const int64_t images = s.batch, hidden = s.hidden_panels() * kPanel;
    const int64_t pixels = s.out_height() * s.out_width();
    const Squeeze squeeze = read_squeeze(s, h);
    const int64_t most = squeezed_together(s, machine);
    for (int64_t image = 0; image < images; image += most) {
      s.batch = std::min(most, images - image);
      const Plan plan = plan_of(s, machine);
      const Tensor scratch = scratch_of(s, plan), pooled = buffer(plan.tasks * hidden * 4);
      const Tensor kept =
          buffer(plan.caches_depthwise ? s.batch * pixels * hidden * kernels().element : 0);
      call.cached = plan.caches_depthwise ? static_cast<char*>(kept.mutable_data_ptr()) : nullptr;
      call.pooled = static_cast<int32_t*>(pooled.mutable_data_ptr());
      call.pass = Pass::kPool;
      run_tiles(call, plan, scratch);
      const Tensor factors = factors_of(s, squeeze, plan, call.pooled);
      call.pass = Pass::kLast;
      call.factors = static_cast<const float*>(factors.const_data_ptr());
      run_tiles(call, plan, scratch);
      call.x += s.batch * call.x_image;
      call.y += s.batch * pixels * s.out_channels;
    }
  }

  Squeeze read_squeeze(const BlockShape& s, const LayerHeader& h) {
    const int64_t hidden = s.hidden_panels() * kPanel, squeezed = s.squeeze_channels;
    Squeeze c{};
    c.mean_scale = reader_.floats(hidden);
    c.gated_scale = reader_.floats(hidden);
    c.mean_zero = h.mean_zero;
    c.reduce = reader_.stage(product_bytes(squeezed, in_panels(s.hidden_channels)), squeezed);
    c.excite =
        reader_.stage(product_bytes(s.hidden_channels, in_panels(squeezed)), s.hidden_channels);
    c.gate = Gate(check_kind("gate", h.gate, kGates));
    if (c.gate == Gate::kHardsigmoidFifth) fail("no kernel on 8-bit integers has this gate");
    return c;
  }

  // Of a squeeze-and-excite, [N][E/16 * 16].
  static Tensor factors_of(const BlockShape& s, const Squeeze& c, const Plan& plan,
                           int32_t* pooled) {
    const Kernels& k = kernels();
    const int64_t hidden = s.hidden_panels() * kPanel, squeezed = s.squeeze_channels;
    const int64_t tiles = plan.tiles_across(s) * plan.tiles_down(s);
    const int64_t scratch_bytes =
        std::max(product_scratch(s.hidden_channels, squeezed), product_scratch(squeezed, hidden));
    const int64_t of_image = round_up(hidden, kLine) + round_up(squeezed, kLine) + hidden * 4;
    const Tensor memory = buffer(s.batch * (scratch_bytes + of_image));
    const Tensor factors = buffer(s.batch * hidden * 4);
    auto* const first = static_cast<char*>(memory.mutable_data_ptr());
    auto* const result = static_cast<float*>(factors.mutable_data_ptr());
    torch::stable::parallel_for(0, s.batch, 1, [&](int64_t image, int64_t end) {
      for (; image < end; ++image) {
        char* const mine = first + image * (scratch_bytes + of_image);
        auto* const mean = reinterpret_cast<uint8_t*>(mine + scratch_bytes);
        auto* const between = mean + round_up(hidden, kLine);
        auto* const v = reinterpret_cast<float*>(between + round_up(squeezed, kLine));
        int32_t* const sums = pooled + image * tiles * hidden;
        for (int64_t tile = 1; tile < tiles; ++tile)
          for (int64_t i = 0; i < hidden; ++i) sums[i] += sums[tile * hidden + i];
        k.mean(sums, hidden, c.mean_scale, float(s.out_height() * s.out_width()), c.mean_zero,
               mean);
        ProductArgs a{mean, s.hidden_channels, squeezed, c.reduce, squeezed};
        a.y = between;
        k.run_product(a, 0, 1, mine);
        ProductArgs b{between, squeezed, s.hidden_channels, c.excite, hidden};
        b.real = v;
        k.run_product(b, 0, 1, mine);
        std::fill(v + s.hidden_channels, v + hidden, 0.0f);
        k.gate(v, hidden, c.gate, c.gated_scale, result + image * hidden);
      }
    });
    return factors;
  }

  void run_product(const LayerShape& l, const LayerHeader& h, const Sizes& x, const uint8_t* in,
                   uint8_t* out, float* real) {
    const int64_t c_in = x[1], c_out = l.y[1], pixels = x[2] * x[3],
                  panels = ceil_div(c_out, kPanel);
    const Stage stage = reader_.stage(product_bytes(c_out, in_panels(c_in)), c_out);
    const int64_t slice = product_scratch(c_in, c_out);
    const Tensor scratch = buffer(slice * threads_);
    auto* const first = static_cast<char*>(scratch.mutable_data_ptr());
    const auto run = [&](const uint8_t* rows_of, int64_t rows, auto set) {
      for_product(rows, panels,
                  [&](int64_t begin, int64_t end, int64_t from, int64_t to, int64_t worker) {
                    ProductArgs a{rows_of, c_in, std::min(to * kPanel, c_out) - from * kPanel,
                                  from_panel(stage, from, in_panels(c_in)), c_out};
                    set(a, from * kPanel);
                    kernels().run_product(a, begin, end, first + worker * slice);
                  });
    };
    if (l.kind != kPooled) {
      return run(in, x[0] * pixels, [&](ProductArgs& a, int64_t channel) {
        if (h.real)
          a.real = real + channel;
        else
          a.y = out + channel;
      });
    }
    const float* const scale = reader_.floats(c_out);
    const int64_t hidden = panels * kPanel;
    const Tensor sums = buffer(x[0] * hidden * 4);
    auto* const all = static_cast<int32_t*>(sums.mutable_data_ptr());
    std::fill(all, all + x[0] * hidden, 0);
    // Parts of the channels, each over all pixels of an image.
    const int64_t parts = x[0] >= threads_ ? 1 : std::min(threads_, panels);
    for_tasks(x[0] * parts, std::min(threads_, x[0] * parts), [&](int64_t task, int64_t worker) {
      const int64_t image = task / parts, part = task % parts;
      const int64_t from = panels * part / parts, to = panels * (part + 1) / parts;
      ProductArgs a{in + image * pixels * c_in, c_in, std::min(to * kPanel, c_out) - from * kPanel,
                    from_panel(stage, from, in_panels(c_in)), c_out};
      a.sums = all + image * hidden + from * kPanel;
      kernels().run_product(a, 0, pixels, first + worker * slice);
    });
    for (int64_t image = 0; image < x[0]; ++image)
      kernels().mean(all + image * hidden, c_out, scale, float(pixels), h.pool_zero,
                     out + image * c_out);
  }

  std::vector<LayerShape> layers_;
  Reader reader_;
  int64_t threads_;
  RowHeader header_;
  bool real_ = false;
};

Tensor int8_sequence(const Tensor& x,              // float32 [N, C, H, W]
                     const Tensor& weights,        // [bytes]
                     IntHeaderOnlyArrayRef layers  // as of a sequence
) {
  try {
    check_given({{"x", &x}, {"weights", &weights}});
    if (x.scalar_type() != ScalarType::Float) fail("x must be float32; convert it with x.float()");
    if (!weights.is_cpu() || weights.scalar_type() != ScalarType::Byte || weights.dim() != 1 ||
        !weights.is_contiguous())
      fail("weights must be one contiguous row of bytes on the CPU, as mnv2_fused.int8 packs them");
    return Row(weights, layer_shapes(layers, sizes_of(x))).run(x);
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string("mnv2_fused::int8_sequence: ") + error.what());
  }
}

}  // namespace
}  // namespace mnv2_fused::cpu::int8

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CPU, m) {
  m.impl("int8_sequence", TORCH_BOX(&mnv2_fused::cpu::int8::int8_sequence));
}
