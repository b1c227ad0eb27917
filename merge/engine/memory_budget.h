// MemoryBudget: memory that tasks take whole before they start and give back when they are done.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>

#include "absl/cleanup/cleanup.h"

namespace pewter {

class MemoryBudget {
 public:
  explicit MemoryBudget(int64_t bytes) : free_(bytes) {}

  // Waits until `bytes` are free; they are given back when what is returned goes. More than the
  // whole budget must not be asked for. Callers of one shard come in the order in which they write,
  // so that whoever waits for room in the output waits for somebody who has his memory.
  [[nodiscard]] auto Acquire(int64_t bytes) {
    std::unique_lock lock(mutex_);
    freed_.wait(lock, [&] { return free_ >= bytes; });
    free_ -= bytes;
    return absl::MakeCleanup([this, bytes] {
      {
        std::lock_guard guard(mutex_);
        free_ += bytes;
      }
      freed_.notify_all();
    });
  }

 private:
  std::mutex mutex_;
  std::condition_variable freed_;
  int64_t free_;  // guarded by mutex_
};

}  // namespace pewter
