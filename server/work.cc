#include "server/work.h"

#include <grpcpp/grpcpp.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <stop_token>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "base/failpoint.h"
#include "base/status.h"
#include "merge/engine/existing_output.h"
#include "merge/engine/observer.h"
#include "pewter/v1/worker_service.grpc.pb.h"
#include "server/clock.h"
#include "server/convert.h"
#include "server/errors.h"
#include "server/executor/local_executor.h"
#include "server/proto_time.h"
#include "server/stop_signals.h"
#include "server/worker_service.h"

namespace pewter::server {
namespace {

constexpr absl::Duration kHeartbeatInterval = absl::Milliseconds(250);
constexpr absl::Duration kCallLimit = absl::Seconds(10);
constexpr absl::Duration kRetryInterval = absl::Milliseconds(200);
constexpr size_t kMaxPendingWarnings = 100;

// Set by SIGTERM and SIGINT; the heartbeat thread looks at it.
std::atomic<bool> g_told_to_stop = false;
static_assert(std::atomic<bool>::is_always_lock_free);

// The server as this worker sees it.
class ServerConnection {
 public:
  ServerConnection(const std::string& address, std::string token)
      : stub_(v1::WorkerService::NewStub(
            grpc::CreateChannel(address, grpc::InsecureChannelCredentials()))),
        token_(std::move(token)) {}

  v1::WorkerService::Stub& stub() { return *stub_; }
  // Every call waits for a server that is not there yet, at most `limit`.
  void Prepare(grpc::ClientContext& context, absl::Duration limit) const {
    context.AddMetadata(kTokenMetadata, token_);
    context.set_deadline(absl::ToChronoTime(absl::Now() + limit));
    context.set_wait_for_ready(true);
  }

 private:
  const std::unique_ptr<v1::WorkerService::Stub> stub_;
  const std::string token_;
};

// The lease on a job: renewed from Start to Stop, with the latest progress and new warnings.
class Lease final : public Observer {
 public:
  Lease(ServerConnection* server, const v1::ClaimJobResponse& claim)
      : server_(*server),
        job_id_(claim.job().id()),
        generation_(claim.job().lease_generation()),
        expiry_(BootClock() + ToDuration(claim.lease_duration())),
        thread_([this] { Beat(); }) {}
  ~Lease() override { Stop(); }

  std::stop_token stop() const { return stop_.get_token(); }

  // Ends the heartbeats. Call before FinishJob, so that no heartbeat comes after it.
  void Stop() {
    {
      absl::MutexLock lock(&mutex_);
      stopping_ = true;
      if (call_ != nullptr) call_->TryCancel();
      wake_.Signal();
    }
    if (thread_.joinable()) thread_.join();
  }

  // After Stop.
  bool lost() {
    absl::MutexLock lock(&mutex_);
    return lost_;
  }
  bool drained() {
    absl::MutexLock lock(&mutex_);
    return drained_;
  }
  absl::Duration left() {
    absl::MutexLock lock(&mutex_);
    return expiry_ - BootClock();
  }
  // What no heartbeat has told.
  void FillFinish(v1::FinishJobRequest& request) {
    absl::MutexLock lock(&mutex_);
    request.set_job_id(job_id_);
    request.set_lease_generation(generation_);
    *request.mutable_progress() = ToProgress(progress_);
    request.mutable_warnings()->Assign(warnings_.begin(), warnings_.end());
  }

  void OnProgress(const Progress& progress) override {
    absl::MutexLock lock(&mutex_);
    const bool new_phase = progress.phase != progress_.phase;
    progress_ = progress;
    has_progress_ = true;
    if (new_phase) {
      new_phase_ = true;
      wake_.Signal();
    }
    // A process that was stopped for longer than its lease must not go on to publish before the
    // heartbeat thread has looked at the clock.
    if (BootClock() >= expiry_) LoseLease();
  }

  // For RunOptions::may_write. What goes to the output is ours to write as long as the lease may be
  // counted on; before the model becomes one, the server has to say so once more.
  absl::Status MayWrite(WriteKind kind) {
    absl::MutexLock lock(&mutex_);
    if (BootClock() >= expiry_) LoseLease();
    if (kind == WriteKind::kManifest && !lost_) {
      const int64_t wanted = ++confirm_wanted_;
      wake_.Signal();
      const auto answered = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
        return confirmed_ >= wanted || lost_ || stopping_ || stop_.stop_requested();
      };
      mutex_.Await(absl::Condition(&answered));
      if (stop_.stop_requested() && !lost_) return absl::CancelledError("told to stop");
    }
    return lost_ ? absl::AbortedError("the lease on the job is lost") : absl::OkStatus();
  }

  void OnWarning(absl::string_view message) override {
    absl::MutexLock lock(&mutex_);
    if (warnings_.size() < kMaxPendingWarnings) warnings_.emplace_back(message);
  }

 private:
  void LoseLease() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    lost_ = true;
    stop_.request_stop();
  }

  void Beat() {
    absl::MutexLock lock(&mutex_);
    while (!stopping_ && !lost_) {
      if (!new_phase_ && confirmed_ == confirm_wanted_) {
        wake_.WaitWithTimeout(&mutex_, kHeartbeatInterval);
      }
      if (stopping_) return;
      new_phase_ = false;
      if (g_told_to_stop) {
        drained_ = true;
        stop_.request_stop();
      }
      SendOne();
    }
  }

  void SendOne() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    v1::HeartbeatRequest request;
    request.set_job_id(job_id_);
    request.set_lease_generation(generation_);
    request.set_state(ToState(progress_.phase));
    if (has_progress_) *request.mutable_progress() = ToProgress(progress_);
    has_progress_ = false;
    const int64_t confirms = confirm_wanted_;
    request.set_confirm_lease(confirms != confirmed_);
    const std::vector<std::string> warnings = std::move(warnings_);
    warnings_.clear();
    request.mutable_warnings()->Assign(warnings.begin(), warnings.end());

    const absl::Duration sent = BootClock();
    v1::HeartbeatResponse response;
    grpc::ClientContext context;
    server_.Prepare(context, std::max(expiry_ - sent, absl::Milliseconds(1)));
    call_ = &context;
    mutex_.Unlock();
    const grpc::Status status = server_.stub().Heartbeat(&context, request, &response);
    mutex_.Lock();
    call_ = nullptr;

    if (status.ok()) {
      // Counted from when it was sent: never longer than the server thinks.
      expiry_ = sent + ToDuration(response.lease_duration());
      confirmed_ = confirms;
      if (response.stop() == v1::STOP_REASON_DRAIN) drained_ = true;
      if (response.stop() != v1::STOP_REASON_UNSPECIFIED) stop_.request_stop();
      return;
    }
    warnings_.insert(warnings_.begin(), warnings.begin(), warnings.end());
    const bool refused = status.error_code() == grpc::StatusCode::ABORTED ||
                         status.error_code() == grpc::StatusCode::UNAUTHENTICATED ||
                         status.error_code() == grpc::StatusCode::NOT_FOUND;
    if (refused || BootClock() >= expiry_) {
      LoseLease();
    } else if (confirm_wanted_ != confirmed_ && !stopping_) {
      wake_.WaitWithTimeout(&mutex_, kRetryInterval);
    }
  }

  ServerConnection& server_;
  const std::string job_id_;
  const int64_t generation_;
  std::stop_source stop_;
  absl::Mutex mutex_;
  absl::CondVar wake_;
  Progress progress_ ABSL_GUARDED_BY(mutex_);
  bool has_progress_ ABSL_GUARDED_BY(mutex_) = false;
  bool new_phase_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::string> warnings_ ABSL_GUARDED_BY(mutex_);
  absl::Duration expiry_ ABSL_GUARDED_BY(mutex_);       // on BootClock
  int64_t confirm_wanted_ ABSL_GUARDED_BY(mutex_) = 0;  // how often MayWrite has asked
  int64_t confirmed_ ABSL_GUARDED_BY(mutex_) = 0;       // and the server answered
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  bool lost_ ABSL_GUARDED_BY(mutex_) = false;
  bool drained_ ABSL_GUARDED_BY(mutex_) = false;
  grpc::ClientContext* call_ ABSL_GUARDED_BY(mutex_) = nullptr;
  std::thread thread_;
};

absl::StatusOr<PlacedManifest> RunJob(const v1::Job& job, Lease& lease) {
  ASSIGN_OR_RETURN(const Recipe recipe, ToRecipe(job.recipe(), job.options()));
  ASSIGN_OR_RETURN(const Plan plan, MakePlan(recipe, ToPlanOptions(job.options())));
  for (const std::string& warning : plan.warnings) lease.OnWarning(warning);
  const RunOptions options{
      .output = job.destination_uri(),
      .mode = job.options().overwrite() ? OutputMode::kOverwrite : OutputMode::kNew,
      .allow_nonfinite = job.options().allow_nonfinite(),
      .job = job.id(),
      .observer = &lease,
      .stop = lease.stop(),
      .may_write = [&lease](WriteKind kind) { return lease.MayWrite(kind); }};
  return RunPlanInto(plan, options,
                     {.on_existing = ToOnExisting(job.on_existing()),
                      .own_unfinished = true,
                      // An attempt that was lost after it had published has done the job.
                      .own_finished = job.lease_generation() > 1});
}

absl::Status Finish(ServerConnection& server, Lease& lease, const v1::FinishJobRequest& request) {
  while (true) {
    grpc::ClientContext context;
    server.Prepare(context, std::max(lease.left(), kRetryInterval));
    v1::FinishJobResponse response;
    const grpc::Status status = server.stub().FinishJob(&context, request, &response);
    if (status.error_code() != grpc::StatusCode::UNAVAILABLE ||
        lease.left() <= absl::ZeroDuration()) {
      return FromGrpc(status);
    }
    absl::SleepFor(kRetryInterval);
  }
}

absl::Status Run(const WorkOptions& options) {
  if (options.parent_pid != 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    // It may have died before the kernel knew.
    if (getppid() != options.parent_pid) return absl::AbortedError("the server is gone");
  }
  HandleStopSignals([](int) { g_told_to_stop = true; });
  const char* token = getenv(kTokenVariable);
  if (token == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat(kTokenVariable, " is not set; `pewterd work` is started by `pewterd serve`"));
  }
  ServerConnection server(options.server, token);
  unsetenv(kTokenVariable);

  v1::ClaimJobRequest claim_request;
  claim_request.set_job_id(options.job_id);
  claim_request.set_worker(absl::StrCat("pid/", getpid()));
  v1::ClaimJobResponse claim;
  {
    grpc::ClientContext context;
    server.Prepare(context, kCallLimit);
    const grpc::Status status = server.stub().ClaimJob(&context, claim_request, &claim);
    if (!status.ok()) return Annotate(FromGrpc(status), "cannot claim the job");
  }

  RETURN_IF_ERROR(Reach(Failpoint::kAfterClaim));
  Lease lease(&server, claim);
  const absl::StatusOr<PlacedManifest> placed = RunJob(claim.job(), lease);
  lease.Stop();
  if (lease.lost()) return absl::AbortedError("the lease is lost");
  RETURN_IF_ERROR(Reach(Failpoint::kBeforeFinish));
  v1::FinishJobRequest request;
  lease.FillFinish(request);
  if (placed.ok()) {
    *request.mutable_output() = ToOutput(*placed);
    for (const std::string& warning : placed->manifest.warnings) request.add_warnings(warning);
  } else if (absl::IsCancelled(placed.status()) && lease.drained()) {
    request.mutable_yielded();
  } else {
    *request.mutable_error() = ToJobError(placed.status());
  }
  RETURN_IF_ERROR(Annotate(Finish(server, lease, request), "cannot finish the job"));
  return Reach(Failpoint::kAfterFinish);
}

}  // namespace

int Work(const WorkOptions& options) {
  const absl::Status status = Run(options);
  if (status.ok()) return 0;
  std::cerr << "pewterd work: job " << options.job_id << ": " << status.message() << std::endl;
  return 1;
}

}  // namespace pewter::server
