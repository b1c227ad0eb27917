// ThreadPool: threads that share the loops of several callers.
//
// Every caller of ForEach works at its own loop, and threads that have nothing else to do take
// items of it. Those are threads of the pool's own, or the caller's, lent by HelpUntil: the lanes
// of a merge, so that a matrix that is merged alone has all cores and no core has two threads.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"

namespace pewter::kernels {

class ThreadPool {
 public:
  // Starts threads - 1: with the caller of ForEach they are `threads`.
  explicit ThreadPool(int threads);
  // Starts none: at most `threads` are lent, the callers of ForEach among them.
  static std::unique_ptr<ThreadPool> OfLent(int threads);
  ~ThreadPool();

  // At most, of one loop.
  int threads() const { return threads_; }
  // Of a loop that began now.
  int available() const { return 1 + idle_.load(std::memory_order_relaxed); }

  // Runs fn(item, thread) for each item in [0, count) and waits. Items are handed out in order;
  // `thread` is in [0, threads()), another for each that takes part, 0 for the caller. `fn` does
  // not call ForEach; what it throws ends the loop and is thrown here.
  void ForEach(int64_t count, absl::FunctionRef<void(int64_t item, int thread)> fn);

  // Returns when `ready` does so with true; until then the calling thread works at the loops of
  // others or sleeps. `ready` is called under a lock, at first and after each Wake.
  void HelpUntil(absl::FunctionRef<bool()> ready);
  // What a `ready` looks at has changed. Not to be called under a lock that `ready` takes.
  void Wake();

 private:
  struct Loop;
  struct Lent {};
  ThreadPool(int threads, Lent) : threads_(threads) {}
  void TakeItems(Loop& loop, int thread);

  const int threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::list<Loop*> loops_;     // that may have items left; guarded by mutex_
  std::atomic<int> idle_ = 0;  // threads in HelpUntil that sleep
  bool stop_ = false;          // guarded by mutex_
  std::vector<std::thread> own_;
};

}  // namespace pewter::kernels
