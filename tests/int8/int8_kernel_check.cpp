// Kernels on 8-bit integers against portable.cpp's on random blocks and products: the same bytes, since all
// read weights of one layout. Without torch, and with buffers of exact sizes, so that it can run under
// sanitizers. Checks the instruction sets that are linked and can run here.
//   int8_kernel_check [checks] [seed]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#ifdef MNV2_SCRATCH_GAP
#include <sanitizer/asan_interface.h>
#endif
#include "../../csrc/cpu/int8/args.h"
#ifdef MNV2_NEON_DOTS
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace mnv2_fused::cpu::int8 {
#define LINKED_PERHAPS(isa)                            \
  namespace isa {                                      \
  extern const Kernels kKernels __attribute__((weak)); \
  }
LINKED_PERHAPS(emulated_avx512)
LINKED_PERHAPS(avx512_vnni)
LINKED_PERHAPS(avx2_vnni)
LINKED_PERHAPS(avx2)
LINKED_PERHAPS(neon_i8mm)
LINKED_PERHAPS(neon_dotprod)
#undef LINKED_PERHAPS
}  // namespace mnv2_fused::cpu::int8

namespace {

using namespace mnv2_fused;
using namespace mnv2_fused::cpu;
using int8::BlockCall, int8::Kernels, int8::ProductArgs, int8::Scratch, int8::Stage;

constexpr int64_t kReadBehind = 16;  // bytes of x behind its end that products may read

std::mt19937 generator;
int64_t between(int64_t least, int64_t most) {
  return std::uniform_int_distribution<int64_t>(least, most)(generator);
}
bool one_in(int64_t n) { return between(1, n) == 1; }

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
      : weight(random_values<int8_t>(weights, -127.9, 127.9)),
        bias(random_values<int32_t>(round_up(channels, kPanel), -3000, 3000)),
        scale(random_values<float>(round_up(channels, kPanel), 5, 40)) {
    const bool bounded = !one_in(3), saturates = bounded && one_in(2);
    const double around = (bounded ? 100.0 : 4.0) / (terms * 10000.0 + 1);
    const auto zero = int32_t(between(0, 120));
    multiplier = random_values<float>(round_up(channels, kPanel), around / 2, around);
    // Sums that pass 16 bits before they are bounded, of some channels.
    for (float& m : multiplier) m *= one_in(8) ? 3000.0f : 1.0f;
    const int64_t narrower = saturates ? 0 : 40;
    for (size_t c = 0; c < multiplier.size(); ++c) {
      low.push_back(float(-zero + between(0, narrower)));
      high.push_back(float(255 - zero - between(0, narrower)));
    }
    const Activation function = one_in(2) ? Activation::kHardswish : Activation::kSilu;
    stage = {weight.data(),
             bias.data(),
             multiplier.data(),
             low.data(),
             high.data(),
             scale.data(),
             zero,
             {bounded ? Activation::kIdentity : function, kNegativeSlope},
             saturates};
  }
};

// One worker's scratch. What lies in it before is another value in every run.
class Room {
 public:
  Room(int64_t bytes, std::vector<int64_t> gaps) : gaps_(std::move(gaps)), memory_(size_t(bytes)) {
    static int fill = 0;
    std::fill(memory_.begin(), memory_.end(), char(fill = (fill + 85) % 256));
#ifdef MNV2_SCRATCH_GAP
    for (const int64_t end : gaps_)
      __asan_poison_memory_region(data() + end - MNV2_SCRATCH_GAP, MNV2_SCRATCH_GAP);
  }
  ~Room() {
    __asan_unpoison_memory_region(data(), memory_.size());
#endif
  }
  Room(const Room&) = delete;
  char* data() { return memory_.data(); }

 private:
  std::vector<int64_t> gaps_;
  std::vector<char> memory_;
};

// Both passes of a squeeze-and-excite, or the one there is. The result: y, and the pool's sums.
std::vector<uint8_t> result(const Kernels& k, BlockCall call, const Plan& plan, bool caches) {
  const BlockShape& s = call.shape;
  const int64_t hidden = s.hidden_panels() * kPanel;
  const Scratch parts(s, plan, k.element);
  std::vector<int64_t> ends;
  for (const int64_t part : {parts.ring, parts.padding, parts.sums, parts.depthwise, parts.row})
    ends.push_back((ends.empty() ? 0 : ends.back()) + part);
  std::vector<uint8_t> y(size_t(s.out_elements()), 7);
  std::vector<int32_t> pooled(size_t(plan.tasks * hidden), 7);
  std::vector<char> cached(size_t(s.batch * s.out_height() * s.out_width() * hidden * k.element),
                           7);
  call.y = y.data();
  const auto run = [&] {
    for (int64_t task = 0; task < plan.tasks; ++task) {
      Room scratch(parts.total(), ends);
      k.run_tile(call, plan, task, scratch.data());
    }
  };
  if (call.factors) {
    call.pass = Pass::kPool;
    call.pooled = pooled.data();
    call.cached = caches ? cached.data() : nullptr;
    run();
    call.pass = Pass::kLast;
  }
  run();
  const auto* const sums = reinterpret_cast<const uint8_t*>(pooled.data());
  y.insert(y.end(), sums, sums + pooled.size() * sizeof(int32_t));
  return y;
}

// A block that the kernels take.
BlockShape random_shape() {
  for (;;) {
    const auto expand = Expand(between(0, 2));
    const int64_t in = expand == Expand::kStem ? between(1, 16) : between(1, 40);
    const int64_t hidden = expand == Expand::kNone ? in : between(1, 100);
    BlockShape s{between(1, 2),  between(1, 20), between(1, 20), in,   hidden,
                 between(1, 40), between(1, 2),  expand,         false};
    s.column_stride = between(0, 2);
    s.kernel = kKernelSizes[between(0, kKernelSizeCount - 1)];
    if (s.stride == 1 && s.stride_across() == 1 && one_in(3)) s.dilation = between(2, 6);
    const int64_t around = s.extent() / 2, most = s.extent() - 1;
    s.pad_left = s.pad_right = s.pad_top = s.pad_bottom = around;
    if (one_in(2)) {
      s.pad_left = between(0, most);
      s.pad_top = between(0, most);
      s.pad_right = one_in(2) ? most - s.pad_left : between(0, most);
      s.pad_bottom = one_in(2) ? most - s.pad_top : between(0, most);
    }
    const bool stem = expand == Expand::kStem;
    s.image_height = stem ? 2 * s.height - between(0, 1) : s.height;
    s.image_width = stem ? 2 * s.width - between(0, 1) : s.width;
    s.squeeze_channels = one_in(3) ? 8 : 0;
    if (one_in(2)) {
      BlockShape with = s;
      with.residual = true;
      with.out_channels = in;
      if (unsupported(with).empty()) return with;
    }
    if (unsupported(s).empty()) return s;
  }
}

bool same_block(const Kernels& a, const Kernels& b) {
  const BlockShape s = random_shape();
  const Machine machine{1, between(1, 2) * 8, 4, 1, 4, 512 << 10};
  const Plan p = make_plan(s, machine);
  const bool own = one_in(3);
  Plan plan = make_plan(s, machine, own ? p.tile_rows : between(1, s.out_height()),
                        own ? p.tile_cols : between(1, s.out_width()),
                        own ? p.group : between(1, s.hidden_panels()) * kPanel, 1);
  // Plans of images so small have one band.
  if (!own) plan.band_rows = between(1, plan.tile_rows);
  const int64_t channels = s.hidden_panels() * kPanel, terms = Scratch::terms(s);
  const int64_t dots = int8::phases(s) * int8::row_dots(s.kernel, s.dilation);
  OwnedStage first(channels * round_up(terms, int8::kQuad), channels, double(terms));
  OwnedStage second(channels * s.kernel * dots * int8::kQuad, channels, double(s.taps()));
  OwnedStage third(round_up(s.out_channels, kPanel) * channels, s.out_channels, double(channels));
  const int64_t behind = s.expand == Expand::kPointwise ? kReadBehind : 0;
  const auto x = random_values<uint8_t>(
      s.batch * s.image_height * s.image_width * s.in_channels + behind, 0, 255.9);
  const auto factors = random_values<float>(s.batch * channels, 0, 1.5);
  BlockCall call{};
  call.shape = s;
  call.x = x.data();
  call.x_image = s.image_height * s.image_width * s.in_channels;
  call.x_row = s.image_width * s.in_channels;
  call.x_col = s.in_channels;
  call.x_zero = int32_t(between(0, 255));
  call.residual_scale = 0.8f;
  call.expand = first.stage;
  call.depthwise = second.stage;
  call.project = third.stage;
  call.factors = s.squeeze_channels > 0 ? factors.data() : nullptr;
  const auto expected = result(b, call, plan, false);
  if (call.factors && result(a, call, plan, true) != expected) return false;
  return result(a, call, plan, false) == expected;
}

bool same_product(const Kernels& a, const Kernels& b) {
  const int64_t rows = between(1, 70), in = between(1, 100), out = between(1, 60);
  const int64_t pitch = out + between(0, 3);
  OwnedStage owned(round_up(in, kPanel) * round_up(out, kPanel), out, double(in));
  const auto x = random_values<uint8_t>(rows * in + kReadBehind, 0, 255.9);
  const auto run = [&](const Kernels& k, int kind) {
    const int64_t together = std::min(rows, int8::kProductRows);
    Room scratch(round_up(int8::kProductRows * round_up(in, kPanel) * k.element, 64) +
                     together * round_up(out, kPanel) * 4,
                 {});
    const int64_t elements = (rows - 1) * pitch + out;
    std::vector<uint8_t> y(size_t(kind == 0 ? elements : 0), 7);
    std::vector<float> real(size_t(kind == 1 ? elements : 0), 7);
    std::vector<int32_t> sums(size_t(kind == 2 ? round_up(out, kPanel) : 0), 3);
    ProductArgs args{x.data(), in, out, owned.stage, pitch};
    if (kind == 0) args.y = y.data();
    if (kind == 1) args.real = real.data();
    if (kind == 2) args.sums = sums.data();
    k.run_product(args, 0, rows, scratch.data());
    if (kind == 2) sums.resize(size_t(out));
    return std::make_tuple(y, real, sums);
  };
  for (int kind = 0; kind < 3; ++kind)
    if (run(a, kind) != run(b, kind)) return false;
  return true;
}

// Pixels of x in every order that quantize_row has code for.
bool same_quantized(const Kernels& a, const Kernels& b) {
  const int64_t cols = between(1, 90), channels = one_in(2) ? 3 : between(1, 9);
  const int64_t order = between(0, 3), plane = cols + between(0, 2);
  const int64_t col_step = order == 0 ? channels : order == 1 ? channels + 2 : order == 2 ? 1 : 2;
  const int64_t channel_step = order < 2 ? 1 : order * plane;
  const auto x =
      random_values<float>((cols - 1) * col_step + (channels - 1) * channel_step + 1, -3, 3);
  const auto run = [&](const Kernels& k) {
    std::vector<uint8_t> q(size_t(cols * channels), 7);
    k.quantize_row(x.data(), cols, channels, col_step, channel_step, 40.0f, 90, q.data());
    return q;
  };
  return run(a) == run(b);
}

bool same_gate(const Kernels& a, const Kernels& b) {
  const int64_t count = between(1, 80), whole = round_up(count, kPanel);
  const auto v = random_values<float>(whole, -90, 90), scale = random_values<float>(whole, 0, 2);
  const auto sums = random_values<int32_t>(whole, -9000, 9000);
  const auto run = [&](const Kernels& k) {
    std::vector<uint8_t> means(size_t(count), 7);
    k.mean(sums.data(), count, scale.data(), 49, 20, means.data());
    std::vector<float> soft(size_t(whole), 7), hard = soft;
    k.gate(v.data(), whole, Gate::kSigmoid, scale.data(), soft.data());
    k.gate(v.data(), whole, Gate::kHardsigmoid, scale.data(), hard.data());
    return std::make_tuple(means, soft, hard);
  };
  return run(a) == run(b);
}

struct Checked {
  const char* isa;
  const Kernels* kernels;
  bool runs;
};

}  // namespace

int main(int argc, char** argv) {
  const int checks = argc > 1 ? std::atoi(argv[1]) : 100;
  const auto seed = argc > 2 ? unsigned(std::atoi(argv[2])) : 1u;
  std::vector<Checked> all{{"portable", &int8::portable::kKernels, true}};
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  all.push_back({"emulated_avx512", &int8::emulated_avx512::kKernels, avx2});
  all.push_back({"avx2", &int8::avx2::kKernels, avx2});
  all.push_back(
      {"avx2_vnni", &int8::avx2_vnni::kKernels, avx2 && __builtin_cpu_supports("avxvnni")});
  all.push_back({"avx512_vnni", &int8::avx512_vnni::kKernels,
                 avx512 && __builtin_cpu_supports("avx512vnni")});
#elif defined(MNV2_NEON_DOTS)
  all.push_back(
      {"neon_i8mm", &int8::neon_i8mm::kKernels, (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0});
  all.push_back(
      {"neon_dotprod", &int8::neon_dotprod::kKernels, (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0});
#endif
  bool same = true;
  for (const auto& [isa, kernels, runs] : all) {
    if (!kernels || !runs) continue;
    generator.seed(seed);
    int equal = 0;
    for (int i = 0; i < checks; ++i) {
      const Kernels &a = *kernels, &b = int8::portable::kKernels;
      const bool of_block = same_block(a, b), of_product = same_product(a, b);
      equal += of_block && of_product && same_quantized(a, b) && same_gate(a, b);
    }
    std::printf("%s: %d of %d equal\n", isa, equal, checks);
    same = same && equal == checks;
  }
  return same ? 0 : 1;
}
