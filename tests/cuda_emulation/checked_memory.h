// The memory that an emulated kernel sees. Every access is checked: what it may not do throws
// std::runtime_error, which says the rest of a sentence that starts with the thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace mnv2_fused::cuda::emulation {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream what;
  (what << ... << parts);
  throw std::runtime_error(what.str());
}

// Threads' accesses are told apart to this many bytes, the smallest element.
constexpr int kUnit = 2;
constexpr int64_t units(int64_t bytes) { return (bytes + kUnit - 1) / kUnit; }

// Global memory that a kernel may read, or may write. None may be both: the kernel reads through
// caches that do not see what the launch writes.
struct Range {
  const void* begin;
  int64_t bytes;
  bool writable = false;
  bool written = false;  // perhaps, by the kernel before this one, which may not have ended
};

enum class Through {
  kConstants,
  kData
};  // caches: the first may hold what is older than the kernel

class GlobalMemory {
 public:
  explicit GlobalMemory(const std::vector<Range>& ranges) {
    for (const Range& range : ranges)
      spans_.push_back({range, std::vector<Owner>(range.writable ? units(range.bytes) : 0)});
  }

  // alone: whether the kernel before this one has ended, as far as the thread knows.
  void read(const void* from, int bytes, void* to, Through cache, bool alone) {
    const Range& range = span_of(from, bytes, false, "reads ").range;
    if (range.written && !alone) fail("reads before grid_dependency_wait() what may not be there");
    if (range.written && cache == Through::kConstants)
      fail("reads as a constant what the kernel before may have written");
    std::memcpy(to, from, bytes);
  }

  // Each output has one owner.
  void write(int block, int thread, void* to, int bytes, const void* from, bool alone) {
    if (!alone) fail("writes before grid_dependency_wait() what others may still read");
    Span& span = span_of(to, bytes, true, "writes ");
    const int64_t at = static_cast<char*>(to) - static_cast<const char*>(span.range.begin);
    for (int64_t u = at / kUnit; u < units(at + bytes); ++u) {
      Owner& owner = span.owners[u];
      if (owner.block >= 0 && (owner.block != block || owner.thread != thread))
        fail("writes global byte ", u * kUnit, " of ", span.range.bytes, ", which thread ",
             owner.thread, " of thread block ", owner.block, " wrote");
      owner = {block, thread};
    }
    std::memcpy(to, from, bytes);
  }

 private:
  struct Owner {
    int block = -1, thread = -1;
  };
  struct Span {
    Range range;
    std::vector<Owner> owners;  // of each unit, who wrote it
  };

  Span& span_of(const void* at, int bytes, bool writable, const char* verb) {
    const auto begin = reinterpret_cast<uintptr_t>(at);
    for (Span& span : spans_) {
      const auto from = reinterpret_cast<uintptr_t>(span.range.begin);
      if (begin < from || begin + bytes > from + span.range.bytes) continue;
      if (span.range.writable != writable) continue;
      if (begin % bytes != 0)
        fail(verb, bytes, " bytes of global memory, misaligned, at ", begin - from, " of ",
             span.range.bytes);
      return span;
    }
    fail(verb, bytes, " bytes of global memory, outside what it may ", writable ? "write" : "read");
  }

  std::vector<Span> spans_;
};

class SharedMemory {
 public:
  explicit SharedMemory(int bytes) : bytes_(bytes), touches_(units(bytes)) {}

  int size() const { return int(bytes_.size()); }

  // For another thread block: a NaN of every type.
  void clear() {
    std::fill(bytes_.begin(), bytes_.end(), 0xff);
    ++interval_;
  }
  void pass_barrier() { ++interval_; }

  void read(int thread, int offset, int bytes, void* to) {
    check(offset, bytes, "reads ");
    for (int u = offset / kUnit; u < units(offset + bytes); ++u) {
      Touches& touches = touches_of(u);
      refuse(u, touches.copier, "reads", "is still copying to");
      if (touches.writer != thread)
        refuse(u, touches.writer, "reads", "wrote since the last barrier");
      (touches.reader < 0 || touches.reader == thread ? touches.reader : touches.second_reader) =
          int16_t(thread);
    }
    std::memcpy(to, &bytes_[offset], bytes);
  }

  void write(int thread, int offset, int bytes, const void* from) {
    check(offset, bytes, "writes ");
    for (int u = offset / kUnit; u < units(offset + bytes); ++u) {
      Touches& touches = touches_of(u);
      refuse(u, touches.copier, "writes", "is still copying to");
      for (const int reader : {touches.reader, touches.second_reader})
        if (reader != thread) refuse(u, reader, "writes", "read since the last barrier");
      if (touches.writer != thread)
        refuse(u, touches.writer, "writes", "wrote since the last barrier");
      touches.writer = int16_t(thread);
    }
    std::memcpy(&bytes_[offset], from, bytes);
  }

  // The bytes are NaN until the copy finishes.
  void start_copy(int thread, int offset, int bytes) {
    write(thread, offset, bytes, std::string(bytes, '\xff').data());
    for (int u = offset / kUnit; u < units(offset + bytes); ++u)
      touches_[u].copier = int16_t(thread);
  }
  void finish_copy(int thread, int offset, int bytes, const void* from) {
    for (int u = offset / kUnit; u < units(offset + bytes); ++u) touches_[u].copier = -1;
    write(thread, offset, bytes, from);
  }

 private:
  // Which threads touched a unit since the last barrier.
  struct Touches {
    int interval = -1;  // between two barriers, of which the rest tells
    int16_t writer = -1, reader = -1, second_reader = -1;
    int16_t copier = -1;  // whose copy to here has not finished; barriers do not change that
  };

  Touches& touches_of(int unit) {
    Touches& touches = touches_[unit];
    if (touches.interval != interval_) touches = {.interval = interval_, .copier = touches.copier};
    return touches;
  }

  void check(int offset, int bytes, const char* verb) const {
    if (offset < 0 || offset + bytes > size())
      fail(verb, bytes, " bytes of shared memory at ", offset, ", outside its ", size());
    if (offset % bytes != 0)
      fail(verb, bytes, " bytes of shared memory at ", offset, ", misaligned");
  }

  static void refuse(int unit, int other, const char* verb, const char* others) {
    if (other >= 0)
      fail(verb, " shared byte ", unit * kUnit, ", which thread ", other, " ", others);
  }

  std::vector<unsigned char> bytes_;
  std::vector<Touches> touches_;
  int interval_ = 0;
};

}  // namespace mnv2_fused::cuda::emulation
