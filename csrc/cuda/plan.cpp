#include "plan.h"

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "../block.h"
#include "call.h"
#include "cost.h"

namespace mnv2_fused::cuda {
namespace {

constexpr int64_t kRegisters = 65536;  // of a multiprocessor
// Seconds until x is there, and until a kernel that follows another starts.
constexpr double kFirstSeconds = 1.2e-6, kLaunchSeconds = 1.5e-6;
// More splits would leave most of the work to the kernel that adds them.
constexpr int64_t kMostSplits = 64;
constexpr int64_t kMostGroupPanels = 4;

// A dilated convolution is several ordinary ones, its phases. Outputs of one phase in a row (or column),
// and the number of phases.
int64_t apart(int64_t out, const BlockShape& s) { return ceil_div(out, s.dilation); }
int64_t phases(int64_t out, const BlockShape& s) { return std::min(out, s.dilation); }

// Expanded pixels in the image under all tiles of a row (or column).
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

int64_t strips(const Choice& c) {
  return c.images * ceil_div(c.tile_rows, 2 * c.variant.tiles) * c.tile_cols;
}

// Elements of x under this many pixels of e, about.
double x_elements(const BlockShape& s, double pixels) {
  const double each = s.expand == Expand::kStem ? double(kStemStride * kStemStride) : 1;
  return pixels * each * double(s.in_channels);
}

int64_t shared_bytes(const BlockShape& s, Precision precision, const Choice& c) {
  const Variant& v = c.variant;
  return shared_layout(
             s, precision,
             {c.images, c.tile_rows, c.tile_cols, 2 * v.tiles, c.group_panels, v.out_panels})
      .bytes;
}

// Thread blocks that a multiprocessor runs at once, by registers, shared memory and threads.
int64_t blocks_per_sm(const Variant& v, const Gpu& gpu, int64_t warps, int64_t shared_bytes) {
  // A register file has four parts of 16384 registers, each for every fourth warp.
  const int64_t per_scheduler = ceil_div(v.most_warps * v.blocks_per_sm, kSchedulers);
  const int64_t registers = kRegisters / kSchedulers / (kLanes * per_scheduler) / 8 * 8;
  const int64_t held =
      kRegisters / kSchedulers / (kLanes * std::min<int64_t>(registers, 255)) * kSchedulers;
  return std::max<int64_t>(
      1, std::min({held / warps, gpu.shared_per_multiprocessor / (shared_bytes + 1024),
                   gpu.threads_per_multiprocessor / (warps * kLanes)}));
}

// Division of the outputs among thread blocks and their warps.
Plan divided(const BlockShape& s, Precision precision, const Gpu& gpu, const Choice& c) {
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
  p.blocks_per_sm = blocks_per_sm(c.variant, gpu, p.warps, p.shared_bytes);
  return p;
}

// Bytes of a block's packed weights.
double weight_traffic(const BlockShape& s, double element) {
  const double w_expand = double(s.expand_terms() * s.hidden_channels);
  return element * (w_expand + double(s.hidden_channels * s.out_channels)) +
         double(4 * (s.taps() + 2) * s.hidden_channels);
}

// Sets the bytes in global memory, and the expanded pixels that tiles compute more than once.
void set_traffic(Plan& p, const BlockShape& s, Precision precision, int64_t expanded_pixels) {
  const double element = double(element_size(precision));
  const bool squeezed = s.squeeze_channels > 0, stem = s.expand == Expand::kStem;
  p.recompute = double(expanded_pixels * p.out_blocks) / double(s.height * s.width);
  const int64_t out_pixels = s.batch * s.out_height() * s.out_width();
  p.partial_bytes = p.splits > 1 ? p.splits * s.out_elements() * 4 : 0;
  p.squeeze_bytes = squeezed ? SqueezeMemory(s, tiles_of(p), p.warps).total() * 4 : 0;
  const int64_t in_expanded = s.expand == Expand::kNone ? 0 : s.height * s.width;
  p.bytes_never_written = s.batch * s.hidden_channels *
                          (in_expanded + s.out_height() * s.out_width()) * element_size(precision);
  const double x_bytes = element * double(s.batch * s.in_channels) *
                         double(stem ? s.image_height * s.image_width : s.height * s.width);
  const double weights = weight_traffic(s, element);
  p.bytes = int64_t(x_bytes + element * double(out_pixels * s.out_channels) + weights) +
            2 * (p.partial_bytes + p.squeeze_bytes);
  if (squeezed)  // x and weights are read by both passes, the products read their own weights
    p.bytes += int64_t(x_bytes + weights) + 8 * s.hidden_channels * s.squeeze_channels;
}

// Estimated seconds of a call. all_pixels: of e, of all images and tiles.
double seconds_of(const Plan& p, const BlockShape& s, Precision precision, const Gpu& gpu,
                  const Choice& c, double all_pixels) {
  const double element = double(element_size(precision)), weights = weight_traffic(s, element);
  const int64_t tiles = tiles_of(p);
  const Rates rates = rates_of(gpu);
  const double groups = double(ceil_div(ceil_div(s.hidden_panels(), c.splits), c.group_panels));
  // One pass: of so many thread blocks, with so many panels of outputs.
  const auto pass_seconds = [&](int64_t thread_blocks, double out) {
    const Work w = WorkCount(s, precision, c, all_pixels / double(tiles), p.warps, out).work();
    const int64_t waves = ceil_div(thread_blocks, gpu.multiprocessors * p.blocks_per_sm);
    const int64_t at_once =
        std::min(p.blocks_per_sm, ceil_div(thread_blocks, gpu.multiprocessors * waves));
    const double cycles =
        wave_cycles(w, rates, precision, at_once, p.warps) + groups * 2 * kBarrierCycles;
    const double from_l2 = weights / double(p.splits) * double(thread_blocks) +
                           element * x_elements(s, all_pixels) * double(p.splits);
    const double busy_sms = double(std::min(gpu.multiprocessors, thread_blocks));
    return std::max(double(waves) * cycles / gpu.clock,
                    from_l2 / (kL2Bytes * busy_sms) / gpu.clock);
  };
  double busy = pass_seconds(p.thread_blocks, double(p.out_panels));
  int64_t launches = p.splits > 1 ? 2 : 1;
  if (s.squeeze_channels > 0) {
    // Both products read their weights from L2 once an image, the first the pooled sums for each panel.
    const double read = double(s.batch * 8 * s.hidden_channels * s.squeeze_channels) +
                        double(p.squeeze_bytes * s.squeeze_panels());
    busy += pass_seconds(tiles * p.splits, 0) +
            read / (kL2Bytes * double(gpu.multiprocessors)) / gpu.clock;
    launches += 3;
  }
  return std::max(busy, double(p.bytes) / gpu.memory_bandwidth) + kFirstSeconds +
         kLaunchSeconds * double(launches);
}

Plan complete(const BlockShape& s, Precision precision, const Gpu& gpu, const Choice& c) {
  Plan p = divided(s, precision, gpu, c);
  const int64_t expanded_rows = expanded(s, s.out_height(), c.tile_rows, s.height, s.pad_top);
  const int64_t expanded_cols = expanded(s, s.out_width(), c.tile_cols, s.width, s.pad_left);
  set_traffic(p, s, precision, expanded_rows * expanded_cols);
  if (p.thread_blocks == 0) return p;  // of an empty batch
  const double all_pixels = double(s.batch) * double(expanded_rows * expanded_cols);
  p.seconds = seconds_of(p, s, precision, gpu, c, all_pixels);
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

// Calls f(variant) for each variant that is compiled for such a block and has outputs.
template <class F>
void for_variants(const BlockShape& s, Precision precision, F f) {
  const Form form = form_of(s);
  for_variants_of(form, [&](const Variant& v) {
    if (s.expand == Expand::kStem && !takes_stem(form, v)) return;
    if (v.out_panels > 0 && compiled(v, precision))
      f(variant_of(v.tiles, v.out_panels, precision, form));
  });
}

// Variants whose registers fit these outputs best: for each number of tiles the narrowest that holds all
// outputs, or the widest.
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
    // Out blocks repeat the expansion, so they are only for outputs that no variant holds.
    if (best && (best->out_panels >= needed || tiles == 1)) found.push_back(*best);
  }
  return found;
}

// The variant of least shared memory, for blocks of which no tile fits with those.
Variant narrowest(const BlockShape& s, Precision precision) {
  std::optional<Variant> found;
  for_variants(s, precision, [&](const Variant& v) {
    if (v.tiles == 1 && (!found || v.out_panels < found->out_panels)) found = v;
  });
  return *found;
}

// Most images of a thread block: one with a squeeze-and-excite, whose sums are of one image.
int64_t most_images(const BlockShape& s) {
  return s.squeeze_channels > 0 ? 1 : std::max<int64_t>(s.batch, 1);
}

// Tries all groups and splits of a tile.
void search_groups(std::optional<Plan>& best, const BlockShape& s, Precision precision,
                   const Gpu& gpu, Choice c) {
  const int64_t hidden = s.hidden_panels();
  for (c.group_panels = 1; c.group_panels <= std::min(kMostGroupPanels, hidden); ++c.group_panels) {
    if (shared_bytes(s, precision, c) > gpu.shared_per_block) break;
    const int64_t groups = ceil_div(hidden, c.group_panels);
    c.splits = 0;
    for (int64_t each = groups; each >= 1; --each) {  // groups of a split
      const int64_t splits = ceil_div(groups, each);
      if (splits > kMostSplits) break;
      if (splits == c.splits) continue;  // the same number with a larger share was tried
      c.splits = splits;
      const Plan p = complete(s, precision, gpu, c);
      if (!best || p.seconds < best->seconds) best = p;
    }
  }
}

// Tries all tiles of a variant.
void search(std::optional<Plan>& best, const BlockShape& s, Precision precision, const Gpu& gpu,
            const Variant& v) {
  const int64_t height = apart(s.out_height(), s), width = apart(s.out_width(), s);
  const int64_t most = v.most_warps * kStripsPerWarp;
  for (const int64_t cols : parts(width, 1, most)) {
    for (const int64_t rows : parts(height, 2 * v.tiles, most / cols * 2 * v.tiles)) {
      const bool whole = cols >= width && rows >= height;
      const int64_t one = ceil_div(rows, 2 * v.tiles) * cols;
      for (int64_t images = 1; images * one <= most; ++images) {
        if (images > most_images(s) || (images > 1 && !whole)) break;
        search_groups(best, s, precision, gpu, {images, rows, cols, v, 1, 1});
      }
    }
  }
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

// The choice that forced values name. Throws std::invalid_argument naming the value and the limit.
Choice forced_choice(const BlockShape& s, Precision precision, const Gpu& gpu,
                     const std::vector<int64_t>& forced) {
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
  return c;
}

// The first value that is no enumerator, as an objection; empty when all are known.
std::string unknown_kind(const BlockShape& s, Precision precision) {
  struct Kind {
    const char* name;
    int64_t value, count;
  };
  for (const auto& [name, value, count] : {
           Kind{"precision", int64_t(precision), kPrecisions},
           Kind{"activation", int64_t(s.activation), kActivations},
           Kind{"expand_activation", int64_t(s.expand_activation), kActivations},
           Kind{"out_activation", int64_t(s.out_activation), kActivations},
           Kind{"squeeze_activation", int64_t(s.squeeze_activation), kActivations},
           Kind{"gate", int64_t(s.gate), kGates},
       })
    if (value < 0 || value >= count)
      return "the CUDA kernel takes " + std::string(name) + " 0 to " + std::to_string(count - 1) +
             ", got " + std::to_string(value) + "; use backend='eager'";
  return "";
}

// The first compute capability that has products of this precision.
int64_t least_capability(Precision precision) {
  switch (precision) {
    case Precision::kHalf:
    case Precision::kFloat32:
      return 75;
    case Precision::kBFloat16:
    case Precision::kTf32:
      return 80;
  }
  throw std::invalid_argument("precision must be float16, bfloat16, tf32 or float32");
}

}  // namespace

std::string unsupported(const BlockShape& s, Precision precision, int64_t capability) {
  if (const std::string why = mnv2_fused::unsupported(s); !why.empty()) return why;
  if (const std::string why = unknown_kind(s, precision); !why.empty()) return why;
  std::ostringstream out;
  const int64_t least = least_capability(precision);
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
  else if (s.kernel > 5)
    out << "the CUDA kernel takes kernel 3 or 5, got " << s.kernel
        << "; use backend='triton' or 'eager'";
  else if (s.stride_across() != s.stride)
    out << "the CUDA kernel takes one stride for rows and columns, got " << s.stride << " and "
        << s.stride_across() << "; use backend='triton' or 'eager'";
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
  for (const Variant& v : variants(s, precision)) search(best, s, precision, gpu, v);
  if (!best) search(best, s, precision, gpu, narrowest(s, precision));
  if (!best) throw std::invalid_argument(does_not_fit(s, gpu));
  return *best;
}

Plan make_plan(const BlockShape& s, Precision precision, const Gpu& gpu,
               const std::vector<int64_t>& forced) {
  check(s, precision, gpu);
  return complete(s, precision, gpu, forced_choice(s, precision, gpu, forced));
}

}  // namespace mnv2_fused::cuda
