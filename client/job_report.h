// What is shown of a server's jobs, and following one until its end: shared by submit and jobs.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/output.h"
#include "client/remote.h"
#include "google/protobuf/message.h"
#include "pewter/v1/job.pb.h"

namespace pewter::client {

// The fields of the proto, by their names there; 64-bit integers are strings, as protobuf's JSON
// has them.
Json ToJson(const google::protobuf::Message& message);

// "5s", "12m", "3h", "2d": as kubectl tells ages.
std::string FormatAge(double seconds);
// All that GetJob tells.
std::string JobToText(const v1::Job& job);
// A row for each job.
std::string JobsToText(const std::vector<v1::Job>& jobs);

// Follows a job with state changes on standard output (JSON: one event a line) and progress on
// standard error, then tells the outcome. Ctrl-C leaves the job running and says so. Returns the
// exit code that a local merge with that outcome would have had, 1 for a cancelled job.
absl::StatusOr<int> FollowJob(Remote& remote, const std::string& id, Output& out);

}  // namespace pewter::client
