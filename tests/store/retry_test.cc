#include "store/retry.h"

#include <gtest/gtest.h>

#include <thread>

#include "store/adaptive_limit.h"

namespace pewter {
namespace {

constexpr RetryPolicy kQuick{.attempts = 5,
                             .first = absl::Microseconds(10),
                             .first_throttled = absl::Microseconds(10),
                             .longest = absl::Microseconds(100)};

TEST(RetryTest, EndsAfterTheLastAttempt) {
  RetryBudget budget;
  Retry retry(kQuick, budget);
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(retry.Again(Failure::kTransient, absl::ZeroDuration()));
  EXPECT_FALSE(retry.Again(Failure::kTransient, absl::ZeroDuration()));
  EXPECT_EQ(retry.attempts(), 5);
}

TEST(RetryTest, WhatIsFinalIsNotTriedAgain) {
  RetryBudget budget;
  EXPECT_FALSE(Retry(kQuick, budget).Again(Failure::kFinal, absl::ZeroDuration()));
}

TEST(RetryTest, ProgressCountsFromTheBeginning) {
  RetryBudget budget;
  Retry retry(kQuick, budget);
  for (int i = 0; i < 50; ++i) {
    EXPECT_TRUE(retry.Again(Failure::kTransient, absl::ZeroDuration()));
    retry.Progressed();
  }
}

TEST(RetryTest, TheBudgetIsOfAllRequests) {
  RetryBudget budget(10);
  int retries = 0;
  for (int request = 0; request < 100; ++request) {
    Retry retry(kQuick, budget);
    while (retry.Again(Failure::kThrottled, absl::ZeroDuration())) ++retries;
  }
  EXPECT_EQ(retries, 10);
}

TEST(RetryTest, ScatteredFailuresAreRetriedWithoutEnd) {
  RetryBudget budget(10);
  for (int request = 0; request < 1000; ++request) {
    Retry retry(kQuick, budget);
    if (request % 5 == 0) {
      ASSERT_TRUE(retry.Again(Failure::kTransient, absl::ZeroDuration())) << request;
    }
    retry.Succeeded();
  }
}

TEST(RetryTest, WaitsAsLongAsTheServerAsks) {
  RetryBudget budget;
  RetryPolicy policy = kQuick;
  policy.longest = absl::Milliseconds(50);
  Retry retry(policy, budget);
  const absl::Time start = absl::Now();
  EXPECT_TRUE(retry.Again(Failure::kThrottled, absl::Milliseconds(30)));
  EXPECT_GE(absl::Now() - start, absl::Milliseconds(30));
  EXPECT_TRUE(retry.Again(Failure::kThrottled, absl::Hours(1)));
  EXPECT_LT(absl::Now() - start, absl::Seconds(10));
}

// A link that brings so many bytes a second however many requests there are, of which each brings
// a tenth at most.
TEST(AdaptiveLimitTest, WidensUntilTheLinkIsFull) {
  absl::Time now = absl::FromUnixSeconds(1000);
  AdaptiveLimit limit(2, 32, [&] { return now; });
  for (int round = 0; round < 200; ++round) {
    const int width = limit.limit();
    for (int i = 0; i < width; ++i) limit.Acquire();
    // One more waits, which says that there was more to do.
    std::thread waiting([&] { limit.Acquire(); });
    while (limit.limit() == width) {
      std::this_thread::sleep_for(std::chrono::microseconds(100));
      break;
    }
    // Ten requests fill the link.
    now += absl::Milliseconds(100) * std::max(1.0, width / 10.0);
    for (int i = 0; i < width; ++i) limit.Release(1 << 20, /*throttled=*/false);
    waiting.join();
    limit.Release(0, false);
  }
  EXPECT_GE(limit.limit(), 7);
  EXPECT_LE(limit.limit(), 20);
}

TEST(AdaptiveLimitTest, ThrottlingHalvesOnceForAllThatWereUnderWay) {
  absl::Time now = absl::FromUnixSeconds(1000);
  AdaptiveLimit limit(16, 32, [&] { return now; });
  for (int i = 0; i < 16; ++i) limit.Acquire();
  for (int i = 0; i < 16; ++i) limit.Release(0, /*throttled=*/true);
  EXPECT_EQ(limit.limit(), 8);
  now += absl::Seconds(2);
  for (int i = 0; i < 5; ++i) {
    limit.Acquire();
    limit.Release(0, /*throttled=*/true);
    now += absl::Seconds(2);
  }
  EXPECT_EQ(limit.limit(), 1);
}

}  // namespace
}  // namespace pewter
