// Arguments of the CPU's kernels on 8-bit integers; mnv2_fused/int8/layers.py says what they compute.
// Plain data: no torch.
#pragma once

#include "../plan.h"

namespace mnv2_fused::cpu {

template <>
struct ComputeOf<uint8_t> {
  using T = int32_t;
};

}  // namespace mnv2_fused::cpu

namespace mnv2_fused::cpu::int8 {

constexpr int64_t kProductRows = 32;  // of a ProductArgs that run together
constexpr int32_t kHighest = 255;     // of a uint8

// A convolution's weights and what follows its sums. Vectors are [C/16 * 16].
struct Stage {
  const void*
      weight;  // of a product [C/16][K/depth][16][depth], of a depthwise [C/16][k][quads][16][depth]
  const int32_t* bias;
  const float *multiplier, *low, *high, *scale;
  int32_t zero;
  ActivationFunction activation;  // identity: low and high are all
};

// Squeeze-and-excite, see layers.py.
struct Squeeze {
  const float* mean_scale;   // [E/16 * 16]
  const float* gated_scale;  // [E/16 * 16]
  int32_t mean_zero;
  Stage reduce, excite;
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

// Bytes of one worker's scratch, part by part.
struct Scratch {
  int64_t ring, sums, depthwise, rows;

  Scratch(const BlockShape& s, const Plan& p, int64_t depth, int64_t element)
      : ring(room(p.expanded_elements(s) * 4)),
        sums(room(p.tile_rows * p.tile_cols * round_up(s.out_channels, kPanel) * 4)),
        depthwise(room(p.depthwise_elements() * element)),
        rows(room(p.ring_rows(s) * p.in_cols(s) * round_up(terms(s), depth) * element + 64)) {}
  int64_t total() const { return ring + sums + depthwise + rows; }

  // Products that an expanded element sums.
  static int64_t terms(const BlockShape& s) {
    return s.expand == Expand::kNone ? 1 : s.in_channels * (s.expand == Expand::kStem ? 9 : 1);
  }

 private:
  static int64_t room(int64_t bytes) { return round_up(bytes, 64); }
};

struct Kernels {
  int64_t depth;    // elements side by side in packed weights
  int64_t element;  // bytes of such an element
  int64_t lanes;    // sums in a vector
  void (*run_tile)(const BlockCall&, const Plan&, int64_t task, char* scratch);
  void (*run_product)(const ProductArgs&, int64_t begin, int64_t end, char* scratch);  // rows
  // q of one row of pixels: x[col * col_step + channel * channel_step].
  void (*quantize_row)(const float* x, int64_t cols, int64_t channels, int64_t col_step,
                       int64_t channel_step, float inverse_scale, int32_t zero, uint8_t* q);
  void (*mean)(const int32_t* sums, int64_t count, const float* scale, float pixels, int32_t zero,
               uint8_t* q);
  void (*gate)(const float* v, int64_t count, Gate gate, const float* scale, float* factors);
};

namespace avx512_vnni {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace portable {
extern const Kernels kKernels;
}

}  // namespace mnv2_fused::cpu::int8
