#include "store/retry.h"

#include <algorithm>
#include <cmath>

#include "absl/random/random.h"
#include "absl/time/clock.h"

namespace pewter {

bool RetryBudget::Take() {
  std::lock_guard lock(mutex_);
  if (tokens_ < 1) return false;
  tokens_ -= 1;
  return true;
}

void RetryBudget::Succeeded(bool after_retry) {
  std::lock_guard lock(mutex_);
  tokens_ = std::min(capacity_, tokens_ + (after_retry ? 1 : kFirstSuccess));
}

bool Retry::Again(Failure failure, absl::Duration retry_after) {
  if (failure == Failure::kFinal || ++failures_ >= policy_.attempts || !budget_.Take()) {
    return false;
  }
  ++attempts_;
  retried_ = true;
  const absl::Duration first =
      failure == Failure::kThrottled ? policy_.first_throttled : policy_.first;
  const absl::Duration ceiling =
      std::min(policy_.longest, first * std::exp2(std::min(failures_ - 1, 30)));
  static thread_local absl::BitGen random;
  const absl::Duration wait = ceiling * absl::Uniform(random, 0.0, 1.0);
  absl::SleepFor(std::max(wait, std::min(retry_after, policy_.longest)));
  return true;
}

}  // namespace pewter
