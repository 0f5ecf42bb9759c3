// MobileNetV2's layers one after the other straight on the CPU kernels, one thread, without torch:
// time of each layer where it stands, between its neighbours, with what they leave in the caches.
//   make chain                            builds build/kernel_chain and runs it
//   build/kernel_chain float32 200        dtype (float32, bfloat16), rounds
//   P5=14,14,96,1 build/kernel_chain ...  forces tile rows, tile columns, group, splits of layer 5
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <vector>

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

template <class S>
struct Layer {
  using T = Compute<S>;
  Vector<S> w_expand, w_project;
  Vector<T> b_expand, w_depthwise, b_depthwise, b_project;
  BlockShape shape{};
  Plan plan{};
  PointwiseShape pointwise{};
  bool is_block = false;
  double multiply_adds = 0, best = 1e9;
  std::vector<double> times;
};

constexpr int64_t kSizes[][4] = {// t, channels, repeats, stride: table 2 of the paper
                                 {1, 16, 1, 1}, {6, 24, 2, 2},  {6, 32, 3, 2}, {6, 64, 4, 2},
                                 {6, 96, 3, 1}, {6, 160, 3, 2}, {6, 320, 1, 1}};

template <class S>
std::vector<Layer<S>> network(const Machine& machine) {
  std::vector<Layer<S>> layers;
  int64_t channels = 32, size = 112;
  const int64_t pair = depth<S>;
  for (const auto& [t, out, repeats, first_stride] : kSizes)
    for (int64_t i = 0; i < repeats; ++i) {
      Layer<S> l;
      l.is_block = true;
      const int64_t stride = i == 0 ? first_stride : 1;
      const bool stem = layers.empty();
      BlockShape& s = l.shape;
      s = {1,
           size,
           size,
           stem ? 3 : channels,
           channels * t,
           out,
           stride,
           stem ? Expand::kStem : Expand::kPointwise,
           !stem && stride == 1 && channels == out};
      if (stem) s.image_height = s.image_width = 224;
      const int64_t terms = s.expand_terms(pair), panels = s.hidden_panels();
      l.w_expand = random<S>(panels * terms * kPanel, 0.3f);
      l.b_expand.assign(panels * kPanel, 0.5f);
      l.w_depthwise = random<float>(panels * 9 * kPanel, 0.3f);
      l.b_depthwise.assign(panels * kPanel, 0.5f);
      l.w_project = random<S>(ceil_div(out, kPanel) * s.hidden_channels * kPanel, 0.1f);
      l.b_project.assign(out, 0.f);
      char name[8];
      std::snprintf(name, sizeof name, "P%zu", layers.size() + 1);
      long long rows, cols, group, splits;
      if (const char* forced = std::getenv(name);
          forced && std::sscanf(forced, "%lld,%lld,%lld,%lld", &rows, &cols, &group, &splits) == 4)
        l.plan = make_plan(s, machine, rows, cols, group, splits);
      else
        l.plan = make_plan(s, machine);
      const double pixels = double(s.out_height() * s.out_width());
      l.multiply_adds = double(s.hidden_channels) *
                        (double(s.expand_terms() * size * size) + pixels * double(9 + out));
      size = s.out_height();
      channels = out;
      layers.push_back(std::move(l));
    }
  for (const auto& [in, out, pool] : {std::array<int64_t, 3>{320, 1280, 1}, {1280, 1000, 0}}) {
    Layer<S> l;
    const Activation activation = pool ? Activation::kRelu6 : Activation::kIdentity;
    l.pointwise = {1, pool ? size : 1, pool ? size : 1, in, out, activation, pool != 0};
    l.w_expand = random<S>(l.pointwise.panels() * in * kPanel, 0.1f);
    l.b_expand.assign(l.pointwise.panels() * kPanel, 0.f);
    l.multiply_adds = double(in * out * l.pointwise.height * l.pointwise.width);
    layers.push_back(std::move(l));
  }
  return layers;
}

template <class S>
void run(int rounds) {
  using T = Compute<S>;
  const cpu::Kernels<S>& kernels = cpu::kernels<S>(cpu::active());
  std::vector<Layer<S>> layers = network<S>(kernels.machine(1, cpu::l2_bytes()));
  int64_t scratch_bytes = 0;
  for (const Layer<S>& l : layers)
    scratch_bytes = std::max(scratch_bytes, l.plan.scratch_bytes + l.plan.partial_bytes);
  Vector<T> scratch(scratch_bytes / sizeof(T) + 64);
  const Vector<S> image = random<S>(3 * 224 * 224, 1);
  Vector<S> between(112 * 112 * 40);
  const int64_t room = int64_t(between.size());
  double peak = 1e9, all = 1e9;
  const int64_t peak_rounds = 100'000;
  std::vector<double> totals;
  for (int round = 0; round < rounds; ++round) {
    double start = seconds();
    const T value = kernels.multiply_add(peak_rounds);
    asm volatile("" : : "m"(value));  // what keeps the loop alive
    peak = std::min(peak, seconds() - start);
    const S* x = image.data();
    const double begin = seconds();
    for (size_t i = 0; i < layers.size(); ++i) {
      Layer<S>& l = layers[i];
      const Layer<S>* next = i + 1 < layers.size() ? &layers[i + 1] : nullptr;
      const void* next_weights = next ? next->w_expand.data() : nullptr;
      int64_t next_bytes = 0;
      if (next) {
        const int64_t group = next->is_block ? next->plan.group : 64;
        const int64_t terms =
            next->is_block ? next->shape.expand_terms(depth<S>) : next->pointwise.in_channels;
        next_bytes = group * terms * int64_t{sizeof(S)};
      }
      start = seconds();
      if (l.is_block) {
        const BlockShape& s = l.shape;
        const bool stem = s.expand == Expand::kStem;
        const int64_t width = stem ? 224 : s.width, channels = s.in_channels;
        S* y = i % 2 ? between.data() + room - round_up(s.out_elements(), 64) : between.data();
        const BlockArgs<S> args{s,
                                x,
                                0,
                                width * channels,
                                channels,
                                1,
                                l.w_expand.data(),
                                l.b_expand.data(),
                                l.w_depthwise.data(),
                                l.b_depthwise.data(),
                                l.w_project.data(),
                                l.b_project.data(),
                                y,
                                scratch.data() + l.plan.scratch_bytes / sizeof(T),
                                next_weights,
                                next_bytes};
        for (int64_t task = 0; task < l.plan.tasks; ++task)
          kernels.run_tile(args, l.plan, task, scratch.data());
        if (l.plan.splits > 1)
          for (int64_t row = 0; row < s.out_height(); ++row) kernels.add_row(args, l.plan, row);
        x = y;
      } else {
        const PointwiseShape& s = l.pointwise;
        S* y = i % 2 ? between.data() + room - 4096 : between.data();
        const PointwiseArgs<S> args{s,
                                    1,
                                    x,
                                    0,
                                    s.width * s.in_channels,
                                    s.in_channels,
                                    l.w_expand.data(),
                                    l.b_expand.data(),
                                    y,
                                    scratch.data(),
                                    next_weights,
                                    next_bytes};
        kernels.run_pointwise(args, 0);
        x = y;
      }
      const double took = seconds() - start;
      l.best = std::min(l.best, took);
      l.times.push_back(took);
    }
    totals.push_back(seconds() - begin);
    all = std::min(all, totals.back());
  }
  const double flops = double(kernels.flops_per_round * peak_rounds) / peak;
  double sum = 0, work = 0;
  std::printf("%s on %s, peak %.1f GFLOP/s\n", sizeof(S) == 2 ? "bfloat16" : "float32",
              cpu::active().name, flops / 1e9);
  std::printf("layer   tile  group splits   best us  median us  of peak\n");
  for (size_t i = 0; i < layers.size(); ++i) {
    Layer<S>& l = layers[i];
    std::nth_element(l.times.begin(), l.times.begin() + rounds / 2, l.times.end());
    std::printf("%5zu %3lldx%-3lld %5lld %6lld %9.1f %10.1f %7.0f%%\n", i + 1,
                (long long)l.plan.tile_rows, (long long)l.plan.tile_cols, (long long)l.plan.group,
                (long long)l.plan.splits, l.best * 1e6, l.times[rounds / 2] * 1e6,
                100 * 2 * l.multiply_adds / l.best / flops);
    sum += l.best;
    work += 2 * l.multiply_adds;
  }
  double blocks = 0, blocks_work = 0;
  for (const Layer<S>& l : layers) {
    if (!l.is_block) continue;
    blocks += l.best;
    blocks_work += 2 * l.multiply_adds;
  }
  std::printf("17 blocks, the first with the stem: %.0f us, %.1f%% of peak\n", blocks * 1e6,
              100 * blocks_work / blocks / flops);
  std::nth_element(totals.begin(), totals.begin() + rounds / 2, totals.end());
  std::printf("sum of best %.0f us, best pass %.0f, median pass %.0f: %.0f%% of peak\n", sum * 1e6,
              all * 1e6, totals[rounds / 2] * 1e6, 100 * work / all / flops);
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 300;
  if (argc > 1 && std::strcmp(argv[1], "bfloat16") == 0)
    run<BFloat16>(rounds);
  else
    run<float>(rounds);
}
