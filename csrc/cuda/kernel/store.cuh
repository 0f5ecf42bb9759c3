// Results in global memory: bias, activation, residual; sums of d in the first of two passes.
#pragma once

#include "activation.cuh"
#include "load.cuh"

namespace mnv2_fused::cuda {

MNV2_DEVICE float4 added(const float4& a, const float4& b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// Quad at `from`, of which `channels` exist. vectors: whether it is aligned.
template <Precision kPrecision>
MNV2_DEVICE float4 load_quad(const typename PrecisionTraits<kPrecision>::Element* from,
                             int channels, bool vectors) {
  using N = PrecisionTraits<kPrecision>;
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
MNV2_DEVICE void store_quad(typename PrecisionTraits<kPrecision>::Element* to, float4 v,
                            int channels) {
  using N = PrecisionTraits<kPrecision>;
  if (channels > 0) store_global(to, N::narrow(v.x));
  if (channels > 1) store_global(to + 1, N::narrow(v.y));
  if (channels > 2) store_global(to + 2, N::narrow(v.z));
  if (channels > 3) store_global(to + 3, N::narrow(v.w));
}

// Place of two quads of outputs, one in each of two neighbouring panels.
struct OutputAt {
  int64_t pixel;
  int channel;  // of the first quad
  bool inside;  // whether the pixel exists
};

// Sums of one split, for add_splits_kernel.
MNV2_DEVICE void store_partial(const Args& a, const float4& first, const float4& second,
                               const OutputAt& at) {
  const int channels = a.out_channels;
  const int64_t pixels = int64_t(a.batch) * a.out_height * a.out_width;
  float* const to = a.partial + (blockIdx.y * pixels + at.pixel) * channels + at.channel;
  if (!at.inside) return;
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    const float4& v = p ? second : first;
    const int left = channels - at.channel - p * int(kPanel);
    if (channels % 4 == 0 && left > 0)
      store_global(reinterpret_cast<float4*>(to + p * kPanel), v);
    else
      store_quad<Precision::kFloat32>(to + p * kPanel, v, left);
  }
}

// Outputs of two panels. Of two-byte elements an even lane stores the quads of the first panel, its own
// and its neighbour's, an odd lane those of the second: 16 bytes each.
template <class C>
MNV2_DEVICE void store_panels(const Args& a, float4 first, float4 second, const OutputAt& at) {
  using Element = typename C::Element;
  if (a.splits > 1) return store_partial(a, first, second, at);
  const int channel = at.channel, channels = a.out_channels;
  Element* const to = static_cast<Element*>(a.y) + at.pixel * channels + channel;
  if (!a.y_vectors) {
    if (!at.inside) return;
    store_quad<C::kPrecision>(to, first, channels - channel);
    store_quad<C::kPrecision>(to + kPanel, second, channels - channel - int(kPanel));
  } else if constexpr (C::kPairs) {
    const bool odd = lane_index() % 2;
    const uint2 mine = C::Traits::narrow(odd ? second : first),
                other = C::Traits::narrow(odd ? first : second);
    const uint2 got = {shuffle_xor(other.x, 1), shuffle_xor(other.y, 1)};
    const uint4 both =
        odd ? uint4{got.x, got.y, mine.x, mine.y} : uint4{mine.x, mine.y, got.x, got.y};
    const int from = channel + (odd ? int(kPanel) - 4 : 0);
    if (at.inside && from < channels)
      store_global(reinterpret_cast<uint4*>(to + (odd ? int(kPanel) - 4 : 0)), both);
  } else {
    if (!at.inside) return;
    if (channel < channels) store_global(reinterpret_cast<float4*>(to), first);
    if (channel + int(kPanel) < channels)
      store_global(reinterpret_cast<float4*>(to + kPanel), second);
  }
}

// Sum over the strips of a warp, of each lane's quad.
MNV2_DEVICE float4 summed_over_strips(float4 v) {
  for (int apart = 4; apart < 32; apart *= 2) {
    v = {v.x + float_of(shuffle_xor(bits_of(v.x), apart)),
         v.y + float_of(shuffle_xor(bits_of(v.y), apart)),
         v.z + float_of(shuffle_xor(bits_of(v.z), apart)),
         v.w + float_of(shuffle_xor(bits_of(v.w), apart))};
  }
  return v;
}

// The warp's sum of d over its strips, for the mean of a squeeze-and-excite.
MNV2_DEVICE void store_pooled(const Args& a, float4 total, int panel) {
  total = summed_over_strips(total);
  const int64_t row = int64_t(block_index()) * warp_count() + threadIdx.x / 32;
  const int lane = lane_index();
  if (lane < 4)
    store_global(reinterpret_cast<float4*>(a.pooled + (row * a.hidden_panels + panel) * kPanel +
                                           4 * (lane % 4)),
                 total);
}

}  // namespace mnv2_fused::cuda
