// The inverted residual as one kernel on tensor cores, a group of expanded channels at a time:
//
//   e = relu6(x W_e + b_e), 0 outside the image     d = relu6(depthwise3x3(e) + b_d)
//   y = d W_p + b_p (+ x)
//
// or what a block has in their place: another activation, 5x5, dilation, padding, an activation of the
// output, a squeeze-and-excite, a network's stem in place of the expansion.
//
// A thread block owns a tile of outputs. x of the tile and its halo lies in shared memory; a group
// of e goes there, too; d goes from the depthwise straight into the registers that the second
// product reads, whose sums stay in registers over all groups. Two barriers a group.
//
// Everything is in panels of 16 channels, of which a lane holds a quad, four neighbouring ones:
// 4 t to 4 t + 3, t being lane % 4. That is not how PTX numbers a fragment's channels, but the order
// of a sum's terms is free, and so are the columns of e and y, as long as the weights have the same
// (fold.py puts them so). A quad is one load, and the results of a product are quads again. In shared
// memory a panel of all pixels lies together: eight pixels' quads fill the banks exactly.
//
// In half precision tensor cores do the depthwise, too: a tap of 8 channels is a product with a
// diagonal matrix. Seven of eight terms are zeros, and yet it takes a third of the instructions that
// widening and multiply-adds of float take.
//
// A warp's rows of the second product are outputs: lane / 4 is one of eight strips, a column of
// 2 kTiles outputs, so that a lane slides down its strip and reads each row of e once.
#pragma once

#ifdef __CUDACC__
#include "device.cuh"
#else
#include "emulated_device.h"
#endif

#include "kernel.h"

namespace mnv2_fused::cuda {

// How activations are stored, four channels at a time, and multiplied.
template <Precision kPrecision>
struct Numbers {  // float: kTf32 and kFloat32
  using Element = float;
  using Quad = uint4;
  static MNV2_DEVICE float4 widen(Quad q) {
    return {float_of(q.x), float_of(q.y), float_of(q.z), float_of(q.w)};
  }
  static MNV2_DEVICE Quad narrow(float4 v) {
    return {bits_of(v.x), bits_of(v.y), bits_of(v.z), bits_of(v.w)};
  }
  static MNV2_DEVICE Quad narrow_relu6(float4 v) {
    return narrow({relu6(v.x), relu6(v.y), relu6(v.z), relu6(v.w)});
  }
  static MNV2_DEVICE float widen(Element v) { return v; }
  static MNV2_DEVICE Element narrow(float v) { return v; }
  static MNV2_DEVICE Quad quad(const Element (&v)[4]) {
    return {bits_of(v[0]), bits_of(v[1]), bits_of(v[2]), bits_of(v[3])};
  }
};

// Of elements of two bytes.
MNV2_DEVICE uint2 quad_of_halves(const uint16_t (&v)[4]) {
  return {v[0] | uint32_t(v[1]) << 16, v[2] | uint32_t(v[3]) << 16};
}

template <>
struct Numbers<Precision::kHalf> {
  using Element = uint16_t;
  using Quad = uint2;
  static MNV2_DEVICE float4 widen(Quad q) {
    const float2 a = unpack_half(q.x), b = unpack_half(q.y);
    return {a.x, a.y, b.x, b.y};
  }
  static MNV2_DEVICE Quad narrow(float4 v) { return {pack_half(v.x, v.y), pack_half(v.z, v.w)}; }
  static MNV2_DEVICE Quad narrow_relu6(float4 v) {
    return {pack_relu6_half(v.x, v.y), pack_relu6_half(v.z, v.w)};
  }
  static MNV2_DEVICE float widen(Element v) { return unpack_half(v).x; }
  static MNV2_DEVICE Element narrow(float v) { return Element(pack_half(v, 0)); }
  static MNV2_DEVICE uint32_t pack(float low, float high) { return pack_half(low, high); }
  static MNV2_DEVICE Quad quad(const Element (&v)[4]) { return quad_of_halves(v); }
  static MNV2_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_half(c, a, b0, b1);
  }
  static MNV2_DEVICE void mma_8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    mma_half_8(c, a0, a1, b);
  }
  static constexpr uint32_t kExponent = 0x7c00;
};

template <>
struct Numbers<Precision::kBFloat16> {
  using Element = uint16_t;
  using Quad = uint2;
  static MNV2_DEVICE float4 widen(Quad q) {
    const float2 a = unpack_bfloat16(q.x), b = unpack_bfloat16(q.y);
    return {a.x, a.y, b.x, b.y};
  }
  static MNV2_DEVICE Quad narrow(float4 v) {
    return {pack_bfloat16(v.x, v.y), pack_bfloat16(v.z, v.w)};
  }
  static MNV2_DEVICE Quad narrow_relu6(float4 v) {
    return {pack_relu6_bfloat16(v.x, v.y), pack_relu6_bfloat16(v.z, v.w)};
  }
  static MNV2_DEVICE float widen(Element v) { return unpack_bfloat16(v).x; }
  static MNV2_DEVICE Element narrow(float v) { return Element(pack_bfloat16(v, 0)); }
  static MNV2_DEVICE uint32_t pack(float low, float high) { return pack_bfloat16(low, high); }
  static MNV2_DEVICE Quad quad(const Element (&v)[4]) { return quad_of_halves(v); }
  static MNV2_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_bfloat16(c, a, b0, b1);
  }
  static MNV2_DEVICE void mma_8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    mma_bfloat16_8(c, a0, a1, b);
  }
  static constexpr uint32_t kExponent = 0x7f80;
};

// Sums of a product over 16 channels by 16: of columns 4 t + 2 j and 4 t + 2 j + 1 for row lane / 4,
// then for that row + 8.
using Sums = float[2][4];

// c += a w for kTiles tiles of 16 rows, of which a holds the lane's quads of row lane / 4 and of that
// row + 8. w: fragments of 16 x 16 weights in shared memory.
template <Precision kPrecision, int kTiles>
MNV2_DEVICE void multiply(Sums (&c)[kTiles],
                          const typename Numbers<kPrecision>::Quad (&a)[kTiles][2], int w,
                          int lane) {
  if constexpr (kPrecision <= Precision::kBFloat16) {
    const uint4 b = load_shared<uint4>(w + lane * 16);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const uint32_t rows[4] = {a[i][0].x, a[i][1].x, a[i][0].y, a[i][1].y};
      Numbers<kPrecision>::mma(c[i][0], rows, b.x, b.y);
      Numbers<kPrecision>::mma(c[i][1], rows, b.z, b.w);
    }
  } else if constexpr (kPrecision == Precision::kTf32) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint4 b = load_shared<uint4>(w + (j * 32 + lane) * 16);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const uint4 &up = a[i][0], &low = a[i][1];
        const uint32_t first[4] = {round_tf32(up.x), round_tf32(low.x), round_tf32(up.y),
                                   round_tf32(low.y)};
        const uint32_t second[4] = {round_tf32(up.z), round_tf32(low.z), round_tf32(up.w),
                                    round_tf32(low.w)};
        mma_tf32(c[i][j], first, round_tf32(b.x), round_tf32(b.y));
        mma_tf32(c[i][j], second, round_tf32(b.z), round_tf32(b.w));
      }
    }
  } else {
    // Multiply-adds of float, 16 terms summed apart, since a sum over all channels would round each
    // to the size of the whole.
    static_assert(kTiles == 1, "registers");
    const int t = lane % 4;
    float row[2][16];
#pragma unroll
    for (int from = 0; from < 4; ++from) {
      const int source = lane - t + from;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float4 v = Numbers<kPrecision>::widen(a[0][r]);
        row[r][4 * from] = from_lane(v.x, source);
        row[r][4 * from + 1] = from_lane(v.y, source);
        row[r][4 * from + 2] = from_lane(v.z, source);
        row[r][4 * from + 3] = from_lane(v.w, source);
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int col = 0; col < 2; ++col) {
        float sum[2] = {0, 0};
#pragma unroll
        for (int from = 0; from < 4; ++from) {
          const float4 b = load_shared<float4>(w + (j * 32 + (2 * t + col) * 4 + from) * 16);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            sum[r] += row[r][4 * from] * b.x;
            sum[r] += row[r][4 * from + 1] * b.y;
            sum[r] += row[r][4 * from + 2] * b.z;
            sum[r] += row[r][4 * from + 3] * b.w;
          }
        }
        c[0][j][col] += sum[0];
        c[0][j][2 + col] += sum[1];
      }
    }
  }
}

// The quad that sums make for row lane / 4 + 8 lower.
MNV2_DEVICE float4 quad_of(const Sums& c, int lower) {
  return {c[0][2 * lower], c[0][2 * lower + 1], c[1][2 * lower], c[1][2 * lower + 1]};
}

// The other way, for both rows.
MNV2_DEVICE void start_at(Sums& c, const float4& v) {
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    c[0][2 * lower] = v.x;
    c[0][2 * lower + 1] = v.y;
    c[1][2 * lower] = v.z;
    c[1][2 * lower + 1] = v.w;
  }
}

// Where a thread block's outputs are, and the part of its input that lies in the image.
struct Tile {
  int first_image, images;
  int row, col;                // of the first output
  int rows, cols;              // of outputs, inside the image
  int in_row, in_col;          // of the first pixel in the image
  int image_rows, image_cols;  // of pixels in the image
  int e_row, e_col;            // of the first pixel in the image, within e
  int pixels;                  // in the image, of all images
  int step;                    // from one row or column to the next, of outputs and pixels
};

MNV2_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
MNV2_DEVICE int larger(int a, int b) { return a > b ? a : b; }

// A part of one side of the image: outputs and pixels that are dilated apart.
struct Side {
  int out, outs;         // the first output, and how many
  int in, ins, e_first;  // the first pixel in the image, how many, and where in e
};

// phase: which of the ordinary convolutions that a dilated one is made of; from: its first output.
template <int kKernel, int kStride>
MNV2_DEVICE Side side_of(int phase, int from, int tile, int dilation, int pad, int out_size,
                         int size) {
  const int before = phase * kStride - pad, first = from * kStride;  // before: of tap 0, output 0
  const int start = larger(first, before < 0 ? (dilation - 1 - before) / dilation : 0);
  const int end =
      smaller(first + (tile - 1) * kStride + kKernel, (size - before + dilation - 1) / dilation);
  return {phase + from * dilation,
          smaller(tile, (out_size - phase + dilation - 1) / dilation - from),
          before + start * dilation, larger(end - start, 0), start - first};
}

// A dilated convolution is several ordinary ones between each other: a tile is of one of them, and of
// any padding.
template <int kKernel, int kStride>
MNV2_DEVICE Tile dilated_tile_of(const Args& a) {
  int index = block_index();
  const auto next = [&](int count) {
    const int rest = index % count;
    index /= count;
    return rest;
  };
  const auto parts = [](int size, int part) { return (size + part - 1) / part; };
  const auto side = [&](int tile, int pad, int out_size, int size) {
    const int phase = next(smaller(a.dilation, out_size));
    const int from = next(parts(parts(out_size, a.dilation), tile)) * tile;
    return side_of<kKernel, kStride>(phase, from, tile, a.dilation, pad, out_size, size);
  };
  const Side col = side(a.tile_cols, a.pad_left, a.out_width, a.width);
  const Side row = side(a.tile_rows, a.pad_top, a.out_height, a.height);
  const int first_image = index * a.images, images = smaller(a.images, a.batch - first_image);
  return {first_image,
          images,
          row.out,
          col.out,
          row.outs,
          col.outs,
          row.in,
          col.in,
          row.ins,
          col.ins,
          row.e_first,
          col.e_first,
          images * row.ins * col.ins,
          a.dilation};
}

template <Form kForm, int kStride>
MNV2_DEVICE Tile tile_of(const Args& a) {
  if constexpr (is_general(kForm)) return dilated_tile_of<int(kernel_of(kForm)), kStride>(a);
  constexpr int stride = kStride;
  const int index = block_index();
  const int across = int(ceil_div(a.out_width, a.tile_cols));
  const int down = int(ceil_div(a.out_height, a.tile_rows));
  Tile t;
  t.col = index % across * a.tile_cols;
  t.row = index / across % down * a.tile_rows;
  t.first_image = index / across / down * a.images;
  t.images = smaller(a.images, a.batch - t.first_image);
  t.rows = smaller(a.tile_rows, a.out_height - t.row);
  t.cols = smaller(a.tile_cols, a.out_width - t.col);
  t.in_row = larger(t.row * stride - 1, 0);
  t.in_col = larger(t.col * stride - 1, 0);
  t.image_rows = smaller((t.row + a.tile_rows - 1) * stride + 2, a.height) - t.in_row;
  t.image_cols = smaller((t.col + a.tile_cols - 1) * stride + 2, a.width) - t.in_col;
  t.e_row = t.in_row - (t.row * stride - 1);
  t.e_col = t.in_col - (t.col * stride - 1);
  t.pixels = t.images * t.image_rows * t.image_cols;
  t.step = 1;
  return t;
}

// A lane's outputs: rows from `row` on of one column.
struct Strip {
  int image, row, col;  // within the tile
  bool exists;          // lanes without one repeat the last
};

MNV2_DEVICE Strip strip_of(const Args& a, int images, int rows) {
  const int down = int(ceil_div(a.tile_rows, rows));
  const int strips = images * down * a.tile_cols, index = thread_index() / 4;
  const int clamped = smaller(index, strips - 1);
  return {clamped / a.tile_cols / down, clamped / a.tile_cols % down * rows, clamped % a.tile_cols,
          index < strips};
}

// A column of e among e's pixels: at stride 2 the even ones come first, so that the windows of
// neighbouring outputs read neighbours.
template <int kStride>
MNV2_DEVICE int e_column(int col, int e_cols) {
  return kStride == 1 ? col : col / 2 + (col % 2) * (e_cols + 1) / 2;
}

template <int kStride>
MNV2_DEVICE void note_places(const Args& a, const Tile& tile, int threads) {
  for (int i = threadIdx.x; i < tile.pixels; i += threads) {
    const int col = i % tile.image_cols, line = i / tile.image_cols;
    const int row = line % tile.image_rows, image = line / tile.image_rows;
    const int e_line = image * a.e_rows + tile.e_row + row;
    const int place = e_line * a.e_cols + e_column<kStride>(tile.e_col + col, a.e_cols);
    store_shared(a.shared.places + 2 * i, uint16_t(place));
  }
}

// Channels of `panels` panels of x into shared memory, pixel by pixel, four lanes to a pixel: to its
// own place in e if there is such a list, else side by side.
template <Precision kPrecision>
MNV2_DEVICE void copy_x(const Args& a, const Tile& tile, int first_panel, int panels, int to,
                        int to_panel, int places, int threads) {
  using Element = typename Numbers<kPrecision>::Element;
  constexpr int kElements = 16 / sizeof(Element), kChunks = kPanel / kElements;
  for (int i = threadIdx.x / 4; i < tile.pixels; i += threads / 4) {
    const int col = i % tile.image_cols, line = i / tile.image_cols;
    const int row = line % tile.image_rows, image = line / tile.image_rows;
    const Element* const pixel =
        static_cast<const Element*>(a.x) + (tile.first_image + image) * a.x_image +
        (tile.in_row + row * tile.step) * a.x_row + (tile.in_col + col * tile.step) * a.x_col;
    const int place = places < 0 ? i : int(load_shared<uint16_t>(places + 2 * i));
    for (int chunk = threadIdx.x % 4; chunk < panels * kChunks; chunk += 4) {
      const int at = to + chunk / kChunks * to_panel + (place * kChunks + chunk % kChunks) * 16;
      const int channel = first_panel * int(kPanel) + chunk * kElements;
      if (a.x_vectors && channel < a.in_channels) {
        copy_16(at, pixel + channel);
      } else {
        for (int k = 0; k < kElements; ++k) {
          const bool exists = channel + k < a.in_channels;
          store_shared(at + k * int(sizeof(Element)),
                       exists ? load_written(pixel + channel + k) : Element(0));
        }
      }
    }
  }
}

// The image under a tile's windows of the stem into shared memory, a quad a pixel, zeros around it; and
// where in it the windows begin.
template <Precision kPrecision>
MNV2_DEVICE void copy_image(const Args& a, const Tile& tile, int threads) {
  using N = Numbers<kPrecision>;
  using Element = typename N::Element;
  constexpr int kQuad = sizeof(typename N::Quad);
  const int rows = int(stem_rows(tile.image_rows)), cols = int(stem_rows(tile.image_cols));
  const int pitch = a.shared.x_panel / kQuad;
  for (int i = threadIdx.x; i < tile.images * rows * cols; i += threads) {
    const int col = i % cols, line = i / cols, row = line % rows, image = line / rows;
    const int at_row = tile.in_row * int(kStemStride) - 1 + row;
    const int at_col = tile.in_col * int(kStemStride) - 1 + col;
    const bool inside =
        at_row >= 0 && at_row < a.image_height && at_col >= 0 && at_col < a.image_width;
    const int64_t at_image = tile.first_image + image;
    const Element* const from = static_cast<const Element*>(a.x) + at_image * a.x_image +
                                at_row * a.x_row + at_col * a.x_col;
    Element v[4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
      v[k] = inside && k < a.in_channels ? load_written(from + k * a.x_channel) : Element(0);
    store_shared(((image * a.image_rows + row) * pitch + col) * kQuad, N::quad(v));
  }
  for (int i = threadIdx.x; i < tile.pixels; i += threads) {
    const int col = i % tile.image_cols, line = i / tile.image_cols;
    const int row = line % tile.image_rows, image = line / tile.image_rows;
    const int window =
        (image * a.image_rows + row * int(kStemStride)) * pitch + col * int(kStemStride);
    store_shared(a.shared.windows + 2 * i, uint16_t(window));
  }
  if (threadIdx.x == 0) store_shared(a.shared.zeros, uint4{0, 0, 0, 0});
}

MNV2_DEVICE void copy_bytes(int to, const void* from, int bytes, int threads) {
  for (int i = threadIdx.x * 16; i < bytes; i += threads * 16)
    copy_16(to + i, static_cast<const char*>(from) + i);
}

// Starts copying the weights of a group's panels.
template <Precision kPrecision, int kTaps, bool kProject>
MNV2_DEVICE void copy_weights(const Args& a, int stage, int first_panel, int panels, int first_out,
                              int out_panels, int threads) {
  const SharedLayout& l = a.shared;
  constexpr int kFragment = kPanel * kPanel * sizeof(typename Numbers<kPrecision>::Element);
  const int vector = kPanel * 4;  // bytes of one float for each of a panel's channels
  if (a.in_panels > 0) {
    const int one = a.in_panels * kFragment;
    copy_bytes(stage, static_cast<const char*>(a.w_expand) + int64_t(first_panel) * one,
               panels * one, threads);
    copy_bytes(stage + l.b_expand, a.b_expand + first_panel * kPanel, panels * vector, threads);
  }
  for (int p = 0; kProject && p < panels; ++p)
    copy_bytes(stage + l.w_project + p * out_panels * kFragment,
               static_cast<const char*>(a.w_project) +
                   (int64_t(first_panel + p) * a.out_panels + first_out) * kFragment,
               smaller(out_panels, a.out_panels - first_out) * kFragment, threads);
  copy_bytes(stage + l.w_depthwise, a.w_depthwise + first_panel * kTaps * kPanel,
             panels * kTaps * vector, threads);
  copy_bytes(stage + l.b_depthwise, a.b_depthwise + first_panel * kPanel, panels * vector, threads);
}

// A quad, zero where there is no such channel: 0 * Inf would give NaN.
MNV2_DEVICE void keep(uint2& q, int channels) {
  if (channels < 2) q.x &= channels < 1 ? 0 : 0xffffu;
  if (channels < 4) q.y &= channels < 3 ? 0 : 0xffffu;
}
MNV2_DEVICE void keep(uint4& q, int channels) {
  if (channels < 1) q.x = 0;
  if (channels < 2) q.y = 0;
  if (channels < 3) q.z = 0;
  if (channels < 4) q.w = 0;
}

MNV2_DEVICE float activated(float v, const ActivationArgs& f) {
  if (f.kind == Activation::kHardswish) return v * (clip(v + 3, 0, 6) * (1 / 6.f));
  if (f.kind == Activation::kSilu) return divide(v, 1 + exponential(-v));
  return clip(v, f.low, f.high);
}
MNV2_DEVICE float4 activated(float4 v, const ActivationArgs& f) {
  return {activated(v.x, f), activated(v.y, f), activated(v.z, f), activated(v.w, f)};
}

template <Precision kPrecision, Form kForm>
MNV2_DEVICE typename Numbers<kPrecision>::Quad narrow_activated(float4 v, const Args& a) {
  if constexpr (!is_general(kForm))
    return Numbers<kPrecision>::narrow_relu6(v);
  else
    return Numbers<kPrecision>::narrow(activated(v, a.expand_activation));
}

// Whether one of the numbers in two registers is infinite or NaN.
template <Precision kPrecision>
MNV2_DEVICE bool is_infinite(uint32_t two) {
  constexpr uint32_t kLow = Numbers<kPrecision>::kExponent, kHigh = kLow << 16;
  return (two & kLow) == kLow || (two & kHigh) == kHigh;
}

// e of kTiles tiles of 16 pixels, `apart` tiles from each other, and of kPanels panels. Returns, of a
// form whose activations allow it, whether any of it is infinite.
template <Precision kPrecision, Form kForm, bool kStem, int kTiles, int kPanels>
MNV2_DEVICE bool expand_tiles(const Args& a, int pixels, int tile, int apart, int w, int bias,
                              int e, int lane) {
  using N = Numbers<kPrecision>;
  using Quad = typename N::Quad;
  constexpr int kQuad = sizeof(Quad), kPixel = 4 * kQuad, kFragment = 64 * kQuad;
  const int t = lane % 4;
  Sums c[kPanels][kTiles];
#pragma unroll
  for (int p = 0; p < kPanels; ++p) {
    const float4 b = load_shared<float4>(bias + (p * 4 + t) * 16);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) start_at(c[p][i], b);
  }
  int row[kTiles][2], window[kTiles][2];
  const int to_row = kStem && t < 3 ? a.shared.x_panel : 0;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      row[i][lower] = (tile + i * apart) * 16 + lower * 8 + lane / 4;
      if (!kStem || !(kForm == Form::kStem || a.stem)) continue;
      // Three pixels of a row; what comes behind them may be infinite, and is not read.
      const int at = a.shared.windows + 2 * smaller(row[i][lower], pixels - 1);
      window[i][lower] = t < 3 ? (load_shared<uint16_t>(at) + t) * kQuad : a.shared.zeros;
    }
  }
#pragma unroll 1
  for (int q = 0; q < a.in_panels; ++q) {
    Quad x[kTiles][2];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const bool stem = kStem && (kForm == Form::kStem || a.stem);
        const int at =
            stem ? window[i][lower] + q * to_row
                 : q * a.shared.x_panel + smaller(row[i][lower], pixels - 1) * kPixel + t * kQuad;
        x[i][lower] = load_shared<Quad>(at);
      }
    }
#pragma unroll
    for (int p = 0; p < kPanels; ++p)
      multiply<kPrecision, kTiles>(c[p], x, w + (p * a.in_panels + q) * kFragment, lane);
  }
  bool infinite = false;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      if (row[i][lower] >= pixels) continue;
      const int place = load_shared<uint16_t>(a.shared.places + 2 * row[i][lower]);
#pragma unroll
      for (int p = 0; p < kPanels; ++p) {
        const Quad q = narrow_activated<kPrecision, kForm>(quad_of(c[p][i], lower), a);
        if constexpr (is_general(kForm) && kQuad == 8)
          infinite = infinite || is_infinite<kPrecision>(q.x) || is_infinite<kPrecision>(q.y);
        store_shared(e + p * a.shared.e_panel + place * kPixel + t * kQuad, q);
      }
    }
  }
  return infinite;
}

// A group of e at each pixel in the image; the rest of e is zero already. A step computes kTiles
// tiles of 16 pixels and kPanels panels. Returns what its tiles return.
template <Precision kPrecision, Form kForm, bool kStem, int kTiles, int kPanels>
MNV2_DEVICE bool expand(const Args& a, int pixels, int panel, int panels, int stage, int warps,
                        int lane) {
  using Quad = typename Numbers<kPrecision>::Quad;
  constexpr int kQuad = sizeof(Quad), kFragment = 64 * kQuad;
  const SharedLayout& l = a.shared;
  const int tiles = (pixels + 15) / 16;
  bool infinite = false;
  for (int p = 0; p < panels; p += kPanels) {
    const int w = stage + p * a.in_panels * kFragment;
    const int bias = stage + l.b_expand + p * int(kPanel) * 4;
    const int e = l.e + p * l.e_panel;
    const bool all = kPanels == 1 || p + 1 < panels;
    for (int i = int(threadIdx.x) / 32; i < tiles; i += kTiles * warps) {
      const bool two = kTiles == 2 && i + warps < tiles;
      bool found;
      if (two && all)
        found = expand_tiles<kPrecision, kForm, kStem, kTiles, kPanels>(a, pixels, i, warps, w,
                                                                        bias, e, lane);
      else if (two)
        found = expand_tiles<kPrecision, kForm, kStem, kTiles, 1>(a, pixels, i, warps, w, bias, e,
                                                                  lane);
      else if (all)
        found = expand_tiles<kPrecision, kForm, kStem, 1, kPanels>(a, pixels, i, warps, w, bias, e,
                                                                   lane);
      else
        found = expand_tiles<kPrecision, kForm, kStem, 1, 1>(a, pixels, i, warps, w, bias, e, lane);
      infinite = infinite || found;
    }
  }
  // Channels that do not exist are 0, not the 0 * Inf of their weights: a lane clears its own.
  const int channels = a.hidden_channels - panel * int(kPanel);
  if (channels >= panels * int(kPanel)) return infinite;
  for (int i = int(threadIdx.x) / 32; i < tiles; i += warps) {
    for (int row = i * 16 + lane / 4; row < smaller(i * 16 + 16, pixels); row += 8) {
      const int place = load_shared<uint16_t>(l.places + 2 * row), last = panels - 1;
      const int at = l.e + last * l.e_panel + (place * 4 + lane % 4) * kQuad;
      Quad q = load_shared<Quad>(at);
      keep(q, channels - last * int(kPanel) - lane % 4 * 4);
      store_shared(at, q);
    }
  }
  return infinite;
}

MNV2_DEVICE void multiply_add(float4& sum, const float4& a, const float4& b) {
  sum.x += a.x * b.x;
  sum.y += a.y * b.y;
  sum.z += a.z * b.z;
  sum.w += a.w * b.w;
}

// Bytes to a column of the windows from their first; odd: to the one beside that.
template <int kStride, int kPixel>
MNV2_DEVICE int beside_first(int col, int odd) {
  return kStride == 1 ? col * kPixel : col == 1 ? odd : (col == 3 ? odd : 0) + col / 2 * kPixel;
}

// finish(row, sum): a quad of d for each row of a strip. e: the quad at the strip's first row and
// column; odd: bytes to the column beside it.
template <Precision kPrecision, int kKernel, int kStride, int kTiles, class Finish>
MNV2_DEVICE void depthwise(typename Numbers<kPrecision>::Quad (&d)[kTiles][2], int e, int e_line,
                           int odd, int taps, int bias, Finish finish) {
  using N = Numbers<kPrecision>;
  using Quad = typename N::Quad;
  constexpr int kPixel = 4 * sizeof(Quad), kRows = 2 * kTiles;
  float4 sum[kRows];
  sum[0] = load_shared<float4>(bias);
#pragma unroll
  for (int o = 1; o < kRows; ++o) sum[o] = sum[0];
  // Column by column, which leaves only a column's taps in registers. In half precision this is the
  // way out for infinite input, which gets no registers of its own.
#pragma unroll sizeof(Quad) == 8 || kKernel == 5 ? 1 : 3
  for (int col = 0; col < kKernel; ++col) {
    const int beside = beside_first<kStride, kPixel>(col, odd);
    float4 tap[kKernel];
#pragma unroll
    for (int k = 0; k < kKernel; ++k)
      tap[k] = load_shared<float4>(taps + (kKernel * k + col) * int(kPanel) * 4);
#pragma unroll
    for (int row = 0; row < (kRows - 1) * kStride + kKernel; ++row) {
      const float4 v = N::widen(load_shared<Quad>(e + row * e_line + beside));
#pragma unroll
      for (int o = 0; o < kRows; ++o) {
        const int k = row - o * kStride;
        if (k >= 0 && k < kKernel) multiply_add(sum[o], v, tap[k]);
      }
    }
  }
#pragma unroll
  for (int o = 0; o < kRows; ++o) d[o / 2][o % 2] = finish(o, sum[o]);
}

// The taps of the depthwise as diagonal matrices, in the fragments of a product: lane 4 g + t has the
// rows 2 t and 2 t + 1 of column g, so that only lanes with g / 2 == t have anything. A column is the
// channel 4 (g / 2) + 2 j + g % 2, of a quad's first or second pair. For each g the columns of the
// window, of eight words each: j, then up to four rows; then, of five, j for the fifth.
template <Precision kPrecision, int kKernel>
MNV2_DEVICE void make_taps(const SharedLayout& l, int stage, int panels, int threads) {
  using N = Numbers<kPrecision>;
  constexpr int kColumn = int(column_words(kKernel)), kWords = kKernel * kColumn;
  for (int i = threadIdx.x; i < panels * 8 * kWords; i += threads) {
    const int word = i % kWords, g = i / kWords % 8, panel = i / (8 * kWords);
    const int col = word / kColumn, within = word % kColumn;
    const int row = within < 8 ? within % 4 : 4, j = within < 8 ? within / 4 : within - 8;
    if (row >= kKernel || j > 1) continue;
    const int tap = panel * kKernel * kKernel + row * kKernel + col;
    const int channel = g / 2 * 4 + j * 2 + g % 2;
    const float w = load_shared<float>(stage + l.w_depthwise + (tap * int(kPanel) + channel) * 4);
    const int at = l.taps + ((panel * 8 + g) * int(tap_words(kKernel)) + word) * 4;
    store_shared(at, g % 2 ? N::pack(0, w) : N::pack(w, 0));
  }
}

// The same on tensor cores. taps: those of the lane's g.
template <Precision kPrecision, int kKernel, int kStride, int kTiles, class Finish>
MNV2_DEVICE void depthwise_product(typename Numbers<kPrecision>::Quad (&d)[kTiles][2], int e,
                                   int e_line, int odd, int taps, int bias, int lane,
                                   Finish finish) {
  using N = Numbers<kPrecision>;
  using Quad = typename N::Quad;
  constexpr int kPixel = 4 * sizeof(Quad), kLines = (2 * kTiles - 1) * kStride + kKernel;
  constexpr int kColumn = int(column_words(kKernel)) * 4;
  Sums c[kTiles];
  const float4 b = load_shared<float4>(bias);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) start_at(c[i], b);
  const uint32_t diagonal = lane / 8 == lane % 4 ? ~0u : 0u;
#pragma unroll kFewRegisters || kKernel == 5 ? 1 : 3
  for (int col = 0; col < kKernel; ++col) {
    const int beside = beside_first<kStride, kPixel>(col, odd);
    Quad q[kLines];
#pragma unroll
    for (int line = 0; line < kLines; ++line)
      q[line] = load_shared<Quad>(e + line * e_line + beside);
    const uint4 w0 = load_shared<uint4>(taps + col * kColumn),
                w1 = load_shared<uint4>(taps + col * kColumn + 16);
    uint2 fifth = {};
    if constexpr (kKernel == 5) fifth = load_shared<uint2>(taps + col * kColumn + 32);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const Quad* const up = q + 2 * i * kStride;
      const Quad* const low = up + kStride;
      const uint32_t first[4] = {up[0].x, low[0].x, up[1].x, low[1].x};
      const uint32_t second[4] = {up[0].y, low[0].y, up[1].y, low[1].y};
      N::mma(c[i][0], first, w0.x & diagonal, w0.y & diagonal);
      if constexpr (kKernel == 3) {
        N::mma_8(c[i][0], up[2].x, low[2].x, w0.z & diagonal);
        N::mma(c[i][1], second, w1.x & diagonal, w1.y & diagonal);
        N::mma_8(c[i][1], up[2].y, low[2].y, w1.z & diagonal);
      } else {
        const uint32_t third[4] = {up[2].x, low[2].x, up[3].x, low[3].x};
        const uint32_t fourth[4] = {up[2].y, low[2].y, up[3].y, low[3].y};
        N::mma(c[i][0], third, w0.z & diagonal, w0.w & diagonal);
        N::mma_8(c[i][0], up[4].x, low[4].x, fifth.x & diagonal);
        N::mma(c[i][1], second, w1.x & diagonal, w1.y & diagonal);
        N::mma(c[i][1], fourth, w1.z & diagonal, w1.w & diagonal);
        N::mma_8(c[i][1], up[4].y, low[4].y, fifth.y & diagonal);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int lower = 0; lower < 2; ++lower)
      d[i][lower] = finish(2 * i + lower, quad_of(c[i], lower));
  }
}

// Whether e has an Inf or NaN, which a diagonal matrix would spread to other channels.
template <Precision kPrecision>
MNV2_DEVICE bool any_infinite(int e, int bytes, int threads) {
  bool found = false;
  for (int i = threadIdx.x * 16; i < bytes; i += threads * 16) {
    const uint4 v = load_shared<uint4>(e + i);
    for (const uint32_t two : {v.x, v.y, v.z, v.w}) found = found || is_infinite<kPrecision>(two);
  }
  return found;
}

// The quad at `from`, `channels` of it.
template <Precision kPrecision>
MNV2_DEVICE float4 load_quad(const typename Numbers<kPrecision>::Element* from, int channels,
                             bool vectors) {
  using N = Numbers<kPrecision>;
  using Quad = typename N::Quad;
  if (vectors && channels >= 4) return N::widen(load_written(reinterpret_cast<const Quad*>(from)));
  return {channels > 0 ? N::widen(load_written(from)) : 0.f,
          channels > 1 ? N::widen(load_written(from + 1)) : 0.f,
          channels > 2 ? N::widen(load_written(from + 2)) : 0.f,
          channels > 3 ? N::widen(load_written(from + 3)) : 0.f};
}

MNV2_DEVICE float4 load_floats(const float* from, int channels) {
  return load_quad<Precision::kFloat32>(from, channels, false);
}

template <Precision kPrecision>
MNV2_DEVICE void store_quad(typename Numbers<kPrecision>::Element* to, float4 v, int channels) {
  using N = Numbers<kPrecision>;
  if (channels > 0) store_global(to, N::narrow(v.x));
  if (channels > 1) store_global(to + 1, N::narrow(v.y));
  if (channels > 2) store_global(to + 2, N::narrow(v.z));
  if (channels > 3) store_global(to + 3, N::narrow(v.w));
}

// The sums of two panels, biased, to an output pixel. Of half precision, an even lane stores its own
// and its neighbour's quad of the first panel, an odd one those of the second.
template <Precision kPrecision>
MNV2_DEVICE void store_panels(const Args& a, float4 first, float4 second, int64_t pixel,
                              int channel, int lane, bool inside) {
  using N = Numbers<kPrecision>;
  using Element = typename N::Element;
  const int channels = a.out_channels;
  if (a.splits > 1) {
    const int64_t pixels = int64_t(a.batch) * a.out_height * a.out_width;
    float* const to = a.partial + (blockIdx.y * pixels + pixel) * channels + channel;
    if (!inside) return;
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      const float4& v = p ? second : first;
      const int left = channels - channel - p * int(kPanel);
      if (channels % 4 == 0 && left > 0)
        store_global(reinterpret_cast<float4*>(to + p * kPanel), v);
      else
        store_quad<Precision::kFloat32>(to + p * kPanel, v, left);
    }
    return;
  }
  Element* const to = static_cast<Element*>(a.y) + pixel * channels + channel;
  if (!a.y_vectors) {
    if (!inside) return;
    store_quad<kPrecision>(to, first, channels - channel);
    store_quad<kPrecision>(to + kPanel, second, channels - channel - int(kPanel));
  } else if constexpr (sizeof(Element) == 4) {
    if (!inside) return;
    if (channel < channels) store_global(reinterpret_cast<float4*>(to), first);
    if (channel + int(kPanel) < channels)
      store_global(reinterpret_cast<float4*>(to + kPanel), second);
  } else {
    const bool odd = lane % 2;
    const uint2 mine = N::narrow(odd ? second : first), other = N::narrow(odd ? first : second);
    const uint2 got = {exchange(other.x, 1), exchange(other.y, 1)};
    const uint4 both =
        odd ? uint4{got.x, got.y, mine.x, mine.y} : uint4{mine.x, mine.y, got.x, got.y};
    const int from = channel + (odd ? int(kPanel) - 4 : 0);
    if (inside && from < channels)
      store_global(reinterpret_cast<uint4*>(to + (odd ? int(kPanel) - 4 : 0)), both);
  }
}

// The sums over a warp's strips of d, which a lane has for its strip.
MNV2_DEVICE float4 summed_over_strips(float4 v) {
  for (int apart = 4; apart < 32; apart *= 2) {
    v = {v.x + float_of(exchange(bits_of(v.x), apart)),
         v.y + float_of(exchange(bits_of(v.y), apart)),
         v.z + float_of(exchange(bits_of(v.z), apart)),
         v.w + float_of(exchange(bits_of(v.w), apart))};
  }
  return v;
}

// blockIdx: tile, split, out block. kTiles: of 16 outputs a warp's registers hold, of kOutPanels
// panels each. Without panels it is the first pass of a squeeze-and-excite.
template <Precision kPrecision, Form kForm, int kStride, int kTiles, int kOutPanels>
MNV2_DEVICE void inverted_residual(const Args& a) {
  using N = Numbers<kPrecision>;
  using Element = typename N::Element;
  using Quad = typename N::Quad;
  constexpr int kRows = 2 * kTiles, kQuad = sizeof(Quad), kPixel = 4 * kQuad;
  constexpr int kFragment = 64 * kQuad;
  constexpr bool kProducts = sizeof(Element) == 2;
  constexpr bool kGeneral = is_general(kForm), kPool = kOutPanels == 0;
  constexpr int kKernel = int(kernel_of(kForm)), kTaps = kKernel * kKernel;
  constexpr Variant kVariant = variant_of(kTiles, kOutPanels, kPrecision, kForm);
  constexpr int kExpandPanels = kFewRegisters ? 1 : int(kVariant.expand_panels);
  constexpr bool kStem = takes_stem(kForm, kVariant);
  const int threads = blockDim.x, warps = threads / 32;
  const int lane = threadIdx.x % 32, t = lane % 4;
  const bool expands = a.in_panels > 0;
  const int first_out = blockIdx.z * kOutPanels;
  const int out_panels = smaller(kOutPanels, a.out_panels - first_out);
  const SharedLayout& l = a.shared;
  const int first = blockIdx.y * a.panels_each;
  const int end = smaller(first + a.panels_each, a.hidden_panels);
  const auto start_weights = [&](int stage, int panel) {
    copy_weights<kPrecision, kTaps, !kPool>(a, stage, panel, smaller(a.group_panels, end - panel),
                                            first_out, kOutPanels, threads);
  };

  int stage = l.weights;
  start_weights(stage, first);
  previous_finishes();
  next_may_start();
  int pixels, e_at;
  int outs = 0;        // of a lane in the image, for its sum
  int gate_image = 0;  // which image's gate is its
  {
    const Tile tile = tile_of<kForm, kStride>(a);
    pixels = tile.pixels;
    if (kStem && (kForm == Form::kStem || a.stem))
      copy_image<kPrecision>(a, tile, threads);
    else if (expands)
      copy_x<kPrecision>(a, tile, 0, a.in_panels, 0, l.x_panel, -1, threads);
    note_places<kStride>(a, tile, threads);
    const Strip strip = strip_of(a, tile.images, kRows);
    e_at = l.e + (strip.image * a.e_rows + strip.row * kStride) * a.e_cols * kPixel +
           strip.col * kPixel + t * kQuad;
    if constexpr (kPool)
      outs = strip.exists && strip.col < tile.cols ? tile.rows - strip.row : 0;
    else if constexpr (kGeneral)
      gate_image = tile.first_image + strip.image;
  }
  for (int i = threadIdx.x * 16; i < a.group_panels * l.e_panel; i += threads * 16)
    store_shared(l.e + i, uint4{0, 0, 0, 0});

  const int odd = e_column<kStride>(1, a.e_cols) * kPixel;
  Sums c[kPool ? 1 : kOutPanels][kTiles] = {};
  for (int panel = first; panel < end; panel += a.group_panels) {
    const int panels = smaller(a.group_panels, end - panel);
    copies_finish();
    barrier();  // this group's weights are there, nobody reads the group before
    const int other = 2 * l.weights + l.stage - stage;
    if (panel + panels < end) start_weights(other, panel + panels);
    bool infinite = false;
    if constexpr (kProducts) make_taps<kPrecision, kKernel>(l, stage, panels, threads);
    if (expands) {
      const bool found = expand<kPrecision, kForm, kStem, kVariant.expand_tiles, kExpandPanels>(
          a, pixels, panel, panels, stage, warps, lane);
      if constexpr (kGeneral && kProducts)
        infinite = barrier_any(found);  // e is there
      else
        barrier();  // e is there, too
    } else {
      const Tile tile = tile_of<kForm, kStride>(a);
      copy_x<kPrecision>(a, tile, panel, panels, l.e, l.e_panel, l.places, threads);
      copies_finish();
      barrier();
      if constexpr (kProducts)
        infinite = barrier_any(any_infinite<kPrecision>(l.e, panels * l.e_panel, threads));
    }
#pragma unroll 1
    for (int p = 0; p < panels; ++p) {
      Quad d[kTiles][2];
      const int e = e_at + p * l.e_panel, bias = stage + l.b_depthwise + (p * 4 + t) * 16;
      float4 total = {0, 0, 0, 0}, gate = {1, 1, 1, 1};
      if constexpr (kGeneral && !kPool) {
        if (a.gate)
          gate = load_written(reinterpret_cast<const float4*>(
              a.gate + (int64_t(gate_image) * a.hidden_panels + panel + p) * kPanel + 4 * t));
      }
      const auto finish = [&](int row, float4 v) {
        if constexpr (!kGeneral) return N::narrow_relu6(v);
        v = activated(v, a.activation);
        if constexpr (kPool) {
          if (row < outs) total = {total.x + v.x, total.y + v.y, total.z + v.z, total.w + v.w};
          return Quad{};
        }
        return N::narrow({v.x * gate.x, v.y * gate.y, v.z * gate.z, v.w * gate.w});
      };
      if (!kProducts || infinite) {
        depthwise<kPrecision, kKernel, kStride, kTiles>(
            d, e, a.e_cols * kPixel, odd, stage + l.w_depthwise + (p * kTaps * 4 + t) * 16, bias,
            finish);
      } else if constexpr (kProducts) {
        depthwise_product<kPrecision, kKernel, kStride, kTiles>(
            d, e, a.e_cols * kPixel, odd, l.taps + (p * 8 + lane / 4) * int(tap_words(kKernel)) * 4,
            bias, lane, finish);
      }
      if constexpr (kPool) {
        total = summed_over_strips(total);
        const int64_t row = int64_t(block_index()) * warps + threadIdx.x / 32;
        if (lane < 4)
          store_global(reinterpret_cast<float4*>(
                           a.pooled + (row * a.hidden_panels + panel + p) * kPanel + 4 * t),
                       total);
      }
      const int w = stage + l.w_project + p * kOutPanels * kFragment;
#pragma unroll
      for (int r = 0; r < kOutPanels; ++r)
        if (r < out_panels) multiply<kPrecision, kTiles>(c[r], d, w + r * kFragment, lane);
    }
    stage = other;
  }
  if constexpr (kPool) return;

  const bool biased = a.splits == 1;
  const Tile tile = tile_of<kForm, kStride>(a);
  const Strip strip = strip_of(a, tile.images, kRows);
#pragma unroll
  for (int o = 0; o < kRows; ++o) {
    const bool inside = strip.exists && strip.row + o < tile.rows && strip.col < tile.cols;
    const int image = tile.first_image + strip.image;
    const int row = tile.row + (strip.row + o) * tile.step, col = tile.col + strip.col * tile.step;
    const int64_t pixel = (int64_t(image) * a.out_height + row) * a.out_width + col;
    const Element* const x =
        static_cast<const Element*>(a.x) + image * a.x_image + row * a.x_row + col * a.x_col;
#pragma unroll
    for (int r = 0; r < kOutPanels; r += 2) {
      const int channel = (first_out + r) * int(kPanel) + 4 * t;
      float4 v[2] = {quad_of(c[r][o / 2], o % 2), quad_of(c[r + 1][o / 2], o % 2)};
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const int from = channel + p * int(kPanel), left = biased ? a.out_channels - from : 0;
        const float4 b = load_floats(a.b_project + from, left);
        v[p] = {v[p].x + b.x, v[p].y + b.y, v[p].z + b.z, v[p].w + b.w};
        if (kGeneral && biased) v[p] = activated(v[p], a.out_activation);
        const int added = inside && a.residual ? left : 0;
        const float4 own = load_quad<kPrecision>(x + from, added, a.x_vectors);
        v[p] = {v[p].x + own.x, v[p].y + own.y, v[p].z + own.z, v[p].w + own.w};
      }
      if (r < out_panels) store_panels<kPrecision>(a, v[0], v[1], pixel, channel, lane, inside);
    }
  }
}

template <Precision kPrecision, Form kForm, int kStride, int kTiles, int kOutPanels>
MNV2_KERNEL(int(variant_of(kTiles, kOutPanels, kPrecision, kForm).most_warps* kLanes),
            int(variant_of(kTiles, kOutPanels, kPrecision, kForm).resident))
inverted_residual_kernel(const Args a) {
  inverted_residual<kPrecision, kForm, kStride, kTiles, kOutPanels>(a);
}

// The splits' sums in their order, so that every run gives the same bits; then bias, activation
// and residual. Four channels of a pixel a thread.
template <Precision kPrecision, bool kActivated>
MNV2_KERNEL(256, 1)
add_splits_kernel(const Args a) {
  using Element = typename Numbers<kPrecision>::Element;
  const int quads = int(ceil_div(a.out_channels, 4));
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t pixel = index / quads, pixels = int64_t(a.batch) * a.out_height * a.out_width;
  previous_finishes();
  next_may_start();
  if (pixel >= pixels) return;
  const int channel = int(index % quads) * 4, left = a.out_channels - channel;
  float4 sum = {0, 0, 0, 0};
  const auto add = [&](float4 v) { sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w}; };
  for (int split = 0; split < a.splits; ++split)
    add(load_quad<Precision::kFloat32>(
        a.partial + (split * pixels + pixel) * a.out_channels + channel, left,
        a.out_channels % 4 == 0));
  add(load_floats(a.b_project + channel, left));
  if constexpr (kActivated) sum = activated(sum, a.out_activation);
  if (a.residual) {
    const int64_t line = pixel / a.out_width;
    const Element* const x = static_cast<const Element*>(a.x) + line / a.out_height * a.x_image +
                             line % a.out_height * a.x_row + pixel % a.out_width * a.x_col +
                             channel;
    add(load_quad<kPrecision>(x, left, a.x_vectors));
  }
  store_quad<kPrecision>(static_cast<Element*>(a.y) + pixel * a.out_channels + channel, sum, left);
}

}  // namespace mnv2_fused::cuda
