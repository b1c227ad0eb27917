// Names of ByteStream's resources, as pewter/v1/artifact_service.proto lists them.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pewter {

struct ResourceName {
  enum class Kind { kUpload, kBlob, kOutput, kJobFile };
  Kind kind = Kind::kBlob;
  std::string id;         // an upload's UUID, an artifact's name or a job's id
  std::string sha256;     // of uploads and blobs
  int64_t size = 0;       // of uploads and blobs
  std::string path = {};  // of outputs' and jobs' files: a key of an ObjectStore

  std::string ToString() const;
};

// InvalidArgument unless it is a name as ToString writes it: what is
// accepted has one spelling.
absl::StatusOr<ResourceName> ParseResourceName(absl::string_view text);

}  // namespace pewter
