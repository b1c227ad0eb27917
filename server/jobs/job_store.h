// JobStore: the durable truth about jobs. What it has acknowledged survives a crash of the machine.
//
// A job's state changes only by Claim, Transition, GiveUp, RequestCancel and FailOverdue, each a
// compare-and-set that follows kStateChanges and appends one event; events of a job are numbered 1,
// 2, 3, ... without gaps. Several servers may share a store: each holds what it has claimed under a
// lease, whose time is the store's clock, and any of them may give up what another has let expire.
// Writes for a worker are fenced: they name the generation of its lease and fail with Aborted
// (LEASE_LOST) once the job has another one or is held no more.
//
// Every method may be called from any thread. Common errors: NotFound (JOB_NOT_FOUND), Unavailable
// (DATABASE_UNAVAILABLE): what was asked for has happened or not, and reading the job tells.
// tests/contract/job_store_contract.h says the same as tests.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "pewter/v1/job.pb.h"
#include "pewter/v1/merge_service.pb.h"
#include "server/jobs/project_policy.h"

namespace pewter::server {

struct NewJob {
  v1::Job job;                  // what the client gave, and the id; the store fills in the rest
  std::string request_digest;   // of the whole request but request_id
  std::string destination_key;  // equal for equal places
};

// What changes together with the state.
struct JobChange {
  std::optional<int64_t> lease_generation;  // checked: the caller is a worker
  std::optional<v1::JobError> error;        // else cleared
  std::optional<v1::JobOutput> output;
  std::optional<v1::Progress> progress;
};

// How an attempt ends that is not the end of its job.
struct LostAttempt {
  int64_t lease_generation = 0;  // of the attempt
  bool only_if_expired = false;  // its lease, by the store's clock
  v1::JobError why;
  bool counts = true;
  int max_attempts = 0;
  absl::Duration retry_delay;  // after the first attempt; doubles with each further one
};

struct JobPage {
  std::vector<v1::Job> jobs;  // without recipe and output.manifest_json
  int64_t next = 0;           // pass as `before`; 0: that was the last page
};

// That a job has changed, by whichever server.
struct JobNotice {
  enum class Kind {
    kEvent,     // it has an event of number `sequence`
    kQueued,    // and is queued
    kProgress,  // or newer progress
    kCancel,    // a cancel was requested
    kGone,      // it was deleted
    kMissed,    // of no job: notices were lost, anything may have changed
  };
  Kind kind = Kind::kMissed;
  std::string job_id;
  int64_t sequence = 0;
};

class JobStore {
 public:
  virtual ~JobStore() = default;

  struct Created {
    v1::Job job;
    bool is_new = false;
  };
  // A job with the same request_id and digest is returned as it is. InvalidArgument
  // (REQUEST_ID_REUSED): same request_id, another digest. AlreadyExists (DESTINATION_BUSY): a job
  // that is not final has the same destination. ResourceExhausted: `queue_limit` jobs are queued
  // (QUEUE_FULL), or as many of the job's project as the policy allows (QUOTA_JOBS).
  virtual absl::StatusOr<Created> Create(const NewJob& job, int64_t queue_limit) = 0;

  virtual absl::StatusOr<v1::Job> Get(absl::string_view id) = 0;
  // Newest first. `before`: from the last page, or 0.
  virtual absl::StatusOr<JobPage> List(const v1::JobFilter& filter, int limit, int64_t before) = 0;
  // FailedPrecondition (JOB_NOT_FINAL) unless it is final.
  virtual absl::Status Delete(absl::string_view id) = 0;

  struct Claimed {
    std::optional<v1::Job> job;  // nothing: no job can be started now
    // Until one that waits after a loss can be.
    absl::Duration next = absl::InfiniteDuration();
  };
  // A queued job whose time to wait is over and whose deadline is not: of the first project in the
  // policy's order the first by QueueRank. QUEUED -> PLANNING with the next generation, one more
  // attempt, and a lease of `server`. No job is given out twice, and no project runs more than it
  // may.
  virtual absl::StatusOr<Claimed> Claim(absl::string_view server, absl::Duration lease) = 0;
  // Keeps the snapshot; the lease ends `lease` from now. The job tells whether to go on
  // (cancel_requested).
  virtual absl::StatusOr<v1::Job> RenewLease(absl::string_view id, int64_t lease_generation,
                                             absl::Duration lease,
                                             const v1::Progress& progress) = 0;
  // Aborted (STATE_CHANGED) when the job is not in `from`; Internal for a change that is not in the
  // table.
  virtual absl::StatusOr<v1::Job> Transition(absl::string_view id, v1::JobState from,
                                             v1::JobState to, const JobChange& change) = 0;
  // To CANCELLED when that was requested before it was to publish, to FAILED when its deadline has
  // passed, or when it counts and was the last attempt, else back to QUEUED, to wait first when it
  // counts. Aborted (LEASE_LOST) also when the lease should have expired and has not.
  virtual absl::StatusOr<v1::Job> GiveUp(absl::string_view id, const LostAttempt& lost) = 0;
  // One event each; Job.warnings holds the first kMaxWarnings, later ones are dropped.
  virtual absl::StatusOr<v1::Job> AddWarnings(absl::string_view id, int64_t lease_generation,
                                              const std::vector<std::string>& warnings) = 0;
  // QUEUED -> CANCELLED; sets cancel_requested while the job is held; else nothing, as when it is
  // queued since an attempt was lost that may have published.
  virtual absl::StatusOr<v1::Job> RequestCancel(absl::string_view id) = 0;

  // Events with a sequence greater than `after`, at most `limit`.
  virtual absl::StatusOr<std::vector<v1::JobEvent>> Events(absl::string_view id, int64_t after,
                                                           int limit) = 0;
  // Jobs that `server` holds: after its start, those whose worker is gone.
  virtual absl::StatusOr<std::vector<v1::Job>> Held(absl::string_view server) = 0;
  // Held jobs whose lease has expired, the longest ago first.
  virtual absl::StatusOr<std::vector<v1::Job>> Expired(int limit) = 0;
  // Queued jobs whose deadline has passed.
  virtual absl::StatusOr<std::vector<v1::Job>> Overdue(int limit) = 0;
  // QUEUED -> FAILED. Aborted (STATE_CHANGED) unless it is queued and its deadline has passed.
  virtual absl::StatusOr<v1::Job> FailOverdue(absl::string_view id) = 0;

  // From now on calls `listener`, on a thread of the store's own, soon after each change that
  // another server makes (and perhaps this one); notices may be lost, so whoever depends on one
  // also looks from time to time. Null ends it, and returns when no call is running. A store that
  // one server has for itself never calls.
  virtual void Listen(std::function<void(const JobNotice&)> listener) = 0;

  // Whether changes can be made now. Unavailable (DATABASE_UNAVAILABLE) otherwise.
  virtual absl::Status Check() = 0;

  static constexpr int kMaxWarnings = 100;
};

// "sqlite:PATH": the file is made when it is not there. "postgresql://USER@HOST:PORT/DATABASE", as
// libpq reads it: tables are made when they are not there. FailedPrecondition when a newer version
// of pewterd wrote it; Unavailable when it cannot be opened. No message holds a password.
absl::StatusOr<std::unique_ptr<JobStore>> OpenJobStore(absl::string_view database,
                                                       ProjectPolicy projects = {});

// Whether a password is part of it.
bool HoldsPassword(absl::string_view database);

}  // namespace pewter::server
