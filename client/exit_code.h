// Exit codes of the command line: part of its contract, like the JSON output.
#pragma once

#include "absl/status/status.h"

namespace pewter::client {

inline constexpr int kExitDone = 0;
inline constexpr int kExitFailed = 1;
inline constexpr int kExitUsage = 2;     // the command line or the recipe is wrong
inline constexpr int kExitNotFound = 3;  // a file, model or job is not there, or access is denied
inline constexpr int kExitInterrupted = 130;

inline int ExitCodeOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return kExitDone;
    case absl::StatusCode::kInvalidArgument:
      return kExitUsage;
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kPermissionDenied:
    case absl::StatusCode::kUnauthenticated:
      return kExitNotFound;
    case absl::StatusCode::kCancelled:
      return kExitInterrupted;
    default:
      return kExitFailed;
  }
}

}  // namespace pewter::client
