#include "client/remote.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/random/random.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "base/digest.h"
#include "base/nearest.h"
#include "base/status.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "grpcpp/grpcpp.h"
#include "merge/recipe/problems.h"
#include "store/resource_name.h"

namespace pewter::client {

namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using std::chrono::steady_clock;

constexpr seconds kCallTimeout{30};
// The server waits for a job to stop, and removes files.
constexpr seconds kDeleteTimeout{300};
constexpr int kCallAttempts = 5;
constexpr milliseconds kFirstDelay{100};
constexpr milliseconds kLongestDelay{5000};
// Of a server while a job is watched or bytes are sent.
constexpr std::chrono::minutes kLongestAbsence{5};
constexpr int64_t kFrameBytes = int64_t{1} << 20;  // of data in a message

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
      // A line for each, in full: the message may be cut.
      std::vector<std::string> lines;
      for (const auto& violation : bad.field_violations()) {
        const bool placed = PositionIn(violation.description()).line > 0;
        lines.push_back(placed || violation.field().empty()
                            ? violation.description()
                            : absl::StrCat(violation.field(), ": ", violation.description()));
      }
      if (!lines.empty()) message = absl::StrJoin(lines, "\n");
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

// ErrorInfo.reason, empty when there is none.
std::string ReasonOf(const grpc::Status& status) {
  google::rpc::Status details;
  if (!details.ParseFromString(status.error_details())) return "";
  google::rpc::ErrorInfo info;
  for (const auto& any : details.details()) {
    if (any.UnpackTo(&info)) return info.reason();
  }
  return "";
}

// A transfer that failed so may go on.
bool MayGoOn(const grpc::Status& status) {
  switch (status.error_code()) {
    case grpc::StatusCode::UNAVAILABLE:
    case grpc::StatusCode::ABORTED:
    case grpc::StatusCode::CANCELLED:  // by a proxy, or by a server that stops
      return true;
    case grpc::StatusCode::OUT_OF_RANGE:
      return ReasonOf(status) == "OFFSET_MISMATCH";
    case grpc::StatusCode::RESOURCE_EXHAUSTED:
      return ReasonOf(status) != "DISK_FULL" && ReasonOf(status) != "QUOTA_BYTES";
    default:
      return false;
  }
}

// Of the blob on this machine for this user: a process that is started again goes on with the
// upload of the last one, and others do not get in its way.
std::string UploadId(const v1::BlobDigest& digest) {
  char host[256] = "";
  gethostname(host, sizeof host - 1);
  const std::string hex = Sha256::Of(absl::StrCat(host, "/", getuid(), "/", digest.sha256()));
  return absl::StrCat(hex.substr(0, 8), "-", hex.substr(8, 4), "-", hex.substr(12, 4), "-",
                      hex.substr(16, 4), "-", hex.substr(20, 12));
}

// One call that may be repeated.
template <class Stub, class Request, class Response>
absl::Status Call(Stub& stub, absl::string_view address,
                  grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*),
                  const Request& request, Response* response, int attempts = kCallAttempts,
                  seconds timeout = kCallTimeout) {
  Backoff backoff;
  for (int attempt = 1;; ++attempt) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + timeout);
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

bool ServerArguments::IsLocal() const {
  absl::string_view host = address;
  if (absl::StartsWith(host, "unix:")) return true;
  for (const absl::string_view prefix : {"dns:///", "dns:", "ipv4:", "ipv6:"}) {
    if (absl::ConsumePrefix(&host, prefix)) break;
  }
  if (absl::ConsumePrefix(&host, "[")) {
    host = host.substr(0, host.find(']'));
  } else {
    host = host.substr(0, host.rfind(':'));
  }
  return host == "localhost" || host == "::1" || absl::StartsWith(host, "127.");
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
  const std::shared_ptr<grpc::Channel> channel =
      grpc::CreateCustomChannel(address_, grpc::InsecureChannelCredentials(), arguments);
  stub_ = v1::MergeService::NewStub(channel);
  artifacts_ = v1::ArtifactService::NewStub(channel);
  bytes_ = google::bytestream::ByteStream::NewStub(channel);
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

absl::StatusOr<v1::Job> Remote::RetryJob(const v1::RetryJobRequest& request) {
  v1::RetryJobResponse response;
  RETURN_IF_ERROR(Call(*stub_, address_, &v1::MergeService::Stub::RetryJob, request, &response));
  return std::move(*response.mutable_job());
}

absl::Status Remote::DeleteJob(const v1::DeleteJobRequest& request) {
  v1::DeleteJobResponse response;
  // Not idempotent: a repeated call could say that there is no such job.
  return Call(*stub_, address_, &v1::MergeService::Stub::DeleteJob, request, &response,
              /*attempts=*/1, /*timeout=*/kDeleteTimeout);
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

absl::StatusOr<v1::FindMissingBlobsResponse> Remote::FindMissingBlobs(
    const v1::FindMissingBlobsRequest& request) {
  v1::FindMissingBlobsResponse response;
  RETURN_IF_ERROR(Call(*artifacts_, address_, &v1::ArtifactService::Stub::FindMissingBlobs, request,
                       &response));
  return response;
}

absl::StatusOr<v1::Artifact> Remote::CreateArtifact(const v1::CreateArtifactRequest& request) {
  v1::CreateArtifactResponse response;
  RETURN_IF_ERROR(
      Call(*artifacts_, address_, &v1::ArtifactService::Stub::CreateArtifact, request, &response));
  return std::move(*response.mutable_artifact());
}

absl::StatusOr<v1::Artifact> Remote::GetArtifact(const v1::GetArtifactRequest& request) {
  v1::GetArtifactResponse response;
  RETURN_IF_ERROR(
      Call(*artifacts_, address_, &v1::ArtifactService::Stub::GetArtifact, request, &response));
  return std::move(*response.mutable_artifact());
}

absl::StatusOr<v1::ListArtifactsResponse> Remote::ListArtifacts(
    const v1::ListArtifactsRequest& request) {
  v1::ListArtifactsResponse response;
  RETURN_IF_ERROR(
      Call(*artifacts_, address_, &v1::ArtifactService::Stub::ListArtifacts, request, &response));
  return response;
}

absl::Status Remote::DeleteArtifact(const std::string& uri) {
  v1::DeleteArtifactRequest request;
  request.set_uri(uri);
  v1::DeleteArtifactResponse response;
  // Not idempotent: a repeated call could say that there is no such artifact.
  return Call(*artifacts_, address_, &v1::ArtifactService::Stub::DeleteArtifact, request, &response,
              /*attempts=*/1);
}

grpc::Status Remote::UploadOnce(int file, const v1::BlobDigest& digest, const std::string& name,
                                const std::function<void(int64_t committed)>& on_progress,
                                std::stop_token stop) {
  int64_t offset = 0;
  {
    google::bytestream::QueryWriteStatusRequest request;
    request.set_resource_name(name);
    google::bytestream::QueryWriteStatusResponse response;
    grpc::ClientContext context;
    const std::stop_callback cancel(stop, [&context] { context.TryCancel(); });
    context.set_deadline(std::chrono::system_clock::now() + kCallTimeout);
    const grpc::Status status = bytes_->QueryWriteStatus(&context, request, &response);
    if (status.ok()) offset = response.committed_size();
    if (!status.ok() && status.error_code() != grpc::StatusCode::NOT_FOUND) return status;
    on_progress(offset);
    if (response.complete()) return grpc::Status::OK;
  }

  google::bytestream::WriteRequest request;
  request.set_resource_name(name);
  google::bytestream::WriteResponse response;
  grpc::ClientContext context;
  const std::stop_callback cancel(stop, [&context] { context.TryCancel(); });
  const auto writer = bytes_->Write(&context, &response);
  do {
    std::string& data = *request.mutable_data();
    data.resize(std::min(kFrameBytes, digest.size_bytes() - offset));
    for (size_t done = 0; done < data.size();) {
      const ssize_t got = pread(file, data.data() + done, data.size() - done, offset + done);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) {
        context.TryCancel();
        writer->Finish();
        return {grpc::StatusCode::FAILED_PRECONDITION, "it cannot be read or has become shorter"};
      }
      done += got;
    }
    request.set_write_offset(offset);
    request.set_finish_write(offset + static_cast<int64_t>(data.size()) == digest.size_bytes());
    if (!writer->Write(request)) break;
    offset += data.size();
    on_progress(offset);
    request.clear_resource_name();
  } while (!request.finish_write());
  writer->WritesDone();
  const grpc::Status status = writer->Finish();
  if (!status.ok() || response.committed_size() == digest.size_bytes()) return status;
  return {grpc::StatusCode::UNAVAILABLE, "the server ended the upload before its end"};
}

absl::Status Remote::Upload(const std::string& path, const v1::BlobDigest& digest,
                            const std::function<void(int64_t committed)>& on_progress,
                            std::stop_token stop) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) {
    return absl::NotFoundError(absl::StrCat("cannot open ", path, ": ", strerror(errno)));
  }
  const absl::Cleanup close_file = [file] { close(file); };
  const std::string name = ResourceName{.kind = ResourceName::Kind::kUpload,
                                        .id = UploadId(digest),
                                        .sha256 = digest.sha256(),
                                        .size = digest.size_bytes()}
                               .ToString();
  Backoff backoff;
  bool damaged = false;
  int64_t furthest = -1;
  auto last_move = steady_clock::now();
  for (;;) {
    const grpc::Status status = UploadOnce(
        file, digest, name,
        [&](int64_t committed) {
          on_progress(committed);
          if (committed <= furthest) return;
          furthest = committed;
          last_move = steady_clock::now();
          backoff.Reset();
        },
        stop);
    if (status.ok()) return absl::OkStatus();
    if (stop.stop_requested()) return absl::CancelledError("interrupted");
    // Once may be the connection's fault.
    const bool mismatch = ReasonOf(status) == "DIGEST_MISMATCH";
    const bool again = mismatch ? !damaged : MayGoOn(status);
    damaged = damaged || mismatch;
    if (!again || steady_clock::now() - last_move > kLongestAbsence) {
      if (!mismatch) return Annotate(ToStatus(status, address_), path);
      return absl::DataLossError(absl::StrCat(path,
                                              ": the server has refused twice what came: it "
                                              "is damaged on the way, or the file changes (",
                                              status.error_message(), ")"));
    }
    if (mismatch) furthest = -1;
    if (!backoff.Wait(stop)) return absl::CancelledError("interrupted");
  }
}

absl::Status Remote::Download(const std::string& resource_name, int64_t offset, int64_t size,
                              const std::function<absl::Status(absl::string_view bytes)>& sink,
                              std::stop_token stop) {
  google::bytestream::ReadRequest request;
  request.set_resource_name(resource_name);
  Backoff backoff;
  auto last_move = steady_clock::now();
  while (offset < size) {
    request.set_read_offset(offset);
    grpc::ClientContext context;
    const std::stop_callback cancel(stop, [&context] { context.TryCancel(); });
    const auto reader = bytes_->Read(&context, request);
    google::bytestream::ReadResponse response;
    while (reader->Read(&response)) {
      absl::Status taken =
          static_cast<int64_t>(response.data().size()) > size - offset
              ? absl::DataLossError("the server sends more bytes than it has promised")
              : sink(response.data());
      if (!taken.ok()) {
        context.TryCancel();
        reader->Finish();
        return taken;
      }
      offset += response.data().size();
      last_move = steady_clock::now();
      backoff.Reset();
    }
    const grpc::Status status = reader->Finish();
    if (offset == size) break;
    if (stop.stop_requested()) return absl::CancelledError("interrupted");
    if ((!status.ok() && !MayGoOn(status)) || steady_clock::now() - last_move > kLongestAbsence) {
      return status.ok() ? absl::DataLossError(absl::StrCat("the server ends ", resource_name,
                                                            " at byte ", offset, " of ", size))
                         : ToStatus(status, address_);
    }
    if (!backoff.Wait(stop)) return absl::CancelledError("interrupted");
  }
  return absl::OkStatus();
}

std::string RandomRequestId() {
  absl::BitGen random;
  return absl::StrFormat("%016x%016x", absl::Uniform<uint64_t>(random),
                         absl::Uniform<uint64_t>(random));
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
