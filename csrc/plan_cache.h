// Plans found so far, by shape and machine.
#pragma once

#include <initializer_list>
#include <mutex>
#include <unordered_map>

#include "block.h"

namespace mnv2_fused {

inline size_t hash_of(std::initializer_list<int64_t> values, size_t h = 0) {
  for (const int64_t v : values) h = (h ^ size_t(v)) * size_t{0x9E3779B97F4A7C15};
  return h;
}
inline size_t hash_of(const BlockShape& s) {
  static_assert(kActivations <= 256, "each activation takes eight bits of `kinds`");
  const int64_t kinds = int64_t(s.expand) * 2 + int64_t{s.residual} + (int64_t(s.activation) << 8) +
                        (int64_t(s.out_activation) << 16) + (int64_t(s.expand_activation) << 24) +
                        (s.column_stride << 32);
  return hash_of({s.batch, s.height, s.width, s.in_channels, s.hidden_channels, s.out_channels,
                  s.stride, kinds, s.image_height, s.image_width, s.kernel, s.dilation, s.pad_left,
                  s.pad_right, s.pad_top, s.pad_bottom, s.squeeze_channels});
}

// Key: a BlockShape and all else that decides a plan, with a hash() of it. Safe to share among threads.
template <class Key, class Plan>
class PlanCache {
 public:
  // Past `most` plans a caller with endless shapes starts afresh.
  explicit PlanCache(size_t most = 4096) : most_(most) {}

  // make() once per key.
  template <class Make>
  Plan get(const Key& key, Make make) {
    {
      const std::lock_guard lock(mutex_);
      if (const auto it = plans_.find(key); it != plans_.end()) return it->second;
    }
    const Plan plan = make();
    const std::lock_guard lock(mutex_);
    if (plans_.size() >= most_) plans_.clear();
    plans_.emplace(key, plan);
    return plan;
  }

 private:
  struct Hash {
    size_t operator()(const Key& key) const { return key.hash(); }
  };
  const size_t most_;
  std::mutex mutex_;
  std::unordered_map<Key, Plan, Hash> plans_;
};

}  // namespace mnv2_fused
