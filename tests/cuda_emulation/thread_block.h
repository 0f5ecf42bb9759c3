// Runs a kernel's thread blocks on the CPU, one after another, each thread as a fiber, and checks
// what a GPU would not: accesses to memory, races between two barriers, threads out of step.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "checked_memory.h"

namespace mnv2_fused::cuda {

struct uint3 {
  unsigned x, y, z;
};
using dim3 = uint3;
inline uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

using Site = std::source_location;
constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;

// Keeps what a call has to, and the stack pointer, then goes on where the other stack left off.
[[gnu::naked, gnu::noipa]] inline void switch_stack(void** /*from*/, void* /*to*/) {
  asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}

enum class State { kReady, kInBarrier, kInWarp, kEnded };

struct Copy {
  int offset;
  std::array<char, 16> bytes;
};

struct Thread {
  std::unique_ptr<char[]> stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
  void* stack_pointer;
  State state;
  Site site;                 // of its last call of a device function
  const char* operation;     // it waits in
  void* operands;            // of that
  std::vector<Copy> copies;  // not finished
  bool alone;                // the kernel before this one has ended
};

class Machine {
 public:
  Machine(dim3 grid, int threads, int shared_bytes, const std::vector<Range>& memory, uint64_t seed)
      : grid_(grid), shared_(shared_bytes), global_(memory), random_(seed), threads_(threads) {}

  void run(const std::function<void()>& kernel);
  void run_thread();

  // What threads call, each through at().
  Machine& at(Site site) {
    current().site = site;
    return *this;
  }

  void read_shared(int offset, int bytes, void* to) { shared_.read(thread_, offset, bytes, to); }
  void write_shared(int offset, int bytes, const void* from) {
    shared_.write(thread_, offset, bytes, from);
  }
  void read_global(const void* from, int bytes, void* to, Through cache) {
    global_.read(from, bytes, to, cache, current().alone);
  }
  void write_global(void* to, int bytes, const void* from) {
    const int block = blockIdx.x + grid_.x * (blockIdx.y + grid_.y * blockIdx.z);
    global_.write(block, thread_, to, bytes, from, current().alone);
  }

  void grid_dependency_wait() { current().alone = true; }
  // The next kernel waits for this one alone.
  void launch_dependents() const {
    if (!threads_[thread_].alone) fail("lets the next kernel start beside the one before this");
  }

  void start_copy(int offset, const void* from) {
    Copy copy{offset, {}};
    read_global(from, copy.bytes.size(), copy.bytes.data(), Through::kData);
    shared_.start_copy(thread_, offset, copy.bytes.size());
    current().copies.push_back(copy);
  }
  void finish_copies() {
    for (const Copy& copy : current().copies)
      shared_.finish_copy(thread_, copy.offset, copy.bytes.size(), copy.bytes.data());
    current().copies.clear();
  }

  // Whether any thread says so.
  bool barrier(bool mine) {
    any_ = any_ || mine;
    stop(State::kInBarrier, "barrier");
    return any_before_;
  }

  // Waits for the other lanes of the warp, of which the last computes for all.
  void warp_operation(const char* operation, void* operands,
                      void (*compute)(void* const* operands)) {
    const int first = thread_ / kWarp * kWarp;
    current().operation = operation, current().operands = operands;
    void* all[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) {
      const Thread& other = threads_[first + lane];
      if (first + lane != thread_ && other.state != State::kInWarp)
        return stop(State::kInWarp, operation);
      if (std::strcmp(other.operation, operation) != 0 || !same(other.site, current().site))
        fail("calls ", operation, ", but thread ", first + lane, " ", doing(other));
      all[lane] = other.operands;
    }
    compute(all);
    for (int lane = 0; lane < kWarp; ++lane) threads_[first + lane].state = State::kReady;
  }

 private:
  static bool same(Site a, Site b) { return a.line() == b.line() && a.column() == b.column(); }
  static std::string name_of(int thread) {
    const auto [x, y, z] = blockIdx;
    return "thread block (" + std::to_string(x) + ", " + std::to_string(y) + ", " +
           std::to_string(z) + "), thread " + std::to_string(thread);
  }
  static std::string place(Site site) {
    if (site.line() == 0) return "";
    const std::string file = site.file_name();
    return " at " + file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line());
  }
  static std::string doing(const Thread& thread) {
    if (thread.state == State::kEnded) return "has ended";
    return "waits in " + (thread.operation + place(thread.site));
  }

  Thread& current() { return threads_[thread_]; }

  void stop(State state, const char* operation) {
    Thread& self = current();
    self.state = state, self.operation = operation;
    switch_stack(&self.stack_pointer, scheduler_);
  }
  void resume(int thread) {
    thread_ = thread;
    threadIdx = {unsigned(thread), 0, 0};
    switch_stack(&scheduler_, current().stack_pointer);
    if (!error_.empty()) throw std::runtime_error(error_);
  }

  static void start(Thread& thread);
  void run_block();
  void run_warp(int first);
  bool pass_barrier();

  const dim3 grid_;
  SharedMemory shared_;
  GlobalMemory global_;
  std::mt19937_64 random_;
  std::vector<Thread> threads_;
  const std::function<void()>* kernel_ = nullptr;
  int thread_ = 0;  // which runs
  void* scheduler_ = nullptr;
  bool any_ = false, any_before_ = false;  // of the barrier to come, of the last one
  std::string error_;
};

inline Machine* machine = nullptr;

inline void Machine::run(const std::function<void()>& kernel) {
  machine = this;
  kernel_ = &kernel;
  gridDim = grid_, blockDim = {unsigned(threads_.size()), 1, 1};
  for (blockIdx.z = 0; blockIdx.z < grid_.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid_.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid_.x; ++blockIdx.x) run_block();
}

// A thread's stack as if it had been left at the start of a function.
inline void Machine::start(Thread& thread) {
  const auto top = (reinterpret_cast<uintptr_t>(thread.stack.get()) + kStackBytes) & ~uintptr_t{15};
  void** const frame =
      reinterpret_cast<void**>(top) - 8;  // six registers, where to go on, no caller
  std::fill(frame, frame + 8, nullptr);
  frame[6] = reinterpret_cast<void*>(+[] { machine->run_thread(); });
  thread.stack_pointer = frame;
  thread.state = State::kReady;
  thread.site = {};
  thread.copies.clear();
  thread.alone = false;
}

inline void Machine::run_thread() {
  try {
    (*kernel_)();
    if (!current().copies.empty()) fail("starts a copy and ends without wait_copies()");
  } catch (const std::exception& error) {
    error_ = name_of(thread_) + place(current().site) + " " + error.what();
  }
  stop(State::kEnded, "");
}

// Until all its lanes wait for other threads: where a barrier misses, it gets far ahead of them.
inline void Machine::run_warp(int first) {
  std::vector<int> lanes;
  do {
    lanes.clear();
    for (int i = first; i < std::min(first + kWarp, int(threads_.size())); ++i)
      if (threads_[i].state == State::kReady) lanes.push_back(i);
    std::shuffle(lanes.begin(), lanes.end(), random_);
    for (const int thread : lanes) resume(thread);
  } while (!lanes.empty());
}

// With every thread waiting: whether that is for a barrier, not the end.
inline bool Machine::pass_barrier() {
  const Thread& first = threads_[0];
  for (const Thread& other : threads_) {
    const std::string who = name_of(int(&other - &first)) + " ";
    if (other.state == State::kInWarp)
      fail(who, doing(other), ", which not all lanes of its warp call");
    if (other.state != first.state) fail(who, doing(other), ", but thread 0 ", doing(first));
    if (other.state == State::kInBarrier && !same(other.site, first.site))
      fail(who, doing(other), ", but thread 0 ", doing(first));
  }
  if (first.state == State::kEnded) return false;
  for (Thread& thread : threads_) thread.state = State::kReady;
  any_before_ = any_, any_ = false;
  shared_.pass_barrier();
  return true;
}

inline void Machine::run_block() {
  shared_.clear();
  std::vector<int> warps;
  for (int i = 0; i < int(threads_.size()); ++i) {
    start(threads_[i]);
    if (i % kWarp == 0) warps.push_back(i);
  }
  do {
    std::shuffle(warps.begin(), warps.end(), random_);
    for (const int first : warps) run_warp(first);
  } while (pass_barrier());
}

// Runs kernel() in every thread of the grid. Throws std::runtime_error, saying which thread did
// what, for a kernel that a GPU could not be trusted with. The seed decides the threads' order.
inline void run(dim3 grid, int threads, int shared_bytes, const std::vector<Range>& memory,
                const std::function<void()>& kernel, uint64_t seed = 0) {
  Machine(grid, threads, shared_bytes, memory, seed).run(kernel);
}

}  // namespace emulation
}  // namespace mnv2_fused::cuda
