// What each change does to a job: the rules that every JobStore keeps, in one place.
//
// A store reads a row and locks it, has a rule change it, and writes the row and its new events in
// the same transaction; or it returns the rule's error and writes nothing. Rules are pure: time
// comes with the row, from the store's clock. Errors are those that job_store.h names.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "server/jobs/job_store.h"

namespace pewter::server {

struct JobRow {
  // Read.
  int64_t number = 0;  // the store's key
  v1::Job job;
  absl::Time now;
  bool lease_expired = false;

  // Written besides `job`.
  std::vector<v1::JobEvent> events;     // new ones, numbered
  std::optional<absl::Duration> lease;  // ends so long after `now`
  std::optional<absl::Duration> waits;  // not to be claimed until then
  bool progressed = false;              // has nothing new but progress
  bool cancel_asked = false;            // cancel_requested was set just now
};

// The job that a store begins with: row.job is the request's.
void Enqueue(JobRow& row);

absl::Status Claim(JobRow& row, absl::string_view server, absl::Duration lease);
absl::Status RenewLease(JobRow& row, int64_t generation, absl::Duration lease,
                        const v1::Progress& progress);
absl::Status Transition(JobRow& row, v1::JobState from, v1::JobState to, const JobChange& change);
absl::Status GiveUp(JobRow& row, const LostAttempt& lost);
absl::Status AddWarnings(JobRow& row, int64_t generation, const std::vector<std::string>& warnings);
absl::Status RequestCancel(JobRow& row);
// QUEUED -> FAILED; Aborted (STATE_CHANGED) unless it is queued and its deadline has passed.
absl::Status FailOverdue(JobRow& row);
absl::Status CheckDelete(const JobRow& row);

// The place of a queued job among those of its project, highest first: a minute of waiting is worth
// one priority.
int64_t QueueRank(const v1::Job& job);

// The first of a job's deadlines that applies to its state.
struct JobDeadline {
  absl::Time time = absl::InfiniteFuture();
  v1::JobError error;  // of a job that misses it
};
JobDeadline DeadlineOf(const v1::Job& job);

// A job is kept as two messages: what never changes and what does.
std::string SpecBytes(v1::Job job);
std::string StatusBytes(v1::Job job);
absl::StatusOr<v1::Job> ParseJob(absl::string_view spec, absl::string_view status);
absl::StatusOr<v1::JobEvent> ParseEvent(absl::string_view bytes);
// As lists show it.
void Shorten(v1::Job& job);

absl::Status JobNotFound(absl::string_view id);
absl::Status JobNotFinal(const v1::Job& job);
absl::Status RequestIdReused(absl::string_view request_id, absl::string_view job_id);
// Whether a job of `project` may be queued beside `queued` jobs, `of_project` of them its own.
absl::Status CheckQueue(absl::string_view project, int64_t queued, int64_t queue_limit,
                        int64_t of_project, const ProjectPolicy& projects);
absl::Status DestinationBusy(absl::string_view job_id, absl::string_view uri);
absl::Status DatabaseUnavailable(absl::string_view message);
// For a database of `version` opened by a pewterd that knows `known`.
absl::Status DatabaseTooNew(int64_t version, int64_t known);

// Of a job that was stopped because a client asked for it.
v1::JobError CancelledError();

// What a store tells other servers after it wrote `row`.
JobNotice NoticeOf(const JobRow& row);
// "<kind><sequence> <id>". Anything else is read as a notice that was lost.
std::string FormatNotice(const JobNotice& notice);
JobNotice ParseNotice(absl::string_view text);

}  // namespace pewter::server
