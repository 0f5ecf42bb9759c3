// Training on compiler vectors of 16 bytes.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "args.h"

#define MNV2_INLINE inline __attribute__((always_inline))

namespace mnv2_fused::cpu::training::portable {
#include "../portable_vectors.h"
#include "kernel.h"

constinit const AllKernels kKernels{training_kernels_of<Vector16<float>>(),
                                    training_kernels_of<Vector16<double>>()};

}  // namespace mnv2_fused::cpu::training::portable
