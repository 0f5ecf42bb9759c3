// Arguments of the CPU's training kernels: a block whose norms take their statistics from the batch. Plain
// data: no torch.
//
// x is the block's input, less its mean where that is far from 0, e = w_expand x + b_expand has the first
// norm folded in, d = w_depthwise * act(e) has none, and a = scale d + shift is d behind its norm.
// p = w_project act(a), or w_project (gate act(a)) where a squeeze-and-excite lies between.
#pragma once

#include <algorithm>

#include "../plan.h"

namespace mnv2_fused::cpu::training {

// Vectors past the last channel, in panels of 16, are zeros.
template <class T>
struct Args {
  BlockShape shape;
  const T* x;            // [N][H][W][C_in]
  const T* w_expand;     // [E/16][C_in][16]
  const T* b_expand;     // [E/16 * 16]
  const T* w_depthwise;  // [E/16][taps][16]
  // Of a squeeze-and-excite, or null. [N][E/16 * 16] each: factors of act(a), and what a factor's own
  // gradient adds to that of each act(a).
  const T *gate = nullptr, *of_pooled = nullptr;
  // Of the pass that projects:
  const T* w_output = nullptr;  // [C_out/16][E/16 * 16][16], w_project transposed
  T* p = nullptr;               // [N][H'][W'][C_out]
  // Of the two passes backward:
  const T* g = nullptr;          // [N][H'][W'][C_out], gradient of p
  const T* w_project = nullptr;  // [E/16][C_out][16]
  // [E/16 * 16] each, of every pass behind the statistics. Gradient of d:
  // scale * (gradient of a) + offset + slope * (d - mean) * inverse.
  const T *scale = nullptr, *shift = nullptr, *mean = nullptr, *inverse = nullptr;
  const T *offset = nullptr, *slope = nullptr;
  const T* w_input = nullptr;  // [C_in/16][E/16 * 16][16], w_expand transposed
  // The panels of expanded channels that passes run on.
  int64_t first_panel = 0, end_panel = 0;
  // What one pass writes and the next one reads instead of computing it again, or null: of these panels, for
  // each image, d and q as [panels][H' W'][16], act(e) as [panels][H][ring columns][16], see Layout.
  T *kept_e = nullptr, *kept_d = nullptr, *kept_q = nullptr;
  // Results, one after the other for each slot, of a squeeze-and-excite's passes for each image:
  double* sums = nullptr;     // [2][E/16 * 16], of each image kPooledSums or kGateSums rows
  T* dw_project = nullptr;    // [C_out][E/16 * 16]
  T* dw_expand = nullptr;     // [C_in][E/16 * 16]
  T* dw_depthwise = nullptr;  // [taps][E/16 * 16]
  T* g_x = nullptr;           // [N][H][W][C_in], of all slots together, or null
};

// Of an image: act(a). Backward: act(a) q, act'(a) q, act'(a), act'(a) q d^, act'(a) d^ with q = g w_project
// and d^ = (d - mean) * inverse.
constexpr int64_t kPooledSums = 1, kGateSums = 5;

// Images are shared out among slots, each with results of its own, which are then added up in order: so
// sums are the same whatever the number of threads.
// Few where pixels are few: results are as large as weights.
constexpr int64_t kMostSlots = 8, kSlotPixels = 96;
inline int64_t slots_of(const BlockShape& s) {
  const int64_t pixels = s.batch * s.out_height() * s.out_width();
  return std::clamp<int64_t>(pixels / kSlotPixels, 1, std::min(s.batch, kMostSlots));
}

// Panels of channels that run together at most, where a vector register holds `lanes`: as many as a
// register tile is wide.
#ifdef MNV2_MOST_PANELS  // of checks: several, whatever the vectors
constexpr int64_t most_panels(int64_t) { return MNV2_MOST_PANELS; }
#else
constexpr int64_t most_panels(int64_t lanes) { return lanes == kPanel ? 4 : 1; }
#endif
// Bytes of a worker's scratch that every L2 has room for, beside weights and x.
constexpr int64_t kNear = int64_t{128} << 10;

// How one chunk of an image lies in a worker's scratch, in elements: rings of rows of act(e) and of d's
// gradient, with zeros around the image's columns, and what belongs to a band of output rows.
struct Layout {
  int64_t panels;                // of a chunk
  int64_t band;                  // output rows
  int64_t ring_rows, ring_cols;  // of act(e)
  int64_t left;                  // its columns in front of the image
  int64_t grad_rows, grad_cols;  // of d's gradient, `stride_across` columns apart
  int64_t grad_left;
  int64_t out_pixels, in_pixels;  // of a band, at most
  bool keeps_e;                   // beside act(e), where that does not tell the derivative

  // The whole image where that is near, else as many rows of it. Fewer panels would leave register tiles
  // narrow, which costs more than it saves.
  Layout(const BlockShape& s, int64_t lanes, int64_t element, bool differentiates_e) {
    const int64_t across = s.stride_across(), spread = (s.out_width() - 1) * across;
    left = s.pad_left;
    ring_cols = left + std::max(s.width, spread + s.extent() - s.pad_left);
    grad_left = s.extent() - 1 - s.pad_left;
    grad_cols = grad_left + std::max(spread + 1, s.width + s.pad_left);
    keeps_e = differentiates_e && s.expand != Expand::kNone && !is_clip(s.expand_activation);
    panels = std::min(most_panels(lanes), s.hidden_panels());
    set_rows(s, s.out_height());
    while (band > 1 && total() * element > kNear) set_rows(s, ceil_div(band, 2));
  }

  int64_t ring() const { return panels * ring_panel(); }
  int64_t ring_panel() const { return ring_rows * ring_cols * kPanel; }
  int64_t grad() const { return panels * grad_panel(); }
  int64_t grad_panel() const { return grad_rows * grad_cols * kPanel; }
  int64_t out_panel() const { return out_pixels * kPanel; }
  int64_t in_panel() const { return in_pixels * kPanel; }
  int64_t zeros() const { return ring_cols * kPanel; }
  // Rings of act(e), of e and of d's gradient; d, q, and the gradient of e.
  int64_t total() const {
    return ring() * (keeps_e ? 2 : 1) + grad() + zeros() + panels * (2 * out_panel() + in_panel());
  }

 private:
  void set_rows(const BlockShape& s, int64_t rows) {
    band = rows;
    ring_rows = std::min(s.height, (band - 1) * s.stride + s.extent());
    grad_rows = std::min(s.out_height(), band + (s.extent() - 1) / s.stride);
    out_pixels = band * s.out_width();
    in_pixels = std::min(s.height, band * s.stride + s.extent() - 1) * s.width;
  }
};

constexpr int64_t kMostSlices = 16;
// Pixels that are summed in T before they go on in double.
constexpr int64_t kBlockPixels = 256;

// Of passes over a tensor of the block's own width, [pixels][channels].
template <class T>
struct NarrowArgs {
  int64_t pixels, channels;
  int64_t slices;
  const T* x;
  const T* g = nullptr;
  const T* added = nullptr;  // or null
  // [channels/16 * 16] each, see narrow.h.
  const T *mean = nullptr, *inverse = nullptr, *scale = nullptr, *offset = nullptr;
  const T* slope = nullptr;
  T* y = nullptr;
  // Results, one after the other for each slice:
  double* sums = nullptr;      // [2][channels/16 * 16]
  double* products = nullptr;  // [channels][channels/16 * 16]
};

template <class T>
struct Kernels {
  int64_t lanes;
  // Each runs the images of one slot. scratch: a layout's total.
  // sums: of d, the mean and the sum of squares less it.
  void (*statistics)(const Args<T>&, const Layout&, int64_t slot, T* scratch);
  // sums: of act(a), for each image.
  void (*pool)(const Args<T>&, const Layout&, int64_t slot, T* scratch);
  // p.
  void (*project)(const Args<T>&, const Layout&, int64_t slot, T* scratch);
  // sums: of a's gradient, and of its products with d's normalised values, or with a gate kGateSums for each
  // image; dw_project.
  void (*backward_project)(const Args<T>&, const Layout&, int64_t slot, T* scratch);
  // sums: of e's gradient, and nothing; dw_depthwise, dw_expand, g_x without what the first norm adds.
  void (*backward_expand)(const Args<T>&, const Layout&, int64_t slot, T* scratch);
  // Each runs one slice; see narrow.h.
  void (*moments)(const NarrowArgs<T>&, int64_t slice);
  void (*normalise)(const NarrowArgs<T>&, int64_t slice);
  void (*gradient_sums)(const NarrowArgs<T>&, int64_t slice);
  void (*gradient)(const NarrowArgs<T>&, int64_t slice);
  // scratch: [channels/16][kBlockPixels][16]
  void (*centre)(const NarrowArgs<T>&, int64_t slice, T* scratch);
};

struct AllKernels {
  Kernels<float> f32;
  Kernels<double> f64;
};

namespace avx512 {
extern const AllKernels kKernels;
}
namespace avx2 {
extern const AllKernels kKernels;
}
namespace neon {
extern const AllKernels kKernels;
}
namespace portable {
extern const AllKernels kKernels;
}

}  // namespace mnv2_fused::cpu::training
