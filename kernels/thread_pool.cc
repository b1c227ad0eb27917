#include "kernels/thread_pool.h"

#include <algorithm>
#include <exception>
#include <memory>

#include "absl/memory/memory.h"

namespace pewter::kernels {

struct ThreadPool::Loop {
  const absl::FunctionRef<void(int64_t item, int thread)> fn;
  const int64_t count;
  std::atomic<int64_t> next = 0;
  // Guarded by the pool's mutex.
  int joined = 0;   // threads that took part, besides the caller
  int working = 0;  // of those, at the moment
  std::condition_variable left;
  std::exception_ptr thrown;  // by the first that did

  bool open() const { return next.load(std::memory_order_relaxed) < count; }
};

ThreadPool::ThreadPool(int threads) : threads_(std::max(threads, 1)) {
  for (int thread = 1; thread < threads_; ++thread) {
    own_.emplace_back([this] { HelpUntil([this] { return stop_; }); });
  }
}

std::unique_ptr<ThreadPool> ThreadPool::OfLent(int threads) {
  return absl::WrapUnique(new ThreadPool(threads, Lent{}));
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : own_) thread.join();
}

void ThreadPool::TakeItems(Loop& loop, int thread) {
  try {
    for (int64_t item; (item = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.count;) {
      loop.fn(item, thread);
    }
  } catch (...) {
    loop.next.store(loop.count, std::memory_order_relaxed);
    std::lock_guard lock(mutex_);
    if (loop.thrown == nullptr) loop.thrown = std::current_exception();
  }
}

void ThreadPool::ForEach(int64_t count, absl::FunctionRef<void(int64_t item, int thread)> fn) {
  if (threads_ == 1 || count <= 1) {
    for (int64_t item = 0; item < count; ++item) fn(item, 0);
    return;
  }
  Loop loop{.fn = fn, .count = count};
  {
    std::lock_guard lock(mutex_);
    loops_.push_back(&loop);
  }
  if (available() > 1) wake_.notify_all();
  TakeItems(loop, 0);
  std::unique_lock lock(mutex_);
  loops_.remove(&loop);
  loop.left.wait(lock, [&] { return loop.working == 0; });
  lock.unlock();
  if (loop.thrown != nullptr) std::rethrow_exception(loop.thrown);
}

void ThreadPool::HelpUntil(absl::FunctionRef<bool()> ready) {
  std::unique_lock lock(mutex_);
  while (!ready()) {
    const auto open = std::find_if(loops_.begin(), loops_.end(), [](Loop* l) { return l->open(); });
    if (open == loops_.end()) {
      idle_.fetch_add(1, std::memory_order_relaxed);
      wake_.wait(lock);
      idle_.fetch_sub(1, std::memory_order_relaxed);
      continue;
    }
    Loop& loop = **open;
    const int thread = ++loop.joined;
    ++loop.working;
    lock.unlock();
    TakeItems(loop, thread);
    lock.lock();
    if (--loop.working == 0) loop.left.notify_one();
  }
}

void ThreadPool::Wake() {
  { std::lock_guard lock(mutex_); }
  wake_.notify_all();
}

}  // namespace pewter::kernels
