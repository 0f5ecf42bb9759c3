#include "isa.h"

#include "int8/args.h"
#include "training/args.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef MNV2_NEON_BF16
#include <asm/hwcap.h>
#include <sys/auxv.h>
#ifndef HWCAP2_BF16  // in older systems' headers
#define HWCAP2_BF16 (1 << 14)
#endif
#ifndef HWCAP2_I8MM
#define HWCAP2_I8MM (1 << 13)
#endif
#endif

namespace mnv2_fused::cpu {
namespace {

const Isa* find(const std::string& name) {
  std::string known;
  for (const Isa& isa : compiled()) {
    if (name == isa.name) {
      if (isa.supported()) return &isa;
      throw std::runtime_error("MNV2_FUSED_ISA: this processor cannot run " + name +
                               "; leave it unset to use the best it has");
    }
    known += (known.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::runtime_error("MNV2_FUSED_ISA: unknown instruction set '" + name +
                           "'; this build has " + known);
}

const Isa* preferred() {
  const char* name = std::getenv("MNV2_FUSED_ISA");
  if (name && *name) return find(name);
  for (const Isa& isa : compiled())
    if (isa.supported()) return &isa;
  return &compiled().back();
}

std::atomic<const Isa*> g_active{nullptr};

template <const int8::Kernels* kKernels>
const int8::Kernels& integers_of() {
  return *kKernels;
}

template <const training::AllKernels* kKernels>
const training::AllKernels& training_of() {
  return *kKernels;
}

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}
// Dot products of bytes came later than the rest.
const int8::Kernels& integers_of_avx512() {
  static const bool vnni = __builtin_cpu_supports("avx512vnni");
  return vnni ? int8::avx512_vnni::kKernels : int8::avx2::kKernels;
}
#endif

#ifdef MNV2_NEON_BF16
bool has_neon_bf16() { return getauxval(AT_HWCAP2) & HWCAP2_BF16; }
#endif
#ifdef MNV2_NEON
// Dot products of bytes came with neither NEON nor those of bfloat16.
const int8::Kernels& integers_of_neon() {
#ifdef MNV2_NEON_DOTS
  if (getauxval(AT_HWCAP2) & HWCAP2_I8MM) return int8::neon_i8mm::kKernels;
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) return int8::neon_dotprod::kKernels;
#endif
  return int8::portable::kKernels;
}
#endif

}  // namespace

const std::vector<Isa>& compiled() {
  static const std::vector<Isa> kIsas{
#if defined(__x86_64__)
      {"avx512_bf16", [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); },
       avx512::kF32, avx512::kF64, avx512_bf16::kBf16, integers_of_avx512,
       training_of<&training::avx512::kKernels>},
      // Widening pairs takes AVX2 as long as it takes AVX-512.
      {"avx512", has_avx512, avx512::kF32, avx512::kF64, avx2::kBf16, integers_of_avx512,
       training_of<&training::avx512::kKernels>},
#ifdef MNV2_AVX_VNNI
      {"avx2_vnni", [] { return has_avx2() && __builtin_cpu_supports("avxvnni"); }, avx2::kF32,
       avx2::kF64, avx2::kBf16, integers_of<&int8::avx2_vnni::kKernels>,
       training_of<&training::avx2::kKernels>},
#endif
      {"avx2", has_avx2, avx2::kF32, avx2::kF64, avx2::kBf16, integers_of<&int8::avx2::kKernels>,
       training_of<&training::avx2::kKernels>},
#endif
#ifdef MNV2_NEON_BF16
      {"neon_bf16", has_neon_bf16, neon::kF32, neon::kF64, neon_bf16::kBf16, integers_of_neon,
       training_of<&training::neon::kKernels>},
#endif
#ifdef MNV2_NEON
      {"neon", [] { return true; }, neon::kF32, neon::kF64, neon::kBf16, integers_of_neon,
       training_of<&training::neon::kKernels>},
#endif
      {"portable", [] { return true; }, portable::kF32, portable::kF64, portable::kBf16,
       integers_of<&int8::portable::kKernels>, training_of<&training::portable::kKernels>},
  };
  return kIsas;
}

const Isa& active() {
  const Isa* isa = g_active.load(std::memory_order_acquire);
  if (!isa) {
    isa = preferred();
    g_active.store(isa, std::memory_order_release);
  }
  return *isa;
}

void set_active(const std::string& name) {
  g_active.store(name.empty() ? preferred() : find(name));
}

void advise_huge_pages([[maybe_unused]] uintptr_t address, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  const auto page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (address + page - 1) / page * page;
  const uintptr_t end = (address + bytes) / page * page;
  // An error says that there are none.
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

int64_t l2_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t kBytes = [] {
    const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return bytes > 0 ? int64_t{bytes} : int64_t{512} << 10;
  }();
  return kBytes;
#else
  return int64_t{512} << 10;
#endif
}

}  // namespace mnv2_fused::cpu
