// The CPU kernel against plain loops in double, without torch, so that it can run under sanitizers.
// Every buffer is its own heap allocation of the exact size; y and the scratch start as NaN.
//   cpu_kernel_check CASES SEED    prints one line per instruction set; exit status 1 on a mismatch
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "../csrc/cpu/isa.h"

using namespace mnv2_fused;

namespace {

std::mt19937_64 g_random;

int64_t between(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(g_random);
}

template <class T>
std::vector<T> uniform(int64_t count, double low, double high) {
  std::uniform_real_distribution<double> d(low, high);
  std::vector<T> v(count);
  for (T& e : v) e = T(d(g_random));
  return v;
}

double relu6(double v) { return std::fmin(std::fmax(v, 0.0), 6.0); }

// Packed weights and biases; padding holds zeros, as mnv2_fused.fold writes them.
template <class T>
struct Weights {
  std::vector<T> w_expand, b_expand, w_depthwise, b_depthwise, w_project, b_project;

  explicit Weights(const BlockShape& s) {
    const int64_t panels = s.hidden_panels(), out_panels = ceil_div(s.out_channels, kPanel);
    w_expand = uniform<T>(panels * s.in_channels * kPanel, -1, 1);
    b_expand = uniform<T>(panels * kPanel, -2, 8);
    w_depthwise = uniform<T>(panels * 9 * kPanel, -1, 1);
    b_depthwise = uniform<T>(panels * kPanel, -2, 2);
    w_project = uniform<T>(out_panels * s.hidden_channels * kPanel, -1, 1);
    b_project = uniform<T>(s.out_channels, -1, 1);
  }
};

template <class T>
std::vector<double> plain_loops(const BlockArgs<T>& a) {
  const BlockShape& s = a.shape;
  const int64_t oh = s.out_height(), ow = s.out_width();
  std::vector<double> y(s.batch * oh * ow * s.out_channels);
  std::vector<double> e(s.height * s.width), d(s.hidden_channels * oh * ow);
  for (int64_t n = 0; n < s.batch; ++n) {
    const T* x = a.x + n * a.x_image;
    for (int64_t c = 0; c < s.hidden_channels; ++c) {
      const int64_t panel = c / kPanel, lane = c % kPanel;
      for (int64_t h = 0; h < s.height; ++h)
        for (int64_t w = 0; w < s.width; ++w) {
          const T* pixel = x + h * a.x_row + w * a.x_col;
          double sum = s.expand ? double(a.b_expand[c]) : double(pixel[c]);
          if (s.expand) {
            for (int64_t i = 0; i < s.in_channels; ++i)
              sum += double(pixel[i]) *
                     double(a.w_expand[(panel * s.in_channels + i) * kPanel + lane]);
            sum = relu6(sum);
          }
          e[h * s.width + w] = sum;
        }
      for (int64_t h = 0; h < oh; ++h)
        for (int64_t w = 0; w < ow; ++w) {
          double sum = a.b_depthwise[c];
          for (int64_t k = 0; k < 9; ++k) {
            const int64_t ih = h * s.stride + k / 3 - 1, iw = w * s.stride + k % 3 - 1;
            if (ih < 0 || ih >= s.height || iw < 0 || iw >= s.width) continue;
            sum += e[ih * s.width + iw] * double(a.w_depthwise[(panel * 9 + k) * kPanel + lane]);
          }
          d[(c * oh + h) * ow + w] = relu6(sum);
        }
    }
    for (int64_t h = 0; h < oh; ++h)
      for (int64_t w = 0; w < ow; ++w)
        for (int64_t o = 0; o < s.out_channels; ++o) {
          double sum = a.b_project[o];
          if (s.residual) sum += double(x[h * a.x_row + w * a.x_col + o]);
          for (int64_t c = 0; c < s.hidden_channels; ++c)
            sum += d[(c * oh + h) * ow + w] *
                   double(a.w_project[(o / kPanel * s.hidden_channels + c) * kPanel + o % kPanel]);
          y[((n * oh + h) * ow + w) * s.out_channels + o] = sum;
        }
  }
  return y;
}

template <class T>
bool check(const cpu::Isa& isa, cpu::RunTile<T> run_tile, cpu::AddRow<T> add_row,
           double tolerance) {
  BlockShape s{};
  s.batch = between(1, 2);
  s.height = between(1, 17);
  s.width = between(1, 17);
  s.stride = between(1, 2);
  s.in_channels = between(1, 40);
  s.expand = between(0, 3) != 0;
  s.hidden_channels = s.expand ? between(1, 100) : s.in_channels;
  s.out_channels = between(0, 1) ? s.in_channels : between(1, 90);
  s.residual = s.stride == 1 && s.out_channels == s.in_channels && between(0, 1);

  // A window of a larger image, so that x has gaps between its pixels and rows.
  const int64_t gap = between(0, 3), wider = between(0, 2);
  const int64_t col = s.in_channels + gap, row = col * (s.width + wider), image = row * s.height;
  const int64_t last = (s.batch - 1) * image + (s.height - 1) * row + (s.width - 1) * col;
  const std::vector<T> x = uniform<T>(last + s.in_channels, -3, 3);
  const Weights<T> w(s);
  const T nan = std::numeric_limits<T>::quiet_NaN();
  std::vector<T> y(s.batch * s.out_height() * s.out_width() * s.out_channels, nan);
  const Machine machine = cpu::machine_for(isa, between(1, 4), sizeof(T), between(1, 512) << 10);
  Plan plan = make_plan(s, machine);
  if (between(0, 1)) {
    const int64_t group = between(1, s.hidden_panels()) * kPanel;
    plan = make_plan(s, machine, between(1, s.out_height()), between(1, s.out_width()), group,
                     between(1, ceil_div(s.hidden_channels, group)));
  }
  std::vector<T> scratch(plan.scratch_bytes / sizeof(T));
  std::vector<T> partial(plan.partial_bytes / sizeof(T), nan);
  const BlockArgs<T> args{s,
                          x.data(),
                          image,
                          row,
                          col,
                          s.expand ? w.w_expand.data() : nullptr,
                          s.expand ? w.b_expand.data() : nullptr,
                          w.w_depthwise.data(),
                          w.b_depthwise.data(),
                          w.w_project.data(),
                          w.b_project.data(),
                          y.data(),
                          partial.data()};
  for (int64_t task = 0; task < plan.tasks; ++task) {
    std::fill(scratch.begin(), scratch.end(), nan);
    run_tile(args, plan, task, scratch.data());
  }
  if (plan.splits > 1)
    for (int64_t row = 0; row < s.batch * s.out_height(); ++row) add_row(args, plan, row);
  const std::vector<double> expected = plain_loops(args);
  for (size_t i = 0; i < y.size(); ++i) {
    if (std::fabs(double(y[i]) - expected[i]) <= tolerance * (1 + std::fabs(expected[i]))) continue;
    std::printf(
        "%s: y[%zu] = %g, expected %g; x [%lld, %lld, %lld, %lld] -> %lld -> %lld, stride "
        "%lld, expand %d, residual %d, tile %lld x %lld, group %lld, splits %lld\n",
        isa.name, i, double(y[i]), expected[i], (long long)s.batch, (long long)s.in_channels,
        (long long)s.height, (long long)s.width, (long long)s.hidden_channels,
        (long long)s.out_channels, (long long)s.stride, s.expand, s.residual,
        (long long)plan.tile_rows, (long long)plan.tile_cols, (long long)plan.group,
        (long long)plan.splits);
    return false;
  }
  return true;
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
      passed += check<float>(isa, isa.run_f32, isa.add_f32, 2e-4);
      passed += check<double>(isa, isa.run_f64, isa.add_f64, 1e-12);
    }
    std::printf("%s: %d of %d\n", isa.name, passed, 2 * cases);
    good = good && passed == 2 * cases;
  }
  return good ? 0 : 1;
}
