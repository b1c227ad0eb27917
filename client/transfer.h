// Transfer: models of this machine go to a server, and what it keeps comes back.
//
// Files are named by their SHA-256, so what the server has is not sent again, an interrupted
// transfer goes on where it was, by the same command too, and nothing that arrives damaged is
// taken. Shows progress, and stops in order at Ctrl-C.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/output.h"
#include "client/remote.h"

namespace pewter::client {

// A file of a model on this machine.
struct ModelFile {
  std::string path;  // in the model
  std::string file;  // where it is
  int64_t size = 0;
};

// What a merge reads of the model, adapter or file at `path`: of a folder the weights and, of the
// folder itself and the modules that modules.json names, the small files that describe a model.
// Errors as of opening a checkpoint: also of a damaged one.
absl::StatusOr<std::vector<ModelFile>> FilesOfModel(const std::string& path);

struct UploadResult {
  std::map<std::string, std::string> uris;  // by path, as given
  int64_t bytes = 0;                        // of all files, each once
  int64_t sent_bytes = 0;                   // that the server did not have
};
// The models, adapters or files at `paths`, absolute or file://. Cancelled when interrupted.
absl::StatusOr<UploadResult> UploadModels(Remote& remote, absl::Span<const std::string> paths,
                                          Output& out);

// The artifact's files into `folder`, which is made when absent. AlreadyExists when it has other
// files of the same names, unless `overwrite`. Gives the bytes that were not there.
absl::StatusOr<int64_t> DownloadArtifact(Remote& remote, const v1::Artifact& artifact,
                                         const std::string& folder, bool overwrite, Output& out);

}  // namespace pewter::client
