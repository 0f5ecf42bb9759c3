// Sums that go on in double.
#pragma once

#include "../kernel/elements.h"

namespace {

template <class V>
MNV2_INLINE void add_lanes(V sum, double* to) {
  typename V::T lanes[V::kLanes];
  sum.store(lanes);
  for (int64_t lane = 0; lane < V::kLanes; ++lane) to[lane] += double(lanes[lane]);
}

// Puts `more` values into a sample of `before` whose mean and sum of squares less it are known. The
// values lie around `origin`: so a mean far from 0 takes no digits.
template <class V>
MNV2_INLINE void join(V origin, V sum, V squares, double before, double more, double* mean,
                      double* spread) {
  typename V::T origins[V::kLanes], sums[V::kLanes], of_squares[V::kLanes];
  origin.store(origins);
  sum.store(sums);
  squares.store(of_squares);
  for (int64_t lane = 0; lane < V::kLanes; ++lane) {
    const double off = double(sums[lane]) / more;
    const double difference = double(origins[lane]) + off - mean[lane];
    spread[lane] += double(of_squares[lane]) - off * double(sums[lane]) +
                    difference * difference * (before * more / (before + more));
    mean[lane] += difference * (more / (before + more));
  }
}

}  // namespace
