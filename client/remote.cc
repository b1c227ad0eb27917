#include "client/remote.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/nearest.h"
#include "base/status.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "grpcpp/grpcpp.h"

namespace pewter::client {

namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using std::chrono::steady_clock;

constexpr seconds kCallTimeout{30};
constexpr int kCallAttempts = 5;
constexpr milliseconds kFirstDelay{100};
constexpr milliseconds kLongestDelay{5000};
constexpr std::chrono::minutes kLongestAbsence{5};  // of a server while a job is watched

constexpr char kStatePrefix[] = "JOB_STATE_";

// Doubles from kFirstDelay to kLongestDelay.
class Backoff {
 public:
  void Reset() { delay_ = kFirstDelay; }
  // At least `least`, but never longer than kLongestDelay. False when `stop` was asked for
  // meanwhile.
  bool Wait(std::stop_token stop, milliseconds least = milliseconds::zero()) {
    std::mutex mutex;
    std::unique_lock lock(mutex);
    std::condition_variable_any wake;
    const milliseconds delay = std::min(std::max(delay_, least), kLongestDelay);
    wake.wait_for(lock, stop, delay, [] { return false; });
    delay_ = std::min(delay_ * 2, kLongestDelay);
    return !stop.stop_requested();
  }

 private:
  milliseconds delay_ = kFirstDelay;
};

absl::Status ToStatus(const grpc::Status& status, absl::string_view address) {
  if (status.ok()) return absl::OkStatus();
  std::string message = status.error_message();
  google::rpc::Status details;
  if (!status.error_details().empty() && details.ParseFromString(status.error_details())) {
    for (const auto& any : details.details()) {
      google::rpc::BadRequest bad;
      if (!any.UnpackTo(&bad)) continue;
      for (const auto& violation : bad.field_violations()) {
        if (message.find(violation.description()) != std::string::npos) continue;
        absl::StrAppend(&message, "\n  ", violation.field(), ": ", violation.description());
      }
    }
  }
  const auto code = static_cast<absl::StatusCode>(status.error_code());
  if (code == absl::StatusCode::kUnavailable || code == absl::StatusCode::kDeadlineExceeded) {
    return absl::Status(code, absl::StrCat("server ", address, ": ", message));
  }
  return absl::Status(code, message);
}

// When the server says it should be asked again; zero when it says nothing.
milliseconds RetryDelayOf(const grpc::Status& status) {
  google::rpc::Status details;
  if (!details.ParseFromString(status.error_details())) return milliseconds::zero();
  for (const auto& any : details.details()) {
    google::rpc::RetryInfo retry;
    if (!any.UnpackTo(&retry)) continue;
    return seconds(std::clamp<int64_t>(retry.retry_delay().seconds(), 0, 3600)) +
           milliseconds(retry.retry_delay().nanos() / 1'000'000);
  }
  return milliseconds::zero();
}

// One call that may be repeated.
template <class Request, class Response>
absl::Status Call(v1::MergeService::Stub& stub, absl::string_view address,
                  grpc::Status (v1::MergeService::Stub::*method)(grpc::ClientContext*,
                                                                 const Request&, Response*),
                  const Request& request, Response* response, int attempts = kCallAttempts) {
  Backoff backoff;
  for (int attempt = 1;; ++attempt) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + kCallTimeout);
    const grpc::Status status = (stub.*method)(&context, request, response);
    if (status.error_code() != grpc::StatusCode::UNAVAILABLE || attempt >= attempts) {
      return ToStatus(status, address);
    }
    backoff.Wait({}, RetryDelayOf(status));
  }
}

std::vector<std::string> StateNames() {
  std::vector<std::string> names;
  for (int i = v1::JobState_MIN; i <= v1::JobState_MAX; ++i) {
    if (v1::JobState_IsValid(i) && i != v1::JOB_STATE_UNSPECIFIED) {
      names.push_back(absl::AsciiStrToLower(StateName(static_cast<v1::JobState>(i))));
    }
  }
  return names;
}

}  // namespace

void ServerArguments::Declare(CLI::App& app) {
  app.add_option("-s,--server", address, "Server to talk to; default: $PEWTER_SERVER")
      ->type_name("HOST:PORT")
      ->envname("PEWTER_SERVER");
}

absl::StatusOr<Remote> Remote::Open(const ServerArguments& arguments) {
  if (arguments.address.empty()) {
    return absl::InvalidArgumentError(
        "no server given: use --server HOST:PORT or set PEWTER_SERVER");
  }
  return Remote(arguments.address);
}

Remote::Remote(std::string address) : address_(std::move(address)) {
  grpc::ChannelArguments arguments;
  // A pewterd is reached directly, whatever http_proxy says for the web.
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  // Finds out about a host that vanished; servers refuse pings that come more often.
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 310'000);
  arguments.SetMaxReceiveMessageSize(64 << 20);
  stub_ = v1::MergeService::NewStub(
      grpc::CreateCustomChannel(address_, grpc::InsecureChannelCredentials(), arguments));
}

absl::StatusOr<v1::Job> Remote::CreateJob(const v1::CreateJobRequest& request) {
  v1::CreateJobResponse response;
  RETURN_IF_ERROR(Call(*stub_, address_, &v1::MergeService::Stub::CreateJob, request, &response));
  return std::move(*response.mutable_job());
}

absl::StatusOr<v1::Job> Remote::GetJob(const std::string& id) {
  v1::GetJobRequest request;
  request.set_job_id(id);
  v1::GetJobResponse response;
  RETURN_IF_ERROR(Call(*stub_, address_, &v1::MergeService::Stub::GetJob, request, &response));
  return std::move(*response.mutable_job());
}

absl::StatusOr<v1::ListJobsResponse> Remote::ListJobs(const v1::ListJobsRequest& request) {
  v1::ListJobsResponse response;
  RETURN_IF_ERROR(Call(*stub_, address_, &v1::MergeService::Stub::ListJobs, request, &response));
  return response;
}

absl::StatusOr<v1::Job> Remote::CancelJob(const std::string& id) {
  v1::CancelJobRequest request;
  request.set_job_id(id);
  v1::CancelJobResponse response;
  RETURN_IF_ERROR(Call(*stub_, address_, &v1::MergeService::Stub::CancelJob, request, &response));
  return std::move(*response.mutable_job());
}

absl::Status Remote::DeleteJob(const std::string& id) {
  v1::DeleteJobRequest request;
  request.set_job_id(id);
  v1::DeleteJobResponse response;
  // Not idempotent: a repeated call could say that there is no such job.
  return Call(*stub_, address_, &v1::MergeService::Stub::DeleteJob, request, &response,
              /*attempts=*/1);
}

absl::StatusOr<v1::JobStateChange> Remote::Watch(
    const std::string& id, const EventCallback& on_event,
    const std::function<void(const absl::Status&)>& on_lost, std::stop_token stop) {
  v1::WatchJobRequest request;
  request.set_job_id(id);
  std::optional<v1::JobStateChange> outcome;
  Backoff backoff;
  bool lost = false;
  auto last_contact = steady_clock::now();
  for (;;) {
    grpc::ClientContext context;
    const std::stop_callback cancel(stop, [&context] { context.TryCancel(); });
    const auto reader = stub_->WatchJob(&context, request);
    v1::WatchJobResponse response;
    while (reader->Read(&response)) {
      const v1::JobEvent& event = response.event();
      last_contact = steady_clock::now();
      backoff.Reset();
      lost = false;
      request.set_after_sequence(std::max(request.after_sequence(), event.sequence()));
      if (event.has_state_change() && IsFinal(event.state_change().state())) {
        outcome = event.state_change();
      }
      on_event(event);
    }
    const grpc::Status status = reader->Finish();
    if (outcome.has_value()) return *outcome;
    if (stop.stop_requested()) return absl::CancelledError("interrupted");
    const bool passes = status.ok() || status.error_code() == grpc::StatusCode::UNAVAILABLE ||
                        status.error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED;
    if (!passes || steady_clock::now() - last_contact > kLongestAbsence) {
      return status.ok() ? absl::UnavailableError(absl::StrCat(
                               "server ", address_, " ended the stream before the job was final"))
                         : ToStatus(status, address_);
    }
    if (!lost) on_lost(ToStatus(status, address_));
    lost = true;
    if (!backoff.Wait(stop)) return absl::CancelledError("interrupted");
  }
}

bool IsFinal(v1::JobState state) {
  return state == v1::JOB_STATE_SUCCEEDED || state == v1::JOB_STATE_FAILED ||
         state == v1::JOB_STATE_CANCELLED;
}

std::string StateName(v1::JobState state) {
  return std::string(absl::StripPrefix(v1::JobState_Name(state), kStatePrefix));
}

absl::StatusOr<v1::JobState> ParseState(absl::string_view text) {
  std::string name = absl::AsciiStrToUpper(text);
  name = absl::StrCat(kStatePrefix, absl::StripPrefix(name, kStatePrefix));
  v1::JobState state;
  if (!v1::JobState_Parse(name, &state) || state == v1::JOB_STATE_UNSPECIFIED) {
    return absl::InvalidArgumentError(absl::StrCat(
        "no job state \"", text, "\"", DidYouMean(absl::AsciiStrToLower(text), StateNames())));
  }
  return state;
}

Progress ToProgress(const v1::Progress& progress, v1::JobState state) {
  const auto phase = [state] {
    switch (state) {
      case v1::JOB_STATE_RUNNING:
        return Phase::kMerging;
      case v1::JOB_STATE_PUBLISHING:
        return Phase::kPublishing;
      case v1::JOB_STATE_SUCCEEDED:
        return Phase::kDone;
      default:
        return Phase::kPlanning;
    }
  };
  return {.phase = phase(),
          .tensors_done = progress.tensors_done(),
          .tensors_total = progress.tensors_total(),
          .bytes_read = progress.read_bytes(),
          .bytes_written = progress.written_bytes(),
          .bytes_total = progress.total_bytes(),
          .shards_reused = progress.shards_reused(),
          .seconds = progress.elapsed_seconds(),
          .bytes_per_second = progress.written_bytes_per_second(),
          .seconds_left = progress.has_remaining_seconds() ? progress.remaining_seconds() : -1,
          .current = progress.current_tensor(),
          .stage = progress.stage(),
          .stages = progress.stages(),
          .stage_name = progress.stage_name()};
}

absl::Status OutcomeOf(const v1::JobStateChange& change) {
  if (change.state() == v1::JOB_STATE_SUCCEEDED) return absl::OkStatus();
  const auto code = static_cast<absl::StatusCode>(change.error().code());
  return absl::Status(code == absl::StatusCode::kOk ? absl::StatusCode::kUnknown : code,
                      change.error().message());
}

}  // namespace pewter::client
