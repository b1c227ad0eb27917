#include "store/adaptive_limit.h"

#include <algorithm>

namespace pewter {
namespace {

constexpr absl::Duration kLeastRound = absl::Milliseconds(200);
constexpr absl::Duration kThrottleOnceIn = absl::Seconds(1);
constexpr double kBetter = 1.05;
constexpr int kRoundsSettled = 20;

}  // namespace

void AdaptiveLimit::Acquire() {
  std::unique_lock lock(mutex_);
  if (in_flight_ >= limit_) saturated_ = true;
  free_.wait(lock, [this] { return in_flight_ < limit_; });
  if (in_flight_++ == 0 && ended_ == 0) round_start_ = clock_();
}

void AdaptiveLimit::Release(int64_t bytes, bool throttled) {
  std::lock_guard lock(mutex_);
  --in_flight_;
  const absl::Time now = clock_();
  if (throttled) {
    // Requests that were under way together are one event.
    if (now - throttled_at_ > kThrottleOnceIn) {
      limit_ = std::max(1, limit_ / 2);
      throttled_at_ = now;
      best_rate_ = 0;
      best_limit_ = limit_;
      ended_ = 0;
      bytes_ = 0;
      round_start_ = now;
    }
  } else {
    ++ended_;
    bytes_ += bytes;
    if (ended_ >= 2 * limit_ && now - round_start_ >= kLeastRound) EndRound(now);
  }
  free_.notify_all();
}

void AdaptiveLimit::EndRound(absl::Time now) {
  const double rate = static_cast<double>(bytes_) /
                      absl::ToDoubleSeconds(std::max(now - round_start_, kLeastRound));
  if (rate > kBetter * best_rate_) {
    best_rate_ = rate;
    best_limit_ = limit_;
    settled_ = 0;
    // What was never full says nothing about more.
    if (saturated_) limit_ = std::min(most_, limit_ + std::max(1, limit_ / 2));
  } else if (limit_ != best_limit_) {
    limit_ = std::clamp(best_limit_, 1, most_);
    settled_ = 0;
  } else if (++settled_ >= kRoundsSettled) {
    settled_ = 0;
    best_rate_ = rate;  // the link may have changed
    if (saturated_) limit_ = std::min(most_, limit_ + std::max(1, limit_ / 4));
  }
  saturated_ = false;
  ended_ = 0;
  bytes_ = 0;
  round_start_ = now;
}

int AdaptiveLimit::limit() const {
  std::lock_guard lock(mutex_);
  return limit_;
}

}  // namespace pewter
