#include "kernels/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <latch>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

namespace pewter::kernels {
namespace {

TEST(ThreadPool, RunsEachItemOnce) {
  for (int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.threads(), threads);
    for (int64_t count : {0, 1, 2, 1000}) {
      std::vector<std::atomic<int>> runs(count);
      pool.ForEach(count, [&](int64_t item, int thread) {
        EXPECT_GE(thread, 0);
        EXPECT_LT(thread, threads);
        ++runs[item];
      });
      for (const std::atomic<int>& times : runs) EXPECT_EQ(times, 1);
    }
  }
}

// Two items that wait for each other need two threads.
TEST(ThreadPool, ItsThreadsTakePart) {
  ThreadPool pool(2);
  std::latch both(2);
  std::mutex mutex;
  std::set<int> threads;
  pool.ForEach(2, [&](int64_t, int thread) {
    both.arrive_and_wait();
    std::lock_guard lock(mutex);
    threads.insert(thread);
  });
  EXPECT_EQ(threads, (std::set<int>{0, 1}));
}

TEST(ThreadPool, LentThreadsHelpUntilTheyAreWanted) {
  const std::unique_ptr<ThreadPool> pool = ThreadPool::OfLent(3);
  std::atomic<bool> ready = false;
  std::atomic<int> helped = 0;
  std::vector<std::jthread> lanes;
  for (int i = 0; i < 2; ++i) {
    lanes.emplace_back([&] { pool->HelpUntil([&] { return ready.load(); }); });
  }
  for (int round = 0; round < 3; ++round) {
    std::latch all(3);
    pool->ForEach(3, [&](int64_t, int thread) {
      all.arrive_and_wait();
      if (thread > 0) ++helped;
    });
  }
  EXPECT_EQ(helped, 6);
  ready = true;
  pool->Wake();
  lanes.clear();
  // Nobody helps any more, and the loop runs.
  int64_t sum = 0;
  pool->ForEach(10, [&](int64_t item, int) { sum += item; });
  EXPECT_EQ(sum, 45);
  EXPECT_EQ(pool->available(), 1);
}

TEST(ThreadPool, ManyCallersShareIt) {
  ThreadPool pool(4);
  std::vector<int64_t> sums(6);
  {
    std::vector<std::jthread> callers;
    for (int64_t& sum : sums) {
      callers.emplace_back([&] {
        for (int round = 0; round < 50; ++round) {
          std::vector<int64_t> items(64);
          pool.ForEach(64, [&](int64_t item, int) { items[item] = item; });
          for (int64_t item : items) sum += item;
        }
      });
    }
  }
  for (int64_t sum : sums) EXPECT_EQ(sum, 50 * 63 * 64 / 2);
}

TEST(ThreadPool, WhatIsThrownEndsTheLoop) {
  for (int threads : {1, 3}) {
    ThreadPool pool(threads);
    for (int round = 0; round < 20; ++round) {
      EXPECT_THROW(pool.ForEach(8, [](int64_t, int) { throw std::runtime_error("no"); }),
                   std::runtime_error);
    }
    std::atomic<int> runs = 0;
    pool.ForEach(8, [&](int64_t, int) { ++runs; });
    EXPECT_EQ(runs, 8);
  }
}

}  // namespace
}  // namespace pewter::kernels
