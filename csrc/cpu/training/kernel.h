// The passes of a block in training over the images of one slot. Included by each instruction set's file
// behind its V; see avx2.cpp.
//
//   statistics         x -> act(e) -> d: its mean, and its squares
//   pool               the same, then act(a): its sums over each image
//   project            the same, then p = w_project (gate act(a))
//   backward_project   the same, then q = g w_project and from it the gradient of a, summed up; dw_project
//   backward_expand    the same, then the gradients of d, of act(e), of e, of x; dw_depthwise, dw_expand
//
// Where memory is given for it, statistics keeps d for pool and project, and backward_project act(e), d and q for
// backward_expand.
//
// Each pass goes over chunks of expanded channels, and of each over the images, from top to bottom in
// bands of output rows.
#pragma once

#include "backward.h"
#include "expand.h"
#include "forward.h"
#include "narrow.h"
#include "passes.h"

namespace {

template <class V, Step kStep>
void run_training(const Args<typename V::T>& args, const Layout& layout, int64_t slot,
                  typename V::T* scratch) {
  Training<V>(kStep, args, layout, slot, scratch).run();
}

template <class V, void (Narrow<V>::*kPass)()>
void run_narrow(const NarrowArgs<typename V::T>& args, int64_t slice) {
  (Narrow<V>(args, slice).*kPass)();
}
template <class V>
void run_centre(const NarrowArgs<typename V::T>& args, int64_t slice, typename V::T* scratch) {
  Narrow<V>(args, slice).centre(scratch);
}

template <class V>
constexpr Kernels<typename V::T> training_kernels_of() {
  using N = Narrow<V>;
  return {V::kLanes,
          &run_training<V, Step::kStatistics>,
          &run_training<V, Step::kPool>,
          &run_training<V, Step::kProject>,
          &run_training<V, Step::kProjectBackward>,
          &run_training<V, Step::kExpandBackward>,
          &run_narrow<V, &N::moments>,
          &run_narrow<V, &N::normalise>,
          &run_narrow<V, &N::gradient_sums>,
          &run_narrow<V, &N::gradient>,
          &run_centre<V>};
}

}  // namespace
