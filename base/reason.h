// A reason that programs branch on, attached to a Status where its cause is known: below the
// service, which passes it on as its own. Where there is none, the code says enough.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/strings/cord.h"
#include "absl/strings/string_view.h"

namespace pewter {

inline constexpr char kReasonPayload[] = "pewter.dev/reason";

// No space is left where the output goes, or no quota.
inline constexpr char kDiskFull[] = "DISK_FULL";

inline absl::Status WithReason(absl::Status status, absl::string_view reason) {
  status.SetPayload(kReasonPayload, absl::Cord(reason));
  return status;
}

// Empty when there is none.
inline std::string AttachedReason(const absl::Status& status) {
  const auto reason = status.GetPayload(kReasonPayload);
  return reason ? std::string(*reason) : std::string();
}

}  // namespace pewter
