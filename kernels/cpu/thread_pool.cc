#include "kernels/cpu/thread_pool.h"

namespace pewter::kernels::cpu {

ThreadPool::ThreadPool(int threads) {
  for (int thread = 1; thread < threads; ++thread) {
    workers_.emplace_back([this, thread] { Work(thread); });
  }
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::TakeItems(const Loop& loop, int64_t count, int thread) {
  for (int64_t item; (item = next_.fetch_add(1, std::memory_order_relaxed)) < count;) {
    loop(item, thread);
  }
}

void ThreadPool::Work(int thread) {
  int64_t seen = 0;
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
    if (stop_) return;
    seen = generation_;
    const Loop& loop = *loop_;
    const int64_t count = count_;
    lock.unlock();
    TakeItems(loop, count, thread);
    lock.lock();
    if (--busy_ == 0) idle_.notify_one();
  }
}

void ThreadPool::ForEach(int64_t count, absl::FunctionRef<void(int64_t item, int thread)> fn) {
  if (workers_.empty() || count <= 1) {
    for (int64_t item = 0; item < count; ++item) fn(item, 0);
    return;
  }
  {
    std::lock_guard lock(mutex_);
    loop_ = &fn;
    count_ = count;
    busy_ = static_cast<int>(workers_.size());
    next_.store(0, std::memory_order_relaxed);
    ++generation_;
  }
  wake_.notify_all();
  TakeItems(fn, count, 0);
  std::unique_lock lock(mutex_);
  idle_.wait(lock, [&] { return busy_ == 0; });
}

}  // namespace pewter::kernels::cpu
