// The CPU kernels against plain loops in double, without torch, so that it can run under sanitizers.
// Every buffer is its own heap allocation of the exact size; y and the scratch start as NaN.
//   cpu_kernel_check CASES SEED    prints one line per instruction set; exit status 1 on a mismatch
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../../csrc/cpu/int8/args.h"
#include "../../csrc/cpu/isa.h"
#include "../../csrc/cpu/training/args.h"

// Kernels on 8-bit integers, and for training, are not checked here: the table of instruction sets is linked
// without them.
namespace mnv2_fused::cpu::int8 {
#define NOT_LINKED(isa)        \
  namespace isa {              \
  const Kernels kKernels = {}; \
  }
NOT_LINKED(avx512_vnni)
#ifdef MNV2_AVX_VNNI
NOT_LINKED(avx2_vnni)
#endif
NOT_LINKED(avx2)
NOT_LINKED(neon_i8mm)
NOT_LINKED(neon_dotprod)
NOT_LINKED(portable)
#undef NOT_LINKED
}  // namespace mnv2_fused::cpu::int8
namespace mnv2_fused::cpu::training {
namespace avx512 {
const AllKernels kKernels = {};
}
namespace avx2 {
const AllKernels kKernels = {};
}
namespace neon {
const AllKernels kKernels = {};
}
namespace portable {
const AllKernels kKernels = {};
}
}  // namespace mnv2_fused::cpu::training

using namespace mnv2_fused;
using namespace mnv2_fused::cpu;

namespace {

std::mt19937_64 g_random;

int64_t between(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(g_random);
}

double value(double v) { return v; }
double value(BFloat16 v) {
  const uint32_t bits = uint32_t{v.bits} << 16;
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  return f;
}
// To the nearest S, ties to even.
template <class S>
S rounded(double v) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    const float f = float(v);
    uint32_t bits;
    std::memcpy(&bits, &f, sizeof(f));
    if (v != v) return {0x7fc0};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else {
    return S(v);
  }
}

template <class S>
std::vector<S> uniform(int64_t count, double low, double high) {
  std::uniform_real_distribution<double> d(low, high);
  std::vector<S> v(count);
  for (S& e : v) e = rounded<S>(d(g_random));
  return v;
}

// Elements of packed weights of a product over `terms`, and the one of channel c and term k.
template <class S>
int64_t packed_elements(int64_t channels, int64_t terms) {
  return ceil_div(channels, kPanel) * round_up(terms, depth<S>) * kPanel;
}
template <class S>
double weight(const S* w, int64_t terms, int64_t c, int64_t k) {
  constexpr int64_t kDepth = depth<S>;
  const int64_t panel = c / kPanel * round_up(terms, kDepth) * kPanel;
  return value(w[panel + (k / kDepth * kPanel + c % kPanel) * kDepth + k % kDepth]);
}

// Where the elements of x, [N, H, W, C], lie. Gaps lie between them, as in a window of a larger image.
struct Strides {
  int64_t image, row, col, channel, elements;

  Strides(int64_t batch, int64_t height, int64_t width, int64_t channels) {
    channel = 1;
    col = channels + between(0, 3);
    row = col * (width + between(0, 2));
    image = row * height;
    count(batch, height, width, channels);
  }
  // Channels anywhere, as the stem takes them.
  static Strides of_image(int64_t batch, int64_t height, int64_t width, int64_t channels) {
    Strides s(batch, height, width, channels);
    if (between(0, 2) == 0) return s;
    if (between(0, 1)) {  // planes
      s.col = between(1, 2);
      s.row = s.col * width + between(0, 3);
      s.channel = s.row * height + between(0, 3);
    } else {  // every second channel, or none left out and no gap
      s.channel = between(1, 2);
      s.col = s.channel * channels;
      s.row = s.col * width;
    }
    s.image = std::max(s.channel * channels, s.row * height) + between(0, 3);
    s.count(batch, height, width, channels);
    return s;
  }

 private:
  void count(int64_t batch, int64_t height, int64_t width, int64_t channels) {
    elements =
        (batch - 1) * image + (height - 1) * row + (width - 1) * col + (channels - 1) * channel + 1;
  }
};

double relu6(double v) { return std::fmin(std::fmax(v, 0.0), 6.0); }
double activated(double v, ActivationFunction a) {
  switch (a.kind) {
    case Activation::kRelu6:
      return relu6(v);
    case Activation::kRelu:
      return std::fmax(v, 0.0);
    case Activation::kHardswish:
      return v * relu6(v + 3) / 6;
    case Activation::kSilu:
      return v / (1 + std::exp(-v));
    case Activation::kIdentity:
      return v;
    case Activation::kLeakyRelu:
      return v > 0 ? v : v * a.negative_slope;
    case Activation::kGelu:
      return v / 2 * std::erfc(-v / std::sqrt(2.0));
    case Activation::kGeluTanh:
      return v / 2 *
             (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (v + 0.044715 * v * v * v)));
  }
  std::abort();
}

// Packed weights and biases, with something in the padding, too: no result may depend on it.
template <class S, class T = Compute<S>>
struct Weights {
  std::vector<S> w_expand, w_project;
  std::vector<T> b_expand, w_depthwise, b_depthwise, b_project;

  explicit Weights(const BlockShape& s) {
    const int64_t panels = s.hidden_panels();
    w_expand = uniform<S>(packed_elements<S>(s.hidden_channels, s.expand_terms(depth<S>)), -1, 1);
    b_expand = uniform<T>(panels * kPanel, -2, 8);
    w_depthwise = uniform<T>(panels * s.taps() * kPanel, -1, 1);
    b_depthwise = uniform<T>(panels * kPanel, -2, 2);
    w_project = uniform<S>(packed_elements<S>(s.out_channels, s.hidden_channels), -1, 1);
    b_project = uniform<T>(s.out_channels, -1, 1);
  }
};

// Channel c of the expanded pixel (h, w).
template <class S>
double expanded(const BlockArgs<S>& a, const S* x, int64_t h, int64_t w, int64_t c) {
  const BlockShape& s = a.shape;
  if (s.expand == Expand::kNone) return value(x[h * a.x_row + w * a.x_col + c]);
  const bool stem = s.expand == Expand::kStem;
  const int64_t channels = stem ? round_up(s.in_channels, depth<S>) : s.in_channels;
  double sum = a.b_expand[c];
  for (int64_t tap = 0; tap < (stem ? 9 : 1); ++tap) {
    const int64_t row = stem ? h * kStemStride + tap / 3 - 1 : h;
    const int64_t col = stem ? w * kStemStride + tap % 3 - 1 : w;
    if (stem && (row < 0 || row >= s.image_height || col < 0 || col >= s.image_width)) continue;
    for (int64_t k = 0; k < s.in_channels; ++k)
      sum += value(x[row * a.x_row + col * a.x_col + k * a.x_channel]) *
             weight(a.w_expand, s.expand_terms(depth<S>), c, tap * channels + k);
  }
  return activated(sum, s.function(s.expand_activation));
}

// d[c][h][w] of image n, multiplied by its gate where there is one.
template <class S>
std::vector<double> depthwise(const BlockArgs<S>& a, int64_t n) {
  const BlockShape& s = a.shape;
  const int64_t oh = s.out_height(), ow = s.out_width();
  const S* x = a.x + n * a.x_image;
  std::vector<double> e(s.height * s.width), d(s.hidden_channels * oh * ow);
  for (int64_t c = 0; c < s.hidden_channels; ++c) {
    const double gate = a.gate ? a.gate[n * s.hidden_channels + c] : 1.0;
    for (int64_t h = 0; h < s.height; ++h)
      for (int64_t w = 0; w < s.width; ++w) e[h * s.width + w] = expanded(a, x, h, w, c);
    for (int64_t h = 0; h < oh; ++h)
      for (int64_t w = 0; w < ow; ++w) {
        double sum = a.b_depthwise[c];
        for (int64_t k = 0; k < s.taps(); ++k) {
          const int64_t ih = h * s.stride + k / s.kernel * s.dilation - s.pad_top;
          const int64_t iw = w * s.stride_across() + k % s.kernel * s.dilation - s.pad_left;
          if (ih < 0 || ih >= s.height || iw < 0 || iw >= s.width) continue;
          sum += e[ih * s.width + iw] *
                 double(a.w_depthwise[(c / kPanel * s.taps() + k) * kPanel + c % kPanel]);
        }
        const double v = activated(sum, s.function(s.activation));
        // What is kept is rounded before the gate, too, as eager rounds it.
        d[(c * oh + h) * ow + w] = value(rounded<S>((a.cached ? value(rounded<S>(v)) : v) * gate));
      }
  }
  return d;
}

template <class S>
std::vector<double> plain_loops(const BlockArgs<S>& a) {
  const BlockShape& s = a.shape;
  const int64_t oh = s.out_height(), ow = s.out_width();
  std::vector<double> y(s.batch * oh * ow * s.out_channels);
  for (int64_t n = 0; n < s.batch; ++n) {
    const S* x = a.x + n * a.x_image;
    const std::vector<double> d = depthwise(a, n);
    for (int64_t h = 0; h < oh; ++h)
      for (int64_t w = 0; w < ow; ++w)
        for (int64_t o = 0; o < s.out_channels; ++o) {
          double sum = a.b_project[o];
          for (int64_t c = 0; c < s.hidden_channels; ++c)
            sum += d[(c * oh + h) * ow + w] * weight(a.w_project, s.hidden_channels, o, c);
          if (!s.activates_sum) sum = activated(sum, s.function(s.out_activation));
          if (s.residual) sum += value(x[h * a.x_row + w * a.x_col + o]);
          if (s.activates_sum) sum = activated(sum, s.function(s.out_activation));
          y[((n * oh + h) * ow + w) * s.out_channels + o] = sum;
        }
  }
  return y;
}

template <class S>
std::vector<double> plain_loops(const PointwiseArgs<S>& a) {
  const PointwiseShape& s = a.shape;
  const int64_t pixels = s.height * s.width;
  std::vector<double> y(s.batch * (s.pool ? 1 : pixels) * s.out_channels);
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const S* x = a.x + n * a.x_image + pixel / s.width * a.x_row + pixel % s.width * a.x_col;
      for (int64_t o = 0; o < s.out_channels; ++o) {
        double sum = a.bias[o];
        for (int64_t c = 0; c < s.in_channels; ++c)
          sum += value(x[c]) * weight(a.weight, s.in_channels, o, c);
        sum = activated(sum, s.function());
        if (s.pool)
          y[n * s.out_channels + o] += sum / double(pixels);
        else
          y[(n * pixels + pixel) * s.out_channels + o] = sum;
      }
    }
  return y;
}

template <class S>
bool same(const std::vector<S>& y, const std::vector<double>& expected, double tolerance,
          double slack = 0) {
  for (size_t i = 0; i < y.size(); ++i) {
    const double limit = tolerance * (1 + std::fabs(expected[i])) + slack;
    if (std::fabs(value(y[i]) - expected[i]) <= limit) continue;
    std::printf("y[%zu] = %g, expected %g; ", i, value(y[i]), expected[i]);
    return false;
  }
  return true;
}

// Kernel, dilation, padding and activations, of every kind.
void choose_options(BlockShape& s) {
  s.kernel = kKernelSizes[between(0, kKernelSizeCount - 1)];
  if (!s.residual) s.column_stride = between(0, 2);
  s.dilation = s.stride == 1 && s.stride_across() == 1 ? between(1, 3) : 1;
  const int64_t most = s.extent() - 1;
  for (int64_t* pad : {&s.pad_left, &s.pad_right, &s.pad_top, &s.pad_bottom}) *pad = most / 2;
  if (!s.residual && between(0, 1)) {
    s.pad_left = between(std::max<int64_t>(0, s.extent() - s.width), most);
    s.pad_top = between(std::max<int64_t>(0, s.extent() - s.height), most);
    s.pad_right = between(0, most);
    s.pad_bottom = between(0, most);
  }
  s.activation = Activation(between(0, kActivations - 1));
  s.expand_activation = Activation(between(0, kActivations - 1));
  s.out_activation = Activation(between(0, kActivations - 1));
  s.negative_slope = double(between(-20, 20)) / 10;
  s.activates_sum = between(0, 1);
}

// Sums of d as the first pass leaves them against those of plain loops.
template <class S>
bool same_sums(const BlockArgs<S>& a, const Plan& plan, double tolerance) {
  const BlockShape& s = a.shape;
  const int64_t pixels = s.out_height() * s.out_width(), hidden = s.hidden_panels() * kPanel;
  const int64_t rows = s.out_height() * plan.tiles_across(s);
  std::vector<Compute<S>> sums(s.batch * s.hidden_channels);
  std::vector<double> expected(sums.size());
  for (int64_t n = 0; n < s.batch; ++n) {
    const std::vector<double> d = depthwise(a, n);
    for (int64_t c = 0; c < s.hidden_channels; ++c) {
      double total = 0;
      for (int64_t r = 0; r < rows; ++r) total += a.pooled[(n * rows + r) * hidden + c];
      sums[n * s.hidden_channels + c] = Compute<S>(total);
      for (int64_t i = 0; i < pixels; ++i) expected[n * s.hidden_channels + c] += d[c * pixels + i];
    }
  }
  return same(sums, expected, tolerance * double(pixels));
}

template <class S>
bool check_block(const cpu::Isa& isa, double tolerance) {
  using T = Compute<S>;
  const cpu::Kernels<S>& kernels = cpu::kernels<S>(isa);
  BlockShape s{};
  s.batch = between(1, 2);
  s.height = between(1, 17);
  s.width = between(1, 17);
  s.stride = between(1, 2);
  s.expand = Expand(between(0, 2));
  const bool stem = s.expand == Expand::kStem;
  s.in_channels = between(1, stem ? 5 : 40);
  s.hidden_channels = s.expand == Expand::kNone ? s.in_channels : between(1, 100);
  if (depth<S> > 1) {  // pairs of them
    s.hidden_channels = round_up(s.hidden_channels, depth<S>);
    if (s.expand == Expand::kNone) s.in_channels = s.hidden_channels;
  }
  s.out_channels = between(0, 1) ? s.in_channels : between(1, 90);
  s.residual = !stem && s.stride == 1 && s.out_channels == s.in_channels && between(0, 1);
  if (between(0, 1)) choose_options(s);
  const bool squeezes = between(0, 2) == 0;
  if (squeezes) s.squeeze_channels = 1;  // which no kernel here reads
  if (stem) {                            // odd and even sizes that come to the expanded ones
    s.image_height = s.height * kStemStride - between(0, 1);
    s.image_width = s.width * kStemStride - between(0, 1);
  }

  const Strides at = stem ? Strides::of_image(s.batch, s.image_height, s.image_width, s.in_channels)
                          : Strides(s.batch, s.height, s.width, s.in_channels);
  const std::vector<S> x = uniform<S>(at.elements, -3, 3);
  const Weights<S> w(s);
  const T nan = std::numeric_limits<T>::quiet_NaN();
  std::vector<S> y(s.batch * s.out_height() * s.out_width() * s.out_channels, rounded<S>(nan));
  const Machine machine = kernels.machine(between(1, 4), between(1, 512) << 10);
  Plan plan = make_plan(s, machine);
  if (between(0, 1)) {
    const int64_t group = between(1, s.hidden_panels()) * kPanel;
    plan = make_plan(s, machine, between(1, s.out_height()), between(1, s.out_width()), group,
                     between(1, ceil_div(s.hidden_channels, group)));
  }
  if (squeezes) plan.caches_depthwise = between(0, 1);
  std::vector<T> scratch(plan.scratch_bytes / sizeof(T));
  std::vector<T> partial(plan.partial_bytes / sizeof(T), nan);
  std::vector<S> kept(plan.cached_elements(s), rounded<S>(nan));
  std::vector<T> pooled(plan.pooled_elements(s), nan);
  const std::vector<T> gate = uniform<T>(s.batch * s.hidden_channels + kPanel, -1, 2);
  BlockArgs<S> args{s,
                    x.data(),
                    at.image,
                    at.row,
                    at.col,
                    at.channel,
                    s.expand == Expand::kNone ? nullptr : w.w_expand.data(),
                    s.expand == Expand::kNone ? nullptr : w.b_expand.data(),
                    w.w_depthwise.data(),
                    s.taps() * kPanel,
                    w.b_depthwise.data(),
                    w.w_project.data(),
                    w.b_project.data(),
                    y.data(),
                    partial.data()};
  const auto run_tiles = [&] {
    for (int64_t task = 0; task < plan.tasks; ++task) {
      std::fill(scratch.begin(), scratch.end(), nan);
      kernels.run_tile(args, plan, task, scratch.data());
    }
  };
  bool good = true;
  if (squeezes) {
    args.cached = plan.caches_depthwise ? kept.data() : nullptr;
    args.pooled = pooled.data();
    args.pass = Pass::kPool;
    run_tiles();
    good = same_sums(args, plan, tolerance);
    args.pass = Pass::kLast;
    args.gate = gate.data();
  }
  run_tiles();
  if (plan.splits > 1)
    for (int64_t row = 0; row < s.batch * s.out_height(); ++row) kernels.add_row(args, plan, row);
  // Now and then an element of d is rounded to the other side, and rarely two under one output.
  double slack = 0;
  if constexpr (depth<S> > 1)
    for (int64_t n = 0; n < s.batch; ++n)
      for (const double d : depthwise(args, n)) slack = std::max(slack, std::fabs(d) * 0x1p-6);
  // The output's activation magnifies that by its slope.
  if (s.out_activation == Activation::kLeakyRelu)
    slack *= std::max(1.0, std::fabs(s.negative_slope));
  if (good && same(y, plain_loops(args), tolerance, slack)) return true;
  std::printf(
      "%s: [%lld, %lld, %lld, %lld] of [%lld, %lld] -> %lld -> %lld, stride %lld, expand %d, "
      "residual %d, kernel %lld, dilation %lld, activations %d, %d and %d, squeeze %lld, keeps %d, "
      "tile %lld x %lld, group %lld, splits %lld\n",
      isa.name, (long long)s.batch, (long long)s.in_channels, (long long)s.height,
      (long long)s.width, (long long)s.image_height, (long long)s.image_width,
      (long long)s.hidden_channels, (long long)s.out_channels, (long long)s.stride, int(s.expand),
      s.residual, (long long)s.kernel, (long long)s.dilation, int(s.expand_activation),
      int(s.activation), int(s.out_activation), (long long)s.squeeze_channels,
      plan.caches_depthwise, (long long)plan.tile_rows, (long long)plan.tile_cols,
      (long long)plan.group, (long long)plan.splits);
  return false;
}

template <class S>
bool check_pointwise(const cpu::Isa& isa, double tolerance) {
  using T = Compute<S>;
  PointwiseShape s{};
  s.batch = between(1, 3);
  s.height = between(1, 24);
  s.width = between(1, 24);
  s.in_channels = between(1, 40);
  s.out_channels = between(1, 150);
  s.activation = Activation(between(0, kActivations - 1));
  s.negative_slope = double(between(-20, 20)) / 10;
  s.pool = between(0, 1);
  const Strides at(s.batch, s.height, s.width, s.in_channels);
  const std::vector<S> x = uniform<S>(at.elements, -3, 3);
  const std::vector<S> weight =
      uniform<S>(packed_elements<S>(s.out_channels, s.in_channels), -1, 1);
  const std::vector<T> bias = uniform<T>(s.panels() * kPanel, -2, 8);
  const T nan = std::numeric_limits<T>::quiet_NaN();
  std::vector<S> y(s.batch * (s.pool ? 1 : s.height * s.width) * s.out_channels, rounded<S>(nan));
  std::vector<T> aside(depth<S> > 1 && s.pool ? y.size() : 0, nan);
  T* sums = aside.data();
  if constexpr (depth<S> == 1) sums = y.data();
  const PointwiseArgs<S> args{s,      between(1, s.panels()), x.data(),    at.image, at.row,
                              at.col, weight.data(),          bias.data(), y.data(), sums};
  for (int64_t task = 0; task < s.batch * args.parts; ++task)
    cpu::kernels<S>(isa).run_pointwise(args, task);
  if (same(y, plain_loops(args), tolerance)) return true;
  std::printf("%s: [%lld, %lld, %lld, %lld] -> %lld, activation %d, pool %d, parts %lld\n",
              isa.name, (long long)s.batch, (long long)s.in_channels, (long long)s.height,
              (long long)s.width, (long long)s.out_channels, int(s.activation), s.pool,
              (long long)args.parts);
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 200;
  g_random.seed(argc > 2 ? std::atoi(argv[2]) : 0);
  bool good = true;
  for (const cpu::Isa& isa : cpu::compiled()) {
    if (!isa.supported()) continue;
    int passed = 0;
    for (int i = 0; i < cases; ++i) {
      passed += check_block<float>(isa, 2e-4);
      passed += check_block<double>(isa, 1e-12);
      passed += check_pointwise<float>(isa, 2e-4);
      passed += check_pointwise<double>(isa, 1e-12);
      // A result's rounding.
      passed += check_block<BFloat16>(isa, 0.004);
      passed += check_pointwise<BFloat16>(isa, 0.004);
    }
    std::printf("%s: %d of %d\n", isa.name, passed, 6 * cases);
    good = good && passed == 6 * cases;
  }
  return good ? 0 : 1;
}
