// Status helpers: early return and annotation.
//
// Codes mean the same everywhere: InvalidArgument, the recipe or the command is wrong;
// FailedPrecondition, the checkpoint does not fit; NotFound, a file or model is not there;
// AlreadyExists, the output is; DataLoss, bytes are bad; Unavailable, try again; ResourceExhausted,
// a budget (memory, disk) ran out; Internal, a bug of ours.
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace pewter {

// Prefixes the message of a failed status with where it happened ("model X, tensor Y"). Keeps code
// and payloads.
inline absl::Status Annotate(const absl::Status& status, absl::string_view where) {
  if (status.ok()) return status;
  absl::Status annotated(status.code(), absl::StrCat(where, ": ", status.message()));
  status.ForEachPayload([&](absl::string_view url, const absl::Cord& payload) {
    annotated.SetPayload(url, payload);
  });
  return annotated;
}

}  // namespace pewter

#define PEWTER_CONCAT_INNER(a, b) a##b
#define PEWTER_CONCAT(a, b) PEWTER_CONCAT_INNER(a, b)

#define RETURN_IF_ERROR(expr) \
  PEWTER_RETURN_IF_ERROR_IMPL(PEWTER_CONCAT(pewter_status_, __LINE__), expr)
#define PEWTER_RETURN_IF_ERROR_IMPL(status, expr)                  \
  do {                                                             \
    if (absl::Status status = (expr); !status.ok()) return status; \
  } while (false)

#define ASSIGN_OR_RETURN(lhs, expr) \
  PEWTER_ASSIGN_OR_RETURN_IMPL(PEWTER_CONCAT(pewter_statusor_, __LINE__), lhs, expr)
#define PEWTER_ASSIGN_OR_RETURN_IMPL(statusor, lhs, expr)  \
  auto statusor = (expr);                                  \
  if (!statusor.ok()) return std::move(statusor).status(); \
  lhs = *std::move(statusor)
