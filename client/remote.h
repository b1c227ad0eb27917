// Remote: a pewterd, seen from the command line. Retries what is safe to repeat while the server is
// unavailable, and follows a job and goes on with a transfer across lost connections. Errors are
// absl::Status with the server's message and code.
#pragma once

#include <functional>
#include <memory>
#include <stop_token>
#include <string>

#include "CLI/CLI.hpp"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "google/bytestream/bytestream.grpc.pb.h"
#include "merge/engine/observer.h"
#include "pewter/v1/artifact_service.grpc.pb.h"
#include "pewter/v1/merge_service.grpc.pb.h"

namespace pewter::client {

// Parsed into by CLI11: --server, or PEWTER_SERVER.
struct ServerArguments {
  std::string address;

  void Declare(CLI::App& app);
  // The server is this machine: it sees the same files.
  bool IsLocal() const;
};

// Not shared between threads.
class Remote {
 public:
  using EventCallback = std::function<void(const v1::JobEvent& event)>;

  // Does not connect yet. InvalidArgument when no address was given.
  static absl::StatusOr<Remote> Open(const ServerArguments& arguments);

  const std::string& address() const { return address_; }

  // `request.request_id` must be set: it makes repeating safe.
  absl::StatusOr<v1::Job> CreateJob(const v1::CreateJobRequest& request);
  absl::StatusOr<v1::Job> GetJob(const std::string& id);
  absl::StatusOr<v1::ListJobsResponse> ListJobs(const v1::ListJobsRequest& request);
  absl::StatusOr<v1::Job> CancelJob(const std::string& id);
  // `request.request_id` must be set.
  absl::StatusOr<v1::Job> RetryJob(const v1::RetryJobRequest& request);
  absl::Status DeleteJob(const v1::DeleteJobRequest& request);

  // Calls back for each event, in order and without gaps, until the job is final; returns the
  // change that made it so. `on_lost` is told when the connection is lost and will be tried again.
  // Cancelled when `stop` is asked to: the job itself goes on. Unavailable when the server stays
  // away for minutes.
  absl::StatusOr<v1::JobStateChange> Watch(const std::string& id, const EventCallback& on_event,
                                           const std::function<void(const absl::Status&)>& on_lost,
                                           std::stop_token stop);

  absl::StatusOr<v1::FindMissingBlobsResponse> FindMissingBlobs(
      const v1::FindMissingBlobsRequest& request);
  absl::StatusOr<v1::Artifact> CreateArtifact(const v1::CreateArtifactRequest& request);
  absl::StatusOr<v1::Artifact> GetArtifact(const v1::GetArtifactRequest& request);
  absl::StatusOr<v1::ListArtifactsResponse> ListArtifacts(const v1::ListArtifactsRequest& request);
  absl::Status DeleteArtifact(const std::string& uri);

  // Sends the file at `path` as the blob of that digest, from where the server has it on: also from
  // where an earlier process has stopped. `on_progress` is told how much the server has, and then
  // what is sent. DataLoss when what arrives is not what the digest says, twice; Cancelled when
  // `stop` is asked to; Unavailable when nothing moves for minutes.
  absl::Status Upload(const std::string& path, const v1::BlobDigest& digest,
                      const std::function<void(int64_t committed)>& on_progress,
                      std::stop_token stop);
  // Reads a resource of `size` bytes from `offset` on; `sink` takes them in order, and its errors
  // end the download. Other errors as of Upload.
  absl::Status Download(const std::string& resource_name, int64_t offset, int64_t size,
                        const std::function<absl::Status(absl::string_view bytes)>& sink,
                        std::stop_token stop);

 private:
  explicit Remote(std::string address);
  grpc::Status UploadOnce(int file, const v1::BlobDigest& digest, const std::string& name,
                          const std::function<void(int64_t committed)>& on_progress,
                          std::stop_token stop);

  std::string address_;
  std::unique_ptr<v1::ArtifactService::Stub> artifacts_;
  std::unique_ptr<google::bytestream::ByteStream::Stub> bytes_;
  std::unique_ptr<v1::MergeService::Stub> stub_;
};

// For request_id: a call that is repeated after a lost connection has its effect once.
std::string RandomRequestId();

bool IsFinal(v1::JobState state);
// "RUNNING".
std::string StateName(v1::JobState state);
// "running", "RUNNING" or "JOB_STATE_RUNNING"; InvalidArgument with the nearest name.
absl::StatusOr<v1::JobState> ParseState(absl::string_view text);
// What the displays of local merges take.
Progress ToProgress(const v1::Progress& progress, v1::JobState state);
// OK for SUCCEEDED; for FAILED and CANCELLED why, with the code that the merge would have had here.
absl::Status OutcomeOf(const v1::JobStateChange& change);

}  // namespace pewter::client
