#include "server/job_manager.h"

#include <signal.h>
#include <string.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/failpoint.h"
#include "base/status.h"
#include "server/admission.h"
#include "server/artifact_manager.h"
#include "server/clock.h"
#include "server/digest.h"
#include "server/errors.h"
#include "server/jobs/job_state.h"
#include "server/log.h"
#include "server/proto_time.h"
#include "server/random_token.h"

namespace pewter::server {
namespace {

constexpr int kDefaultPage = 50;
constexpr int kMaxPage = 1000;
constexpr int kEventsPerRead = 100;
// How long the reaper and watchers are deaf to a stop or a client that has gone.
constexpr absl::Duration kPollInterval = absl::Milliseconds(250);
constexpr absl::Duration kStoreRetry = absl::Seconds(1);
constexpr int kMostStartDoublings = 6;
constexpr int kExpiredAtOnce = 100;
// A lease is renewed when so much of it is over.
constexpr int kRenewalsPerLease = 5;

// "JOB_STATE_RUNNING" as logs and messages say it.
std::string StateName(v1::JobState state) {
  return v1::JobState_Name(state).substr(sizeof("JOB_STATE_") - 1);
}

v1::JobError WorkerLostError(absl::string_view message) {
  v1::JobError error;
  error.set_code(static_cast<int>(absl::StatusCode::kUnavailable));
  error.set_reason("WORKER_LOST");
  error.set_message(std::string(message));
  return error;
}

v1::JobError WorkerLostError(const WorkerExit& exit, bool overdue) {
  v1::JobError error;
  if (overdue) {
    error = WorkerLostError("the worker did not answer for longer than its lease and was killed");
  } else if (exit.signal != 0) {
    error = WorkerLostError(absl::StrCat(
        "the worker was killed by signal ", exit.signal, " (", strsignal(exit.signal), ")",
        exit.signal == SIGKILL ? "; the kernel does so when memory runs out" : ""));
  } else {
    error = WorkerLostError(
        absl::StrCat("the worker exited with code ", exit.exit_code, " before its job was done"));
  }
  if (exit.signal != 0) (*error.mutable_metadata())["signal"] = absl::StrCat(exit.signal);
  if (!exit.stderr_tail.empty()) (*error.mutable_metadata())["stderr"] = exit.stderr_tail;
  return error;
}

absl::Status LeaseLost(absl::string_view job_id) {
  return MakeError(absl::StatusCode::kAborted, "LEASE_LOST",
                   absl::StrCat("job ", job_id, " is not leased to this worker any more"),
                   {{"job_id", std::string(job_id)}});
}

absl::Status DrainingError() {
  return WithRetry(MakeError(absl::StatusCode::kUnavailable, "DRAINING",
                             "the server is stopping; try again when it is back"),
                   absl::Seconds(1));
}

}  // namespace

JobManager::JobManager(std::unique_ptr<JobStore> store, const JobManagerOptions& options)
    : options_(options), store_(std::move(store)), hub_(options.max_watches) {}

JobManager::~JobManager() {
  store_->Listen(nullptr);
  hub_.Close();
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
    schedule_.SignalAll();
  }
  if (reaper_.joinable()) reaper_.join();
  if (scheduler_.joinable()) scheduler_.join();
}

absl::Status JobManager::Start(std::unique_ptr<Executor> executor) {
  executor_ = std::move(executor);
  ASSIGN_OR_RETURN(const std::vector<v1::Job> held, store_->Held(options_.server));
  for (const v1::Job& job : held) {
    RETURN_IF_ERROR(
        GiveUp(job.id(), {.lease_generation = job.lease_generation(),
                          .why = WorkerLostError("the server stopped while the job ran")}));
  }
  store_->Listen([this](const JobNotice& notice) { OnNotice(notice); });
  scheduler_ = std::thread([this] { Schedule(); });
  reaper_ = std::thread([this] { Reap(); });
  return absl::OkStatus();
}

void JobManager::Drain(absl::Duration grace) {
  hub_.Close();
  const absl::Time deadline = absl::Now() + grace;
  absl::MutexLock lock(&mutex_);
  draining_ = true;
  for (const auto& [id, worker] : workers_) executor_->Cancel(id, Executor::CancelMode::kStop);
  while (!workers_.empty() && !idle_.WaitWithDeadline(&mutex_, deadline)) {
  }
  for (const auto& [id, worker] : workers_) executor_->Cancel(id, Executor::CancelMode::kKill);
  while (!workers_.empty()) idle_.Wait(&mutex_);
}

// Clients.

absl::StatusOr<v1::Job> JobManager::Create(const v1::CreateJobRequest& request) {
  ASSIGN_OR_RETURN(const NewJob admitted, Admit(request, options_.access));
  return Enqueue(admitted);
}

absl::StatusOr<v1::Job> JobManager::Retry(const v1::RetryJobRequest& request) {
  ASSIGN_OR_RETURN(const v1::Job job, store_->Get(request.job_id()));
  if (!IsFinal(job.state())) return JobNotFinal(job);
  ASSIGN_OR_RETURN(const NewJob admitted, AdmitRetry(request, job, options_.access));
  return Enqueue(admitted);
}

absl::StatusOr<v1::Job> JobManager::Enqueue(const NewJob& admitted) {
  if (draining()) return DrainingError();
  ASSIGN_OR_RETURN(JobStore::Created created, store_->Create(admitted, options_.queue_limit));
  if (created.is_new) {
    Announce(created.job);
    WakeScheduler();
  }
  return std::move(created.job);
}

absl::StatusOr<v1::Job> JobManager::Get(absl::string_view id) {
  ASSIGN_OR_RETURN(v1::Job job, store_->Get(id));
  absl::MutexLock lock(&mutex_);
  // What the store has not heard yet.
  const auto it = workers_.find(id);
  if (it != workers_.end() && IsHeld(job.state()) &&
      it->second->generation == job.lease_generation()) {
    *job.mutable_progress() = it->second->progress;
  }
  return job;
}

absl::StatusOr<v1::ListJobsResponse> JobManager::List(const v1::ListJobsRequest& request) {
  RETURN_IF_ERROR(CheckListJobs(request));
  const std::string digest = DigestOf(request.filter());
  ASSIGN_OR_RETURN(const PageToken token, ParsePageToken(request.page_token(), digest));
  const int size =
      request.page_size() == 0 ? kDefaultPage : std::min(request.page_size(), kMaxPage);
  ASSIGN_OR_RETURN(JobPage page, store_->List(request.filter(), size, token.position));
  v1::ListJobsResponse response;
  for (v1::Job& job : page.jobs) *response.add_jobs() = std::move(job);
  if (page.next != 0) {
    response.set_next_page_token(FormatPageToken({.position = page.next, .version = ""}, digest));
  }
  return response;
}

absl::StatusOr<v1::Job> JobManager::Cancel(absl::string_view id) {
  ASSIGN_OR_RETURN(v1::Job job, store_->RequestCancel(id));
  if (job.cancel_requested()) {
    Log(LogLevel::kInfo, "cancel requested", {{"job", std::string(id)}});
    absl::MutexLock lock(&mutex_);
    if (const auto it = workers_.find(id); it != workers_.end()) CancelWorker(id, *it->second);
  } else {
    Announce(job);
  }
  return job;
}

void JobManager::CancelWorker(absl::string_view id, Worker& worker) {
  if (worker.cancel) return;
  worker.cancel = true;
  StopWorker(id, worker);
}

void JobManager::StopWorker(absl::string_view id, Worker& worker) {
  worker.stop_deadline = std::min(worker.stop_deadline, BootClock() + options_.cancel_grace);
  // It has done nothing yet that would have to be ended in order.
  if (!worker.started) executor_->Cancel(id, Executor::CancelMode::kKill);
  woken_ = true;
  schedule_.Signal();
}

absl::Status JobManager::Delete(const v1::DeleteJobRequest& request,
                                const std::function<bool()>& cancelled) {
  const std::string& id = request.job_id();
  ASSIGN_OR_RETURN(v1::Job job, store_->Get(id));
  if (request.force() && !IsFinal(job.state())) {
    RETURN_IF_ERROR(Cancel(id).status());
    ASSIGN_OR_RETURN(job, WaitForEnd(id, cancelled));
  }
  if (!IsFinal(job.state())) return JobNotFinal(job);
  if (request.delete_outputs() && job.has_output()) {
    // What is asked for may be allowed no more.
    RETURN_IF_ERROR(options_.access.CheckWrite(job.output().uri()));
    RETURN_IF_ERROR(DeleteJobOutput(job));
    Log(LogLevel::kInfo, "output deleted", {{"job", id}, {"uri", job.output().uri()}});
  }
  RETURN_IF_ERROR(store_->Delete(id));
  hub_.PublishGone(id);
  Log(LogLevel::kInfo, "job deleted", {{"job", id}});
  return absl::OkStatus();
}

absl::StatusOr<v1::Job> JobManager::WaitForEnd(const std::string& id,
                                               const std::function<bool()>& cancelled) {
  const absl::Duration end = BootClock() + options_.delete_wait;
  ASSIGN_OR_RETURN(WatchHub::Watch watch, hub_.Subscribe(id));
  while (true) {
    ASSIGN_OR_RETURN(v1::Job job, store_->Get(id));
    if (IsFinal(job.state())) return job;
    if (BootClock() >= end) return WithRetry(JobNotFinal(job), absl::Seconds(5));
    if (cancelled()) return absl::CancelledError("the client is gone");
    if (watch
            .Wait(job.sequence(), /*progress_version=*/std::numeric_limits<int64_t>::max(),
                  kPollInterval)
            .closed) {
      return DrainingError();
    }
  }
}

absl::Status JobManager::Watch(const v1::WatchJobRequest& request,
                               const std::function<bool(const v1::JobEvent&)>& sink,
                               const std::function<bool()>& cancelled) {
  // First the subscription, then the look into the store: nothing falls between.
  ASSIGN_OR_RETURN(WatchHub::Watch watch, hub_.Subscribe(request.job_id()));
  ASSIGN_OR_RETURN(const v1::Job job, store_->Get(request.job_id()));
  int64_t sequence = request.after_sequence();
  if (sequence < 0) {
    return BadRequestError("FIELD_INVALID", {{"after_sequence", "must not be negative"}});
  }
  if (sequence > job.sequence()) {
    return MakeError(absl::StatusCode::kOutOfRange, "SEQUENCE_AHEAD",
                     absl::StrCat("the last event of job ", job.id(), " is ", job.sequence(),
                                  ", not ", sequence),
                     {{"job_id", job.id()}, {"sequence", absl::StrCat(job.sequence())}});
  }
  int64_t progress_version = 0;
  int64_t told = 0;  // sequence of the latest notice
  bool look = true;
  absl::Duration looked;
  while (true) {
    if (look) {
      looked = BootClock();
      ASSIGN_OR_RETURN(const std::vector<v1::JobEvent> events,
                       store_->Events(request.job_id(), sequence, kEventsPerRead));
      for (const v1::JobEvent& event : events) {
        if (!sink(event)) return absl::CancelledError("the client is gone");
        sequence = event.sequence();
        if (IsFinal(event.state_change().state())) return absl::OkStatus();
      }
      if (!events.empty()) continue;
      if (IsFinal(job.state())) return absl::OkStatus();
    }
    told = std::max(told, sequence);
    const WatchHub::Watch::News news = watch.Wait(told, progress_version, kPollInterval);
    if (news.closed) return DrainingError();
    if (cancelled()) return absl::CancelledError("the client is gone");
    // A job that is gone, or has events, is found in the store; and it may have them without a
    // notice.
    look = news.gone || news.sequence > told || BootClock() - looked >= options_.look;
    told = std::max(told, news.sequence);
    if (look || news.progress_version <= progress_version) continue;
    progress_version = news.progress_version;
    v1::JobEvent event;
    event.set_sequence(sequence);
    const int64_t micros = absl::GetCurrentTimeNanos() / 1000;
    event.mutable_time()->set_seconds(micros / 1'000'000);
    event.mutable_time()->set_nanos(static_cast<int32_t>(micros % 1'000'000) * 1000);
    *event.mutable_progress() = news.progress;
    if (!sink(event)) return absl::CancelledError("the client is gone");
  }
}

// Workers.

bool JobManager::draining() {
  absl::MutexLock lock(&mutex_);
  return draining_;
}

void JobManager::WakeScheduler() {
  absl::MutexLock lock(&mutex_);
  woken_ = true;
  schedule_.Signal();
}

std::shared_ptr<JobManager::Worker> JobManager::FindWorker(absl::string_view job_id) {
  absl::MutexLock lock(&mutex_);
  const auto it = workers_.find(job_id);
  return it == workers_.end() ? nullptr : it->second;
}

absl::StatusOr<std::shared_ptr<JobManager::Worker>> JobManager::CheckToken(
    absl::string_view token, absl::string_view job_id) {
  std::shared_ptr<Worker> worker = FindWorker(job_id);
  if (worker == nullptr || !SecretsEqual(worker->token, token)) {
    return MakeError(absl::StatusCode::kUnauthenticated, "TOKEN_INVALID",
                     "the token is not one of a job that runs here");
  }
  return worker;
}

absl::Status JobManager::CheckLease(absl::string_view job_id, const Worker& worker,
                                    int64_t generation) {
  absl::MutexLock lock(&mutex_);
  const bool held = worker.started && worker.generation == generation && !worker.finished;
  return held ? absl::OkStatus() : LeaseLost(job_id);
}

absl::StatusOr<v1::Job> JobManager::Renew(absl::string_view id, Worker& worker) {
  // Before the store's clock is read: a worker never counts on more than the store grants.
  const absl::Duration now = BootClock();
  v1::Progress progress;
  {
    absl::MutexLock lock(&mutex_);
    progress = worker.progress;
  }
  ASSIGN_OR_RETURN(v1::Job job,
                   store_->RenewLease(id, worker.generation, options_.lease, progress));
  absl::MutexLock lock(&mutex_);
  worker.renewed = now;
  // By another server.
  if (job.cancel_requested()) CancelWorker(id, worker);
  return job;
}

absl::Duration JobManager::LeaseLeft(const Worker& worker) const {
  return std::max(worker.renewed + options_.lease - BootClock(), absl::ZeroDuration());
}

absl::StatusOr<v1::ClaimJobResponse> JobManager::Claim(absl::string_view token,
                                                       const v1::ClaimJobRequest& request) {
  const std::string& id = request.job_id();
  ASSIGN_OR_RETURN(const std::shared_ptr<Worker> worker, CheckToken(token, id));
  absl::MutexLock turn(&worker->turn);
  {
    absl::MutexLock lock(&mutex_);
    if (worker->started) return LeaseLost(id);
    if (draining_) return DrainingError();
    if (worker->cancel || worker->overdue) {
      return MakeError(absl::StatusCode::kCancelled, "JOB_STOPPED", "the job is not to be done",
                       {{"job_id", id}});
    }
  }
  v1::ClaimJobResponse response;
  ASSIGN_OR_RETURN(*response.mutable_job(), Renew(id, *worker));
  {
    absl::MutexLock lock(&mutex_);
    worker->started = true;
    worker->deadline = worker->renewed + options_.lease;
    SetDuration(LeaseLeft(*worker), response.mutable_lease_duration());
  }
  WakeScheduler();  // which waits for the later end of the time to start
  Log(LogLevel::kInfo, "job claimed",
      {{"job", id},
       {"worker", request.worker()},
       {"attempt", absl::StrCat(response.job().attempt())}});
  return response;
}

absl::StatusOr<v1::HeartbeatResponse> JobManager::Heartbeat(absl::string_view token,
                                                            const v1::HeartbeatRequest& request) {
  const std::string& id = request.job_id();
  ASSIGN_OR_RETURN(const std::shared_ptr<Worker> worker, CheckToken(token, id));
  absl::MutexLock turn(&worker->turn);
  RETURN_IF_ERROR(CheckLease(id, *worker, request.lease_generation()));
  if (IsHeld(request.state())) {
    RETURN_IF_ERROR(
        Advance(id, *worker, request.state(), {.lease_generation = worker->generation}));
  }
  RETURN_IF_ERROR(AddWarnings(id, worker->generation, request.warnings()));
  bool renew = request.confirm_lease();
  {
    absl::MutexLock lock(&mutex_);
    if (request.has_progress()) worker->progress = request.progress();
    const absl::Duration now = BootClock();
    worker->deadline = now + options_.lease;
    renew |= now - worker->renewed >= options_.lease / kRenewalsPerLease;
  }
  if (request.has_progress()) hub_.PublishProgress(id, request.progress());
  if (renew) RETURN_IF_ERROR(Renew(id, *worker).status());
  v1::HeartbeatResponse response;
  absl::MutexLock lock(&mutex_);
  if (worker->cancel) {
    response.set_stop(v1::STOP_REASON_CANCEL);
  } else if (worker->overdue) {
    response.set_stop(v1::STOP_REASON_DEADLINE);
  } else if (draining_) {
    response.set_stop(v1::STOP_REASON_DRAIN);
  }
  SetDuration(LeaseLeft(*worker), response.mutable_lease_duration());
  return response;
}

absl::Status JobManager::Finish(absl::string_view token, const v1::FinishJobRequest& request) {
  const std::string& id = request.job_id();
  ASSIGN_OR_RETURN(const std::shared_ptr<Worker> worker, CheckToken(token, id));
  absl::MutexLock turn(&worker->turn);
  RETURN_IF_ERROR(CheckLease(id, *worker, request.lease_generation()));
  RETURN_IF_ERROR(AddWarnings(id, worker->generation, request.warnings()));
  JobChange change{.lease_generation = worker->generation};
  if (request.has_progress()) change.progress = request.progress();

  absl::Status status;
  switch (request.result_case()) {
    case v1::FinishJobRequest::kOutput: {
      status = Advance(id, *worker, v1::JOB_STATE_PUBLISHING, change);
      change.output = request.output();
      if (status.ok()) status = Advance(id, *worker, v1::JOB_STATE_SUCCEEDED, change);
      break;
    }
    case v1::FinishJobRequest::kError: {
      change.error = request.error();
      const bool stopped = request.error().code() == static_cast<int>(absl::StatusCode::kCancelled);
      bool cancelled = false;
      {
        absl::MutexLock lock(&mutex_);
        cancelled = stopped && worker->cancel;
        if (stopped && !cancelled && worker->overdue) change.error = worker->deadline_error;
      }
      if (cancelled) change.error = CancelledError();
      status = Transition(id, worker->state,
                          cancelled ? v1::JOB_STATE_CANCELLED : v1::JOB_STATE_FAILED, change)
                   .status();
      break;
    }
    case v1::FinishJobRequest::kYielded: {
      status = GiveUp(id, {.lease_generation = worker->generation,
                           .why = WorkerLostError("the worker was told to stop"),
                           .counts = !draining()});
      break;
    }
    case v1::FinishJobRequest::RESULT_NOT_SET:
      return BadRequestError("FIELD_INVALID", {{"result", "must be set"}});
  }
  if (absl::IsAborted(status)) {
    // Perhaps because it was done before, and the answer was lost between the store and here.
    const absl::StatusOr<v1::Job> job = store_->Get(id);
    if (job.ok() && IsFinal(job->state()) && job->lease_generation() == worker->generation) {
      status = absl::OkStatus();
    }
  }
  RETURN_IF_ERROR(status);
  worker->finished = true;
  return absl::OkStatus();
}

// Changes of state.

absl::Status JobManager::Advance(absl::string_view job_id, Worker& worker, v1::JobState state,
                                 const JobChange& change) {
  while (worker.state < state) {
    const v1::JobState next = NextState(worker.state);
    const absl::Status moved = Transition(job_id, worker.state, next, change).status();
    if (ReasonOf(moved) == "STATE_CHANGED") {
      // By an earlier call whose answer was lost between the store and here.
      ASSIGN_OR_RETURN(const v1::Job job, store_->Get(job_id));
      if (!IsHeld(job.state()) || job.state() <= worker.state) return moved;
      worker.state = job.state();
      continue;
    }
    RETURN_IF_ERROR(moved);
    worker.state = next;
  }
  return absl::OkStatus();
}

absl::StatusOr<v1::Job> JobManager::Transition(absl::string_view id, v1::JobState from,
                                               v1::JobState to, const JobChange& change) {
  ASSIGN_OR_RETURN(v1::Job job, store_->Transition(id, from, to, change));
  Announce(job);
  return job;
}

void JobManager::Announce(const v1::Job& job) {
  hub_.PublishEvent(job.id(), job.sequence());
  Log(job.state() == v1::JOB_STATE_FAILED ? LogLevel::kWarning : LogLevel::kInfo, "job state",
      {{"job", job.id()},
       {"state", StateName(job.state())},
       {"attempt", absl::StrCat(job.attempt())},
       {"reason", job.error().reason()}});
}

absl::Status JobManager::AddWarnings(
    absl::string_view id, int64_t generation,
    const google::protobuf::RepeatedPtrField<std::string>& warnings) {
  if (warnings.empty()) return absl::OkStatus();
  ASSIGN_OR_RETURN(const v1::Job job,
                   store_->AddWarnings(id, generation, {warnings.begin(), warnings.end()}));
  hub_.PublishEvent(id, job.sequence());
  return absl::OkStatus();
}

absl::Status JobManager::GiveUp(absl::string_view id, LostAttempt lost) {
  lost.max_attempts = options_.max_attempts;
  if (lost.counts) lost.retry_delay = options_.retry_delay;
  const absl::StatusOr<v1::Job> job = store_->GiveUp(id, lost);
  // By another server, or the job is gone.
  if (absl::IsAborted(job.status()) || absl::IsNotFound(job.status())) return absl::OkStatus();
  RETURN_IF_ERROR(job.status());
  Announce(*job);
  WakeScheduler();
  return absl::OkStatus();
}

absl::Status JobManager::OnExit(const WorkerExit& exit) {
  const std::shared_ptr<Worker> worker = FindWorker(exit.job_id);
  if (worker == nullptr) return absl::OkStatus();
  absl::MutexLock turn(&worker->turn);
  if (!worker->finished) {
    Log(LogLevel::kWarning, "worker lost",
        {{"job", exit.job_id},
         {"exit_code", absl::StrCat(exit.exit_code)},
         {"signal", absl::StrCat(exit.signal)},
         {"stderr", exit.stderr_tail}});
    bool overdue = false, counts = true;
    {
      absl::MutexLock lock(&mutex_);
      overdue = worker->killed && !worker->cancel && !worker->overdue;
      counts = !draining_;
    }
    RETURN_IF_ERROR(GiveUp(exit.job_id, {.lease_generation = worker->generation,
                                         .why = WorkerLostError(exit, overdue),
                                         .counts = counts}));
  }
  absl::MutexLock lock(&mutex_);
  workers_.erase(exit.job_id);
  woken_ = true;
  schedule_.Signal();
  idle_.SignalAll();
  return absl::OkStatus();
}

// Threads.

void JobManager::Reap() {
  // Ends that the store could not record yet: their workers stay on the books.
  std::vector<WorkerExit> exits;
  while (true) {
    {
      absl::MutexLock lock(&mutex_);
      if (stopping_) return;
    }
    for (WorkerExit& exit : executor_->Poll(kPollInterval)) exits.push_back(std::move(exit));
    std::vector<WorkerExit> unrecorded;
    for (WorkerExit& exit : exits) {
      const absl::Status status = OnExit(exit);
      if (status.ok()) continue;
      Log(LogLevel::kError, "cannot record a lost worker",
          {{"job", exit.job_id}, {"error", std::string(status.message())}});
      unrecorded.push_back(std::move(exit));
    }
    exits = std::move(unrecorded);
  }
}

void JobManager::Schedule() {
  while (true) {
    {
      absl::MutexLock lock(&mutex_);
      if (stopping_) return;
      woken_ = false;
    }
    // What comes first may make work for what comes after.
    absl::Duration wait = StopOverdueJobs();
    wait = std::min(wait, KillOverdueWorkers());
    wait = std::min(wait, KeepLeasesOfStarting());
    wait = std::min(wait, LookAround());
    wait = std::min(wait, StartWorkers());
    absl::MutexLock lock(&mutex_);
    if (!woken_ && !stopping_) schedule_.WaitWithTimeout(&mutex_, wait);
  }
}

absl::Duration JobManager::StopOverdueJobs() {
  absl::MutexLock lock(&mutex_);
  const absl::Duration now = BootClock();
  absl::Duration wait = absl::InfiniteDuration();
  for (const auto& [id, worker] : workers_) {
    if (worker->overdue) continue;
    if (worker->job_deadline <= now) {
      Log(LogLevel::kWarning, "job misses its deadline",
          {{"job", id}, {"reason", worker->deadline_error.reason()}});
      worker->overdue = true;
      StopWorker(id, *worker);
    } else {
      wait = std::min(wait, worker->job_deadline - now);
    }
  }
  return wait;
}

absl::Duration JobManager::KillOverdueWorkers() {
  absl::MutexLock lock(&mutex_);
  const absl::Duration now = BootClock();
  absl::Duration wait = absl::InfiniteDuration();
  for (const auto& [id, worker] : workers_) {
    if (worker->killed) continue;
    const absl::Duration left = std::min(worker->deadline, worker->stop_deadline) - now;
    if (left <= absl::ZeroDuration()) {
      worker->killed = true;
      executor_->Cancel(id, Executor::CancelMode::kKill);
    } else {
      wait = std::min(wait, left);
    }
  }
  return wait;
}

absl::Duration JobManager::KeepLeasesOfStarting() {
  const absl::Duration interval = options_.lease / kRenewalsPerLease;
  absl::Duration wait = absl::InfiniteDuration();
  std::vector<std::pair<std::string, std::shared_ptr<Worker>>> due;
  {
    absl::MutexLock lock(&mutex_);
    for (const auto& [id, worker] : workers_) {
      if (worker->started || worker->killed) continue;
      const absl::Duration left = worker->renewed + interval - BootClock();
      if (left > absl::ZeroDuration()) {
        wait = std::min(wait, left);
      } else {
        due.emplace_back(id, worker);
      }
    }
  }
  for (const auto& [id, worker] : due) {
    absl::MutexLock turn(&worker->turn);
    const absl::Status renewed = Renew(id, *worker).status();
    if (absl::IsAborted(renewed)) {
      absl::MutexLock lock(&mutex_);
      worker->killed = true;
      executor_->Cancel(id, Executor::CancelMode::kKill);
    }
    wait = std::min(wait, renewed.ok() ? interval : kStoreRetry);
  }
  return wait;
}

absl::Duration JobManager::LookAround() {
  const absl::Duration now = BootClock();
  if (now < next_look_) return next_look_ - now;
  next_look_ = now + options_.look;
  GiveUpExpired();
  FailOverdue();
  return options_.look;
}

void JobManager::FailOverdue() {
  const absl::StatusOr<std::vector<v1::Job>> overdue = store_->Overdue(kExpiredAtOnce);
  if (!overdue.ok()) {
    Log(LogLevel::kError, "cannot look for missed deadlines",
        {{"error", std::string(overdue.status().message())}});
    return;
  }
  for (const v1::Job& job : *overdue) {
    const absl::StatusOr<v1::Job> failed = store_->FailOverdue(job.id());
    if (failed.ok()) {
      Announce(*failed);
    } else if (absl::IsUnavailable(failed.status())) {
      return;
    }
  }
}

void JobManager::GiveUpExpired() {
  const absl::StatusOr<std::vector<v1::Job>> expired = store_->Expired(kExpiredAtOnce);
  if (!expired.ok()) {
    Log(LogLevel::kError, "cannot look for expired leases",
        {{"error", std::string(expired.status().message())}});
    return;
  }
  for (const v1::Job& job : *expired) {
    // Of a worker of this server its own clock decides, and its exit.
    const std::shared_ptr<Worker> worker = FindWorker(job.id());
    if (worker != nullptr && worker->generation == job.lease_generation()) continue;
    Log(LogLevel::kWarning, "lease expired", {{"job", job.id()}, {"server", job.server()}});
    const absl::Status status =
        GiveUp(job.id(), {.lease_generation = job.lease_generation(),
                          .only_if_expired = true,
                          .why = WorkerLostError(absl::StrCat(
                              "server ", job.server(), " did not renew its lease on the job"))});
    if (!status.ok()) break;
  }
}

bool JobManager::MayClaim() {
  if (options_.may_claim == nullptr) return true;
  const absl::Status may = options_.may_claim();
  if (may.ok() == claims_nothing_) {
    claims_nothing_ = !may.ok();
    Log(may.ok() ? LogLevel::kInfo : LogLevel::kWarning,
        may.ok() ? "jobs are taken again" : "no jobs are taken",
        {{"reason", std::string(may.message())}});
  }
  return may.ok();
}

absl::Duration JobManager::StartWorkers() {
  if (!MayClaim()) return options_.look;
  while (true) {
    {
      absl::MutexLock lock(&mutex_);
      if (draining_ || static_cast<int>(workers_.size()) >= options_.workers) break;
    }
    const absl::Duration now = BootClock();
    if (now < no_start_before_) return no_start_before_ - now;
    const absl::StatusOr<JobStore::Claimed> claimed =
        store_->Claim(options_.server, options_.lease);
    if (!claimed.ok()) {
      Log(LogLevel::kError, "cannot claim a job",
          {{"error", std::string(claimed.status().message())}});
      return kStoreRetry;
    }
    if (!claimed->job) return std::min(claimed->next, options_.look);
    StartWorker(*claimed->job, now);
  }
  return absl::InfiniteDuration();
}

void JobManager::StartWorker(const v1::Job& job, absl::Duration claimed) {
  Announce(job);
  // Not the job's fault: the attempt does not count, and another server may be quicker.
  const auto give_back = [&](absl::string_view why) {
    Log(LogLevel::kError, "cannot start a worker",
        {{"job", job.id()}, {"error", std::string(why)}});
    const absl::Status status = GiveUp(
        job.id(),
        {.lease_generation = job.lease_generation(), .counts = false, .retry_delay = kStoreRetry});
    if (!status.ok()) {
      Log(LogLevel::kError, "cannot give a job back",
          {{"job", job.id()}, {"error", std::string(status.message())}});
    }
  };
  // A worker of this server from whom another one has taken the job is still to die.
  if (FindWorker(job.id()) != nullptr) {
    executor_->Cancel(job.id(), Executor::CancelMode::kKill);
    give_back("its last one is still there");
    return;
  }
  const std::string token = RandomHex(32);
  const JobDeadline deadline = DeadlineOf(job);
  const auto worker = std::make_shared<Worker>(token, job.lease_generation(),
                                               claimed + options_.start_limit, claimed);
  worker->deadline_error = deadline.error;
  // The attempt began by the store's clock when it was claimed by this one.
  worker->job_deadline = claimed + (deadline.time - ToTime(job.attempt_time()));
  absl::Status status;
  {
    absl::MutexLock lock(&mutex_);
    // A drain that began while the store was asked knows of no such worker.
    if (draining_) {
      status = absl::UnavailableError("the server stops");
    } else {
      workers_[job.id()] = worker;
      status = executor_->Submit({.job_id = job.id(), .token = token});
      if (!status.ok()) workers_.erase(job.id());
    }
  }
  if (status.ok()) {
    failed_starts_ = 0;
    (void)Reach(Failpoint::kWorkerLaunched);
    return;
  }
  no_start_before_ =
      BootClock() + kStoreRetry * (int64_t{1} << std::min(failed_starts_++, kMostStartDoublings));
  give_back(status.message());
}

void JobManager::OnNotice(const JobNotice& notice) {
  switch (notice.kind) {
    case JobNotice::Kind::kEvent:
      hub_.PublishEvent(notice.job_id, notice.sequence);
      return;
    case JobNotice::Kind::kQueued: {
      hub_.PublishEvent(notice.job_id, notice.sequence);
      WakeScheduler();
      return;
    }
    case JobNotice::Kind::kProgress: {
      if (!hub_.IsWatched(notice.job_id)) return;
      if (FindWorker(notice.job_id) != nullptr) return;
      const absl::StatusOr<v1::Job> job = store_->Get(notice.job_id);
      if (job.ok() && job->has_progress()) hub_.PublishProgress(notice.job_id, job->progress());
      return;
    }
    case JobNotice::Kind::kCancel: {
      absl::MutexLock lock(&mutex_);
      const auto it = workers_.find(notice.job_id);
      if (it != workers_.end()) CancelWorker(notice.job_id, *it->second);
      return;
    }
    case JobNotice::Kind::kGone:
      hub_.PublishGone(notice.job_id);
      return;
    case JobNotice::Kind::kMissed:
      WakeScheduler();
      return;
  }
}

}  // namespace pewter::server
