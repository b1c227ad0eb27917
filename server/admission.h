// What a request must be before it becomes a job: checks that cost nothing but the text.
//
// All violations of a request are told at once (BadRequest); then PermissionDenied for a place that
// the operator does not allow. Whether models exist and fit is for planning.
#pragma once

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "pewter/v1/merge_service.pb.h"
#include "server/access_policy.h"
#include "server/jobs/job_store.h"

namespace pewter::server {

// The job to create, with a new id.
absl::StatusOr<NewJob> Admit(const v1::CreateJobRequest& request, const AccessPolicy& access);

// The same from what the store has of `job`, which the operator may by now no longer allow.
absl::StatusOr<NewJob> AdmitRetry(const v1::RetryJobRequest& request, const v1::Job& job,
                                  const AccessPolicy& access);

absl::Status CheckListJobs(const v1::ListJobsRequest& request);

// Recipe errors are not violations of a PlanMergeRequest: they are its answer.
absl::Status CheckPlanMerge(const v1::PlanMergeRequest& request, const AccessPolicy& access);

}  // namespace pewter::server
