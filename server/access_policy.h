// AccessPolicy: which places jobs may read and write, as the operator of a server allows it.
//
// A rule is a place, and allows it and what is below it, part by part: s3://bucket/models allows
// s3://bucket/models/a, and not s3://bucket/models-old. Places: s3://BUCKET[/PREFIX], hf://ORG or
// hf://ORG/MODEL (of any revision), a folder, and s3:// or hf:// for all of a kind. Artifacts
// (artifact://) are the server's own and always allowed.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pewter::server {

// The place that an absolute path, a file://, s3://, hf:// or artifact:// URI names, links resolved
// as far as it exists, so that equal places have equal keys, and what is below one begins with its
// key and '/'. Nothing for other places.
std::optional<std::string> PlaceKey(absl::string_view uri);

class AccessPolicy {
 public:
  // Allows everything.
  AccessPolicy() = default;
  // Without rules of a kind everything is allowed. InvalidArgument for a rule that names no place.
  static absl::StatusOr<AccessPolicy> Make(const std::vector<std::string>& read,
                                           const std::vector<std::string>& write);

  // PermissionDenied (SOURCE_PREFIX_DENIED, OUTPUT_PREFIX_DENIED); says what is allowed.
  absl::Status CheckRead(absl::string_view uri) const;
  absl::Status CheckWrite(absl::string_view uri) const;

 private:
  std::vector<std::string> read_, write_;  // keys
};

}  // namespace pewter::server
