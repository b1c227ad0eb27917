// HubStore: a model on a Hugging Face hub, read over the network in ranges and never as a whole.
//
// The revision is resolved once, to a commit; all that is read is of that commit. Files that a hub
// cache of this machine has of the same commit are read from there (the layout is
// huggingface_hub's, see HubCacheStore). The token ($HF_TOKEN, else the file $HF_TOKEN_PATH or
// $HF_HOME/token) goes to the hub alone, not to the hosts that it sends to for large files. Errors:
// NotFound (no such model, revision or file), Unauthenticated and PermissionDenied (a gated or
// private model), Unavailable after retries. Read-only. Thread-safe.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "absl/container/flat_hash_set.h"
#include "store/file_store.h"
#include "store/http.h"
#include "store/hub_json.h"
#include "store/object_store.h"
#include "store/retry.h"
#include "store/secret.h"

namespace pewter {

struct HubOptions {
  std::string endpoint;  // "https://huggingface.co"
  Secret token;
  RetryPolicy retry;
  HttpOptions http;
};

// hf://MODEL@REVISION: from the hub at $HF_ENDPOINT, or, when that is not set or HF_HUB_OFFLINE is,
// from the cache of this machine.
absl::StatusOr<std::shared_ptr<ObjectStore>> OpenHub(absl::string_view model,
                                                     absl::string_view revision);

class HubStore final : public ReadOnlyStore {
 public:
  // `model` is "org/name" or "name"; an empty `revision` means main.
  static absl::StatusOr<std::shared_ptr<ObjectStore>> Open(HubOptions options,
                                                           absl::string_view model,
                                                           absl::string_view revision);

  absl::StatusOr<ObjectStat> Stat(absl::string_view key) override;
  absl::Status ReadInto(absl::string_view key, int64_t offset, absl::Span<std::byte> out) override;
  std::shared_ptr<void> WillRead(absl::string_view key, int64_t offset, int64_t bytes) override;
  absl::StatusOr<std::vector<ObjectEntry>> List(absl::string_view prefix) override;
  bool distant() const override { return true; }
  // "hf://org/model@COMMIT/config.json"
  std::string Describe(absl::string_view key) const override;

 private:
  explicit HubStore(HubOptions options);
  absl::Status Load(absl::string_view model, absl::string_view revision);
  // GET, with retries and redirects; `into` empty: a body of text.
  absl::Status Get(const std::string& url, int64_t offset, absl::Span<std::byte> into,
                   HttpResponse& response);
  absl::StatusOr<HubFile> Find(absl::string_view key) const;
  absl::Status ReadRange(const std::string& key, int64_t offset, absl::Span<std::byte> out);
  absl::Status ReadOnly() const override;

  const HubOptions options_;
  HttpClient http_;
  RetryBudget budget_;
  std::string model_;
  std::string name_;  // "hf://org/model@COMMIT"
  std::string commit_;
  std::map<std::string, HubFile, std::less<>> files_;
  std::unique_ptr<FileStore> cache_;         // of the same commit
  absl::flat_hash_set<std::string> cached_;  // keys that it has whole
};

}  // namespace pewter
