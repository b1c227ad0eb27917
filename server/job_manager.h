// JobManager: what the service does with jobs. It owns the store, the executor and the watches.
//
//   client --Create--> store --Claim--> scheduler --> executor --Heartbeat/Finish--> store -->
//   watches
//
// Several servers may share a store. A server claims what it can run and renews the leases of its
// workers for as long as it hears of them; what another server has claimed and let expire goes back
// to the queue. Whoever has lost a lease is told so by the store: its worker stops, and nothing of
// what it still says counts.
//
// What the store has to do takes an fsync, and is waited for under no lock that others need: each
// worker has its own turn, in which what it says and what becomes of it are done one after the
// other; the mutex guards the map of workers and is held for no longer than a look. Two threads of
// its own: the scheduler starts workers and kills those whose time is up (it also calls
// Executor::Submit, as that asks for a thread that stays), the reaper learns which have ended. A
// job whose worker is lost goes back to the queue only when nothing of that worker is alive, so no
// two workers of a server write one destination.
//
// Methods may be called from any thread.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "pewter/v1/merge_service.pb.h"
#include "pewter/v1/worker_service.pb.h"
#include "server/access_policy.h"
#include "server/executor/executor.h"
#include "server/jobs/job_rules.h"
#include "server/jobs/job_store.h"
#include "server/watch_hub.h"

namespace pewter::server {

struct JobManagerOptions {
  std::string server = "local";  // id among those that share the store
  int workers = 1;               // jobs that run at the same time
  absl::Duration lease = absl::Seconds(15);
  // How often the store is asked for what notices should have told, and for expired leases.
  absl::Duration look = absl::Seconds(5);
  absl::Duration start_limit = absl::Seconds(60);        // from start to claim
  absl::Duration cancel_grace = absl::Seconds(30);       // from the wish to the kill
  absl::Duration delete_wait = absl::Seconds(45);        // of a forced Delete for the job's end
  absl::Duration retry_delay = absl::Milliseconds(200);  // after the first loss; doubles
  int max_attempts = 5;
  int64_t queue_limit = 10'000;
  int max_watches = 128;
  AccessPolicy access;  // of jobs
  // Asked before each claim; while it is not OK, no job is taken. May be called from any thread.
  std::function<absl::Status()> may_claim;
};

class JobManager {
 public:
  JobManager(std::unique_ptr<JobStore> store, const JobManagerOptions& options);
  // Kills the workers that are left.
  ~JobManager();

  // Gives up the attempts of workers that died with the last server of the same id, and begins to
  // run jobs. Until then jobs are only queued.
  absl::Status Start(std::unique_ptr<Executor> executor);
  // Takes no more jobs, ends all watches, and stops the workers, which leave their jobs queued and
  // their finished shards in place. Those that are not gone after `grace` are killed.
  void Drain(absl::Duration grace);

  // For clients; errors as in pewter/v1/merge_service.proto.
  absl::StatusOr<v1::Job> Create(const v1::CreateJobRequest& request);
  absl::StatusOr<v1::Job> Get(absl::string_view id);
  absl::StatusOr<v1::ListJobsResponse> List(const v1::ListJobsRequest& request);
  absl::StatusOr<v1::Job> Cancel(absl::string_view id);
  absl::StatusOr<v1::Job> Retry(const v1::RetryJobRequest& request);
  // Waits for a job that `force` stops; Cancelled when `cancelled` returns true meanwhile.
  absl::Status Delete(const v1::DeleteJobRequest& request, const std::function<bool()>& cancelled);
  // Whether the store takes changes now.
  absl::Status Check() { return store_->Check(); }
  // Calls `sink` with each event until the job is final (OK), `sink` returns false or `cancelled`
  // returns true (Cancelled). Blocks.
  absl::Status Watch(const v1::WatchJobRequest& request,
                     const std::function<bool(const v1::JobEvent&)>& sink,
                     const std::function<bool()>& cancelled);

  // For workers; errors as in pewter/v1/worker_service.proto.
  absl::StatusOr<v1::ClaimJobResponse> Claim(absl::string_view token,
                                             const v1::ClaimJobRequest& request);
  absl::StatusOr<v1::HeartbeatResponse> Heartbeat(absl::string_view token,
                                                  const v1::HeartbeatRequest& request);
  absl::Status Finish(absl::string_view token, const v1::FinishJobRequest& request);

 private:
  // A worker from the claim of its job until the executor has reported its end.
  struct Worker {
    Worker(std::string token, int64_t generation, absl::Duration deadline, absl::Duration renewed)
        : token(std::move(token)), generation(generation), deadline(deadline), renewed(renewed) {}

    const std::string token;
    const int64_t generation;

    // Held while the store is asked to change something on its behalf; before mutex_.
    absl::Mutex turn;
    v1::JobState state ABSL_GUARDED_BY(turn) = v1::JOB_STATE_PLANNING;
    bool finished ABSL_GUARDED_BY(turn) = false;  // has called Finish

    // Guarded by mutex_.
    bool started = false;  // has called Claim
    v1::Progress progress;
    bool cancel = false;
    v1::JobError deadline_error;  // of a job that misses its deadline
    bool overdue = false;         // which has passed
    bool killed = false;
    // On BootClock.
    absl::Duration deadline;  // of its start, then of its next word
    absl::Duration job_deadline = absl::InfiniteDuration();
    absl::Duration stop_deadline = absl::InfiniteDuration();  // after it was told to stop
    absl::Duration renewed;  // when the store was last asked to renew the lease, and did
  };

  void Schedule();
  void Reap();
  void OnNotice(const JobNotice& notice);
  // These are the scheduler's, and return how long nothing will have to be done, at most.
  absl::Duration StopOverdueJobs();
  absl::Duration KillOverdueWorkers();
  absl::Duration KeepLeasesOfStarting();
  absl::Duration LookAround();
  void GiveUpExpired();
  void FailOverdue();
  bool MayClaim();
  absl::Duration StartWorkers();
  // `claimed`: on BootClock, not later than the claim.
  void StartWorker(const v1::Job& job, absl::Duration claimed);

  // Not OK when the store could not record it: to be repeated.
  absl::Status OnExit(const WorkerExit& exit);
  // The store's GiveUp under this server's limits. OK when the attempt is over already.
  absl::Status GiveUp(absl::string_view id, LostAttempt lost);
  bool draining();
  void WakeScheduler();
  // Null when the job has none.
  std::shared_ptr<Worker> FindWorker(absl::string_view job_id);
  // The worker whose token it is.
  absl::StatusOr<std::shared_ptr<Worker>> CheckToken(absl::string_view token,
                                                     absl::string_view job_id);
  absl::Status CheckLease(absl::string_view job_id, const Worker& worker, int64_t generation)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(worker.turn);
  absl::StatusOr<v1::Job> Enqueue(const NewJob& admitted);
  absl::StatusOr<v1::Job> WaitForEnd(const std::string& id, const std::function<bool()>& cancelled);
  absl::StatusOr<v1::Job> Renew(absl::string_view id, Worker& worker)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(worker.turn);
  void CancelWorker(absl::string_view id, Worker& worker) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Its next heartbeat tells it, and it is killed when it does not stop then.
  void StopWorker(absl::string_view id, Worker& worker) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // What a worker may count on, from now.
  absl::Duration LeaseLeft(const Worker& worker) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Moves the job along its way until it is in `state`.
  absl::Status Advance(absl::string_view job_id, Worker& worker, v1::JobState state,
                       const JobChange& change) ABSL_EXCLUSIVE_LOCKS_REQUIRED(worker.turn);
  // The store's Transition, told to watchers and the log.
  absl::StatusOr<v1::Job> Transition(absl::string_view id, v1::JobState from, v1::JobState to,
                                     const JobChange& change);
  void Announce(const v1::Job& job);
  absl::Status AddWarnings(absl::string_view id, int64_t generation,
                           const google::protobuf::RepeatedPtrField<std::string>& warnings);

  const JobManagerOptions options_;
  const std::unique_ptr<JobStore> store_;
  WatchHub hub_;

  absl::Mutex mutex_;
  absl::CondVar schedule_;  // something to schedule
  absl::CondVar idle_;      // a worker is gone
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  bool woken_ ABSL_GUARDED_BY(mutex_) = false;  // the scheduler has something to look at
  absl::flat_hash_map<std::string, std::shared_ptr<Worker>> workers_ ABSL_GUARDED_BY(mutex_);
  // The scheduler's. On BootClock.
  absl::Duration next_look_;        // for what other servers let expire
  absl::Duration no_start_before_;  // after no worker could be started
  int failed_starts_ = 0;           // one after the other
  bool claims_nothing_ = false;     // as may_claim was not OK

  std::unique_ptr<Executor> executor_;  // set once, by Start, before the threads
  std::thread scheduler_;
  std::thread reaper_;
};

}  // namespace pewter::server
