// Kernels of avx512_vnni.cpp, its intrinsics emulated, against portable.cpp's on random blocks and products: the
// same bytes, since both read weights of one layout. Prints how many were equal.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/cpu/int8/args.h"

namespace {

using namespace mnv2_fused;
using namespace mnv2_fused::cpu;
using int8::BlockCall, int8::Kernels, int8::ProductArgs, int8::Scratch, int8::Stage;

std::mt19937 generator{1};
int64_t between(int64_t least, int64_t most) {
  return std::uniform_int_distribution<int64_t>(least, most)(generator);
}

template <class T>
std::vector<T> random_values(int64_t count, double least, double most) {
  std::uniform_real_distribution<double> of(least, most);
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) value = T(of(generator));
  return values;
}

// A stage with what it points to.
struct OwnedStage {
  std::vector<int8_t> weight;
  std::vector<int32_t> bias;
  std::vector<float> multiplier, low, high, scale;
  Stage stage;

  OwnedStage(int64_t weights, int64_t channels, double terms)
      : weight(random_values<int8_t>(weights, -127, 127)),
        bias(random_values<int32_t>(round_up(channels, kPanel), -3000, 3000)),
        scale(random_values<float>(round_up(channels, kPanel), 5, 40)) {
    const bool clips = between(0, 2) > 0;
    const double around = (clips ? 100.0 : 4.0) / (terms * 10000.0 + 1);
    const auto zero = int32_t(between(0, 120));
    multiplier = random_values<float>(round_up(channels, kPanel), around / 2, around);
    low.assign(multiplier.size(), float(-zero));
    high.assign(multiplier.size(), float(255 - zero));
    const Activation function = between(0, 1) ? Activation::kHardswish : Activation::kSilu;
    stage = {weight.data(),
             bias.data(),
             multiplier.data(),
             low.data(),
             high.data(),
             scale.data(),
             zero,
             {clips ? Activation::kIdentity : function, kNegativeSlope}};
  }
};

std::vector<uint8_t> result(const Kernels& k, BlockCall call, const Plan& plan) {
  std::vector<uint8_t> y(size_t(call.shape.out_elements()), 7);
  std::vector<char> scratch(size_t(Scratch(call.shape, plan, k.depth, k.element).total()), 85);
  call.y = y.data();
  for (int64_t task = 0; task < plan.tasks; ++task) k.run_tile(call, plan, task, scratch.data());
  return y;
}

bool same_block(const Kernels& a, const Kernels& b) {
  const auto expand = Expand(between(0, 2));
  const int64_t in = expand == Expand::kStem ? between(1, 4) : between(1, 40);
  const int64_t hidden = expand == Expand::kNone ? in : between(1, 100);
  BlockShape s{between(1, 2),  between(1, 20), between(1, 20), in,   hidden,
               between(1, 40), between(1, 2),  expand,         false};
  s.kernel = kKernelSizes[between(0, kKernelSizeCount - 1)];
  s.pad_left = s.pad_right = s.pad_top = s.pad_bottom = s.kernel / 2;
  s.image_height = s.height * (expand == Expand::kStem ? 2 : 1);
  s.image_width = s.width * (expand == Expand::kStem ? 2 : 1);
  if (expand != Expand::kStem && s.stride == 1 && between(0, 1)) {
    s.residual = true;
    s.out_channels = in;
  }
  const Machine machine{1, between(1, 2) * 8, 4, 1, 4, 512 << 10};
  const Plan p = make_plan(s, machine);
  const Plan plan =
      make_plan(s, machine, between(1, s.out_height()), between(1, s.out_width()), p.group, 1);
  const int64_t channels = s.hidden_panels() * kPanel, terms = Scratch::terms(s);
  OwnedStage first(channels * round_up(terms, 4), channels, double(terms));
  OwnedStage second(channels * s.kernel * ceil_div(s.kernel, 4) * 4, channels, double(s.taps()));
  OwnedStage third(round_up(s.out_channels, kPanel) * channels, s.out_channels, double(hidden));
  const auto x = random_values<uint8_t>(s.batch * s.image_height * s.image_width * in, 0, 255.9);
  BlockCall call{};
  call.shape = s;
  call.x = x.data();
  call.x_image = s.image_height * s.image_width * in;
  call.x_row = s.image_width * in;
  call.x_col = in;
  call.x_zero = int32_t(between(0, 255));
  call.residual_scale = 0.8f;
  call.expand = first.stage;
  call.depthwise = second.stage;
  call.project = third.stage;
  return result(a, call, plan) == result(b, call, plan);
}

bool same_product(const Kernels& a, const Kernels& b) {
  const int64_t rows = between(1, 70), in = between(1, 100), out = between(1, 60);
  OwnedStage owned(round_up(in, kPanel) * round_up(out, kPanel), out, double(in));
  const auto x = random_values<uint8_t>(rows * in, 0, 255.9);
  std::vector<char> scratch(
      size_t(int8::kProductRows * (round_up(in, kPanel) + round_up(out, kPanel) * 4) + 128));
  const auto run = [&](const Kernels& k, int kind) {
    std::vector<uint8_t> y(size_t(rows * out * 4 + 64), 7);
    ProductArgs args{x.data(), in, out, owned.stage, out};
    if (kind == 0) args.y = y.data();
    if (kind == 1) args.real = reinterpret_cast<float*>(y.data());
    std::vector<int32_t> sums(size_t(round_up(out, kPanel)), 3);
    if (kind == 2) args.sums = sums.data();
    k.run_product(args, 0, rows, scratch.data());
    y.insert(y.end(), reinterpret_cast<uint8_t*>(sums.data()),
             reinterpret_cast<uint8_t*>(sums.data() + out));
    return y;
  };
  for (int kind = 0; kind < 3; ++kind)
    if (run(a, kind) != run(b, kind)) return false;
  return true;
}

bool same_rest(const Kernels& a, const Kernels& b) {
  const int64_t cols = between(1, 90), channels = between(1, 9), panels = between(1, 5) * kPanel;
  const auto x = random_values<float>(cols * channels, -3, 3);
  const auto v = random_values<float>(panels, -90, 90), scale = random_values<float>(panels, 0, 2);
  const auto sums = random_values<int32_t>(panels, -9000, 9000);
  const auto run = [&](const Kernels& k) {
    std::vector<uint8_t> all(size_t(cols * channels + panels * 9), 7);
    uint8_t* const at = all.data() + cols * channels;
    k.quantize_row(x.data(), cols, channels, channels, 1, 40.0f, 90, all.data());
    k.mean(sums.data(), panels, scale.data(), 49, 20, at);
    std::vector<float> factors(size_t(2 * panels));
    k.gate(v.data(), panels, Gate::kSigmoid, scale.data(), factors.data());
    k.gate(v.data(), panels, Gate::kHardsigmoid, scale.data(), factors.data() + panels);
    std::memcpy(at + panels, factors.data(), factors.size() * sizeof(float));
    return all;
  };
  return run(a) == run(b);
}

}  // namespace

int main() {
  int equal = 0;
  constexpr int kChecks = 100;
  for (int i = 0; i < kChecks; ++i) {
    const Kernels &a = int8::avx512_vnni::kKernels, &b = int8::portable::kKernels;
    equal += same_block(a, b) && same_product(a, b) && same_rest(a, b);
  }
  std::printf("%d of %d equal\n", equal, kChecks);
  return equal == kChecks ? 0 : 1;
}
