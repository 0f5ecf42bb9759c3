#include "plan.h"

#include <algorithm>
#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "../block.h"
#include "launch.h"

namespace mnv2_fused::cuda {
namespace {

// What a processor does in a cycle: bytes of shared memory, and by generation multiply-adds of float
// and, of half precision on tensor cores by mma.sync, with sums in float. The last are published
// rates, of 9.0 the 62 % of them that mma.sync reaches (wgmma alone has them all).
constexpr double kSharedBytes = 128;
struct Rates {
  int64_t capability;
  double fma, mma;
};
constexpr Rates kRates[] = {{120, 128, 512}, {100, 128, 1024}, {90, 128, 1270},
                            {86, 128, 512},  {80, 64, 1024},   {75, 64, 512}};
constexpr int64_t kRegisters = 65536, kSchedulers = 4;
// Warp instructions a scheduler issues in a cycle: what one warp leaves between its own, and at best.
constexpr double kIssuedAlone = 0.3, kIssued = 0.8;
// Of shared memory's and the tensor cores' rates, what is reached in a mix.
constexpr double kReached = 0.85;
// Until x is there, until a barrier is passed, until a kernel that follows another starts.
constexpr double kFirstSeconds = 1.2e-6, kBarrierCycles = 40, kLaunchSeconds = 1.5e-6;
// From L2 for each processor, a cycle.
constexpr double kL2Bytes = 40;

// More would leave the second kernel with most of the work.
constexpr int64_t kMostSplits = 64;
constexpr int64_t kMostGroupPanels = 4;

Rates rates_of(const Gpu& gpu) {
  for (const Rates& r : kRates)
    if (gpu.capability >= r.capability) return r;
  return kRates[std::size(kRates) - 1];
}

// Outputs of one of the convolutions that a dilated one is made of, in a row or column, and how many
// of those there are.
int64_t apart(int64_t out, const BlockShape& s) { return ceil_div(out, s.dilation); }
int64_t phases(int64_t out, const BlockShape& s) { return std::min(out, s.dilation); }

// Of all tiles in a row (or column) of the image, the expanded pixels in the image.
int64_t expanded(const BlockShape& s, int64_t out, int64_t tile, int64_t size, int64_t pad) {
  int64_t sum = 0;
  for (int64_t phase = 0; phase < phases(out, s); ++phase) {
    const int64_t before = phase * s.stride - pad;
    const int64_t least = before < 0 ? ceil_div(-before, s.dilation) : 0;
    const int64_t end = ceil_div(size - before, s.dilation);
    for (int64_t at = 0; at < apart(out, s); at += tile)
      sum += std::max<int64_t>(
          std::min((at + tile - 1) * s.stride + s.kernel, end) - std::max(at * s.stride, least), 0);
  }
  return sum;
}

struct Choice {
  int64_t images, tile_rows, tile_cols;
  Variant variant;
  int64_t group_panels, splits;
};

int64_t strips(const Choice& c) {
  return c.images * ceil_div(c.tile_rows, 2 * c.variant.tiles) * c.tile_cols;
}

// Elements of x under this many pixels of e, about.
double x_elements(const BlockShape& s, double pixels) {
  const double each = s.expand == Expand::kStem ? double(kStemStride * kStemStride) : 1;
  return pixels * each * double(s.in_channels);
}

int64_t shared_bytes(const BlockShape& s, Precision precision, const Choice& c) {
  return shared_layout(element_size(precision), expand_panels(s), c.variant.out_panels, s.stride,
                       2 * c.variant.tiles, c.images, c.tile_rows, c.tile_cols, c.group_panels,
                       apart(s.height, s), apart(s.width, s), s.kernel, s.expand == Expand::kStem)
      .bytes;
}

// What a thread block asks of its processor.
struct Work {
  double instructions = 0;  // of the warp that has most
  double issued = 0;        // of all warps
  double fma = 0, mma = 0;  // multiply-adds
  double shared = 0;        // bytes
};

// Counted in the machine code of sm_90 where loops are, and rounded.
// out: panels of outputs, 0 in the first pass of a squeeze-and-excite.
Work work_of(const BlockShape& s, Precision precision, const Choice& c, double pixels,
             int64_t warps, double out) {
  const double element = double(element_size(precision)), quad = 4 * element * kLanes;
  const bool wide = element == 4, exact = precision == Precision::kFloat32;
  const Variant& v = c.variant;
  const double panels = double(ceil_div(s.hidden_panels(), c.splits));
  const double tiles = pixels / 16, rows = 2.0 * double(v.tiles);
  const double rounds = double(ceil_div(ceil_div(int64_t(pixels), 16), warps));
  const double in = double(expand_panels(s)), kernel = double(s.kernel), taps = double(s.taps());
  Work w;
  // Products of 16 x 16 x 16: instructions and bytes from shared memory for `tiles` of them that
  // share their weights.
  const auto product = [&](double shared_by) {
    const double each = exact  ? 256 + 16 / shared_by
                        : wide ? 12 + 10 / shared_by
                               : 2 + 1 / shared_by;
    return std::array<double, 2>{each, exact ? 16 * 512 : kLanes * 8 * element / shared_by};
  };
  if (s.expand != Expand::kNone) {
    const auto [instructions, bytes] = product(double(v.expand_tiles));
    const double loads = 3.0 / double(v.expand_panels);
    const double each = in * (instructions + loads) + 30 + 14 / double(v.expand_panels);
    w.instructions += rounds * panels * each;
    w.issued += tiles * panels * each;
    w.shared += tiles * panels * (in * (bytes + 2 * quad / double(v.expand_panels)) + 2 * quad);
    (exact ? w.fma : w.mma) += tiles * panels * in * 4096;
  } else {
    const double each = pixels * 2 * element / 4 / kLanes * 20;  // copies, with their addresses
    w.instructions += panels * each / double(warps);
    w.issued += panels * each;
    w.shared += panels * pixels * 16 * element;
  }
  const double lines = (rows - 1) * double(s.stride) + kernel;
  // On tensor cores 12 products for two rows, or 30 of five taps; or widened loads and multiply-adds of
  // float.
  const double depthwise = wide            ? kernel * lines + (8 + 4 * taps) * rows + 40
                           : s.kernel == 5 ? kernel * lines + 25 * rows + 95
                                           : kernel * lines + 16 * rows + 50;
  const auto [instructions, bytes] = product(double(v.tiles));
  const double project = out * double(v.tiles) * instructions;
  w.instructions += panels * (depthwise + project);
  w.issued += double(warps) * panels * (depthwise + project);
  w.shared += double(warps) * panels *
              (kernel * lines * quad + kernel / 3 * 8 * 128 + out * double(v.tiles) * bytes);
  (wide ? w.fma : w.mma) += double(warps) * panels * rows * taps * (wide ? 4 * kLanes : 1024);
  (exact ? w.fma : w.mma) += double(warps) * panels * out * double(v.tiles) * 4096;
  // A panel's weights, 16 bytes a copy.
  const double copies = ((in + out) * 256 * element + (taps + 2) * 64) / 16 / kLanes * 6;
  w.instructions += panels * copies / double(warps);
  w.issued += panels * copies;
  // First and last: addresses, copies and clearing; bias, residual and stores.
  const double store = 120 + (out > 0 ? rows * out * 14 : panels * 24);
  // An image's pixels channel by channel, and the windows; else 16 bytes a copy.
  const bool stem = s.expand == Expand::kStem;
  const double image_pixels = pixels * double(kStemStride * kStemStride);
  const double copied = stem ? image_pixels * 40 + pixels * 30 : pixels * in * 2 * element / 4 * 20;
  const double load = (copied + pixels * 20) / kLanes / double(warps) + 200;
  w.instructions += store + load;
  w.issued += double(warps) * (store + load);
  w.shared += (stem ? image_pixels * double(kStemChannels) : pixels * in * 16) * element;
  return w;
}

Plan complete(const BlockShape& s, Precision precision, const Gpu& gpu, const Choice& c) {
  const double element = double(element_size(precision));
  Plan p{};
  p.images = c.images;
  p.tile_rows = c.tile_rows;
  p.tile_cols = c.tile_cols;
  p.strip_rows = 2 * c.variant.tiles;
  p.group = c.group_panels * kPanel;
  p.splits = c.splits;
  p.out_panels = c.variant.out_panels;
  p.out_blocks = ceil_div(ceil_div(s.out_channels, kPanel), p.out_panels);
  p.warps = ceil_div(strips(c), kStripsPerWarp);
  const int64_t tiles = ceil_div(s.batch, c.images) * phases(s.out_height(), s) *
                        ceil_div(apart(s.out_height(), s), c.tile_rows) * phases(s.out_width(), s) *
                        ceil_div(apart(s.out_width(), s), c.tile_cols);
  p.thread_blocks = tiles * p.splits * p.out_blocks;
  p.shared_bytes = shared_bytes(s, precision, c);

  // A register file has four parts of 16384, each for every fourth warp.
  const int64_t per_scheduler = ceil_div(c.variant.most_warps * c.variant.resident, kSchedulers);
  const int64_t registers = kRegisters / kSchedulers / (kLanes * per_scheduler) / 8 * 8;
  const int64_t warps =
      kRegisters / kSchedulers / (kLanes * std::min<int64_t>(registers, 255)) * kSchedulers;
  p.resident = std::max<int64_t>(
      1, std::min({warps / p.warps, gpu.shared_per_processor / (p.shared_bytes + 1024),
                   gpu.threads_per_processor / (p.warps * kLanes)}));

  const int64_t expanded_rows = expanded(s, s.out_height(), c.tile_rows, s.height, s.pad_top);
  const int64_t expanded_cols = expanded(s, s.out_width(), c.tile_cols, s.width, s.pad_left);
  const double all_pixels = double(s.batch) * double(expanded_rows * expanded_cols);
  p.recompute = double(expanded_rows * expanded_cols * p.out_blocks) / double(s.height * s.width);
  const int64_t out_pixels = s.batch * s.out_height() * s.out_width();
  p.partial_bytes = p.splits > 1 ? p.splits * s.out_elements() * 4 : 0;
  const bool squeezed = s.squeeze_channels > 0;
  p.squeeze_bytes = squeezed ? SqueezeMemory(s, tiles, p.warps).total() * 4 : 0;
  const int64_t in_expanded = s.expand == Expand::kNone ? 0 : s.height * s.width;
  const bool stem = s.expand == Expand::kStem;
  const double x_bytes = element * double(s.batch * s.in_channels) *
                         double(stem ? s.image_height * s.image_width : s.height * s.width);
  p.bytes_never_written = s.batch * s.hidden_channels *
                          (in_expanded + s.out_height() * s.out_width()) * element_size(precision);
  const double w_expand = double(s.expand_terms() * s.hidden_channels);
  const double weights = element * (w_expand + double(s.hidden_channels * s.out_channels)) +
                         double(4 * (s.taps() + 2) * s.hidden_channels);
  p.bytes = int64_t(x_bytes + element * double(out_pixels * s.out_channels) + weights) +
            2 * (p.partial_bytes + p.squeeze_bytes);
  if (squeezed)  // x and the weights once more, and those of its products
    p.bytes += int64_t(x_bytes + weights) + 8 * s.hidden_channels * s.squeeze_channels;
  if (tiles == 0) return p;

  const Rates rates = rates_of(gpu);
  const double groups = double(ceil_div(ceil_div(s.hidden_panels(), c.splits), c.group_panels));
  const double mma = rates.mma / (element == 4 ? 2 : 1);
  // Of a pass of so many thread blocks with so many panels of outputs.
  const auto seconds_of = [&](int64_t thread_blocks, double out) {
    const Work w = work_of(s, precision, c, all_pixels / double(tiles), p.warps, out);
    const int64_t waves = ceil_div(thread_blocks, gpu.processors * p.resident);
    const int64_t at_once = std::min(p.resident, ceil_div(thread_blocks, gpu.processors * waves));
    const double warps_each = double(at_once * p.warps) / double(kSchedulers);
    const double issue = std::min(kIssued, kIssuedAlone * std::max(warps_each, 1.0));
    const double blocks = double(at_once);
    double cycles =
        std::max({blocks * w.issued / kSchedulers / issue, w.instructions / kIssuedAlone,
                  blocks * w.fma / rates.fma / kReached, blocks * w.mma / mma / kReached,
                  blocks * w.shared / kSharedBytes / kReached});
    cycles += groups * 2 * kBarrierCycles;
    const double from_l2 = weights / double(p.splits) * double(thread_blocks) +
                           element * x_elements(s, all_pixels) * double(p.splits);
    const double processors = double(std::min(gpu.processors, thread_blocks));
    return std::max(double(waves) * cycles / gpu.clock,
                    from_l2 / (kL2Bytes * processors) / gpu.clock);
  };
  double busy = seconds_of(p.thread_blocks, double(p.out_panels));
  int64_t launches = p.splits > 1 ? 2 : 1;
  if (squeezed) {
    // Both products read their weights from L2 once an image, the first the pooled sums for each panel.
    const double read = double(s.batch * 8 * s.hidden_channels * s.squeeze_channels) +
                        double(p.squeeze_bytes * s.squeeze_panels());
    busy +=
        seconds_of(tiles * p.splits, 0) + read / (kL2Bytes * double(gpu.processors)) / gpu.clock;
    launches += 3;
  }
  p.seconds = std::max(busy, double(p.bytes) / gpu.copy_bytes) + kFirstSeconds +
              kLaunchSeconds * double(launches);
  return p;
}

// Tile sizes that cut n into equal parts, the last one smaller at most.
std::vector<int64_t> parts(int64_t n, int64_t multiple, int64_t most) {
  std::vector<int64_t> found;
  for (int64_t k = ceil_div(n, most); k <= n; ++k) {
    const int64_t size = std::min(round_up(ceil_div(n, k), multiple), round_up(n, multiple));
    if (size <= most && (found.empty() || found.back() != size)) found.push_back(size);
    if (size <= multiple) break;
  }
  return found;
}

// f(variant) for each that is compiled for such a block and has outputs.
template <class F>
void for_variants(const BlockShape& s, Precision precision, F f) {
  const Form form = form_of(s);
  for_variants_of(form, [&](const Variant& v) {
    if (s.expand == Expand::kStem && !takes_stem(form, v)) return;
    if (v.out_panels > 0 && compiled(v, precision))
      f(variant_of(v.tiles, v.out_panels, precision, form));
  });
}

// The variants whose registers fit these outputs best: of each number of tiles the narrowest that
// holds all, or the widest.
std::vector<Variant> variants(const BlockShape& s, Precision precision) {
  const int64_t needed = ceil_div(s.out_channels, kPanel);
  std::vector<Variant> found;
  for (const int64_t tiles : {2, 1}) {
    std::optional<Variant> best;
    for_variants(s, precision, [&](const Variant& v) {
      if (v.tiles != tiles) return;
      const bool better = !best || (best->out_panels >= needed
                                        ? v.out_panels >= needed && v.out_panels < best->out_panels
                                        : v.out_panels > best->out_panels);
      if (better) best = v;
    });
    // Out blocks repeat the expansion: only where there is no other way.
    if (best && (best->out_panels >= needed || tiles == 1)) found.push_back(*best);
  }
  return found;
}

// What takes least shared memory, for where no tile fits with those.
Variant narrowest(const BlockShape& s, Precision precision) {
  std::optional<Variant> found;
  for_variants(s, precision, [&](const Variant& v) {
    if (v.tiles == 1 && (!found || v.out_panels < found->out_panels)) found = v;
  });
  return *found;
}

// Of a thread block. The sums of a squeeze-and-excite are of one image.
int64_t most_images(const BlockShape& s) {
  return s.squeeze_channels > 0 ? 1 : std::max<int64_t>(s.batch, 1);
}

std::string does_not_fit(const BlockShape& s, const Gpu& gpu) {
  std::ostringstream out;
  out << "no tile of " << s.in_channels << " -> " << s.hidden_channels << " -> " << s.out_channels
      << " channels fits into the " << gpu.shared_per_block
      << " bytes of shared memory that a thread block may use; use backend='triton' or 'eager'";
  return out.str();
}

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream out;
  out << "plan: ";
  (out << ... << parts);
  throw std::invalid_argument(out.str());
}

void check(const BlockShape& s, Precision precision, const Gpu& gpu) {
  const std::string why = unsupported(s, precision, gpu.capability);
  if (!why.empty()) throw std::invalid_argument(why);
}

}  // namespace

std::string unsupported(const BlockShape& s, Precision precision, int64_t capability) {
  std::ostringstream out;
  const int64_t least =
      precision == Precision::kBFloat16 || precision == Precision::kTf32 ? 80 : 75;
  if (const std::string why = mnv2_fused::unsupported(s); !why.empty()) return why;
  const int64_t size = std::max({s.batch * s.out_height() * s.out_width(), s.batch, s.height,
                                 s.width, s.image_height, s.image_width});
  const int64_t channels =
      std::max({s.in_channels, s.hidden_channels, s.out_channels, s.squeeze_channels});
  if (capability < least)
    out << (precision == Precision::kBFloat16 ? "bfloat16" : "this") << " needs compute capability "
        << least / 10 << "." << least % 10 << ", this GPU has " << capability / 10 << "."
        << capability % 10 << "; use float16, float32 or backend='eager'";
  else if (size > int64_t{1} << 30)
    out << "the CUDA kernel takes at most 2^30 output pixels, rows and columns, got " << s.batch
        << " images of " << s.height << "x" << s.width
        << "; split the batch, or use backend='eager'";
  else if (channels > int64_t{1} << 15)
    out << "the CUDA kernel takes at most 2^15 channels, got " << channels
        << "; use backend='eager'";
  else if (s.expand == Expand::kStem && s.in_channels > kStemChannels)
    out << "the CUDA kernel takes at most " << kStemChannels << " channels in front of a stem, got "
        << s.in_channels << "; run the stem by itself";
  else if (s.expand == Expand::kStem && s.dilation > 1)
    out << "the CUDA kernel takes no dilation behind a stem, got " << s.dilation
        << "; run the stem by itself";
  return out.str();
}

Plan make_plan(const BlockShape& s, Precision precision, const Gpu& gpu) {
  check(s, precision, gpu);
  std::optional<Plan> best;
  const int64_t hidden = s.hidden_panels();
  const int64_t height = apart(s.out_height(), s), width = apart(s.out_width(), s);
  const auto search = [&](const Variant& v) {
    const int64_t most = v.most_warps * kStripsPerWarp;
    for (const int64_t cols : parts(width, 1, most)) {
      for (const int64_t rows : parts(height, 2 * v.tiles, most / cols * 2 * v.tiles)) {
        const bool whole = cols >= width && rows >= height;
        const int64_t one = ceil_div(rows, 2 * v.tiles) * cols;
        for (int64_t images = 1; images * one <= most; ++images) {
          if (images > most_images(s) || (images > 1 && !whole)) break;
          for (int64_t group = 1; group <= std::min(kMostGroupPanels, hidden); ++group) {
            Choice c{images, rows, cols, v, group, 1};
            if (shared_bytes(s, precision, c) > gpu.shared_per_block) break;
            const int64_t groups = ceil_div(hidden, group);
            for (int64_t each = groups; each >= 1; --each) {
              const int64_t splits = ceil_div(groups, each);
              if (splits > kMostSplits) break;
              if (splits == c.splits && each < groups) continue;  // the same with more in one
              c.splits = splits;
              const Plan p = complete(s, precision, gpu, c);
              if (!best || p.seconds < best->seconds) best = p;
            }
          }
        }
      }
    }
  };
  for (const Variant& v : variants(s, precision)) search(v);
  if (!best) search(narrowest(s, precision));
  if (!best) throw std::invalid_argument(does_not_fit(s, gpu));
  return *best;
}

Plan make_plan(const BlockShape& s, Precision precision, const Gpu& gpu,
               const std::vector<int64_t>& forced) {
  check(s, precision, gpu);
  if (forced.size() != 6)
    refuse("must be [images, tile_rows, tile_cols, strip_rows, group, splits], got ", forced.size(),
           " values");
  Choice c{forced[0], forced[1], forced[2], {}, forced[4] / kPanel, forced[5]};
  for (const Variant& v : variants(s, precision))
    if (2 * v.tiles == forced[3]) c.variant = v;
  if (c.variant.tiles == 0)
    refuse("no kernel is compiled for strip_rows ", forced[3],
           " with these output channels and dtype; 2 always is, 4 up to 64 "
           "channels of MobileNetV2's block unless float32 is exact");
  if (c.images < 1 || c.images > most_images(s))
    refuse("images must be 1 to ",
           s.squeeze_channels > 0 ? std::string("1 with a squeeze-and-excite")
                                  : "the batch of " + std::to_string(s.batch),
           ", got ", c.images);
  const auto limit = [](const char* name, int64_t value, int64_t most) {
    if (value < 1 || value > most) refuse(name, " must be 1 to ", most, ", got ", value);
  };
  const int64_t height = apart(s.out_height(), s), width = apart(s.out_width(), s);
  limit("tile_rows", c.tile_rows, round_up(height, forced[3]));
  limit("tile_cols", c.tile_cols, width);
  if (c.images > 1 && (c.tile_rows < height || c.tile_cols < width))
    refuse("several images need a tile of the whole image, got ", c.tile_rows, "x", c.tile_cols);
  if (forced[4] % kPanel != 0 || c.group_panels < 1)
    refuse("group must be a multiple of ", kPanel, ", got ", forced[4]);
  limit("group", forced[4], s.hidden_panels() * kPanel);
  const int64_t groups = ceil_div(s.hidden_panels(), c.group_panels);
  limit("splits", c.splits, groups);
  if (c.splits != ceil_div(groups, ceil_div(groups, c.splits)))
    refuse("splits of ", c.splits, " leave one without any of the ", groups, " groups");
  if (const Variant v = narrowest(s, precision);
      shared_bytes(s, precision, c) > gpu.shared_per_block && v.tiles == c.variant.tiles)
    c.variant = v;
  const int64_t most = c.variant.most_warps * kStripsPerWarp;
  if (strips(c) > most)
    refuse("a thread block holds at most ", most, " strips of ", forced[3], " rows, got ",
           strips(c), "; choose a smaller tile or fewer images");
  if (const int64_t bytes = shared_bytes(s, precision, c); bytes > gpu.shared_per_block)
    refuse("takes ", bytes, " bytes of shared memory, a thread block of this GPU has ",
           gpu.shared_per_block, "; choose a smaller tile or group");
  return complete(s, precision, gpu, c);
}

}  // namespace mnv2_fused::cuda
