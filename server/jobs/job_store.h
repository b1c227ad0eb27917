// JobStore: the durable truth about jobs. What it has acknowledged survives a crash of the machine.
//
// A job's state changes only by Transition and Claim, each a compare-and-set that follows
// kStateChanges and appends one event; events of a job are numbered 1, 2, 3, ... without gaps. A
// worker's writes are fenced: they name the generation of its lease and fail with Aborted
// (LEASE_LOST) once the job has another one or is held no more.
//
// Every method may be called from any thread. Common errors: NotFound (JOB_NOT_FOUND), Unavailable
// (DATABASE_UNAVAILABLE). tests/contract/job_store_contract.h says the same as tests.
#pragma once

#include <cstdint>
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
  bool refund_attempt = false;  // the attempt does not count
};

struct JobPage {
  std::vector<v1::Job> jobs;  // without recipe and output.manifest_json
  int64_t next = 0;           // pass as `before`; 0: that was the last page
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
  // that is not final has the same destination. ResourceExhausted (QUEUE_FULL): `queue_limit` jobs
  // are queued.
  virtual absl::StatusOr<Created> Create(const NewJob& job, int64_t queue_limit) = 0;

  virtual absl::StatusOr<v1::Job> Get(absl::string_view id) = 0;
  // Newest first. `before`: from the last page, or 0.
  virtual absl::StatusOr<JobPage> List(const v1::JobFilter& filter, int limit, int64_t before) = 0;
  // FailedPrecondition (JOB_NOT_FINAL) unless it is final.
  virtual absl::Status Delete(absl::string_view id) = 0;

  // Aborted (STATE_CHANGED) when the job is not in `from`; Internal for a change that is not in the
  // table.
  virtual absl::StatusOr<v1::Job> Transition(absl::string_view id, v1::JobState from,
                                             v1::JobState to, const JobChange& change) = 0;
  // QUEUED -> PLANNING with the next generation, one more attempt, and a lease.
  // FailedPrecondition (STATE_CONFLICT) unless it is queued.
  virtual absl::StatusOr<v1::Job> Claim(absl::string_view id, absl::Time lease_expiry) = 0;
  // Keeps the lease and the snapshot.
  virtual absl::Status RenewLease(absl::string_view id, int64_t lease_generation,
                                  absl::Time lease_expiry, const v1::Progress& progress) = 0;
  // One event each; Job.warnings holds the first kMaxWarnings, later ones are dropped.
  virtual absl::StatusOr<v1::Job> AddWarnings(absl::string_view id, int64_t lease_generation,
                                              const std::vector<std::string>& warnings) = 0;
  // Sets cancel_requested unless the job is final.
  virtual absl::StatusOr<v1::Job> RequestCancel(absl::string_view id) = 0;

  // Events with a sequence greater than `after`, at most `limit`.
  virtual absl::StatusOr<std::vector<v1::JobEvent>> Events(absl::string_view id, int64_t after,
                                                           int limit) = 0;
  // Ids of queued jobs, in the order in which they should run.
  virtual absl::StatusOr<std::vector<std::string>> Queue(int limit) = 0;
  // Ids of the jobs that are held: after a start of the server, those whose worker is gone.
  virtual absl::StatusOr<std::vector<std::string>> Held() = 0;

  static constexpr int kMaxWarnings = 100;
};

// "sqlite:PATH": the file is made when it is not there. FailedPrecondition when a newer version of
// pewterd wrote it.
absl::StatusOr<std::unique_ptr<JobStore>> OpenJobStore(absl::string_view database);

}  // namespace pewter::server
