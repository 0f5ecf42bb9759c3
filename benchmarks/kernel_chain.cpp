// MobileNetV2's layers one after the other straight on the CPU kernels, one thread, without torch:
// time of each layer where it stands, between its neighbours, with what they leave in the caches.
//   make chain                            builds build/kernel_chain and runs it
//   build/kernel_chain float32 200        dtype (float32, bfloat16, int8), rounds
//   P5=14,14,96,1 build/kernel_chain ...  forces tile rows, tile columns, group, splits of layer 5
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <random>
#include <vector>

#include "../csrc/cpu/int8/args.h"
#include "../csrc/cpu/isa.h"

using namespace mnv2_fused;
using namespace mnv2_fused::cpu;

namespace {

double seconds() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

template <class S>
S stored(float v) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return {uint16_t(bits >> 16)};
  } else {
    return S(v);
  }
}

// Memory in whole cache lines, as torch hands it out.
template <class T>
struct Allocator {
  using value_type = T;
  Allocator() = default;
  template <class U>
  Allocator(const Allocator<U>&) {}
  T* allocate(size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64}));
  }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t{64}); }
  bool operator==(const Allocator&) const = default;
};
template <class T>
using Vector = std::vector<T, Allocator<T>>;

template <class S>
Vector<S> random(int64_t count, float scale) {
  static std::mt19937 generator;
  std::normal_distribution<float> normal(0, scale);
  Vector<S> v(count);
  for (S& e : v) e = stored<S>(normal(generator));
  return v;
}

// What is measured of a layer.
struct Measured {
  Plan plan{};  // of a block
  bool is_block = false;
  double multiply_adds = 0, best = 1e9;
  std::vector<double> times;
};

constexpr int64_t kSizes[][4] = {// t, channels, repeats, stride: table 2 of the paper
                                 {1, 16, 1, 1}, {6, 24, 2, 2},  {6, 32, 3, 2}, {6, 64, 4, 2},
                                 {6, 96, 3, 1}, {6, 160, 3, 2}, {6, 320, 1, 1}};

// The 17 blocks, the first with the stem, and a planner's choice or the environment's.
std::vector<BlockShape> block_shapes() {
  std::vector<BlockShape> shapes;
  int64_t channels = 32, size = 112;
  for (const auto& [t, out, repeats, first_stride] : kSizes)
    for (int64_t i = 0; i < repeats; ++i) {
      const int64_t stride = i == 0 ? first_stride : 1;
      const bool stem = shapes.empty();
      BlockShape s{1,
                   size,
                   size,
                   stem ? 3 : channels,
                   channels * t,
                   out,
                   stride,
                   stem ? Expand::kStem : Expand::kPointwise,
                   !stem && stride == 1 && channels == out};
      if (stem) s.image_height = s.image_width = 224;
      size = s.out_height();
      channels = out;
      shapes.push_back(s);
    }
  return shapes;
}

Measured measured(const BlockShape& s, size_t number, const Machine& machine, bool splits_allowed) {
  Measured m;
  m.is_block = true;
  char name[8];
  std::snprintf(name, sizeof name, "P%zu", number);
  long long rows, cols, group, splits;
  if (const char* forced = std::getenv(name);
      forced && std::sscanf(forced, "%lld,%lld,%lld,%lld", &rows, &cols, &group, &splits) == 4) {
    m.plan = make_plan(s, machine, rows, cols, group, splits);
  } else {
    m.plan = make_plan(s, machine);
    if (m.plan.splits > 1 && !splits_allowed)
      m.plan = make_plan(s, machine, m.plan.tile_rows, m.plan.tile_cols, m.plan.group, 1);
  }
  m.multiply_adds = double(s.hidden_channels) *
                    (double(s.expand_terms() * s.height * s.width) +
                     double(s.out_height() * s.out_width()) * double(s.taps() + s.out_channels));
  return m;
}

// The head, which sums up pixels, and the classifier: channels in and out, pixels.
constexpr int64_t kProducts[][3] = {{320, 1280, 49}, {1280, 1000, 1}};

Measured measured(const int64_t (&product)[3]) {
  Measured m;
  m.multiply_adds = double(product[0] * product[1] * product[2]);
  return m;
}

// Rounds of peak() and call(0), call(1) and so on, and a table. peak does what returns operations.
template <class Peak, class Call>
void run(const char* dtype, const char* unit, int rounds, std::vector<Measured>& layers, Peak peak,
         Call call) {
  double rate = 0, all = 1e9;
  std::vector<double> totals;
  for (int round = 0; round < rounds; ++round) {
    double start = seconds();
    const double operations = peak();
    rate = std::max(rate, operations / (seconds() - start));
    const double begin = seconds();
    for (size_t i = 0; i < layers.size(); ++i) {
      start = seconds();
      call(i);
      const double took = seconds() - start;
      layers[i].best = std::min(layers[i].best, took);
      layers[i].times.push_back(took);
    }
    totals.push_back(seconds() - begin);
    all = std::min(all, totals.back());
  }
  double sum = 0, work = 0, blocks = 0, blocks_work = 0;
  std::printf("%s on %s, peak %.1f %s\n", dtype, cpu::active().name, rate / 1e9, unit);
  std::printf("layer   tile  group splits   best us  median us  of peak\n");
  for (size_t i = 0; i < layers.size(); ++i) {
    Measured& l = layers[i];
    std::nth_element(l.times.begin(), l.times.begin() + rounds / 2, l.times.end());
    std::printf("%5zu %3lldx%-3lld %5lld %6lld %9.1f %10.1f %7.0f%%\n", i + 1,
                (long long)l.plan.tile_rows, (long long)l.plan.tile_cols, (long long)l.plan.group,
                (long long)l.plan.splits, l.best * 1e6, l.times[rounds / 2] * 1e6,
                100 * 2 * l.multiply_adds / l.best / rate);
    sum += l.best;
    work += 2 * l.multiply_adds;
    if (!l.is_block) continue;
    blocks += l.best;
    blocks_work += 2 * l.multiply_adds;
  }
  std::printf("17 blocks, the first with the stem: %.0f us, %.1f%% of peak\n", blocks * 1e6,
              100 * blocks_work / blocks / rate);
  std::nth_element(totals.begin(), totals.begin() + rounds / 2, totals.end());
  std::printf("sum of best %.0f us, best pass %.0f, median pass %.0f: %.0f%% of peak\n", sum * 1e6,
              all * 1e6, totals[rounds / 2] * 1e6, 100 * work / all / rate);
}

constexpr int64_t kPeakRounds = 100'000;

template <class S>
struct Weights {
  using T = Compute<S>;
  Vector<S> w_expand, w_project;
  Vector<T> b_expand, w_depthwise, b_depthwise, b_project;

  explicit Weights(const BlockShape& s) {
    const int64_t panels = s.hidden_panels();
    w_expand = random<S>(panels * s.expand_terms(depth<S>) * kPanel, 0.3f);
    b_expand.assign(panels * kPanel, 0.5f);
    w_depthwise = random<float>(panels * s.taps() * kPanel, 0.3f);
    b_depthwise.assign(panels * kPanel, 0.5f);
    w_project = random<S>(ceil_div(s.out_channels, kPanel) * s.hidden_channels * kPanel, 0.1f);
    b_project.assign(s.out_channels, 0.f);
  }
  Weights(int64_t panels, int64_t in) {
    w_expand = random<S>(panels * in * kPanel, 0.1f);
    b_expand.assign(panels * kPanel, 0.f);
  }
};

template <class S>
void run_floats(int rounds) {
  using T = Compute<S>;
  const cpu::Kernels<S>& kernels = cpu::kernels<S>(cpu::active());
  const Machine machine = kernels.machine(1, cpu::l2_bytes());
  const std::vector<BlockShape> blocks = block_shapes();
  std::vector<Measured> layers;
  std::vector<Weights<S>> weights;
  std::vector<int64_t> read_first;  // bytes of weights that a layer begins with
  int64_t scratch_bytes = 0;
  for (const BlockShape& s : blocks) {
    layers.push_back(measured(s, layers.size() + 1, machine, true));
    weights.emplace_back(s);
    const Plan& p = layers.back().plan;
    read_first.push_back(p.group * s.expand_terms(depth<S>) * int64_t{sizeof(S)});
    scratch_bytes = std::max(scratch_bytes, p.scratch_bytes + p.partial_bytes);
  }
  std::vector<PointwiseShape> products;
  for (const auto& product : kProducts) {
    const auto [in, out, pixels] = product;
    const bool pool = pixels > 1;
    const int64_t size = pool ? 7 : 1;
    products.push_back(
        {1, size, size, in, out, pool ? Activation::kRelu6 : Activation::kIdentity, pool});
    layers.push_back(measured(product));
    weights.emplace_back(products.back().panels(), in);
    read_first.push_back(64 * in * int64_t{sizeof(S)});
  }
  Vector<T> scratch(scratch_bytes / sizeof(T) + 64);
  const Vector<S> image = random<S>(3 * 224 * 224, 1);
  Vector<S> between(112 * 112 * 40);
  const int64_t room = int64_t(between.size());
  const S* x = nullptr;
  const auto call = [&](size_t i) {
    if (i == 0) x = image.data();
    const Weights<S>& w = weights[i];
    const bool last = i + 1 == layers.size();
    const void* next_weights = last ? nullptr : weights[i + 1].w_expand.data();
    const int64_t next_bytes = last ? 0 : read_first[i + 1];
    if (!layers[i].is_block) {
      const PointwiseShape& s = products[i - blocks.size()];
      S* y = i % 2 ? between.data() + room - 4096 : between.data();
      const PointwiseArgs<S> args{s,
                                  1,
                                  x,
                                  0,
                                  s.width * s.in_channels,
                                  s.in_channels,
                                  w.w_expand.data(),
                                  w.b_expand.data(),
                                  y,
                                  scratch.data(),
                                  next_weights,
                                  next_bytes};
      kernels.run_pointwise(args, 0);
      x = y;
      return;
    }
    const BlockShape& s = blocks[i];
    const Plan& plan = layers[i].plan;
    const int64_t width = s.expand == Expand::kStem ? 224 : s.width, channels = s.in_channels;
    S* y = i % 2 ? between.data() + room - round_up(s.out_elements(), 64) : between.data();
    const BlockArgs<S> args{s,
                            x,
                            0,
                            width * channels,
                            channels,
                            1,
                            w.w_expand.data(),
                            w.b_expand.data(),
                            w.w_depthwise.data(),
                            s.taps() * kPanel,
                            w.b_depthwise.data(),
                            w.w_project.data(),
                            w.b_project.data(),
                            y,
                            scratch.data() + plan.scratch_bytes / sizeof(T),
                            next_weights,
                            next_bytes};
    for (int64_t task = 0; task < plan.tasks; ++task)
      kernels.run_tile(args, plan, task, scratch.data());
    if (plan.splits > 1)
      for (int64_t row = 0; row < s.out_height(); ++row) kernels.add_row(args, plan, row);
    x = y;
  };
  const auto peak = [&] {
    const T value = kernels.multiply_add(kPeakRounds);
    asm volatile("" : : "m"(value));  // what keeps the loop alive
    return double(kernels.flops_per_round * kPeakRounds);
  };
  run(sizeof(S) == 2 ? "bfloat16" : "float32", "GFLOP/s", rounds, layers, peak, call);
}

// A convolution's weights and multipliers, of sums that spread over 8 bits.
struct OwnedStage {
  Vector<int8_t> weight;
  Vector<int32_t> bias;
  Vector<float> multiplier, low, high, scale;

  OwnedStage(int64_t weights, int64_t channels, int64_t terms) {
    channels = round_up(channels, kPanel);
    for (const float v : random<float>(weights, 40))
      weight.push_back(int8_t(std::clamp(v, -127.0f, 127.0f)));
    bias.assign(channels, 0);
    multiplier.assign(channels, 1.0f / (70.0f * float(terms)));
    low.assign(channels, 0);
    high.assign(channels, 255);
    scale.assign(channels, 1);
  }
  int8::Stage stage() const {
    return {weight.data(),
            bias.data(),
            multiplier.data(),
            low.data(),
            high.data(),
            scale.data(),
            0,
            {Activation::kIdentity, kNegativeSlope},
            true};
  }
};

void run_integers(int rounds) {
  const int8::Kernels& kernels = cpu::active().integers();
  const Machine machine = kernels.machine(1, cpu::l2_bytes());
  const std::vector<BlockShape> blocks = block_shapes();
  std::vector<Measured> layers;
  std::vector<OwnedStage> stages;  // three of each block, then one of each product
  int64_t scratch_bytes = 0;
  for (const BlockShape& s : blocks) {
    layers.push_back(measured(s, layers.size() + 1, machine, false));
    const int64_t hidden = s.hidden_panels() * kPanel, terms = int8::Scratch::terms(s);
    const int64_t dots = int8::phases(s) * int8::row_dots(s.kernel, s.dilation);
    stages.emplace_back(hidden * round_up(terms, int8::kQuad), hidden, terms);
    stages.emplace_back(hidden * s.kernel * dots * int8::kQuad, hidden, s.taps());
    stages.emplace_back(round_up(s.out_channels, kPanel) * hidden, s.out_channels, hidden);
    const int8::Scratch scratch(s, layers.back().plan, kernels.element);
    scratch_bytes = std::max(scratch_bytes, scratch.total());
  }
  for (const auto& product : kProducts) {
    const auto [in, out, pixels] = product;
    layers.push_back(measured(product));
    stages.emplace_back(round_up(out, kPanel) * in, out, in);
    scratch_bytes =
        std::max(scratch_bytes, int8::kProductRows * (in * kernels.element + (out + kPanel) * 4));
  }
  Vector<char> scratch(scratch_bytes + 64);
  Vector<uint8_t> image(3 * 224 * 224 + 64), between(112 * 112 * 40);
  std::iota(image.begin(), image.end(), uint8_t{0});
  Vector<int32_t> sums(1280);
  Vector<float> logits(1024);
  const int64_t room = int64_t(between.size());
  const uint8_t* x = nullptr;
  const auto call = [&](size_t i) {
    if (i == 0) x = image.data();
    if (!layers[i].is_block) {
      const size_t product = i - blocks.size();
      const auto [in, out, pixels] = kProducts[product];
      int8::ProductArgs args{x, in, out, stages[3 * blocks.size() + product].stage(), out};
      if (pixels > 1)
        args.sums = sums.data();
      else
        args.real = logits.data();
      kernels.run_product(args, 0, pixels, scratch.data());
      return;
    }
    int8::BlockCall call{};
    call.shape = blocks[i];
    const BlockShape& s = call.shape;
    const bool stem = s.expand == Expand::kStem;
    call.x = x;
    call.x_col = s.in_channels;
    call.x_row = (stem ? 224 : s.width) * s.in_channels;
    call.x_image = (stem ? 224 : s.height) * call.x_row;
    call.residual_scale = 1;
    call.expand = stages[3 * i].stage();
    call.depthwise = stages[3 * i + 1].stage();
    call.project = stages[3 * i + 2].stage();
    call.y = i % 2 ? between.data() + room - round_up(s.out_elements(), 64) - 64 : between.data();
    for (int64_t task = 0; task < layers[i].plan.tasks; ++task)
      kernels.run_tile(call, layers[i].plan, task, scratch.data());
    x = call.y;
  };
  const auto peak = [&] {
    const int32_t value = kernels.dots(kPeakRounds);
    asm volatile("" : : "m"(value));
    return double(kernels.operations_per_round * kPeakRounds);
  };
  run("int8", "GOP/s", rounds, layers, peak, call);
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 300;
  const char* const dtype = argc > 1 ? argv[1] : "float32";
  if (std::strcmp(dtype, "float32") == 0)
    run_floats<float>(rounds);
  else if (std::strcmp(dtype, "bfloat16") == 0)
    run_floats<BFloat16>(rounds);
  else if (std::strcmp(dtype, "int8") == 0)
    run_integers(rounds);
  else
    return std::fprintf(stderr, "dtype must be float32, bfloat16 or int8, got %s\n", dtype), 2;
}
