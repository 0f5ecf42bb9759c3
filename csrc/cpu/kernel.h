// The fused block for one tile of output pixels, written once over a vector type V and the type S of
// stored elements: V's own type T, or BFloat16, whose products are summed in V.
//
// Include inside an instruction set's own .cpp, after its `#pragma GCC target`, MNV2_INLINE and V (and
// Bf16<V> for BFloat16): everything here has internal linkage, so no code compiled for one instruction
// set can serve another.
//
// Stages, for each group of expanded channels:
//   expand     x tile + halo -> expanded   T [group/16][ring rows][in_cols][16], 0 outside the image
//              (a stem reads x from a patch S [rows][cols][C_in] with its padding)
//   depthwise  expanded      -> depthwise  S [group/16][band pixels][16]
//   project    depthwise     -> y, the groups' sums added up in place (in a buffer of T where y is
//              narrower) or, when split, by add_row
//
// Every output element sums its terms in an order that depends on the group alone: the first run of
// channels ascending, then the bias, then the sum of each further run (shorter sums round less than
// one over all channels), those of a group before those of the next, and x last: a large bias or x
// would coarsen every rounding after it. Taps and input channels ascend. So results are identical
// bit for bit over tiles, splits and threads.
#pragma once

#include "kernel/pointwise.h"
#include "kernel/tile.h"
