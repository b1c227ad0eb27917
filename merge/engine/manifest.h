// pewter_manifest.json, and the state file of an unfinished run from which it is resumed.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "merge/engine/input_audit.h"
#include "merge/methods/tensor_task.h"
#include "merge/plan/plan.h"
#include "store/object_store.h"

namespace pewter {

inline constexpr char kManifestFile[] = "pewter_manifest.json";
inline constexpr char kStateFile[] = ".pewter-state.json";

// A finished output file. `sha256` is empty when hashing was off.
struct OutputFile {
  std::string name;
  int64_t bytes = 0;
  std::string sha256;
};

// What a finished shard leaves for the manifest and for a resume.
struct ShardRecord {
  OutputFile file;
  std::vector<ReadRange> ranges;
  std::vector<std::string> warnings;
  std::map<std::string, TensorReport> reports = {};  // by tensor
};

// The state file: the plan's fingerprint, the finished shards, by shard number, and the digests of
// the files that passes before the merge have left (alignments), by name.
struct RunState {
  std::string fingerprint;
  std::map<int, ShardRecord> shards;
  std::map<std::string, std::string> artefacts;

  std::string ToJson() const;
  static absl::StatusOr<RunState> FromJson(absl::string_view text);
  // From kStateFile of `store`; NotFound when there is none.
  static absl::StatusOr<RunState> Read(ObjectStore& store);
};

// The hex digest of an object's bytes.
absl::StatusOr<std::string> Sha256OfObject(ObjectStore& store, absl::string_view key, int64_t size);

enum class FileCheck {
  kSizes,    // every file is there
  kDigests,  // and has the bytes that were written: all of them are read
};
// The manifest of the finished model in `store`, when it has the given fingerprint; nothing when
// there is no such model. DataLoss when a file is not as the manifest says.
absl::StatusOr<std::optional<std::string>> FindFinished(ObjectStore& store,
                                                        absl::string_view fingerprint,
                                                        FileCheck check);
// Whose work a model is.
struct ModelOrigin {
  std::string fingerprint;  // of the plan
  std::string job;          // RunOptions::job
};
// As the manifest of `store` says; NotFound when there is none, DataLoss when it is damaged.
absl::StatusOr<ModelOrigin> OriginOfModel(ObjectStore& store);
// The files that a manifest lists. DataLoss when the text is no manifest.
absl::StatusOr<std::vector<OutputFile>> OutputFilesOf(absl::string_view manifest_json);
// The names of the files that a manifest lists, its own the last.
std::vector<std::string> FilesOfManifest(absl::string_view manifest_json);

// Removes the model that a manifest describes: its manifest first, then the files that it lists,
// and nothing else. What is gone already is no error. DataLoss when the text is no manifest.
absl::Status RemoveModel(ObjectStore& store, absl::string_view manifest_json);

struct ManifestInput {
  const Plan& plan;
  const std::map<int, ShardRecord>& shards;
  const std::vector<OutputFile>& aux_files;
  std::string device;  // description of the backend
  int threads = 0;
  double seconds = 0;
  int64_t shards_reused = 0;
  std::string job = {};
  std::vector<std::string> stage_manifests = {};  // JSON, in the order of plan.stages
};

// Inputs are identified by the hub's etag, else by size, time of change and CRC32C: of the whole
// file where all of it was read, else of the ranges that were.
std::string ManifestJson(const ManifestInput& input);

}  // namespace pewter
