// Memory fetched into L2 while kernels multiply. Weights come from beyond L2, each once per group:
// waited for, they would cost more than the arithmetic hides.
#pragma once

namespace {

// Bytes in runs of `run`, whose beginnings lie `pitch` apart.
struct Region {
  const void* from = nullptr;
  int64_t bytes = 0, run = 1, pitch = 0;

  static Region dense(const void* from, int64_t bytes) { return {from, bytes, bytes, 0}; }
};

// One kernel call's share: it begins at `from`, and the kernel goes on by `step` bytes with every term.
struct Prefetch {
  const char* from;
  int64_t step;
};

// A region that is soon read, handed out in equal shares to the kernel calls before that.
class PrefetchQueue {
 public:
  PrefetchQueue() = default;
  PrefetchQueue(const Region& region, int64_t calls)
      : from_(static_cast<const char*>(region.from)),
        left_(calls > 0 ? region.bytes : 0),
        run_(region.run),
        pitch_(region.pitch),
        share_(calls > 0 ? round_up(ceil_div(region.bytes, calls), 64) : 0) {}

  // The next share, for a kernel that sums this many terms.
  Prefetch next(int64_t terms) {
    if (left_ <= 0) return {from_, 0};
    const int64_t done = done_;
    done_ += share_;
    left_ -= share_;
    return {from_ + done / run_ * pitch_ + done % run_, ceil_div(share_, terms)};
  }

 private:
  const char* from_ = nullptr;
  int64_t left_ = 0, done_ = 0, run_ = 1, pitch_ = 0, share_ = 0;  // bytes
};

}  // namespace
