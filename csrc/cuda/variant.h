// Compiled kernels: forms of blocks, and sizes of register tiles. No torch, no CUDA.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "../block.h"
#include "precision.h"

namespace mnv2_fused::cuda {

constexpr int64_t kLanes = 32;
// Strips of a warp; a strip is a column of 2 or 4 outputs.
constexpr int64_t kStripsPerWarp = 8;

// Blocks that one kernel takes: MobileNetV2's own; any block with a depthwise kernel of 3x3, or of
// 5x5; MobileNetV2's stem with its first block.
enum class Form : int8_t { kMobileNetV2, kGeneral3x3, kGeneral5x5, kStem };

constexpr bool is_general(Form form) {
  return form == Form::kGeneral3x3 || form == Form::kGeneral5x5;
}
constexpr int64_t kernel_of(Form form) {
  switch (form) {
    case Form::kMobileNetV2:
    case Form::kGeneral3x3:
    case Form::kStem:
      return 3;
    case Form::kGeneral5x5:
      return 5;
  }
  throw std::invalid_argument("unknown form of a block");
}

inline Form form_of(const BlockShape& s) {
  if (s.kernel == 5) return Form::kGeneral5x5;
  if (s.kernel != 3) throw std::invalid_argument("the CUDA kernel takes kernel 3 or 5");
  bool plain = s.dilation == 1 && s.squeeze_channels == 0 && s.activation == Activation::kRelu6 &&
               s.expand_activation == Activation::kRelu6 &&
               s.out_activation == Activation::kIdentity;
  for (const int64_t pad : {s.pad_left, s.pad_right, s.pad_top, s.pad_bottom})
    plain = plain && pad == 1;
  if (!plain) return Form::kGeneral3x3;
  if (s.expand != Expand::kStem) return Form::kMobileNetV2;
  return s.stride == 1 && s.out_channels <= 2 * kPanel ? Form::kStem : Form::kGeneral3x3;
}

// One compiled kernel. Its limit is the 65536 registers of a multiprocessor: the sums take
// 8 * tiles * out_panels registers of a lane, depthwise and expansion 60 to 90 more.
struct Variant {
  int64_t tiles;          // of 16 outputs that a warp sums at once
  int64_t out_panels;     // of these outputs
  int64_t most_warps;     // of a thread block
  int64_t blocks_per_sm;  // thread blocks of most_warps that the registers of a multiprocessor hold
  int64_t expand_tiles, expand_panels;  // that a warp expands at once
};
constexpr Variant kVariants[] = {
    {2, 2, 7, 2, 2, 2}, {2, 4, 6, 2, 2, 2},  {1, 4, 7, 2, 2, 2},  {1, 6, 7, 2, 2, 1},
    {2, 6, 4, 2, 2, 2}, {1, 10, 6, 2, 2, 1}, {2, 10, 8, 1, 2, 2}, {1, 20, 8, 1, 2, 2},
};
// Few and small, since each is compiled for both depthwise kernels and both strides. Zero output
// panels: the first pass of a squeeze-and-excite, which sums d.
constexpr Variant kGeneralVariants[] = {
    {1, 4, 6, 2, 2, 1},
    {1, 10, 6, 2, 2, 1},
    {1, 0, 6, 2, 2, 1},
};
constexpr Variant kStemVariants[] = {{2, 2, 7, 2, 2, 2}, {1, 2, 7, 2, 2, 2}};

// Stems take registers that a lane with many sums lacks.
constexpr bool takes_stem(Form form, const Variant& v) {
  return form == Form::kStem || (is_general(form) && v.out_panels <= 4);
}
// Exact float32 products take twice the registers: two tiles or 20 panels are too many.
constexpr bool compiled(const Variant& v, Precision p) {
  return p != Precision::kFloat32 || (v.tiles == 1 && v.out_panels <= 10);
}

template <Form kForm>
constexpr auto& variants_of() {
  if constexpr (kForm == Form::kMobileNetV2) {
    return kVariants;
  } else if constexpr (kForm == Form::kStem) {
    return kStemVariants;
  } else {
    static_assert(is_general(kForm), "variants of a new form");
    return kGeneralVariants;
  }
}

// Calls f(variant) for each variant of a form.
template <class F>
constexpr void for_variants_of(Form form, F f) {
  const auto all = [&](const auto& variants) {
    for (const Variant& v : variants) f(v);
  };
  switch (form) {
    case Form::kMobileNetV2:
      return all(kVariants);
    case Form::kGeneral3x3:
    case Form::kGeneral5x5:
      return all(kGeneralVariants);
    case Form::kStem:
      return all(kStemVariants);
  }
  throw std::invalid_argument("unknown form of a block");
}

// The variant with these tiles and output panels, adapted to the registers of a precision.
constexpr Variant variant_of(int64_t tiles, int64_t out_panels, Precision p,
                             Form form = Form::kMobileNetV2) {
  Variant found{};
  for_variants_of(form, [&](Variant v) {
    if (v.tiles != tiles || v.out_panels != out_panels) return;
    if (p == Precision::kFloat32) v.expand_tiles = 1;
    if (v.out_panels == 10 &&
        (p == Precision::kFloat32 || (p == Precision::kTf32 && is_general(form))))
      v.most_warps = 4;
    if (element_size(p) == 4) {
      v.expand_panels = 1;
      if (v.blocks_per_sm == 2 && v.most_warps > 6) v.most_warps = 6;
    }
    found = v;
  });
  return found;
}

}  // namespace mnv2_fused::cuda
