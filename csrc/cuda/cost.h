// Estimated time of one pass of the kernel. Pure; no torch, no CUDA.
#pragma once

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

#include "plan.h"
#include "shared_layout.h"
#include "variant.h"

namespace mnv2_fused::cuda {

// Rates of a multiprocessor in a cycle: bytes of shared memory; by generation multiply-adds of float, and
// multiply-adds of half precision by mma.sync with float sums. The last are published rates, for 9.0 the
// 62 % of them that mma.sync reaches (only wgmma reaches all).
constexpr double kSharedBytes = 128;
struct Rates {
  int64_t capability;
  double fma, mma;
};
constexpr Rates kRates[] = {{120, 128, 512}, {100, 128, 1024}, {90, 128, 1270},
                            {86, 128, 512},  {80, 64, 1024},   {75, 64, 512}};
constexpr int64_t kSchedulers = 4;  // of a multiprocessor
// Warp instructions that a scheduler issues in a cycle: for one warp alone, and at best.
constexpr double kIssuedAlone = 0.3, kIssued = 0.8;
// Share of the rates of shared memory and tensor cores that a mix of instructions reaches.
constexpr double kReached = 0.85;
constexpr double kBarrierCycles = 40;
// Bytes from L2 for each multiprocessor, a cycle.
constexpr double kL2Bytes = 40;

// One candidate of the planner.
struct Choice {
  int64_t images, tile_rows, tile_cols;
  Variant variant;
  int64_t group_panels, splits;
};

inline Rates rates_of(const Gpu& gpu) {
  for (const Rates& r : kRates)
    if (gpu.capability >= r.capability) return r;
  throw std::invalid_argument("the CUDA kernel needs compute capability 7.5, this GPU has " +
                              std::to_string(gpu.capability / 10) + "." +
                              std::to_string(gpu.capability % 10));
}

// Work of a thread block on its multiprocessor.
struct Work {
  double instructions = 0;  // of the busiest warp
  double issued = 0;        // of all warps
  double fma = 0, mma = 0;  // multiply-adds
  double shared = 0;        // bytes
};

// Counts of instructions were read off the loops in the machine code of sm_90, and rounded.
class WorkCount {
 public:
  // pixels: of e, of one tile; out: panels of outputs, 0 in the first pass of a squeeze-and-excite.
  WorkCount(const BlockShape& s, Precision precision, const Choice& c, double pixels, int64_t warps,
            double out)
      : s_(s),
        v_(c.variant),
        element_(double(element_size(precision))),
        quad_(4 * element_ * kLanes),
        wide_(element_ == 4),
        exact_(precision == Precision::kFloat32),
        pixels_(pixels),
        warps_(warps),
        out_(out),
        panels_(double(ceil_div(s.hidden_panels(), c.splits))),
        rows_(2.0 * double(v_.tiles)),
        in_(double(expand_panels(s))),
        taps_(double(s.taps())) {
    static_assert(kPrecisions == 4, "a new precision needs its counts here");
  }

  Work work() {
    if (s_.expand != Expand::kNone)
      add_expand();
    else
      add_copy_of_e();
    add_depthwise_and_project();
    add_copy_of_weights();
    add_load_and_store();
    return w_;
  }

 private:
  // Instructions, and bytes from shared memory, of a product of 16 x 16 x 16 whose weights `shared_by`
  // products share.
  std::array<double, 2> product(double shared_by) const {
    const double each = exact_  ? 256 + 16 / shared_by
                        : wide_ ? 12 + 10 / shared_by
                                : 2 + 1 / shared_by;
    return {each, exact_ ? 16 * 512 : kLanes * 8 * element_ / shared_by};
  }
  double& products() { return exact_ ? w_.fma : w_.mma; }

  void add_expand() {
    const double tiles = pixels_ / 16;
    const double rounds = double(ceil_div(ceil_div(int64_t(pixels_), 16), warps_));
    const auto [instructions, bytes] = product(double(v_.expand_tiles));
    const double loads = 3.0 / double(v_.expand_panels);
    // A lane's share of 16 pixels and channels is 8 elements.
    const double each = in_ * (instructions + loads) + 30 + 14 / double(v_.expand_panels) +
                        8 * row_of(s_.expand_activation).gpu_instructions;
    w_.instructions += rounds * panels_ * each;
    w_.issued += tiles * panels_ * each;
    w_.shared +=
        tiles * panels_ * (in_ * (bytes + 2 * quad_ / double(v_.expand_panels)) + 2 * quad_);
    products() += tiles * panels_ * in_ * 4096;
  }

  // Copies, with their addresses, where e is x itself.
  void add_copy_of_e() {
    const double each = pixels_ * 2 * element_ / 4 / kLanes * 20;
    w_.instructions += panels_ * each / double(warps_);
    w_.issued += panels_ * each;
    w_.shared += panels_ * pixels_ * 16 * element_;
  }

  // Instructions of a panel's depthwise for one warp, in which a lane reads `lines` rows of e.
  double depthwise_instructions(double kernel, double lines) const {
    // Widened loads, and multiply-adds of float.
    if (wide_) return kernel * lines + (8 + 4 * taps_) * rows_ + 40;
    // On tensor cores two rows take 12 products, or 30 of five taps.
    if (s_.kernel == 3) return kernel * lines + 16 * rows_ + 50;
    if (s_.kernel == 5) return kernel * lines + 25 * rows_ + 95;
    throw std::invalid_argument("kernel must be 3 or 5, got " + std::to_string(s_.kernel));
  }

  void add_depthwise_and_project() {
    const double kernel = double(s_.kernel), warps = double(warps_), tiles = double(v_.tiles);
    const double lines = (rows_ - 1) * double(s_.stride) + kernel;
    // Four channels of a lane's rows.
    const double depthwise =
        depthwise_instructions(kernel, lines) + 4 * rows_ * row_of(s_.activation).gpu_instructions;
    const auto [instructions, bytes] = product(tiles);
    const double project = out_ * tiles * instructions;
    w_.instructions += panels_ * (depthwise + project);
    w_.issued += warps * panels_ * (depthwise + project);
    w_.shared +=
        warps * panels_ * (kernel * lines * quad_ + kernel / 3 * 8 * 128 + out_ * tiles * bytes);
    (wide_ ? w_.fma : w_.mma) += warps * panels_ * rows_ * taps_ * (wide_ ? 4 * kLanes : 1024);
    products() += warps * panels_ * out_ * tiles * 4096;
  }

  // 16 bytes a copy.
  void add_copy_of_weights() {
    const double copies = ((in_ + out_) * 256 * element_ + (taps_ + 2) * 64) / 16 / kLanes * 6;
    w_.instructions += panels_ * copies / double(warps_);
    w_.issued += panels_ * copies;
  }

  // Before and after the groups: addresses, copies and clearing; bias, residual and stores.
  void add_load_and_store() {
    const double store = 120 + (out_ > 0 ? rows_ * out_ * 14 : panels_ * 24);
    // A stem's image is copied channel by channel, with the starts of windows; x 16 bytes a copy.
    const bool stem = s_.expand == Expand::kStem;
    const double image_pixels = pixels_ * double(kStemStride * kStemStride);
    const double copied =
        stem ? image_pixels * 40 + pixels_ * 30 : pixels_ * in_ * 2 * element_ / 4 * 20;
    const double load = (copied + pixels_ * 20) / kLanes / double(warps_) + 200;
    w_.instructions += store + load;
    w_.issued += double(warps_) * (store + load);
    w_.shared += (stem ? image_pixels * double(kStemChannels) : pixels_ * in_ * 16) * element_;
  }

  const BlockShape& s_;
  const Variant& v_;
  const double element_, quad_;  // bytes; of a quad in all lanes
  const bool wide_, exact_;      // elements of four bytes; float32 products
  const double pixels_;
  const int64_t warps_;
  const double out_, panels_, rows_, in_, taps_;
  Work w_;
};

// Cycles of one wave of `blocks` thread blocks on each multiprocessor, without barriers.
inline double wave_cycles(const Work& w, const Rates& rates, Precision precision, int64_t blocks,
                          int64_t warps) {
  const double mma = rates.mma / (element_size(precision) == 4 ? 2 : 1), n = double(blocks);
  const double warps_each = double(blocks * warps) / double(kSchedulers);
  const double issue = std::min(kIssued, kIssuedAlone * std::max(warps_each, 1.0));
  return std::max({n * w.issued / kSchedulers / issue, w.instructions / kIssuedAlone,
                   n * w.fma / rates.fma / kReached, n * w.mma / mma / kReached,
                   n * w.shared / kSharedBytes / kReached});
}

}  // namespace mnv2_fused::cuda
