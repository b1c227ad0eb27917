// Retries that neither give up at the first hiccup nor storm a store that is in trouble: full
// jitter, longer waits when the store throttles, and a budget that all requests to one endpoint
// share, as AWS SDKs do in their standard mode
// (https://docs.aws.amazon.com/sdkref/latest/guide/feature-retry-behavior.html).
#pragma once

#include <mutex>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/time/time.h"

namespace pewter {

enum class Failure {
  kTransient,  // a connection, a 500: soon again
  kThrottled,  // the store asks for fewer requests
  kFinal,
};

struct RetryPolicy {
  int attempts = 12;
  absl::Duration first = absl::Milliseconds(100);
  absl::Duration first_throttled = absl::Milliseconds(500);
  absl::Duration longest = absl::Seconds(20);
};

// Tokens for retries. A retry takes one; the request it was for gives it back when it succeeds, and
// so does, in part, every success. So scattered failures are retried without end, and an outage
// ends the retries of all requests soon. Thread-safe.
class RetryBudget {
 public:
  explicit RetryBudget(double capacity = 100) : capacity_(capacity), tokens_(capacity) {}
  bool Take();
  void Succeeded(bool after_retry);

 private:
  static constexpr double kFirstSuccess = 0.2;
  const double capacity_;
  std::mutex mutex_;
  double tokens_;  // guarded by mutex_
};

// The attempts of one request.
class Retry {
 public:
  Retry(const RetryPolicy& policy, RetryBudget& budget) : policy_(policy), budget_(budget) {}

  // Waits, and says whether there is another attempt. `retry_after`: what the server asked for, or
  // zero.
  bool Again(Failure failure, absl::Duration retry_after);
  // Something of what was asked for has come: counts from the beginning again.
  void Progressed() { failures_ = 0; }
  void Succeeded() { budget_.Succeeded(retried_); }
  int attempts() const { return attempts_; }

 private:
  const RetryPolicy& policy_;
  RetryBudget& budget_;
  int failures_ = 0;
  int attempts_ = 1;
  bool retried_ = false;
};

}  // namespace pewter
