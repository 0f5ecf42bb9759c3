// The instruction sets the CPU kernel is built for, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "plan.h"

#if defined(__aarch64__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define MNV2_NEON
// Clang names a function's instruction set in another way.
#if defined(__linux__) && !defined(__clang__)
#define MNV2_NEON_BF16
#endif
#endif

namespace mnv2_fused::cpu {

namespace int8 {
struct Kernels;
}
namespace training {
struct AllKernels;
}

// The kernels for activations and weights stored as S: float, double or BFloat16.
template <class S>
struct Kernels {
  using T = Compute<S>;

  void (*run_tile)(const BlockArgs<S>&, const Plan&, int64_t task, T* scratch);
  // Adds up the groups' sums of one output row, counted over the batch, when the plan splits them.
  void (*add_row)(const BlockArgs<S>&, const Plan&, int64_t row);
  // Of a squeeze-and-excite: an image's rows' sums [rows][channels] to its mean, times `scale`;
  // and what follows a product, in place.
  void (*mean_of_rows)(const T* rows, int64_t count, int64_t channels, T scale, T* mean);
  void (*activate)(T* p, int64_t count, ActivationFunction a);
  void (*gate)(T* p, int64_t count, Gate gate);
  void (*run_pointwise)(const PointwiseArgs<S>&, int64_t task);  // task: image x part
  // Does rounds x flops_per_round floating-point operations of the products' kind, a multiply-add
  // being two; the return value only keeps them alive. For the peak meter.
  T (*multiply_add)(int64_t rounds);
  int64_t flops_per_round;
  int64_t lanes;  // sums in a vector
  int64_t depth;  // products that one multiply-add puts into a sum

  Machine machine(int64_t threads, int64_t l2_bytes) const {
    return {threads, lanes, int64_t{sizeof(T)}, int64_t{sizeof(S)}, depth, l2_bytes};
  }
};

struct Isa {
  const char* name;
  bool (*supported)();  // by this processor and operating system
  Kernels<float> f32;
  Kernels<double> f64;
  Kernels<BFloat16> bf16;
  const int8::Kernels& (*integers)();
  const training::AllKernels& (*training)();
};

template <class S>
const Kernels<S>& kernels(const Isa& isa) {
  if constexpr (std::is_same_v<S, float>)
    return isa.f32;
  else if constexpr (std::is_same_v<S, double>)
    return isa.f64;
  else
    return isa.bf16;
}

// Best first; the last one runs everywhere.
const std::vector<Isa>& compiled();

// The one in use: the best this machine has, or what MNV2_FUSED_ISA names at first use.
// Throws std::runtime_error when that name is unknown or cannot run here.
const Isa& active();
// Switches at run time (tests, sweeps); an empty name restores the default.
void set_active(const std::string& name);

// Size of this machine's per-core L2, or 512 KiB where the system does not tell.
int64_t l2_bytes();
// Asks for huge pages under this memory, whose pages nobody has touched: fewer entries of the
// processor's address caches. Where the system has none, nothing changes.
void advise_huge_pages(uintptr_t address, size_t bytes);

// What each instruction set's file defines; Isa structures are put together in isa.cpp.
namespace avx512 {
extern const Kernels<float> kF32;
extern const Kernels<double> kF64;
}  // namespace avx512
namespace avx512_bf16 {
extern const Kernels<BFloat16> kBf16;
}
namespace avx2 {
extern const Kernels<float> kF32;
extern const Kernels<double> kF64;
extern const Kernels<BFloat16> kBf16;
}  // namespace avx2
namespace neon {
extern const Kernels<float> kF32;
extern const Kernels<double> kF64;
extern const Kernels<BFloat16> kBf16;
}  // namespace neon
namespace neon_bf16 {
extern const Kernels<BFloat16> kBf16;
}
namespace portable {
extern const Kernels<float> kF32;
extern const Kernels<double> kF64;
extern const Kernels<BFloat16> kBf16;
}  // namespace portable

}  // namespace mnv2_fused::cpu
