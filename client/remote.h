// Remote: a pewterd, seen from the command line. Retries what is safe to repeat while the server is
// unavailable, and follows a job across lost connections. Errors are absl::Status with the server's
// message and code.
#pragma once

#include <functional>
#include <memory>
#include <stop_token>
#include <string>

#include "CLI/CLI.hpp"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "merge/engine/observer.h"
#include "pewter/v1/merge_service.grpc.pb.h"

namespace pewter::client {

// Parsed into by CLI11: --server, or PEWTER_SERVER.
struct ServerArguments {
  std::string address;

  void Declare(CLI::App& app);
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
  absl::Status DeleteJob(const std::string& id);

  // Calls back for each event, in order and without gaps, until the job is final; returns the
  // change that made it so. `on_lost` is told when the connection is lost and will be tried again.
  // Cancelled when `stop` is asked to: the job itself goes on. Unavailable when the server stays
  // away for minutes.
  absl::StatusOr<v1::JobStateChange> Watch(const std::string& id, const EventCallback& on_event,
                                           const std::function<void(const absl::Status&)>& on_lost,
                                           std::stop_token stop);

 private:
  explicit Remote(std::string address);

  std::string address_;
  std::unique_ptr<v1::MergeService::Stub> stub_;
};

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
