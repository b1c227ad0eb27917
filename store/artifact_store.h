// Artifacts: models that a server keeps for its clients, below one root: the folder or s3:// URI
// $PEWTER_ARTIFACTS.
//
//   ROOT/blobs/sha256/AB/ABCD...    the bytes of a file, named by their SHA-256
//   ROOT/sets/ABCD...               a set of files that was uploaded, named by its own SHA-256
//   ROOT/outputs/NAME/PATH          what a job has written to artifact://NAME
//
// artifact://sha256/ABCD... is such a set, as a store that is read only; artifact://NAME is the
// folder outputs/NAME. Who writes blobs and sets is the server (server/artifact_manager.h); this is
// what a merge sees of them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "store/object_store.h"

namespace pewter {

inline constexpr char kArtifactScheme[] = "artifact://";
inline constexpr char kArtifactRootVariable[] = "PEWTER_ARTIFACTS";

// A file of a set.
struct ArtifactFile {
  std::string path;  // relative, with '/'
  int64_t size = 0;
  std::string sha256;  // 64 lower-case hex digits
};

// artifact://sha256/DIGEST or artifact://NAME.
struct ArtifactUri {
  bool uploaded = false;
  std::string name;  // the digest, or the name

  std::string ToString() const;
};
// InvalidArgument for all else, and for what is below an artifact.
absl::StatusOr<ArtifactUri> ParseArtifactUri(absl::string_view uri);

bool IsSha256(absl::string_view text);
// 1 to 63 letters, digits, '.', '_' and '-', the first a letter or digit; not "sha256".
bool IsArtifactName(absl::string_view text);

// Keys below the root.
std::string BlobKey(absl::string_view sha256);
std::string SetKey(absl::string_view sha256);
std::string OutputKey(absl::string_view name, absl::string_view path);

// A set as it is stored: equal sets have equal texts.
std::string FormatFileSet(std::vector<ArtifactFile> files);
// DataLoss when the text is none.
absl::StatusOr<std::vector<ArtifactFile>> ParseFileSet(absl::string_view text);
// The set of that digest. NotFound when `root` has none.
absl::StatusOr<std::vector<ArtifactFile>> ReadFileSet(ObjectStore& root, absl::string_view sha256);

// What the URI names after its scheme: sha256/DIGEST, or NAME with folders below it; nothing for
// the folder of all outputs. FailedPrecondition where PEWTER_ARTIFACTS is not set.
absl::StatusOr<std::shared_ptr<ObjectStore>> OpenArtifact(absl::string_view rest);

}  // namespace pewter
