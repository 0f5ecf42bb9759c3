// Training kernels of this processor beside the portable ones in double, on random blocks: for sanitizers, and
// for processors that are emulated. Every array has just the elements that args.h says.
//   training_kernel_check COUNT    blocks; exits with 1 where results differ
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "../../csrc/cpu/training/args.h"

namespace mnv2_fused::cpu::training {
// Those that are not linked are null.
namespace avx512 {
extern const AllKernels kKernels __attribute__((weak));
}
namespace avx2 {
extern const AllKernels kKernels __attribute__((weak));
}
namespace neon {
extern const AllKernels kKernels __attribute__((weak));
}
}  // namespace mnv2_fused::cpu::training

using namespace mnv2_fused;
using namespace mnv2_fused::cpu::training;

namespace {

std::mt19937 g_random;

int64_t between(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(g_random);
}

template <class T>
struct Block {
  BlockShape s{};
  std::vector<T> x, w_expand, b_expand, w_depthwise, g, w_project, rows, w_input, w_output, gates;
};

std::vector<double> drawn(int64_t count) {
  std::normal_distribution<double> normal;
  std::vector<double> v(static_cast<size_t>(count));
  for (double& value : v) value = normal(g_random);
  return v;
}

// [panels][terms][16], zeros from channel `channels` on.
std::vector<double> panels(int64_t channels, int64_t terms) {
  const int64_t count = ceil_div(channels, kPanel);
  std::vector<double> v = drawn(count * terms * kPanel);
  for (int64_t p = 0; p < count; ++p)
    for (int64_t t = 0; t < terms; ++t)
      for (int64_t l = 0; l < kPanel; ++l)
        if (p * kPanel + l >= channels) v[size_t((p * terms + t) * kPanel + l)] = 0;
  return v;
}

BlockShape shape() {
  BlockShape s{};
  const bool expands = between(0, 3) > 0;
  s.batch = between(1, 3);
  s.in_channels = between(1, 24);
  s.hidden_channels = expands ? between(1, 90) : s.in_channels;
  s.out_channels = between(1, 24);
  s.expand = expands ? Expand::kPointwise : Expand::kNone;
  s.kernel = kKernelSizes[between(0, kKernelSizeCount - 1)];
  s.stride = between(1, 2);
  s.column_stride = between(0, 2);
  if (s.stride == 1 && s.stride_across() == 1) s.dilation = between(1, 3);
  for (int64_t* pad : {&s.pad_left, &s.pad_right, &s.pad_top, &s.pad_bottom})
    *pad = between(0, s.extent() - 1);
  s.height = std::max<int64_t>(1, s.extent() - s.pad_top - s.pad_bottom) + between(0, 12);
  s.width = std::max<int64_t>(1, s.extent() - s.pad_left - s.pad_right) + between(0, 60);
  const Activation known[] = {Activation::kRelu6,     Activation::kRelu, Activation::kIdentity,
                              Activation::kHardswish, Activation::kSilu, Activation::kLeakyRelu};
  s.activation = known[between(0, 5)];
  s.expand_activation = known[between(0, 5)];
  return s;
}

Block<double> block() {
  Block<double> b;
  const BlockShape s = b.s = shape();
  const int64_t hidden = s.hidden_panels() * kPanel;
  b.x = drawn(s.batch * s.height * s.width * s.in_channels);
  b.w_expand = panels(s.hidden_channels, s.in_channels);
  b.b_expand = panels(s.hidden_channels, 1);
  b.w_depthwise = panels(s.hidden_channels, s.taps());
  b.g = drawn(s.out_elements());
  b.w_project = panels(s.hidden_channels, s.out_channels);
  b.rows.resize(size_t(6 * hidden));
  for (int64_t row = 0; row < 6; ++row) {
    const std::vector<double> values = panels(s.hidden_channels, 1);
    std::copy(values.begin(), values.end(), b.rows.begin() + row * hidden);
  }
  const auto transposed = [&](int64_t channels) {
    std::vector<double> v = panels(channels, hidden);
    for (int64_t p = 0; p < ceil_div(channels, kPanel); ++p)
      for (int64_t e = s.hidden_channels; e < hidden; ++e)
        std::fill_n(v.begin() + (p * hidden + e) * kPanel, kPanel, 0.0);
    return v;
  };
  b.w_input = transposed(s.in_channels);
  b.w_output = transposed(s.out_channels);
  // Factors of each image, and what they add to gradients.
  for (int64_t i = 0; i < 2 * s.batch; ++i) {
    const std::vector<double> values = panels(s.hidden_channels, 1);
    b.gates.insert(b.gates.end(), values.begin(), values.end());
  }
  return b;
}

template <class T>
std::vector<T> as(const std::vector<double>& v) {
  return {v.begin(), v.end()};
}

enum Pass { kStatistics, kPool, kProject, kBackwardProject, kBackwardExpand };

// One pass over a block, with results that are NaN before.
template <class T>
struct Call {
  static constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
  static std::vector<T> made(int64_t count) { return std::vector<T>(size_t(count), kNaN); }

  Call(const Block<T>& from, const Kernels<T>& kernels, Pass step, bool gated)
      : s(from.s),
        step(step),
        layout(s, kernels.lanes, sizeof(T), step == kBackwardExpand),
        run_slot(std::array{kernels.statistics, kernels.pool, kernels.project,
                            kernels.backward_project, kernels.backward_expand}[step]),
        args{s, from.x.data(), from.w_expand.data(), from.b_expand.data(), from.w_depthwise.data()},
        scratch(made(layout.total())) {
    const int64_t hidden = s.hidden_panels() * kPanel, slots = slots_of(s);
    const int64_t of_image = step == kPool ? kPooledSums : gated ? kGateSums : 0;
    const bool by_image = step == kPool || (step == kBackwardProject && gated);
    sums.assign(size_t((by_image ? s.batch * of_image : slots * 2) * hidden), kNaN);
    p = made(s.out_elements());
    dw_project = made(slots * s.out_channels * hidden);
    dw_expand = made(slots * s.in_channels * hidden);
    dw_depthwise = made(slots * s.taps() * hidden);
    g_x = made(int64_t(from.x.size()));
    args.sums = sums.data();
    args.p = p.data();
    args.w_output = from.w_output.data();
    if (gated) {
      args.gate = from.gates.data();
      args.of_pooled = step == kBackwardExpand ? from.gates.data() + s.batch * hidden : nullptr;
    }
    if (step == kStatistics) return;
    args.g = from.g.data();
    args.w_project = from.w_project.data();
    const T* at = from.rows.data();
    for (const T** row :
         {&args.scale, &args.shift, &args.mean, &args.inverse, &args.offset, &args.slope})
      *row = at, at += hidden;
    args.w_input = from.w_input.data();
    args.dw_project = dw_project.data();
    args.dw_expand = dw_expand.data();
    args.dw_depthwise = dw_depthwise.data();
    args.g_x = g_x.data();
  }
  // On some panels; kept: act(e), d and q of these, or nulls.
  void run(int64_t first, int64_t end, T* e, T* d, T* q) {
    args.first_panel = first;
    args.end_panel = end;
    args.kept_e = e;
    args.kept_d = d;
    args.kept_q = q;
    for (int64_t slot = 0; slot < slots_of(s); ++slot) run_slot(args, layout, slot, scratch.data());
  }
  void append_to(std::vector<double>& all) const {
    const auto keep = [&](const auto& v) { all.insert(all.end(), v.begin(), v.end()); };
    const bool expands = s.expand == Expand::kPointwise;
    if (step == kProject) return keep(p);
    if (step != kBackwardExpand || expands) keep(sums);
    if (step == kBackwardProject) keep(dw_project);
    if (step == kBackwardExpand) keep(dw_depthwise), keep(g_x);
    if (step == kBackwardExpand && expands) keep(dw_expand);
  }

  const BlockShape& s;
  Pass step;
  Layout layout;
  void (*run_slot)(const Args<T>&, const Layout&, int64_t, T*);
  Args<T> args;
  std::vector<T> scratch, p, dw_project, dw_expand, dw_depthwise, g_x;
  std::vector<double> sums;
};

// Results of all passes, of those behind the pooled values with and without a gate. keeps: two groups of panels one
// after the other, each pass behind the one that keeps values for it.
template <class T>
std::vector<double> results(const Block<double>& of, const Kernels<T>& kernels, bool keeps) {
  const BlockShape& s = of.s;
  const Block<T> from{s,
                      as<T>(of.x),
                      as<T>(of.w_expand),
                      as<T>(of.b_expand),
                      as<T>(of.w_depthwise),
                      as<T>(of.g),
                      as<T>(of.w_project),
                      as<T>(of.rows),
                      as<T>(of.w_input),
                      as<T>(of.w_output),
                      as<T>(of.gates)};
  std::vector<double> all;
  const auto pass = [&](Pass step, bool gated = false) {
    Call<T> call(from, kernels, step, gated);
    const int64_t panels = s.hidden_panels();
    if (!keeps || step == kStatistics || step == kBackwardProject) {
      call.run(0, panels, nullptr, nullptr, nullptr);
    } else {
      const bool backward = step == kBackwardExpand;
      const bool has_e = backward && s.expand != Expand::kNone && is_clip(s.expand_activation);
      Call<T> before(from, kernels, backward ? kBackwardProject : kStatistics, gated && backward);
      for (const auto& [first, end] : {std::pair(int64_t{0}, panels / 2), {panels / 2, panels}}) {
        const int64_t images = s.batch * (end - first);
        const int64_t of_d = images * s.out_height() * s.out_width() * kPanel;
        std::vector<T> e = Call<T>::made(images * s.height * call.layout.ring_cols * kPanel);
        std::vector<T> d = Call<T>::made(of_d), q = Call<T>::made(of_d);
        for (Call<T>* one : {&before, &call})
          one->run(first, end, has_e ? e.data() : nullptr, d.data(), backward ? q.data() : nullptr);
      }
    }
    call.append_to(all);
  };
  pass(kStatistics);
  pass(kPool);
  for (const bool gated : {false, true})
    for (const Pass step : {kProject, kBackwardProject, kBackwardExpand}) pass(step, gated);
  return all;
}

// Whether `found` is `expected` to `allowed` of its largest value, and finite.
bool close(const std::vector<double>& found, const std::vector<double>& expected, double allowed) {
  double largest = 1, off = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (!std::isfinite(found[i]) || !std::isfinite(expected[i])) return false;
    largest = std::max(largest, std::abs(expected[i]));
    off = std::max(off, std::abs(found[i] - expected[i]));
  }
  return off <= allowed * largest;
}

}  // namespace

int main(int count, char** arguments) {
  const int blocks = count > 1 ? std::atoi(arguments[1]) : 20;
  std::vector<std::pair<const char*, const AllKernels*>> all{{"portable", &portable::kKernels}};
#if defined(__x86_64__)
  if (&avx2::kKernels && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    all.push_back({"avx2", &avx2::kKernels});
  if (&avx512::kKernels && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq"))
    all.push_back({"avx512", &avx512::kKernels});
#else
  if (&neon::kKernels) all.push_back({"neon", &neon::kKernels});
#endif
  int wrong = 0;
  for (int i = 0; i < blocks; ++i) {
    g_random.seed(unsigned(i));
    const Block<double> b = block();
    const std::vector<double> expected = results(b, portable::kKernels.f64, false);
    for (const auto& [name, kernels] : all) {
      // A gate near its bound may open in float and stay shut in double: most of such errors are small.
      bool right = true;
      for (const bool keeps : {false, true})
        right = right && close(results(b, kernels->f64, keeps), expected, 1e-10) &&
                close(results(b, kernels->f32, keeps), expected, 1e-3);
      if (!right) std::printf("block %d, %s: differs\n", i, name), ++wrong;
    }
  }
  for (const auto& [name, kernels] : all) std::printf("%s ", name);
  std::printf("%d blocks, %d wrong\n", blocks, wrong);
  return wrong > 0;
}
