// Compile-time constants of one kernel, for every stage.
#pragma once

#include "../args.h"
#include "../variant.h"
#include "product.cuh"

namespace mnv2_fused::cuda {

// kTiles: tiles of 16 outputs in a warp's registers, of kOutPanels panels each. Zero panels: the first
// pass of a squeeze-and-excite.
template <Precision kPrecisionOf, Form kFormOf, int kStrideOf, int kTilesOf, int kOutPanelsOf>
struct Config {
  static constexpr Precision kPrecision = kPrecisionOf;
  static constexpr Form kForm = kFormOf;
  static constexpr int kStride = kStrideOf, kTiles = kTilesOf, kOutPanels = kOutPanelsOf;

  using Traits = PrecisionTraits<kPrecision>;
  using Element = typename Traits::Element;
  using Quad = typename Traits::Quad;

  // Bytes of a quad, of a pixel's panel, and of a fragment of 16 x 16 weights.
  static constexpr int kQuad = sizeof(Quad), kPixel = 4 * kQuad, kFragment = 64 * kQuad;
  static constexpr int kRows = 2 * kTiles;  // of a strip
  static constexpr int kKernel = int(kernel_of(kForm)), kTaps = kKernel * kKernel;
  static constexpr int kTapWords = int(tap_words(kKernel));
  static constexpr int kColumnWords = int(column_words(kKernel));

  static constexpr bool kGeneral = is_general(kForm);
  static constexpr bool kPool = kOutPanels == 0;
  static constexpr bool kPairs = sizeof(Element) == 2;  // two elements to a register

  static constexpr Variant kVariant = variant_of(kTiles, kOutPanels, kPrecision, kForm);
  static constexpr bool kTakesStem = takes_stem(kForm, kVariant);
  static constexpr int kExpandTiles = int(kVariant.expand_tiles);
  static constexpr int kExpandPanels = kFewRegisters ? 1 : int(kVariant.expand_panels);

  // Sums of the second product in a lane's registers, over all groups.
  using OutSums = Sums[kPool ? 1 : kOutPanels][kTiles];
};

// Whether this call has a stem in place of the expansion: known when the kernel is compiled, except in a
// general form.
template <class C>
MNV2_DEVICE bool has_stem(const Args& a) {
  return C::kTakesStem && (C::kForm == Form::kStem || a.stem);
}

}  // namespace mnv2_fused::cuda
