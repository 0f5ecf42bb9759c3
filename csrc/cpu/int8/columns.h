// Writes a row of the ring: pairs of columns, one behind the other, into quads that overlap.
//
//   pair    -1     0      1      2          P_h = columns 2h and 2h + 1
//   quad   [P-1 P0]  [P0 P1]  [P1 P2]       quad h = P_h P_h+1
//
// Whatever column a row of taps begins at, one quad holds its first three taps. A pair has 16 bits to an
// element, as sums leave them.
#pragma once

#include "requantize.h"

namespace {

// Of one vector of channels.
template <class V>
struct Columns {
  using Pair = typename V::Pair;
  int32_t* at;  // the next quad
  Pair before;  // its first pair

  Columns() = default;
  // ring_row: quad -1 of the row. left: columns of padding in front, of which an odd one is the caller's.
  MNV2_INLINE Columns(int32_t* ring_row, int64_t left, Pair padding)
      : at(ring_row), before(padding) {
    for (int64_t i = 0; i < left / 2; ++i) push(padding);
  }
  MNV2_INLINE void push(Pair next) {
    V::quads(before, next).store(at);
    at += kPanel;
    before = next;
  }
  MNV2_INLINE void finish(const int32_t* row_end, Pair padding) {
    while (at < row_end) push(padding);
  }
};

// The pair of two vectors of q - zero.
template <class V>
MNV2_INLINE typename V::Pair pair_of(V first, V second, int32_t zero) {
  return V::Pair::add(V::pair(first, second), V::Pair::set1(int16_t(zero)));
}

// Padding in all of a row.
template <class V>
void pad(int32_t* quads, int64_t count, int32_t zero) {
  const auto padding = V::Pair::set1(int16_t(zero));
  const V quad = V::quads(padding, padding);
  for (int64_t i = 0; i < count; i += V::kLanes) quad.store(quads + i);
}

}  // namespace
