// Errors of the service: absl::Status whose payloads are the google.rpc details, keyed by type URL.
//
// So an error keeps its details through every layer and becomes a gRPC status with
// grpc-status-details-bin, and back, without a table. Every error that leaves the server has one
// ErrorInfo with domain "pewter.dev".
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "grpcpp/support/status.h"

namespace pewter::server {

struct FieldViolation {
  std::string field;  // path in the request: "options.memory_bytes"
  std::string description;
  int line = 0;  // in the recipe's text; the description begins with the place then
  int column = 0;
};

absl::Status MakeError(absl::StatusCode code, absl::string_view reason, absl::string_view message,
                       const std::map<std::string, std::string>& metadata = {});

// InvalidArgument with one BadRequest that holds all violations, or as many as fit and "n more";
// there is at least one, and ErrorInfo has the place of the first.
absl::Status BadRequestError(absl::string_view reason,
                             const std::vector<FieldViolation>& violations);

// FailedPrecondition with one PreconditionFailure that has a violation of type MISSING for each
// subject; `description` is said of each. There is at least one.
absl::Status MissingError(absl::string_view reason, const std::vector<std::string>& subjects,
                          absl::string_view description);

// Tells the client when to try again.
absl::Status WithRetry(absl::Status status, absl::Duration delay);
// Adds a QuotaFailure of `subject`, described by the message, and when to try again.
absl::Status WithQuota(absl::Status status, absl::string_view subject, absl::Duration delay);
// Adds a PreconditionFailure of one violation, described by the message.
absl::Status WithPrecondition(absl::Status status, absl::string_view type,
                              absl::string_view subject);
// Adds the ResourceInfo of what the error is about.
absl::Status WithResource(absl::Status status, absl::string_view type, absl::string_view name);

// ErrorInfo.reason, empty when there is none.
std::string ReasonOf(const absl::Status& status);

// Message and details are cut to what fits into gRPC's default limit on metadata (8 KiB): details
// to 4 KiB, ErrorInfo always. A status without a reason gets the attached one (base/reason.h), or
// one that names its code.
grpc::Status ToGrpc(const absl::Status& status);
// An RPC's answer: the value into `response`, or the error.
template <typename Value>
grpc::Status Reply(absl::StatusOr<Value> result, Value* response) {
  if (!result.ok()) return ToGrpc(result.status());
  *response = *std::move(result);
  return grpc::Status::OK;
}

absl::Status FromGrpc(const grpc::Status& status);

}  // namespace pewter::server
