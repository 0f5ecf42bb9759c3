// What the emulated device computes, and kernels that it must refuse, for test_cuda_emulation_device.py.
#include <map>
#include <string>

#include "emulated_device.h"

using namespace mnv2_fused::cuda;
using emulation::Range;
using emulation::run;

namespace {

constexpr int kShared = 1024, kThreads = 64;

alignas(16) float g_input[256];
alignas(16) float g_result[256];  // of the kernel before
alignas(16) float g_output[256];

int thread() { return int(threadIdx.x); }

const std::map<std::string, void (*)()> kKernels = {
    {"correct",
     [] {
       grid_dependency_wait();
       launch_dependents();
       store_shared(4 * thread(), float(thread()));
       if (thread() < 16) copy_16(512 + 16 * thread(), g_input + 4 * thread());
       wait_copies();
       barrier();
       const float v =
           load_shared<float>(4 * (thread() ^ 33)) + load_shared<float>(512 + 4 * thread());
       const float of_others = shuffle(v, thread() % 32) - load_written(g_result) + g_result[0];
       store_global(g_output + thread(), of_others);
     }},
    {"missing barrier",
     [] {
       store_shared(4 * thread(), 1.f);
       load_shared<float>(4 * (thread() ^ 33));
     }},
    {"missing barrier within a warp",
     [] {
       store_shared(4 * thread(), 1.f);
       load_shared<float>(4 * (thread() ^ 1));
     }},
    {"missing barrier before a store",
     [] {
       load_shared<float>(4 * (thread() ^ 33));
       store_shared(4 * thread(), 1.f);
     }},
    {"two stores to one place", [] { store_shared(4 * (thread() / 2), 1.f); }},
    {"shared memory, after its end",
     [] { load_shared<float2>(kShared - 8 + 8 * (thread() == 37)); }},
    {"shared memory, before its start",
     [] { store_shared(thread() == 37 ? -4 : 4 * thread(), 1.f); }},
    {"shared memory, misaligned", [] { load_shared<uint4>(8); }},
    {"global memory, after its end", [] { load_global(g_input + 4 * thread() + 1); }},
    {"global memory, before its start", [] { load_global(g_input + thread() - 1); }},
    {"global memory, misaligned",
     [] { load_global(reinterpret_cast<const float2*>(g_input + 1)); }},
    {"copy, misaligned",
     [] {
       copy_16(16 * thread(), g_input + 1);
       wait_copies();
     }},
    {"copy to after the end",
     [] {
       copy_16(kShared, g_input);
       wait_copies();
     }},
    {"read of what is written", [] { load_global(g_output + thread()); }},
    {"store to the input",
     [] {
       grid_dependency_wait();
       store_global(g_input + thread(), 1.f);
     }},
    {"two stores to one output",
     [] {
       grid_dependency_wait();
       store_global(g_output + thread() / 2, 1.f);
     }},
    {"two blocks' stores to one output",
     [] {
       grid_dependency_wait();
       store_global(g_output + thread(), 1.f);
     }},
    {"warp operation of some lanes",
     [] {
       if (thread() % 32 < 31) shuffle(1, 0);
     }},
    {"warp operation after a barrier of others",
     [] {
       if (thread() % 32 < 31) shuffle(1, 0);
       barrier();
     }},
    {"warp operations of two kinds",
     [] {
       if (thread() % 32 < 31)
         shuffle(1, 0);
       else
         shuffle_xor(1, 1);
     }},
    {"warp operations of two places",
     [] {
       if (thread() % 32 < 31)
         shuffle(1, 0);
       else
         shuffle(1, 1);
     }},
    {"warp operation, once more by one lane",
     [] {
       for (int i = 0; i < 3 + (thread() == 37); ++i) shuffle_xor(1, 1);
     }},
    {"a lane that there is not", [] { shuffle(1, 32); }},
    {"barrier of some threads",
     [] {
       if (thread() != 37) barrier();
     }},
    {"barriers of two places",
     [] {
       if (thread() != 37)
         barrier();
       else
         barrier();
     }},
    {"unfinished copy", [] { copy_16(16 * thread(), g_input); }},
    {"read of an unfinished copy",
     [] {
       copy_16(16 * thread(), g_input);
       load_shared<float>(16 * thread());
       wait_copies();
     }},
    {"copy finished by its thread only",
     [] {
       copy_16(16 * thread(), g_input);
       wait_copies();
       load_shared<float>(16 * (thread() ^ 1));
     }},
    {"copy over what others read",
     [] {
       load_shared<float>(16 * (thread() ^ 1));
       copy_16(16 * thread(), g_input);
       wait_copies();
     }},
    {"read before the last kernel's end", [] { load_written(g_result + thread()); }},
    {"copy before the last kernel's end",
     [] {
       copy_16(16 * thread(), g_result);
       wait_copies();
     }},
    {"store before the last kernel's end", [] { store_global(g_output + thread(), 1.f); }},
    {"read of the last kernel's results as of constants",
     [] {
       grid_dependency_wait();
       load_global(g_result + thread());
     }},
    {"start of the next kernel before the last one's end", [] { launch_dependents(); }},
};

std::string g_error;

}  // namespace

extern "C" {

// The error of a kernel above, or null. `blocks` thread blocks.
const char* check(const char* name, int blocks, uint64_t seed) try {
  for (int i = 0; i < 256; ++i) g_input[i] = float(1000 * i);
  run({unsigned(blocks), 1, 1}, kThreads, kShared,
      {{g_input, 64 * sizeof(float)},
       {g_result, 64 * sizeof(float), false, true},
       {g_output, 64 * sizeof(float), true}},
      kKernels.at(name), seed);
  return nullptr;
} catch (const std::runtime_error& error) {
  g_error = error.what();
  return g_error.c_str();
}
const float* output() { return g_output; }

// How many of 200 rounds of barrier_any tell a thread the wrong thing, each round of which one
// thread or none says true.
int wrong_any(uint64_t seed) {
  int wrong = 0;
  run(
      {1, 1, 1}, kThreads, kShared, {},
      [&] {
        for (int i = 0; i < 200; ++i)
          if (barrier_any(i * 7 % 100 == thread()) != (i * 7 % 100 < kThreads)) ++wrong;
      },
      seed);
  return wrong;
}

// Sums that the threads of a block form through shared memory, too early when a barrier misses.
float order_of_threads(uint64_t seed) {
  int order[kThreads], next = 0;
  run({1, 1, 1}, kThreads, kShared, {}, [&] { order[thread()] = next++; }, seed);
  return float(order[0] + 64 * order[1] + 4096 * order[63]);
}

// c [32, 4] += a [32, 4] b [32, 2], fragments by lanes; of kinds 3 and 4 a [32, 2] b [32, 1].
void mma(int kind, const uint32_t* a, const uint32_t* b, float* c) {
  run({1, 1, 1}, 32, 0, {}, [&] {
    float sums[4];
    std::copy_n(c + 4 * thread(), 4, sums);
    if (kind >= 3) {
      const uint32_t* const left = a + 2 * thread();
      const auto site = emulation::Site::current();
      (kind == 3 ? mma_half_8 : mma_bfloat16_8)(sums, left[0], left[1], b[thread()], site);
    } else {
      uint32_t left[4];
      std::copy_n(a + 4 * thread(), 4, left);
      const uint32_t* const right = b + 2 * thread();
      const auto site = emulation::Site::current();
      (kind == 0   ? mma_half
       : kind == 1 ? mma_bfloat16
                   : mma_tf32)(sums, left, right[0], right[1], site);
    }
    std::copy_n(sums, 4, c + 4 * thread());
  });
}

// Pairs of numbers there and back.
void pack(int kind, bool relu6, int64_t pairs, const float* from, uint32_t* to) {
  const auto f = relu6       ? kind == 0 ? pack_relu6_half : pack_relu6_bfloat16
                 : kind == 0 ? pack_half
                             : pack_bfloat16;
  for (int64_t i = 0; i < pairs; ++i) to[i] = f(from[2 * i], from[2 * i + 1]);
}
void unpack(int kind, int64_t pairs, const uint32_t* from, float* to) {
  for (int64_t i = 0; i < pairs; ++i) {
    const float2 v = (kind == 0 ? unpack_half : unpack_bfloat16)(from[i]);
    to[2 * i] = v.x, to[2 * i + 1] = v.y;
  }
}
void relu6_of(int64_t count, const float* from, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = relu6(from[i]);
}
void round_to_tf32(int64_t count, const uint32_t* from, uint32_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = round_tf32(from[i]);
}
// Values of all lanes through shuffle, then shuffle_xor.
void shuffle_lanes(const int* lanes, int mask, const float* from, float* picked, float* exchanged) {
  run({1, 1, 1}, 32, 0, {}, [&] {
    picked[thread()] = shuffle(from[thread()], lanes[thread()]);
    exchanged[thread()] = float_of(shuffle_xor(bits_of(from[thread()]), mask));
  });
}
}
