// Arguments of the CPU's kernels on 8-bit integers; mnv2_fused/int8/layers.py says what they compute.
// Plain data: no torch.
#pragma once

#include <algorithm>

#include "../plan.h"

// GCC has had these instructions since 11.
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define MNV2_AVX_VNNI
#endif
// As MNV2_NEON_BF16.
#if defined(__aarch64__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ && defined(__linux__) && \
    !defined(__clang__)
#define MNV2_NEON_DOTS
#endif

namespace mnv2_fused::cpu {

template <>
struct ComputeOf<uint8_t> {
  using T = int32_t;
};

}  // namespace mnv2_fused::cpu

namespace mnv2_fused::cpu::int8 {

constexpr int64_t kProductRows = 32;  // of a ProductArgs that run together
constexpr int32_t kHighest = 255;     // of a uint8
constexpr int64_t kQuad = 4;          // elements that one dot product of a lane takes
constexpr int64_t kMostStemChannels = 16;
// Of L2, what plans may count on: with more, calls take no less time and more memory.
constexpr int64_t kMostL2 = int64_t{512} << 10;

// A convolution's weights and what follows its sums. Vectors are [C/16 * 16].
struct Stage {
  // Of a product [C/16][K/4][16][4], of a depthwise [C/16][k][phases][dots][16][4].
  const int8_t* weight;
  const int32_t* bias;
  const float *multiplier, *low, *high, *scale;
  int32_t zero;
  ActivationFunction activation;  // identity: low and high are all
  // Whether low and high are a uint8's own ends, and no rounded value leaves an int32: a conversion that
  // saturates is then all that bounds a value.
  bool saturates;
};

// Dot products that a row of taps takes: dilated, one for each tap.
constexpr int64_t row_dots(int64_t kernel, int64_t dilation) {
  return dilation > 1 ? kernel : ceil_div(kernel + 1, kQuad);
}
// Places that a row's first tap may have in the ring's pairs of columns.
inline int64_t phases(const BlockShape& s) { return s.stride_across() == 1 ? 2 : 1; }

// Squeeze-and-excite, see layers.py.
struct Squeeze {
  const float* mean_scale;   // [E/16 * 16]
  const float* gated_scale;  // [E/16 * 16]
  int32_t mean_zero;
  Stage reduce, excite;
  Gate gate;
};

struct BlockCall {
  BlockShape shape;
  const uint8_t* x;               // [N, H, W, C_in] by the strides below, channels side by side
  int64_t x_image, x_row, x_col;  // elements
  int32_t x_zero;
  float residual_scale;
  Stage expand, depthwise, project;
  uint8_t* y;  // [N, H', W', C_out]
  // Of a squeeze-and-excite:
  Pass pass = Pass::kLast;
  const float* factors = nullptr;  // [N][E/16 * 16], the last pass's factors of d
  int32_t* pooled = nullptr;       // [tasks][E/16 * 16], sums of d - zero of each tile
  // What the pool's pass keeps of d for the last, or null: [N][pixels][E/16 * 16], by tiles, groups, bands.
  char* cached = nullptr;
};

// Rows of uint8 times a matrix: 1x1 convolution of pixels, or a linear layer of images.
struct ProductArgs {
  const uint8_t* x;  // [rows][in]
  int64_t in, out;
  Stage stage;
  int64_t pitch;            // elements between rows of the result:
  uint8_t* y = nullptr;     // [rows][out], or
  float* real = nullptr;    // [rows][out]: float32(sum + bias) * multiplier, or
  int32_t* sums = nullptr;  // [out/16 * 16]: sums of q - zero over the rows
};

// The ring of expanded rows: [panels of the group][rows][1 + halves][16] quads, each the bytes of four
// columns of a channel. Quad h of a row begins at column 2h of the window, so a column is in two of them.
// The first, of columns -2 to 1, is there to be written alone.
struct Ring {
  int64_t halves;  // quads of a row that are read

  Ring(const BlockShape& s, int64_t tile_cols)
      : halves(ceil_div((tile_cols - 1) * s.stride_across() + s.extent(), 2)) {}
  // In quads:
  int64_t row() const { return (halves + 1) * kPanel; }
  int64_t panel(int64_t rows) const { return rows * row(); }
};

// Bytes of one worker's scratch, part by part.
struct Scratch {
  int64_t ring, padding, sums, depthwise, row;

  Scratch(const BlockShape& s, const Plan& p, int64_t element)
      : ring(room(p.group / kPanel * Ring(s, p.tile_cols).panel(p.ring_rows(s)) * 4)),
        padding(room(Ring(s, p.tile_cols).row() * 4)),
        sums(room(sum_rows(s, p) * p.tile_cols * round_up(s.out_channels, kPanel) * 4)),
        // Pixels are stored by fours.
        depthwise(room((p.depthwise_elements() + 3 * kPanel) * element)),
        row(room(Ring(s, p.tile_cols).halves * 2 * round_up(terms(s), kPanel) * element)) {}
  int64_t total() const { return ring + padding + sums + depthwise + row; }

  // Output rows whose sums are there at once: a band's where one group is all, else the tile's.
  static int64_t sum_rows(const BlockShape& s, const Plan& p) {
    return p.groups(s) == 1 ? p.band_rows : p.tile_rows;
  }
  // Products that an expanded element sums.
  static int64_t terms(const BlockShape& s) {
    return s.expand == Expand::kNone ? 1 : s.in_channels * (s.expand == Expand::kStem ? 9 : 1);
  }

 private:
#ifdef MNV2_SCRATCH_GAP  // of checks: bytes behind every part that no kernel touches
  static int64_t room(int64_t bytes) { return bytes + MNV2_SCRATCH_GAP; }
#else
  static int64_t room(int64_t bytes) { return round_up(bytes, 64); }
#endif
};

struct Kernels {
  int64_t element;  // bytes of an activation where products read it
  int64_t lanes;    // sums in a vector
  void (*run_tile)(const BlockCall&, const Plan&, int64_t task, char* scratch);
  void (*run_product)(const ProductArgs&, int64_t begin, int64_t end, char* scratch);  // rows
  // q of one row of pixels: x[col * col_step + channel * channel_step].
  void (*quantize_row)(const float* x, int64_t cols, int64_t channels, int64_t col_step,
                       int64_t channel_step, float inverse_scale, int32_t zero, uint8_t* q);
  void (*mean)(const int32_t* sums, int64_t count, const float* scale, float pixels, int32_t zero,
               uint8_t* q);
  void (*gate)(const float* v, int64_t count, Gate gate, const float* scale, float* factors);
  // Does rounds x operations_per_round operations of the products' kind, as isa.h's multiply_add.
  int32_t (*dots)(int64_t rounds);
  int64_t operations_per_round;

  Machine machine(int64_t threads, int64_t l2_bytes) const {
    return {threads, lanes, 4, element, kQuad, std::min(l2_bytes, kMostL2)};
  }
};

namespace avx512_vnni {
extern const Kernels kKernels;
}
#ifdef MNV2_AVX_VNNI
namespace avx2_vnni {
extern const Kernels kKernels;
}
#endif
namespace avx2 {
extern const Kernels kKernels;
}
#ifdef MNV2_NEON_DOTS
namespace neon_i8mm {
extern const Kernels kKernels;
}
namespace neon_dotprod {
extern const Kernels kKernels;
}
#endif
namespace portable {
extern const Kernels kKernels;
}

}  // namespace mnv2_fused::cpu::int8
