// HubCacheStore: one snapshot of a model in an existing Hugging Face hub cache, read offline.
//
//   CACHE/models--ORG--NAME/refs/REVISION               text: the commit that a branch or tag had
//   CACHE/models--ORG--NAME/snapshots/COMMIT/FILE       link to ../../blobs/ETAG
//
// CACHE is $HF_HUB_CACHE, else $HF_HOME/hub, else $XDG_CACHE_HOME/huggingface/hub, else
// ~/.cache/huggingface/hub. An object's etag is its blob's name: the file's hash. Writes are
// Unimplemented. Thread-safe.
#pragma once

#include <memory>
#include <string>

#include "store/file_store.h"
#include "store/object_store.h"

namespace pewter {

class HubCacheStore final : public ReadOnlyStore {
 public:
  // `model` is "org/name" or "name". `revision`: a branch, a tag, a commit or a unique beginning of
  // one (four hex digits at least); empty means main. NotFound names the folder that was searched
  // and the command that downloads the model.
  static absl::StatusOr<std::shared_ptr<ObjectStore>> Open(absl::string_view model,
                                                           absl::string_view revision);
  // The cache folder as the environment gives it.
  static std::string CacheFolder();
  // True for what could be a model's name on the hub.
  static bool IsModelId(absl::string_view text);

  absl::StatusOr<ObjectStat> Stat(absl::string_view key) override;
  absl::Status ReadInto(absl::string_view key, int64_t offset, absl::Span<std::byte> out) override;
  absl::StatusOr<std::vector<ObjectEntry>> List(absl::string_view prefix) override;
  // "hf://org/model@COMMIT/config.json"
  std::string Describe(absl::string_view key) const override;

 private:
  HubCacheStore(std::string name, const std::string& snapshot);
  std::string Etag(absl::string_view key) const;
  absl::Status ReadOnly() const override;

  const std::string name_;  // "hf://org/model@COMMIT"
  FileStore files_;
};

}  // namespace pewter
