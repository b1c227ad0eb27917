// Planner: answers PlanMerge. Bounded: so many plans at a time, others are refused at once.
#pragma once

#include <atomic>
#include <utility>

#include "absl/status/statusor.h"
#include "pewter/v1/merge_service.pb.h"
#include "server/access_policy.h"

namespace pewter::server {

class Planner {
 public:
  explicit Planner(int max_plans, AccessPolicy access = {})
      : max_plans_(max_plans), access_(std::move(access)) {}

  absl::StatusOr<v1::PlanMergeResponse> Plan(const v1::PlanMergeRequest& request);

 private:
  const int max_plans_;
  const AccessPolicy access_;
  std::atomic<int> running_ = 0;
};

}  // namespace pewter::server
