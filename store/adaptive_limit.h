// AdaptiveLimit: how many requests at a time, found by trying.
//
// Rounds of some requests are timed. A round that brings more bytes a second than the one before is
// followed by a wider one; a round that brings no more, by one as wide as before, and now and then
// a wider or a narrower one is tried again. When the store throttles, the limit is halved at once.
// Thread-safe.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace pewter {

class AdaptiveLimit {
 public:
  using Clock = std::function<absl::Time()>;
  AdaptiveLimit(int first, int most, Clock clock = &absl::Now)
      : most_(most), clock_(std::move(clock)), limit_(first) {}

  // Waits until a request may start.
  void Acquire();
  // A request has ended, with so many bytes.
  void Release(int64_t bytes, bool throttled);
  int limit() const;

 private:
  void EndRound(absl::Time now);

  const int most_;
  const Clock clock_;
  mutable std::mutex mutex_;
  std::condition_variable free_;
  int limit_;  // all below guarded by mutex_
  int in_flight_ = 0;
  bool saturated_ = false;  // the round has been at its limit
  int ended_ = 0;
  int64_t bytes_ = 0;
  absl::Time round_start_ = absl::InfinitePast();
  absl::Time throttled_at_ = absl::InfinitePast();
  double best_rate_ = 0;
  int best_limit_ = 0;
  int settled_ = 0;  // rounds since the last try
};

}  // namespace pewter
