#include "server/job_manager.h"

#include <signal.h>
#include <string.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status.h"
#include "server/admission.h"
#include "server/clock.h"
#include "server/digest.h"
#include "server/errors.h"
#include "server/jobs/job_state.h"
#include "server/log.h"
#include "server/random_token.h"

namespace pewter::server {
namespace {

constexpr int kDefaultPage = 50;
constexpr int kMaxPage = 1000;
constexpr int kEventsPerRead = 100;
// How long the reaper and watchers are deaf to a stop or a client that has gone.
constexpr absl::Duration kPollInterval = absl::Milliseconds(250);
constexpr absl::Duration kStoreRetry = absl::Seconds(1);

// "JOB_STATE_RUNNING" as logs and messages say it.
std::string StateName(v1::JobState state) {
  return v1::JobState_Name(state).substr(sizeof("JOB_STATE_") - 1);
}

v1::JobError CancelledError() {
  v1::JobError error;
  error.set_code(static_cast<int>(absl::StatusCode::kCancelled));
  error.set_reason("CANCELLED_BY_CLIENT");
  error.set_message("cancelled; finished shards stay at the destination");
  return error;
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

void SetDuration(absl::Duration duration, google::protobuf::Duration* out) {
  out->set_seconds(absl::ToInt64Seconds(duration));
  out->set_nanos(static_cast<int32_t>(
      absl::ToInt64Nanoseconds(duration - absl::Seconds(absl::ToInt64Seconds(duration)))));
}

}  // namespace

JobManager::JobManager(std::unique_ptr<JobStore> store, const JobManagerOptions& options)
    : options_(options), store_(std::move(store)), hub_(options.max_watches) {}

JobManager::~JobManager() {
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
  {
    absl::MutexLock lock(&mutex_);
    executor_ = std::move(executor);
    ASSIGN_OR_RETURN(const std::vector<std::string> held, store_->Held());
    for (const std::string& id : held) {
      ASSIGN_OR_RETURN(const v1::Job job, store_->Get(id));
      RETURN_IF_ERROR(GiveUpAttempt(job, WorkerLostError("the server stopped while the job ran"),
                                    /*counts=*/true));
    }
  }
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
  ASSIGN_OR_RETURN(const NewJob admitted, Admit(request));
  absl::MutexLock lock(&mutex_);
  if (draining_) return DrainingError();
  ASSIGN_OR_RETURN(JobStore::Created created, store_->Create(admitted, options_.queue_limit));
  if (created.is_new) {
    Announce(created.job);
    schedule_.Signal();
  }
  return std::move(created.job);
}

absl::StatusOr<v1::Job> JobManager::Get(absl::string_view id) {
  ASSIGN_OR_RETURN(v1::Job job, store_->Get(id));
  absl::MutexLock lock(&mutex_);
  // What the store has not heard yet.
  const auto it = workers_.find(id);
  if (it != workers_.end() && IsHeld(job.state()) &&
      it->second.generation == job.lease_generation()) {
    *job.mutable_progress() = it->second.progress;
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
  absl::MutexLock lock(&mutex_);
  ASSIGN_OR_RETURN(const v1::Job job, store_->Get(id));
  if (IsFinal(job.state()) || job.cancel_requested()) return job;
  if (job.state() == v1::JOB_STATE_QUEUED) {
    return Transition(id, job.state(), v1::JOB_STATE_CANCELLED, {.error = CancelledError()});
  }
  if (const auto it = workers_.find(id); it != workers_.end()) {
    it->second.cancel = true;
    it->second.cancel_deadline = BootClock() + options_.cancel_grace;
    schedule_.Signal();
  }
  Log(LogLevel::kInfo, "cancel requested", {{"job", std::string(id)}});
  return store_->RequestCancel(id);
}

absl::Status JobManager::Delete(absl::string_view id) {
  absl::MutexLock lock(&mutex_);
  RETURN_IF_ERROR(store_->Delete(id));
  hub_.PublishGone(id);
  Log(LogLevel::kInfo, "job deleted", {{"job", std::string(id)}});
  return absl::OkStatus();
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
  while (true) {
    ASSIGN_OR_RETURN(const std::vector<v1::JobEvent> events,
                     store_->Events(request.job_id(), sequence, kEventsPerRead));
    for (const v1::JobEvent& event : events) {
      if (!sink(event)) return absl::CancelledError("the client is gone");
      sequence = event.sequence();
      if (IsFinal(event.state_change().state())) return absl::OkStatus();
    }
    if (!events.empty()) continue;
    if (IsFinal(job.state())) return absl::OkStatus();

    const WatchHub::Watch::News news = watch.Wait(sequence, progress_version, kPollInterval);
    if (news.closed) return DrainingError();
    if (cancelled()) return absl::CancelledError("the client is gone");
    // A job that is gone, or has events, is found in the store.
    if (news.gone || news.progress_version <= progress_version) continue;
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

absl::Status JobManager::CheckToken(absl::string_view token, absl::string_view job_id) {
  const auto it = tokens_.find(job_id);
  if (it == tokens_.end() || !SecretsEqual(it->second, token)) {
    return MakeError(absl::StatusCode::kUnauthenticated, "TOKEN_INVALID",
                     "the token is not one of a job that runs here");
  }
  return absl::OkStatus();
}

absl::StatusOr<JobManager::Worker*> JobManager::FindLease(absl::string_view job_id,
                                                          int64_t generation) {
  const auto it = workers_.find(job_id);
  if (it == workers_.end() || generation == 0 || it->second.generation != generation ||
      it->second.finished) {
    return LeaseLost(job_id);
  }
  return &it->second;
}

absl::StatusOr<v1::ClaimJobResponse> JobManager::Claim(absl::string_view token,
                                                       const v1::ClaimJobRequest& request) {
  absl::MutexLock lock(&mutex_);
  RETURN_IF_ERROR(CheckToken(token, request.job_id()));
  const auto it = workers_.find(request.job_id());
  if (it == workers_.end() || it->second.generation != 0) return LeaseLost(request.job_id());
  if (draining_) return DrainingError();
  Worker& worker = it->second;
  v1::ClaimJobResponse response;
  ASSIGN_OR_RETURN(*response.mutable_job(),
                   store_->Claim(request.job_id(), absl::Now() + options_.lease));
  worker.generation = response.job().lease_generation();
  worker.state = response.job().state();
  worker.renewed = BootClock();
  worker.deadline = worker.renewed + options_.lease;
  schedule_.Signal();  // which waits for the later end of the time to start
  SetDuration(options_.lease, response.mutable_lease_duration());
  Announce(response.job());
  Log(LogLevel::kInfo, "job claimed",
      {{"job", request.job_id()},
       {"worker", request.worker()},
       {"attempt", absl::StrCat(response.job().attempt())}});
  return response;
}

absl::StatusOr<v1::HeartbeatResponse> JobManager::Heartbeat(absl::string_view token,
                                                            const v1::HeartbeatRequest& request) {
  absl::MutexLock lock(&mutex_);
  const std::string& id = request.job_id();
  RETURN_IF_ERROR(CheckToken(token, id));
  ASSIGN_OR_RETURN(Worker* const worker, FindLease(id, request.lease_generation()));
  if (IsHeld(request.state())) {
    RETURN_IF_ERROR(
        Advance(id, *worker, request.state(), {.lease_generation = worker->generation}));
  }
  RETURN_IF_ERROR(AddWarnings(id, worker->generation, request.warnings()));
  if (request.has_progress()) {
    worker->progress = request.progress();
    hub_.PublishProgress(id, request.progress());
  }
  const absl::Duration now = BootClock();
  worker->deadline = now + options_.lease;
  if (now - worker->renewed >= options_.lease / 5) {
    RETURN_IF_ERROR(
        store_->RenewLease(id, worker->generation, absl::Now() + options_.lease, worker->progress));
    worker->renewed = now;
  }
  v1::HeartbeatResponse response;
  if (worker->cancel) {
    response.set_stop(v1::STOP_REASON_CANCEL);
  } else if (draining_) {
    response.set_stop(v1::STOP_REASON_DRAIN);
  }
  SetDuration(options_.lease, response.mutable_lease_duration());
  return response;
}

absl::Status JobManager::Finish(absl::string_view token, const v1::FinishJobRequest& request) {
  absl::MutexLock lock(&mutex_);
  const std::string& id = request.job_id();
  RETURN_IF_ERROR(CheckToken(token, id));
  ASSIGN_OR_RETURN(Worker* const worker, FindLease(id, request.lease_generation()));
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
      const bool cancelled = worker->cancel && request.error().code() ==
                                                   static_cast<int>(absl::StatusCode::kCancelled);
      if (cancelled) change.error = CancelledError();
      status = Transition(id, worker->state,
                          cancelled ? v1::JOB_STATE_CANCELLED : v1::JOB_STATE_FAILED, change)
                   .status();
      break;
    }
    case v1::FinishJobRequest::kYielded: {
      ASSIGN_OR_RETURN(const v1::Job job, store_->Get(id));
      status = GiveUpAttempt(job, WorkerLostError("the worker was told to stop"),
                             /*counts=*/!draining_);
      break;
    }
    case v1::FinishJobRequest::RESULT_NOT_SET:
      return BadRequestError("FIELD_INVALID", {{"result", "must be set"}});
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
    RETURN_IF_ERROR(Transition(job_id, worker.state, next, change).status());
    worker.state = next;
  }
  return absl::OkStatus();
}

absl::StatusOr<v1::Job> JobManager::Transition(absl::string_view id, v1::JobState from,
                                               v1::JobState to, const JobChange& change) {
  ASSIGN_OR_RETURN(v1::Job job, store_->Transition(id, from, to, change));
  if (IsFinal(to)) {
    tokens_.erase(id);
    not_before_.erase(id);
  }
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

absl::Status JobManager::GiveUpAttempt(const v1::Job& job, v1::JobError why, bool counts) {
  if (job.cancel_requested()) {
    return Transition(job.id(), job.state(), v1::JOB_STATE_CANCELLED, {.error = CancelledError()})
        .status();
  }
  if (!counts) {
    return Transition(job.id(), job.state(), v1::JOB_STATE_QUEUED, {.refund_attempt = true})
        .status();
  }
  (*why.mutable_metadata())["attempts"] = absl::StrCat(job.attempt());
  if (job.attempt() >= options_.max_attempts) {
    why.set_message(absl::StrCat(why.message(), "; given up after ", job.attempt(), " attempts"));
    return Transition(job.id(), job.state(), v1::JOB_STATE_FAILED, {.error = std::move(why)})
        .status();
  }
  not_before_[job.id()] =
      BootClock() + options_.retry_delay * (int64_t{1} << std::min(job.attempt() - 1, 20));
  const absl::Status status =
      Transition(job.id(), job.state(), v1::JOB_STATE_QUEUED, {.error = std::move(why)}).status();
  schedule_.Signal();
  return status;
}

absl::Status JobManager::OnExit(const WorkerExit& exit) {
  absl::MutexLock lock(&mutex_);
  const auto it = workers_.find(exit.job_id);
  if (it == workers_.end()) return absl::OkStatus();
  const Worker& worker = it->second;
  if (!worker.finished) {
    Log(LogLevel::kWarning, "worker lost",
        {{"job", exit.job_id},
         {"exit_code", absl::StrCat(exit.exit_code)},
         {"signal", absl::StrCat(exit.signal)},
         {"stderr", exit.stderr_tail}});
    const absl::Status status =
        RecordLoss(exit.job_id, WorkerLostError(exit, worker.killed && !worker.cancel));
    if (!status.ok() && !absl::IsNotFound(status)) return status;
  }
  workers_.erase(it);
  schedule_.Signal();
  idle_.SignalAll();
  return absl::OkStatus();
}

absl::Status JobManager::RecordLoss(absl::string_view id, v1::JobError why) {
  ASSIGN_OR_RETURN(v1::Job job, store_->Get(id));
  if (IsFinal(job.state())) return absl::OkStatus();
  if (job.state() == v1::JOB_STATE_QUEUED) {
    if (draining_) return absl::OkStatus();
    // It ended before it claimed: an attempt like others, or a worker that cannot start would be
    // started for ever.
    ASSIGN_OR_RETURN(job, store_->Claim(id, absl::Now()));
    Announce(job);
  }
  return GiveUpAttempt(job, std::move(why), /*counts=*/!draining_);
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
  absl::MutexLock lock(&mutex_);
  while (!stopping_) {
    const absl::Duration overdue = KillOverdueWorkers();
    const absl::Duration startable = StartWorkers();
    schedule_.WaitWithTimeout(&mutex_, std::min(overdue, startable));
  }
}

absl::Duration JobManager::KillOverdueWorkers() {
  const absl::Duration now = BootClock();
  absl::Duration wait = absl::InfiniteDuration();
  for (auto& [id, worker] : workers_) {
    if (worker.killed) continue;
    const absl::Duration left = std::min(worker.deadline, worker.cancel_deadline) - now;
    if (left <= absl::ZeroDuration()) {
      worker.killed = true;
      executor_->Cancel(id, Executor::CancelMode::kKill);
    } else {
      wait = std::min(wait, left);
    }
  }
  return wait;
}

absl::Duration JobManager::StartWorkers() {
  absl::Duration wait = absl::InfiniteDuration();
  while (!draining_ && static_cast<int>(workers_.size()) < options_.workers) {
    const absl::StatusOr<std::string> id = NextJob(wait);
    if (!id.ok()) {
      Log(LogLevel::kError, "cannot read the queue",
          {{"error", std::string(id.status().message())}});
      return kStoreRetry;
    }
    if (id->empty()) break;
    std::string& token = tokens_[*id];
    if (token.empty()) token = RandomHex(32);
    not_before_.erase(*id);
    workers_[*id] = {.deadline = BootClock() + options_.start_limit};
    const absl::Status status = executor_->Submit({.job_id = *id, .token = token});
    if (!status.ok()) {
      // The machine's fault, not the job's: no attempt is counted.
      Log(LogLevel::kError, "cannot start a worker",
          {{"job", *id}, {"error", std::string(status.message())}});
      workers_.erase(*id);
      return kStoreRetry;
    }
  }
  return wait;
}

absl::StatusOr<std::string> JobManager::NextJob(absl::Duration& wait) {
  // Every job that is passed over is in one of the maps, so one more than they hold is enough.
  const int limit = static_cast<int>(workers_.size() + not_before_.size()) + 1;
  ASSIGN_OR_RETURN(const std::vector<std::string> queue, store_->Queue(limit));
  const absl::Duration now = BootClock();
  for (const std::string& id : queue) {
    if (workers_.contains(id)) continue;
    const auto it = not_before_.find(id);
    if (it == not_before_.end() || it->second <= now) return id;
    wait = std::min(wait, it->second - now);
  }
  return std::string();
}

}  // namespace pewter::server
