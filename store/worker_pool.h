// WorkerPool: threads for requests that wait for a network. Tasks start in order; a thread is made
// when a task finds none idle, up to a limit. The destructor runs what is queued. Thread-safe.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace pewter {

class WorkerPool {
 public:
  explicit WorkerPool(size_t most) : most_(most) {}
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  void Run(std::function<void()> task);

 private:
  void Main();

  const size_t most_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;  // guarded by mutex_
  size_t idle_ = 0;                          // guarded by mutex_
  bool closing_ = false;                     // guarded by mutex_
  std::vector<std::jthread> threads_;        // guarded by mutex_
};

}  // namespace pewter
