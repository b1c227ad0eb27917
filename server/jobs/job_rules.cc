#include "server/jobs/job_rules.h"

#include <algorithm>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "server/errors.h"
#include "server/jobs/job_state.h"
#include "server/proto_time.h"

namespace pewter::server {
namespace {

constexpr int kMostDoublings = 20;
// By JobNotice::Kind; the last is never sent.
constexpr absl::string_view kNoticeKinds = "eqpcd";

constexpr absl::Duration kFullQueueRetry = absl::Seconds(30);
// A job waits so long for one more priority.
constexpr int64_t kAgeingMs = 60'000;

absl::Status CheckLease(const v1::Job& job, int64_t generation) {
  if (IsHeld(job.state()) && job.lease_generation() == generation) return absl::OkStatus();
  return MakeError(
      absl::StatusCode::kAborted, "LEASE_LOST",
      absl::StrCat("job ", job.id(), " is ", v1::JobState_Name(job.state()),
                   " with lease generation ", job.lease_generation(), ", not ", generation),
      {{"job_id", job.id()}});
}

// Numbers the event.
void Append(JobRow& row, v1::JobEvent event) {
  row.job.set_sequence(row.job.sequence() + 1);
  event.set_sequence(row.job.sequence());
  SetTime(row.now, event.mutable_time());
  row.events.push_back(std::move(event));
}

void SetState(JobRow& row, v1::JobState state) {
  v1::Job& job = row.job;
  job.set_state(state);
  SetTime(row.now, job.mutable_update_time());
  if (state == v1::JOB_STATE_PLANNING) {
    SetTime(row.now, job.mutable_attempt_time());
    if (!job.has_start_time()) *job.mutable_start_time() = job.attempt_time();
  }
  if (IsFinal(state)) {
    job.clear_cancel_requested();
    job.clear_perhaps_published();
    SetTime(row.now, job.mutable_end_time());
  }
  v1::JobEvent event;
  v1::JobStateChange* change = event.mutable_state_change();
  change->set_state(state);
  change->set_attempt(job.attempt());
  if (job.has_error()) *change->mutable_error() = job.error();
  if (job.has_output()) *change->mutable_output() = job.output();
  Append(row, std::move(event));
}

}  // namespace

void Enqueue(JobRow& row) {
  SetTime(row.now, row.job.mutable_create_time());
  SetState(row, v1::JOB_STATE_QUEUED);
}

int64_t QueueRank(const v1::Job& job) {
  return job.priority() * kAgeingMs - absl::ToUnixMillis(ToTime(job.create_time()));
}

JobDeadline DeadlineOf(const v1::Job& job) {
  JobDeadline first;
  const auto consider = [&](const google::protobuf::Timestamp& from,
                            const google::protobuf::Duration& limit, absl::string_view reason,
                            absl::string_view what) {
    const absl::Time time = ToTime(from) + ToDuration(limit);
    if (time >= first.time) return;
    first.time = time;
    const std::string text = absl::FormatDuration(ToDuration(limit));
    first.error.set_reason(std::string(reason));
    first.error.set_message(absl::StrCat(what, " ", text));
    (*first.error.mutable_metadata())["limit"] = text;
  };
  first.error.set_code(static_cast<int>(absl::StatusCode::kDeadlineExceeded));
  if (job.perhaps_published()) return first;
  if (job.has_total_deadline()) {
    consider(job.create_time(), job.total_deadline(), "TOTAL_DEADLINE",
             "the job was not done within its total_deadline of");
  }
  if (job.has_queue_deadline() && job.state() == v1::JOB_STATE_QUEUED && !job.has_start_time()) {
    consider(job.create_time(), job.queue_deadline(), "QUEUE_DEADLINE",
             "no worker took the job within its queue_deadline of");
  }
  if (job.has_run_deadline() && IsHeld(job.state())) {
    consider(job.attempt_time(), job.run_deadline(), "RUN_DEADLINE",
             "the attempt was not done within the run_deadline of");
  }
  return first;
}

absl::Status Claim(JobRow& row, absl::string_view server, absl::Duration lease) {
  v1::Job& job = row.job;
  if (job.state() != v1::JOB_STATE_QUEUED) {
    return absl::InternalError(
        absl::StrCat("job ", job.id(), " is claimed while ", v1::JobState_Name(job.state())));
  }
  job.set_attempt(job.attempt() + 1);
  job.set_lease_generation(job.lease_generation() + 1);
  job.set_server(std::string(server));
  job.clear_error();
  job.clear_progress();
  row.lease = lease;
  SetState(row, v1::JOB_STATE_PLANNING);
  return absl::OkStatus();
}

absl::Status RenewLease(JobRow& row, int64_t generation, absl::Duration lease,
                        const v1::Progress& progress) {
  RETURN_IF_ERROR(CheckLease(row.job, generation));
  *row.job.mutable_progress() = progress;
  row.lease = lease;
  row.progressed = true;
  return absl::OkStatus();
}

absl::Status Transition(JobRow& row, v1::JobState from, v1::JobState to, const JobChange& change) {
  v1::Job& job = row.job;
  if (!IsAllowed(from, to)) {
    return absl::InternalError(
        absl::StrCat("no job goes from ", v1::JobState_Name(from), " to ", v1::JobState_Name(to)));
  }
  if (change.lease_generation) RETURN_IF_ERROR(CheckLease(job, *change.lease_generation));
  if (job.state() != from) {
    return MakeError(absl::StatusCode::kAborted, "STATE_CHANGED",
                     absl::StrCat("job ", job.id(), " is ", v1::JobState_Name(job.state()),
                                  ", no longer ", v1::JobState_Name(from)),
                     {{"job_id", job.id()}});
  }
  job.clear_error();
  if (change.error) *job.mutable_error() = *change.error;
  if (change.output) *job.mutable_output() = *change.output;
  if (change.progress) *job.mutable_progress() = *change.progress;
  SetState(row, to);
  return absl::OkStatus();
}

absl::Status GiveUp(JobRow& row, const LostAttempt& lost) {
  v1::Job& job = row.job;
  RETURN_IF_ERROR(CheckLease(job, lost.lease_generation));
  if (lost.only_if_expired && !row.lease_expired) {
    return MakeError(absl::StatusCode::kAborted, "LEASE_LOST",
                     absl::StrCat("the lease on job ", job.id(), " was renewed"),
                     {{"job_id", job.id()}});
  }
  // Of an attempt that was lost while it published nobody knows whether the model is there: the
  // next one finds out, and a cancelled job never has a model.
  if (job.state() == v1::JOB_STATE_PUBLISHING) job.set_perhaps_published(true);
  if (job.cancel_requested() && !job.perhaps_published()) {
    *job.mutable_error() = CancelledError();
    SetState(row, v1::JOB_STATE_CANCELLED);
    return absl::OkStatus();
  }
  if (const JobDeadline deadline = DeadlineOf(job); deadline.time <= row.now) {
    *job.mutable_error() = deadline.error;
    SetState(row, v1::JOB_STATE_FAILED);
    return absl::OkStatus();
  }
  job.clear_cancel_requested();
  if (!lost.counts) {
    job.set_attempt(job.attempt() - 1);
    job.clear_error();
    row.waits = lost.retry_delay;
    SetState(row, v1::JOB_STATE_QUEUED);
    return absl::OkStatus();
  }
  const int attempts = job.attempt();
  *job.mutable_error() = lost.why;
  (*job.mutable_error()->mutable_metadata())["attempts"] = absl::StrCat(attempts);
  if (attempts >= lost.max_attempts) {
    job.mutable_error()->set_message(
        absl::StrCat(lost.why.message(), "; given up after ", attempts, " attempts"));
    SetState(row, v1::JOB_STATE_FAILED);
    return absl::OkStatus();
  }
  row.waits = lost.retry_delay * (int64_t{1} << std::clamp(attempts - 1, 0, kMostDoublings));
  SetState(row, v1::JOB_STATE_QUEUED);
  return absl::OkStatus();
}

absl::Status AddWarnings(JobRow& row, int64_t generation,
                         const std::vector<std::string>& warnings) {
  RETURN_IF_ERROR(CheckLease(row.job, generation));
  for (const std::string& warning : warnings) {
    if (row.job.warnings_size() >= JobStore::kMaxWarnings) break;
    // A resumed attempt says what the first one said.
    const auto& known = row.job.warnings();
    if (std::find(known.begin(), known.end(), warning) != known.end()) continue;
    row.job.add_warnings(warning);
    v1::JobEvent event;
    event.set_warning(warning);
    Append(row, std::move(event));
  }
  return absl::OkStatus();
}

absl::Status RequestCancel(JobRow& row) {
  // Too late, perhaps: see GiveUp.
  if (row.job.perhaps_published()) return absl::OkStatus();
  if (row.job.state() == v1::JOB_STATE_QUEUED) {
    *row.job.mutable_error() = CancelledError();
    SetState(row, v1::JOB_STATE_CANCELLED);
  } else if (IsHeld(row.job.state())) {
    row.cancel_asked = !row.job.cancel_requested();
    row.job.set_cancel_requested(true);
  }
  return absl::OkStatus();
}

absl::Status FailOverdue(JobRow& row) {
  v1::Job& job = row.job;
  const JobDeadline deadline = DeadlineOf(job);
  if (job.state() != v1::JOB_STATE_QUEUED || deadline.time > row.now) {
    return MakeError(absl::StatusCode::kAborted, "STATE_CHANGED",
                     absl::StrCat("job ", job.id(), " does not wait beyond its deadline"),
                     {{"job_id", job.id()}});
  }
  *job.mutable_error() = deadline.error;
  SetState(row, v1::JOB_STATE_FAILED);
  return absl::OkStatus();
}

absl::Status CheckDelete(const JobRow& row) {
  return IsFinal(row.job.state()) ? absl::OkStatus() : JobNotFinal(row.job);
}

std::string SpecBytes(v1::Job job) {
  v1::Job spec;
  spec.set_id(std::move(*job.mutable_id()));
  spec.set_request_id(std::move(*job.mutable_request_id()));
  spec.set_recipe(std::move(*job.mutable_recipe()));
  spec.set_destination_uri(std::move(*job.mutable_destination_uri()));
  spec.mutable_labels()->swap(*job.mutable_labels());
  spec.set_priority(job.priority());
  if (job.has_options()) *spec.mutable_options() = std::move(*job.mutable_options());
  spec.set_project(std::move(*job.mutable_project()));
  spec.set_retry_of(std::move(*job.mutable_retry_of()));
  if (job.has_queue_deadline()) *spec.mutable_queue_deadline() = job.queue_deadline();
  if (job.has_run_deadline()) *spec.mutable_run_deadline() = job.run_deadline();
  if (job.has_total_deadline()) *spec.mutable_total_deadline() = job.total_deadline();
  spec.set_on_existing(job.on_existing());
  *spec.mutable_create_time() = job.create_time();
  return spec.SerializeAsString();
}

std::string StatusBytes(v1::Job job) {
  job.clear_id();
  job.clear_request_id();
  job.clear_recipe();
  job.clear_destination_uri();
  job.clear_labels();
  job.clear_priority();
  job.clear_options();
  job.clear_project();
  job.clear_retry_of();
  job.clear_queue_deadline();
  job.clear_run_deadline();
  job.clear_total_deadline();
  job.clear_on_existing();
  job.clear_create_time();
  return job.SerializeAsString();
}

absl::StatusOr<v1::Job> ParseJob(absl::string_view spec, absl::string_view status) {
  v1::Job job;
  if (!job.ParseFromString(absl::StrCat(spec, status))) {
    return absl::DataLossError("job database: a job's row is bad");
  }
  // Of a version without projects.
  if (job.project().empty()) job.set_project(kDefaultProject);
  return job;
}

absl::StatusOr<v1::JobEvent> ParseEvent(absl::string_view bytes) {
  v1::JobEvent event;
  if (!event.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) {
    return absl::DataLossError("job database: an event is bad");
  }
  return event;
}

void Shorten(v1::Job& job) {
  job.clear_recipe();
  if (job.has_output()) job.mutable_output()->clear_manifest_json();
}

absl::Status JobNotFound(absl::string_view id) {
  return WithResource(
      MakeError(absl::StatusCode::kNotFound, "JOB_NOT_FOUND", absl::StrCat("there is no job ", id),
                {{"job_id", std::string(id)}}),
      "pewter.v1.Job", id);
}

absl::Status JobNotFinal(const v1::Job& job) {
  return WithPrecondition(
      MakeError(absl::StatusCode::kFailedPrecondition, "JOB_NOT_FINAL",
                absl::StrCat("job ", job.id(), " is ", v1::JobState_Name(job.state()),
                             "; wait for its end or cancel it first"),
                {{"job_id", job.id()}}),
      "STATE", absl::StrCat("jobs/", job.id()));
}

absl::Status RequestIdReused(absl::string_view request_id, absl::string_view job_id) {
  return MakeError(
      absl::StatusCode::kInvalidArgument, "REQUEST_ID_REUSED",
      absl::StrCat("request_id \"", request_id, "\" was used for job ", job_id,
                   " with another request; choose a new one"),
      {{"request_id", std::string(request_id)}, {"existing_job", std::string(job_id)}});
}

absl::Status CheckQueue(absl::string_view project, int64_t queued, int64_t queue_limit,
                        int64_t of_project, const ProjectPolicy& projects) {
  if (queued >= queue_limit) {
    return WithQuota(
        MakeError(absl::StatusCode::kResourceExhausted, "QUEUE_FULL",
                  absl::StrCat(queued,
                               " jobs are queued, as many as this service takes; try again later"),
                  {{"limit", absl::StrCat(queue_limit)}, {"used", absl::StrCat(queued)}}),
        "service", kFullQueueRetry);
  }
  const int64_t limit = projects.LimitsOf(project).queued;
  if (of_project < limit) return absl::OkStatus();
  return WithQuota(MakeError(absl::StatusCode::kResourceExhausted, "QUOTA_JOBS",
                             absl::StrCat("project ", project, " has ", of_project,
                                          " jobs queued and may have ", limit, "; try again later"),
                             {{"limit", absl::StrCat(limit)},
                              {"used", absl::StrCat(of_project)},
                              {"project", std::string(project)}}),
                   absl::StrCat("projects/", project), kFullQueueRetry);
}

absl::Status DestinationBusy(absl::string_view job_id, absl::string_view uri) {
  return WithResource(
      MakeError(absl::StatusCode::kAlreadyExists, "DESTINATION_BUSY",
                absl::StrCat("job ", job_id, " writes ", uri, "; wait for it or cancel it"),
                {{"existing_job", std::string(job_id)}, {"uri", std::string(uri)}}),
      "pewter.v1.Job", job_id);
}

absl::Status DatabaseUnavailable(absl::string_view message) {
  return WithRetry(MakeError(absl::StatusCode::kUnavailable, "DATABASE_UNAVAILABLE",
                             absl::StrCat("job database: ", message)),
                   absl::Seconds(1));
}

absl::Status DatabaseTooNew(int64_t version, int64_t known) {
  return absl::FailedPreconditionError(
      absl::StrCat("the job database has version ", version, ", this pewterd knows ", known,
                   "; start a newer pewterd or give another --database"));
}

v1::JobError CancelledError() {
  v1::JobError error;
  error.set_code(static_cast<int>(absl::StatusCode::kCancelled));
  error.set_reason("CANCELLED_BY_CLIENT");
  error.set_message("cancelled; finished shards stay at the destination");
  return error;
}

JobNotice NoticeOf(const JobRow& row) {
  JobNotice notice = {
      .kind = JobNotice::Kind::kEvent, .job_id = row.job.id(), .sequence = row.job.sequence()};
  if (row.cancel_asked) {
    notice.kind = JobNotice::Kind::kCancel;
  } else if (row.progressed) {
    notice.kind = JobNotice::Kind::kProgress;
  } else if (row.job.state() == v1::JOB_STATE_QUEUED) {
    notice.kind = JobNotice::Kind::kQueued;
  }
  return notice;
}

std::string FormatNotice(const JobNotice& notice) {
  return absl::StrCat(kNoticeKinds.substr(static_cast<size_t>(notice.kind), 1), notice.sequence,
                      " ", notice.job_id);
}

JobNotice ParseNotice(absl::string_view text) {
  const size_t kind = text.empty() ? absl::string_view::npos : kNoticeKinds.find(text[0]);
  const size_t space = text.find(' ');
  JobNotice notice;
  if (kind == absl::string_view::npos || space == absl::string_view::npos ||
      !absl::SimpleAtoi(text.substr(1, space - 1), &notice.sequence) || notice.sequence < 0 ||
      space + 1 == text.size()) {
    return {};
  }
  notice.kind = static_cast<JobNotice::Kind>(kind);
  notice.job_id = std::string(text.substr(space + 1));
  return notice;
}

}  // namespace pewter::server
