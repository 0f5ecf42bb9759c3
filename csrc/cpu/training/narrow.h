// What a block in training does with tensors of its own width: norms behind the projection, and moments of
// the block's input. Pixels are shared out among slices, whose sums are added up in order.
#pragma once

#include "product.h"
#include "sums.h"

namespace {

template <class V>
class Narrow {
  using T = typename V::T;
  static constexpr int64_t kBlock = kBlockPixels;

 public:
  Narrow(const NarrowArgs<T>& args, int64_t slice)
      : a_(args),
        channels_(args.channels),
        padded_(round_up(args.channels, kPanel)),
        begin_(args.pixels * slice / args.slices),
        end_(args.pixels * (slice + 1) / args.slices),
        sums_(args.sums + slice * 2 * padded_),
        products_(args.products + slice * channels_ * padded_) {}

  // The mean, and the sum of squares less it: of values less the block's first, as statistics of d are.
  void moments() {
    clear_sums();
    double before = 0;
    for_blocks([&](int64_t first, int64_t count) {
      const double more = double(count), all = before + more;
      for_vectors([&](int64_t c, auto load, auto) MNV2_INLINE_LAMBDA {
        const T* at = a_.x + first * channels_ + c;
        const V origin = load(at), minus = multiplied(origin, V::set1(-1));
        V sum = V::set1(0), squares = V::set1(0);
        for (int64_t i = 0; i < count; ++i, at += channels_) {
          const V off = V::add(load(at), minus);
          sum = V::add(sum, off);
          squares = V::fma(off, off, squares);
        }
        join<V>(origin, sum, squares, before, more, sums_ + c, sums_ + padded_ + c);
      });
      before = all;
    });
  }

  // y = (x - mean) * scale + offset (+ added)
  void normalise() {
    for_vectors([&](int64_t c, auto load, auto store) MNV2_INLINE_LAMBDA {
      const V minus = multiplied(V::load(a_.mean + c), V::set1(-1));
      const V scale = V::load(a_.scale + c), offset = V::load(a_.offset + c);
      for (int64_t at = begin_ * channels_ + c; at < end_ * channels_; at += channels_) {
        V y = V::fma(V::add(load(a_.x + at), minus), scale, offset);
        if (a_.added) y = V::add(y, load(a_.added + at));
        store(y, a_.y + at);
      }
    });
  }

  // Sums of g, and of its products with normalised values.
  void gradient_sums() {
    clear_sums();
    for_blocks([&](int64_t first, int64_t count) {
      for_vectors([&](int64_t c, auto load, auto) MNV2_INLINE_LAMBDA {
        const V minus = multiplied(V::load(a_.mean + c), V::set1(-1));
        const V inverse = V::load(a_.inverse + c);
        V sum = V::set1(0), products = V::set1(0);
        for (int64_t i = 0, at = first * channels_ + c; i < count; ++i, at += channels_) {
          const V g = load(a_.g + at);
          sum = V::add(sum, g);
          products = V::fma(g, multiplied(V::add(load(a_.x + at), minus), inverse), products);
        }
        add_lanes<V>(sum, sums_ + c);
        add_lanes<V>(products, sums_ + padded_ + c);
      });
    });
  }

  // y = scale * g + offset + slope * (x - mean) * inverse
  void gradient() {
    for_vectors([&](int64_t c, auto load, auto store) MNV2_INLINE_LAMBDA {
      const V minus = multiplied(V::load(a_.mean + c), V::set1(-1));
      const V scale = V::load(a_.scale + c), offset = V::load(a_.offset + c);
      const V slope = multiplied(V::load(a_.slope + c), V::load(a_.inverse + c));
      for (int64_t at = begin_ * channels_ + c; at < end_ * channels_; at += channels_) {
        const V off = V::add(load(a_.x + at), minus);
        store(V::fma(load(a_.g + at), scale, V::fma(off, slope, offset)), a_.y + at);
      }
    });
  }

  // y = x - mean, sums of y, and of its products [C][C/16 * 16]; without a mean, of x. scratch:
  // [C/16][block][16].
  void centre(T* scratch) {
    clear_sums();
    std::fill_n(products_, channels_ * padded_, 0.0);
    for_blocks([&](int64_t first, int64_t count) {
      const T* const x = a_.x + first * channels_;
      T* const y = a_.mean ? a_.y + first * channels_ : nullptr;
      for_vectors([&](int64_t c, auto load, auto store) MNV2_INLINE_LAMBDA {
        const V minus = y ? multiplied(V::load(a_.mean + c), V::set1(-1)) : V::set1(0);
        T* const to = scratch + vector_offset<V>(c / V::kLanes, kBlock * kPanel);
        V sum = V::set1(0);
        for (int64_t i = 0; i < count; ++i) {
          const V off = V::add(load(x + i * channels_ + c), minus);
          sum = V::add(sum, off);
          off.store(to + i * kPanel);
          if (y) store(off, y + i * channels_ + c);
        }
        add_lanes<V>(sum, sums_ + c);
      });
      product<V>(
          channels_, ceil_div(channels_, V::kLanes), y ? y : x, 1, channels_, scratch,
          kBlock * kPanel, count, Dense<double>{products_, padded_},
          [](double*, int64_t) MNV2_INLINE_LAMBDA { return V::set1(0); },
          [](double* at, int64_t v, V sum)
              MNV2_INLINE_LAMBDA { add_lanes<V>(sum, at + v * V::kLanes); });
    });
  }

 private:
  void clear_sums() { std::fill_n(sums_, 2 * padded_, 0.0); }
  template <class F>
  void for_blocks(F f) const {
    for (int64_t first = begin_; first < end_; first += kBlock)
      f(first, least(kBlock, end_ - first));
  }
  // Calls f(channel, load, store) for the vectors of a pixel; lanes past its channels are zeros.
  template <class F>
  void for_vectors(F f) const {
    int64_t c = 0;
    for (; c + V::kLanes <= channels_; c += V::kLanes)
      f(
          c, [](const T* p) MNV2_INLINE_LAMBDA { return V::load(p); },
          [](V v, T* p) MNV2_INLINE_LAMBDA { v.store(p); });
    const int64_t lanes = channels_ - c;
    if (lanes > 0)
      f(
          c, [lanes](const T* p) MNV2_INLINE_LAMBDA { return V::load_partial(p, lanes); },
          [lanes](V v, T* p) MNV2_INLINE_LAMBDA { v.store_partial(p, lanes); });
  }

  const NarrowArgs<T>& a_;
  const int64_t channels_, padded_, begin_, end_;
  double *sums_, *products_;
};

}  // namespace
