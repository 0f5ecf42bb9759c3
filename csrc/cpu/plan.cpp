#include "plan.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace mnv2_fused::cpu {
namespace {

// Costs in vector multiply-adds, set by hand and checked by forcing plans over MobileNetV2's 17
// blocks on one Zen 4 core, where the chosen plan was mostly within a few percent of the best:
// bias + ReLU6 + store of one expanded vector, load + store of one output vector per channel group,
// bias + ReLU6 + store of one depthwise vector, and what a task spends before its first multiply.
constexpr double kExpandEpilogue = 4.0;
constexpr double kProjectEpilogue = 4.0;
constexpr double kDepthwiseEpilogue = 6.0;
constexpr double kTaskStart = 2000.0;
// What a tile's row costs each vector, beside its pixels: wide tiles have fewer of them.
constexpr double kRow = 12.0;
// A second parallel loop.
constexpr double kBarrier = 10000.0;
// A vector read once more, from L2 and from beyond; most of it hides behind multiply-adds. And one
// that another core wrote.
constexpr double kFromL2 = 0.3, kFromBeyond = 2.0, kFromOtherCore = 4.0;
// Output pixels of a band: enough to reuse the weights in L1, few enough that what is between the
// stages stays near.
constexpr int64_t kBandPixels = 112;
// What a squeeze-and-excite may keep of one image, and of several at once, instead of computing it
// twice: about what caches hold. Past it, memory is what the block is fused for.
constexpr int64_t kMostCached = int64_t{4} << 20, kMostCachedTogether = int64_t{16} << 20;
// Of expanded pixels, while scratch stays in L2; every plan for MobileNetV2's blocks stays below 2. Of
// a dilated block's scratch, most of which lies between the rows of its taps, each row is written once
// and read three times: on a Zen 4 core whole rows of 160 -> 960 -> 160 at 272x480, dilated by 36, in
// twice L2 took 0.54 of the time that columns took whose windows fit L2 and were computed 2.05 times.
constexpr double kMostRecompute = 4.0, kMostRecomputeDilated = 1.2;
// Images of one pixel that the group is chosen for.
constexpr int64_t kColumns = 64;
// What the group is chosen for, once and for all: its best plans on these numbers of threads.
constexpr int64_t kThreads[] = {1, 2};

bool has_images_as_columns(const BlockShape& s) {
  return s.kernel == 1 && s.height == 1 && s == as_one_image(s, s.width);
}

// Vector operations one multiply-add costs in a register tile of 1 ... 4 vectors of channels:
// narrow tiles need more rows, whose input pointers no longer fit the integer registers. Two vectors
// against three was measured (79 and 87 GFLOP/s on 16 -> 96 -> 24); one is an estimate.
constexpr double kTileCost[] = {1.5, 1.12, 1.0, 1.0};
double tile_cost(int64_t vectors, int64_t most) {
  const int64_t pieces = ceil_div(vectors, most), narrow = vectors / pieces;
  const int64_t wider = vectors % pieces;  // this many pieces have one vector more
  const double cost = double((pieces - wider) * narrow) * kTileCost[narrow - 1] +
                      double(wider * (narrow + 1)) * kTileCost[std::min<int64_t>(narrow, 3)];
  return cost / double(vectors);
}

// Bytes that a squeeze-and-excite's d of one image takes.
int64_t image_cache_bytes(const BlockShape& s, const Machine& m) {
  return s.out_height() * s.out_width() * s.hidden_panels() * kPanel * m.storage_size;
}

// Part of L2 the scratch may take; the rest holds x, y and the weights of one group.
int64_t scratch_budget(const Machine& m) { return m.l2_bytes * 5 / 8; }

// Limits: how the call is cut, and the scratch that takes.
Plan cut(const BlockShape& s, const Machine& m, int64_t tile_rows, int64_t tile_cols, int64_t group,
         int64_t splits) {
  Plan p{};
  p.tile_rows = tile_rows;
  p.tile_cols = tile_cols;
  p.group = group;
  // Bands of equal height.
  const int64_t most = std::clamp<int64_t>(kBandPixels / tile_cols, 1, tile_rows);
  p.band_rows = ceil_div(tile_rows, ceil_div(tile_rows, most));
  p.splits = splits;
  p.tasks = s.batch * p.tiles_down(s) * p.tiles_across(s) * splits;
  p.workers = std::max<int64_t>(1, std::min(m.threads, p.tasks));
  const bool narrow = m.storage_size < m.element_size;
  p.tile_sums_in_scratch = narrow && splits == 1 && (p.groups(s) > 1 || group > kLongestProject);
  p.scratch_bytes =
      (p.expanded_elements(s) + p.run_sum_elements(s) + p.tile_sum_elements(s)) * m.element_size +
      (p.depthwise_elements() + p.patch_elements(s)) * m.storage_size;
  return p;
}

// Memory beside the scratch: what workers share, and what an unfused block would write.
void count_memory(Plan& p, const BlockShape& s, const Machine& m) {
  // Saturated: a forced plan of a huge image may ask for more than 64 bits count.
  const double partial = double(p.groups(s)) * double(s.out_elements()) * double(m.element_size);
  if (p.splits > 1) p.partial_bytes = int64_t(std::min(partial, 0x1p62));
  const bool squeezes = s.squeeze_channels > 0;
  p.caches_depthwise = squeezes && image_cache_bytes(s, m) <= kMostCached;
  const double out_pixels = double(s.out_height()) * double(s.out_width());
  p.bytes_never_written =
      int64_t(double(s.batch) * double(s.hidden_channels) * double(m.storage_size) *
              (out_pixels * (squeezes && !p.caches_depthwise ? 2.0 : 1.0) +
               (s.expand == Expand::kNone ? 0.0 : double(s.height) * double(s.width))));
}

// Rows (or columns) the expansion computes: every tile's window, clipped to the image. Windows between
// the first and the last count as inside it.
int64_t window_sum(const BlockShape& s, int64_t stride, int64_t out, int64_t tile, int64_t size,
                   int64_t pad) {
  const auto window = [&](int64_t begin, int64_t outs) {
    const int64_t first = begin * stride - pad;
    const int64_t end = first + (outs - 1) * stride + s.extent();
    return std::max<int64_t>(std::min(end, size) - std::max<int64_t>(first, 0), 0);
  };
  const int64_t last = ceil_div(out, tile) - 1;
  if (last == 0) return window(0, out);
  const int64_t between = std::min((tile - 1) * stride + s.extent(), size);
  return window(0, tile) + (last - 1) * between + window(last * tile, out - last * tile);
}

// What a plan makes of one image: pixels, and vectors of channels at each of them.
struct Counts {
  double in_pixels, out_pixels;  // expanded pixels computed, output pixels
  double vectors, out_vectors;   // of expanded channels, of output channels
  double tiles, groups;
  double sums;    // that an output is the sum of: one of each run of each group
  double stored;  // size of a stored element over that of a sum

  Counts(const BlockShape& s, const Machine& m, const Plan& p)
      : in_pixels(
            double(window_sum(s, s.stride, s.out_height(), p.tile_rows, s.height, s.pad_top)) *
            double(
                window_sum(s, s.stride_across(), s.out_width(), p.tile_cols, s.width, s.pad_left))),
        out_pixels(double(s.out_height()) * double(s.out_width())),
        vectors(double(round_up(s.hidden_channels, kPanel)) / double(m.lanes)),
        out_vectors(double(ceil_div(s.out_channels, std::min<int64_t>(m.lanes, 8))) *
                    double(std::min<int64_t>(m.lanes, 8)) / double(m.lanes)),
        tiles(double(p.tiles_down(s) * p.tiles_across(s))),
        groups(double(p.groups(s))),
        sums(groups * double(ceil_div(p.group, kLongestProject))),
        stored(double(m.storage_size) / double(m.element_size)) {}
};

// Traffic: vector operations that memory read again takes, of one image. A group's weights are read
// again by every band, a tile's x and y by every group.
double read_again(const BlockShape& s, const Machine& m, const Plan& p, const Counts& c) {
  const double lanes = double(m.lanes), element = double(m.storage_size), l2 = double(m.l2_bytes);
  const double terms = double(s.expand_terms() + s.taps() + s.out_channels);
  const double bands = c.tiles * double(ceil_div(p.tile_rows, p.band_rows));
  const double weights = double(s.hidden_channels) * terms * c.stored / lanes * bands;
  const double x = c.in_pixels * double(s.in_channels) * c.stored / lanes * c.groups;
  const double y = c.out_pixels * c.out_vectors * (c.sums - 1) * 2;
  const auto from = [&](double bytes, double room) {
    return bytes <= room ? kFromL2 : kFromBeyond;
  };
  return weights * from(double(p.scratch_bytes) + double(p.group) * terms * element, l2 * 0.9) +
         x * from(x / c.groups / c.tiles * lanes * element, l2 / 4) +
         y * from(c.out_pixels / c.tiles * c.out_vectors * lanes * element, l2 / 4);
}

// Vector operations from x to d, of one image.
double cost_of_depthwise(const BlockShape& s, const Machine& m, const Plan& p, const Counts& c) {
  const double wide = tile_cost(p.group / m.lanes, m.lanes * m.element_size == 64 ? 4 : 2);
  const double act = row_of(s.activation).cpu_operations;
  const double expand_act =
      s.expand == Expand::kNone ? 0.0 : row_of(s.expand_activation).cpu_operations;
  return c.in_pixels * c.vectors *
             (double(s.expand_terms()) / double(m.depth) * wide + kExpandEpilogue + expand_act) +
         c.out_pixels * c.vectors * (double(s.taps()) + kDepthwiseEpilogue + act) +
         double(s.out_height() * p.tiles_across(s)) * c.vectors * kRow;
}

// Time: vector operations on the slowest worker.
double cost_of(const BlockShape& s, const Machine& m, const Plan& p, const Counts& c) {
  const double to_d = cost_of_depthwise(s, m, p, c);
  // Before a squeeze-and-excite d is computed twice, or written, read, and written and read again.
  const double squeeze = s.squeeze_channels == 0 ? 0.0
                         : p.caches_depthwise    ? c.out_pixels * c.vectors * 4 * kFromBeyond
                                                 : to_d;
  const double project = c.out_pixels * c.out_vectors *
                         (double(s.hidden_channels) / double(m.depth) + c.sums * kProjectEpilogue);
  const double image = to_d + squeeze + project + read_again(s, m, p, c);
  const double rounds = double(ceil_div(p.tasks, p.workers));
  const double share = double(ceil_div(p.groups(s), p.splits)) / c.groups;
  const double tiles = rounds * (image / c.tiles * share + kTaskStart);
  if (p.splits == 1) return tiles;
  return tiles + (kBarrier + double(s.batch) * c.out_pixels * c.out_vectors * c.groups *
                                 kFromOtherCore / double(p.workers));
}

// The whole plan; past the budget for scratch, only what decides that.
Plan complete(const BlockShape& s, const Machine& m, int64_t tile_rows, int64_t tile_cols,
              int64_t group, int64_t splits, int64_t budget = std::numeric_limits<int64_t>::max()) {
  Plan p = cut(s, m, tile_rows, tile_cols, group, splits);
  if (p.scratch_bytes > budget) return p;
  count_memory(p, s, m);
  const Counts counts(s, m, p);
  p.recompute = counts.in_pixels / (double(s.height) * double(s.width));
  p.cost = cost_of(s, m, p, counts);
  return p;
}

// Calls f with the distinct part sizes that split `size` into equal parts: every count up to 8,
// then ever fewer, down to parts of one.
template <class F>
void for_parts(int64_t size, F f) {
  int64_t last = 0;
  for (int64_t parts = 1; parts < size; parts += std::max<int64_t>(1, parts / 8))
    if (const int64_t part = ceil_div(size, parts); part != last) f(last = part);
  if (last != 1) f(1);
}

// The plan of least cost with this group whose scratch fits the budget, if there is one.
std::optional<Plan> best_within(const BlockShape& s, const Machine& m, int64_t group,
                                int64_t budget) {
  std::vector<Plan> legal;
  const auto consider = [&](int64_t rows, int64_t cols, int64_t splits) {
    const Plan p = complete(s, m, rows, cols, group, splits, budget);
    if (p.scratch_bytes > budget) return false;
    if (splits > 1 && (p.tasks > m.threads || p.partial_bytes > budget)) return true;
    // A whole map of every expanded channel would be the expanded tensor. Of one-pixel images it may be:
    // the group must not rest on how many there are.
    const bool whole =
        p.band_rows == s.out_height() && cols == s.out_width() && !has_images_as_columns(s);
    if (whole && group >= s.hidden_channels && group > kPanel) return true;
    legal.push_back(p);
    return true;
  };
  // Columns decide the order in which a squeeze-and-excite adds up d, so they rest on neither batch nor
  // threads: the most whose scratch fits.
  int64_t only = 0;
  if (s.squeeze_channels > 0)
    for_parts(s.out_width(), [&](int64_t cols) {
      if (only == 0 && complete(s, m, 1, cols, group, 1, budget).scratch_bytes <= budget)
        only = cols;
    });
  for_parts(s.out_width(), [&](int64_t cols) {
    if (only > 0 && cols != only) return;
    for_parts(s.out_height(), [&](int64_t rows) {
      if (!consider(rows, cols, 1)) return;
      // Splits are for threads that would have no tile.
      const double tiles = double(ceil_div(s.out_height(), rows) * ceil_div(s.out_width(), cols));
      if (2 * tiles * double(s.batch) > double(m.threads)) return;
      const int64_t groups = ceil_div(s.hidden_channels, group);
      for_parts(groups, [&](int64_t groups_of_split) {
        if (const int64_t splits = ceil_div(groups, groups_of_split); splits > 1)
          consider(rows, cols, splits);
      });
    });
  });
  if (legal.empty()) return std::nullopt;
  // Of those that are all but the cheapest, the one that needs the least scratch.
  double least = legal.front().cost;
  for (const Plan& p : legal) least = std::min(least, p.cost);
  const Plan* best = nullptr;
  for (const Plan& p : legal)
    if (p.cost <= least * 1.002 && (!best || p.scratch_bytes < best->scratch_bytes)) best = &p;
  return *best;
}

// The plan of least cost with this group that stays in L2. With the smallest group there always is
// one: where a tile's window, far wider than the tile, does not fit, or would be computed again and
// again, scratch may leave L2.
std::optional<Plan> best_plan(const BlockShape& s, const Machine& m, int64_t group) {
  std::optional<Plan> best = best_within(s, m, group, scratch_budget(m));
  if (group > kPanel) return best;
  const double most = s.dilation > 1 ? kMostRecomputeDilated : kMostRecompute;
  for (const int64_t times : {4, 16, 64, 256}) {
    // What a squeeze-and-excite sums up must not rest on what the best plan of some threads is.
    if (best && (s.squeeze_channels > 0 || best->recompute <= most)) break;
    if (const auto larger = best_within(s, m, group, times * scratch_budget(m)))
      if (!best || larger->cost < best->cost) best = larger;
  }
  return best ? best : complete(s, m, 1, 1, group, 1);
}

void check(const BlockShape& s) {
  if (has_images_as_columns(s)) return;
  if (const std::string why = unsupported(s); !why.empty()) throw std::invalid_argument(why);
}

}  // namespace

bool takes_middle_taps(const BlockShape& s) {
  const int64_t middle = s.dilation * (s.kernel / 2);
  return s.height == 1 && s.width == 1 && s.out_height() == 1 && s.out_width() == 1 &&
         s.pad_left == middle && s.pad_top == middle && s.squeeze_channels == 0 &&
         s.expand != Expand::kStem;
}

BlockShape as_one_image(BlockShape s, int64_t images) {
  s.batch = 1;
  s.width = images;
  s.stride = s.kernel = s.dilation = 1;
  s.column_stride = 0;
  s.pad_left = s.pad_right = s.pad_top = s.pad_bottom = 0;
  return s;
}

int64_t squeezed_together(const BlockShape& s, const Machine& m) {
  const int64_t image = image_cache_bytes(s, m);
  const int64_t fit = image <= kMostCached ? kMostCachedTogether / image : 1;
  return std::min(s.batch, std::max(fit, m.threads));
}

Plan make_plan(const BlockShape& s, const Machine& m) {
  check(s);
  // The group decides the order of summation, so it depends on neither batch nor threads: an
  // image's result is the same bit for bit alone, in a batch, and on any number of cores.
  BlockShape image = s;
  image.batch = 1;
  if (has_images_as_columns(s)) image.width = kColumns;
  int64_t group = kPanel;
  double least = -1;
  for_parts(s.hidden_panels(), [&](int64_t panels) {
    double cost = 0;
    for (const int64_t threads : kThreads) {
      Machine machine = m;
      machine.threads = threads;
      const std::optional<Plan> best = best_plan(image, machine, panels * kPanel);
      if (!best) return;
      cost += double(threads) * best->cost;
    }
    if (least >= 0 && cost >= least) return;
    least = cost;
    group = panels * kPanel;
  });
  // Whether there is one rests on neither batch nor threads.
  return best_plan(s, m, group).value();
}

Plan make_plan(const BlockShape& s, const Machine& m, int64_t tile_rows, int64_t tile_cols,
               int64_t group, int64_t splits) {
  check(s);
  const auto in_range = [](const char* name, int64_t value, int64_t limit) {
    if (value < 1 || value > limit)
      throw std::invalid_argument("plan: " + std::string(name) + " must be 1 to " +
                                  std::to_string(limit) + ", got " + std::to_string(value));
  };
  in_range("tile_rows", tile_rows, s.out_height());
  in_range("tile_cols", tile_cols, s.out_width());
  in_range("group", group, s.hidden_panels() * kPanel);
  if (group % kPanel != 0)
    throw std::invalid_argument("plan: group must be a multiple of " + std::to_string(kPanel) +
                                ", got " + std::to_string(group));
  in_range("splits", splits, ceil_div(s.hidden_channels, group));
  return complete(s, m, tile_rows, tile_cols, group, splits);
}

}  // namespace mnv2_fused::cpu
