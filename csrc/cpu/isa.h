// The instruction sets the CPU kernel is built for, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "../plan.h"

namespace mnv2_fused::cpu {

template <class T>
using RunTile = void (*)(const BlockArgs<T>&, const Plan&, int64_t task, T* scratch);

// Adds up the groups' sums of one output row, counted over the batch, when the plan splits them.
template <class T>
using AddRow = void (*)(const BlockArgs<T>&, const Plan&, int64_t row);

template <class T>
using RunPointwise = void (*)(const PointwiseArgs<T>&, int64_t task);  // task: image x part

template <class T>
struct Kernels {
  RunTile<T> run_tile;
  AddRow<T> add_row;
  RunPointwise<T> run_pointwise;
};

struct Isa {
  const char* name;
  int64_t vector_bytes;
  bool (*supported)();  // by this processor and operating system
  Kernels<float> f32;
  Kernels<double> f64;
  // Does rounds x flops_per_round floating-point operations, a multiply-add being two; the return value
  // only keeps them alive. For the peak meter.
  float (*multiply_add)(int64_t rounds);
  int64_t flops_per_round;
};

template <class T>
const Kernels<T>& kernels(const Isa& isa) {
  if constexpr (sizeof(T) == sizeof(float))
    return isa.f32;
  else
    return isa.f64;
}

// Best first; the last one runs everywhere.
const std::vector<Isa>& compiled();

// The one in use: the best this machine has, or what MNV2_FUSED_ISA names at first use.
// Throws std::runtime_error when that name is unknown or cannot run here.
const Isa& active();
// Switches at run time (tests, sweeps); an empty name restores the default.
void set_active(const std::string& name);

inline Machine machine_for(const Isa& isa, int64_t threads, int64_t element_size,
                           int64_t l2_bytes) {
  return {threads, isa.vector_bytes / element_size, element_size, l2_bytes};
}
// Size of this machine's per-core L2, or 512 KiB where the system does not tell.
int64_t l2_bytes();

extern const Isa kAvx512, kAvx2, kPortable;

}  // namespace mnv2_fused::cpu
