// What a request must be before it becomes a job: checks that cost nothing but the text.
//
// All violations of a request are told at once (BadRequest). Whether models exist and fit is for
// planning.
#pragma once

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "pewter/v1/merge_service.pb.h"
#include "server/jobs/job_store.h"

namespace pewter::server {

// The job to create, with a new id.
absl::StatusOr<NewJob> Admit(const v1::CreateJobRequest& request);

absl::Status CheckListJobs(const v1::ListJobsRequest& request);

// Recipe errors are not violations of a PlanMergeRequest: they are its answer.
absl::Status CheckPlanMerge(const v1::PlanMergeRequest& request);

}  // namespace pewter::server
