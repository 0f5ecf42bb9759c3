// Tasks shared out among torch's threads.
#pragma once

#include <atomic>

#include "../tensors.h"

namespace mnv2_fused::cpu {

// Calls f(task, worker) for every task, each worker running one at a time.
template <class F>
void for_tasks(int64_t tasks, int64_t workers, F f) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
        f(task, worker);
  });
}

}  // namespace mnv2_fused::cpu
