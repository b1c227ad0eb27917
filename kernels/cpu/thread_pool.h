// ThreadPool: the threads of one CPU backend, for loops inside one call. Owns its threads; used by
// one caller at a time.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"

namespace pewter::kernels::cpu {

class ThreadPool {
 public:
  // The caller of ForEach is one of the `threads`.
  explicit ThreadPool(int threads);
  ~ThreadPool();

  int threads() const { return static_cast<int>(workers_.size()) + 1; }
  // Runs fn(item, thread) for each item in [0, count) and waits. Items are handed out in order;
  // `thread` is in [0, threads()).
  void ForEach(int64_t count, absl::FunctionRef<void(int64_t item, int thread)> fn);

 private:
  using Loop = absl::FunctionRef<void(int64_t item, int thread)>;
  void Work(int thread);
  void TakeItems(const Loop& loop, int64_t count, int thread);

  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  const Loop* loop_ = nullptr;  // guarded by mutex_, as are the next three
  int64_t count_ = 0;
  int64_t generation_ = 0;
  int busy_ = 0;
  bool stop_ = false;
  std::atomic<int64_t> next_{0};
  std::vector<std::thread> workers_;
};

}  // namespace pewter::kernels::cpu
