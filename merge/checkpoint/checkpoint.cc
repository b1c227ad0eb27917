#include "merge/checkpoint/checkpoint.h"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "base/status.h"
#include "merge/checkpoint/lora_adapter.h"
#include "merge/checkpoint/lora_file.h"
#include "merge/checkpoint/printable.h"
#include "merge/checkpoint/shard_index.h"
#include "merge/checkpoint/stored_source.h"
#include "store/artifact_store.h"
#include "store/hub_cache_store.h"
#include "store/hub_store.h"

namespace pewter {
namespace {

namespace fs = std::filesystem;

constexpr absl::string_view kConfig = "config.json";
constexpr absl::string_view kIndexEnding = ".index.json";
// Names of a whole model's weights, the ones that are looked for first at the front. Each may be an
// index of shards instead.
constexpr absl::string_view kWeights[] = {"model.safetensors", "pytorch_model.bin"};
constexpr int64_t kMaxConfigBytes = int64_t{16} << 20;
constexpr int64_t kMaxIndexBytes = 100'000'000;

// Where a model or an adapter lies.
struct Location {
  std::shared_ptr<ObjectStore> store;
  std::string file;  // of a bare file of tensors; else empty: a folder
};

absl::StatusOr<Location> LocateFile(const std::string& path) {
  std::error_code error;
  if (fs::is_directory(path, error)) {
    ASSIGN_OR_RETURN(std::shared_ptr<ObjectStore> store, OpenStore(path));
    return Location{.store = std::move(store)};
  }
  if (!fs::exists(path, error)) {
    // is_directory and exists also say no when a folder on the way may not be searched.
    if (error) {
      return absl::PermissionDeniedError(absl::StrCat("cannot open ", path, ": ", error.message()));
    }
    return absl::NotFoundError(absl::StrCat(path, " does not exist"));
  }
  if (!IsTensorFile(path)) {
    return absl::FailedPreconditionError(
        absl::StrCat(path, " is neither a folder nor a .safetensors, .bin, .pt or .pth file"));
  }
  const fs::path file(path);
  const std::string folder = file.parent_path().string();
  ASSIGN_OR_RETURN(std::shared_ptr<ObjectStore> store, OpenStore(folder.empty() ? "." : folder));
  return Location{.store = std::move(store), .file = file.filename().string()};
}

// s3:// and artifact:// have no folders: what ends like a file of tensors is one, but for the first
// part, which is a bucket's or an artifact's name.
absl::StatusOr<Location> LocateObject(const std::string& uri) {
  const size_t name_at = uri.rfind('/') + 1;
  const bool is_file = IsTensorFile(uri) && uri.find('/', uri.find("://") + 3) != std::string::npos;
  ASSIGN_OR_RETURN(std::shared_ptr<ObjectStore> store,
                   OpenStore(is_file ? uri.substr(0, name_at) : uri));
  return Location{.store = std::move(store), .file = is_file ? uri.substr(name_at) : ""};
}

// An existing local path, file://, s3://, artifact://, hf://, or a hub id.
absl::StatusOr<Location> Locate(const std::string& path, const std::string& revision) {
  if (path.empty()) return absl::InvalidArgumentError("empty model path");
  absl::string_view hub_id = path;
  if (absl::ConsumePrefix(&hub_id, "hf://")) {
    const size_t at = hub_id.find('@');
    if (at != absl::string_view::npos && !revision.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, " has a revision; a second one (", revision, ") cannot be given"));
    }
    ASSIGN_OR_RETURN(std::shared_ptr<ObjectStore> store,
                     OpenHub(hub_id.substr(0, at),
                             at == absl::string_view::npos ? revision : hub_id.substr(at + 1)));
    return Location{.store = std::move(store)};
  }
  if (absl::StartsWith(path, "s3://") || absl::StartsWith(path, kArtifactScheme)) {
    if (revision.empty()) return LocateObject(path);
    return absl::InvalidArgumentError(
        absl::StrCat(path, " has no revisions (", revision, " was asked for)"));
  }
  absl::string_view local = path;
  const bool is_file_uri = absl::ConsumePrefix(&local, "file://");
  if (!is_file_uri && absl::StrContains(path, "://")) return OpenStore(path).status();
  if (is_file_uri && !absl::StartsWith(local, "/")) return OpenStore(path).status();
  absl::StatusOr<Location> found = LocateFile(std::string(local));
  if (found.ok() && !revision.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        local, " is a local path, which has no revision (", revision, " was asked for)"));
  }
  if (!absl::IsNotFound(found.status()) || is_file_uri || !HubCacheStore::IsModelId(path)) {
    return found;
  }
  absl::StatusOr<std::shared_ptr<ObjectStore>> snapshot = OpenHub(path, revision);
  if (absl::IsNotFound(snapshot.status())) {
    return absl::NotFoundError(
        absl::StrCat("no local path ", path, ", and ", snapshot.status().message()));
  }
  RETURN_IF_ERROR(snapshot.status());
  return Location{.store = *std::move(snapshot)};
}

// False for NotFound alone: a file that is there and cannot be read is an error.
absl::StatusOr<bool> Exists(ObjectStore& store, absl::string_view key) {
  const absl::Status stat = store.Stat(key).status();
  if (absl::IsNotFound(stat)) return false;
  RETURN_IF_ERROR(stat);
  return true;
}

// Why a folder has no weights that can be read.
absl::Status NoWeights(ObjectStore& store, const std::vector<ObjectEntry>& entries,
                       bool has_config) {
  const std::string folder = store.Describe("");
  const std::string wanted = absl::StrCat(absl::StrJoin(kWeights, " nor "));
  for (const ObjectEntry& entry : entries) {
    if (!IsTensorFile(entry.key)) continue;
    return absl::FailedPreconditionError(absl::StrCat(
        folder, " has neither ", wanted, ", but ", Printable(entry.key),
        store.Stat("adapter_config.json").ok() ? ": it is an adapter; write it as BASE+ADAPTER"
        : has_config                           ? ": the index of its shards is missing"
                                               : ": name the file itself to merge it"));
  }
  if (!has_config) {
    return absl::NotFoundError(
        absl::StrCat(folder,
                     " is not a checkpoint: it has no config.json, no .safetensors files "
                     "and no pytorch_model.bin"));
  }
  return absl::FailedPreconditionError(
      absl::StrCat(folder, " has no weights: neither ", wanted, " nor an index of shards"));
}

class OpenedCheckpoint final : public Checkpoint {
 public:
  explicit OpenedCheckpoint(ModelRef ref) : ref_(std::move(ref)), name_(ref_.ToString()) {}

  // `store` is null when the reference says where the model is.
  absl::Status Open(std::shared_ptr<ObjectStore> store) {
    Location location{.store = std::move(store)};
    if (location.store == nullptr) {
      ASSIGN_OR_RETURN(location, Locate(ref_.path, ref_.revision));
    }
    store_ = std::move(location.store);
    if (location.file.empty()) {
      RETURN_IF_ERROR(OpenFolder());
    } else {
      RETURN_IF_ERROR(AddFile(location.file));
    }
    RETURN_IF_ERROR(ListNames());
    if (ref_.adapter.empty()) return absl::OkStatus();
    return Annotate(ApplyAdapter(), absl::StrCat("adapter ", ref_.adapter));
  }

  // The folder is an adapter and nothing else.
  absl::Status OpenAdapter() {
    ASSIGN_OR_RETURN(Location location, LocateAdapter(ref_.path, ref_.revision));
    store_ = std::move(location.store);
    ASSIGN_OR_RETURN(AdapterConfigFile config, ReadAdapterConfig(store_));
    config_json_ = std::move(config.text);
    files_.push_back(std::move(config.file));
    ASSIGN_OR_RETURN(TensorFile weights, ReadAdapterWeights(store_));
    RETURN_IF_ERROR(AddFile(std::move(weights)));
    return ListNames();
  }

  const ModelRef& ref() const override { return ref_; }
  ObjectStore& store() const override { return *store_; }
  bool raw() const override { return raw_; }
  const std::string& config_json() const override { return config_json_; }
  const std::vector<std::string>& warnings() const override { return warnings_; }
  const std::vector<InputFile>& files() const override { return files_; }
  const std::vector<std::string>& tensor_names() const override { return names_; }

  const TensorInfo* Find(absl::string_view tensor) const override {
    const auto found = tensors_.find(tensor);
    return found == tensors_.end() ? nullptr : &found->second.info;
  }

  int FileOf(absl::string_view tensor) const override {
    const auto found = tensors_.find(tensor);
    return found == tensors_.end() ? -1 : found->second.file;
  }

  absl::StatusOr<std::shared_ptr<const TensorSource>> OpenTensor(absl::string_view tensor,
                                                                 int file_base) const override {
    const auto found = tensors_.find(tensor);
    if (found == tensors_.end()) {
      return absl::NotFoundError(
          absl::StrCat("model ", name_, " has no tensor ", Printable(tensor)));
    }
    const StoredTensor& stored = found->second;
    const InputFile& file = files_[stored.file];
    std::shared_ptr<const TensorSource> source = std::make_shared<StoredSource>(
        file.store, file.key, stored.info, absl::StrCat("model ", name_, ", tensor ", tensor),
        file_base + stored.file);
    if (!Adapted(tensor)) return source;
    const int adapter_file = static_cast<int>(files_.size()) - 1;
    return adapter_->Apply(tensor, std::move(source), file_base + adapter_file);
  }

  bool Adapted(absl::string_view tensor) const override {
    return adapter_ != nullptr && adapter_->Changes(tensor);
  }

 private:
  struct StoredTensor {
    int file = 0;  // index into files_
    TensorInfo info;
  };

  absl::Status OpenFolder() {
    ASSIGN_OR_RETURN(const bool has_config, Exists(*store_, kConfig));
    raw_ = !has_config;
    if (has_config) {
      ASSIGN_OR_RETURN(config_json_, ReadText(*store_, kConfig, kMaxConfigBytes));
    }
    for (absl::string_view weights : kWeights) {
      const std::string index = absl::StrCat(weights, kIndexEnding);
      ASSIGN_OR_RETURN(const bool has_index, Exists(*store_, index));
      if (has_index) return OpenIndexed(index);
      // A folder of safetensors without config.json is all of them.
      if (!has_config && weights == kWeights[0]) {
        RETURN_IF_ERROR(AddSafetensors());
        if (!files_.empty()) return absl::OkStatus();
        continue;
      }
      ASSIGN_OR_RETURN(const bool has_weights, Exists(*store_, weights));
      if (has_weights) return AddFile(std::string(weights));
    }
    ASSIGN_OR_RETURN(const std::vector<ObjectEntry> entries, store_->List(""));
    return NoWeights(*store_, entries, has_config);
  }

  absl::Status AddSafetensors() {
    ASSIGN_OR_RETURN(const std::vector<ObjectEntry> entries, store_->List(""));
    for (const ObjectEntry& entry : entries) {
      if (!absl::EndsWith(entry.key, ".safetensors") || absl::StrContains(entry.key, '/')) continue;
      RETURN_IF_ERROR(AddFile(entry.key));
    }
    return absl::OkStatus();
  }

  absl::Status OpenIndexed(const std::string& index_key) {
    const std::string index_file = store_->Describe(index_key);
    ASSIGN_OR_RETURN(const std::string text, ReadText(*store_, index_key, kMaxIndexBytes));
    const absl::StatusOr<ShardIndex> index = ParseShardIndex(text);
    if (!index.ok()) return Annotate(index.status(), index_file);
    std::map<std::string, int> shards;  // file -> index into files_
    for (const auto& [tensor, file] : index->file_of) shards.emplace(file, 0);
    for (auto& [file, number] : shards) {
      number = static_cast<int>(files_.size());
      const absl::Status added = AddFile(file);
      if (absl::IsNotFound(added)) {
        return absl::FailedPreconditionError(
            absl::StrCat(index_file, " names a shard that is missing: ", added.message()));
      }
      RETURN_IF_ERROR(added);
    }
    for (const auto& [tensor, file] : index->file_of) {
      const auto found = tensors_.find(tensor);
      if (found == tensors_.end() || found->second.file != shards[file]) {
        return absl::FailedPreconditionError(absl::StrCat(
            index_file, ": tensor ", Printable(tensor), " is not in ", file,
            found == tensors_.end() ? ""
                                    : absl::StrCat(" but in ", files_[found->second.file].key)));
      }
    }
    // Every indexed tensor was found, so a surplus is in the shards alone.
    if (tensors_.size() == index->file_of.size()) return absl::OkStatus();
    for (const auto& [tensor, stored] : tensors_) {
      if (!index->file_of.contains(tensor)) {
        return absl::FailedPreconditionError(absl::StrCat(files_[stored.file].Describe(),
                                                          ": tensor ", Printable(tensor),
                                                          " is not in the index ", index_key));
      }
    }
    return absl::OkStatus();
  }

  absl::Status ListNames() {
    for (const auto& [tensor, stored] : tensors_) names_.push_back(tensor);
    if (names_.empty()) return absl::FailedPreconditionError("there are no tensors in it");
    std::sort(names_.begin(), names_.end());
    return absl::OkStatus();
  }

  absl::Status AddFile(const std::string& key) {
    ASSIGN_OR_RETURN(TensorFile opened, ReadTensorFile(store_, key));
    return AddFile(std::move(opened));
  }

  absl::Status AddFile(TensorFile opened) {
    const int file = static_cast<int>(files_.size());
    files_.push_back(std::move(opened.file));
    warnings_.insert(warnings_.end(), opened.warnings.begin(), opened.warnings.end());
    tensors_.reserve(tensors_.size() + opened.tensors.size());
    for (TensorInfo& info : opened.tensors) {
      std::string tensor = info.name;
      const auto [entry, added] = tensors_.try_emplace(
          std::move(tensor), StoredTensor{.file = file, .info = std::move(info)});
      if (!added) {
        return absl::FailedPreconditionError(
            absl::StrCat("tensor ", Printable(entry->first), " is in two files: ",
                         files_[entry->second.file].Describe(), " and ", files_[file].Describe()));
      }
    }
    return absl::OkStatus();
  }

  static absl::StatusOr<Location> LocateAdapter(const std::string& path,
                                                const std::string& revision) {
    ASSIGN_OR_RETURN(Location location, Locate(path, revision));
    if (location.file.empty()) return location;
    return absl::FailedPreconditionError("an adapter is a folder with adapter_config.json");
  }

  absl::Status ApplyAdapter() {
    ASSIGN_OR_RETURN(Location location, LocateAdapter(ref_.adapter, ref_.adapter_revision));
    ASSIGN_OR_RETURN(adapter_,
                     LoraAdapter::Open(location.store, absl::StrCat("adapter ", ref_.adapter),
                                       [&](absl::string_view tensor) { return Find(tensor); }));
    files_.push_back(adapter_->config_file());
    files_.push_back(adapter_->file());
    warnings_.insert(warnings_.end(), adapter_->warnings().begin(), adapter_->warnings().end());
    return absl::OkStatus();
  }

  const ModelRef ref_;
  const std::string name_;
  std::shared_ptr<ObjectStore> store_;
  bool raw_ = true;
  std::string config_json_;
  std::vector<std::string> warnings_;
  std::vector<InputFile> files_;
  absl::flat_hash_map<std::string, StoredTensor> tensors_;
  std::vector<std::string> names_;
  std::shared_ptr<const LoraAdapter> adapter_;
};

}  // namespace

absl::StatusOr<std::shared_ptr<const Checkpoint>> Checkpoint::Open(const ModelRef& ref) {
  return Open(ref, nullptr);
}

absl::StatusOr<std::shared_ptr<const Checkpoint>> Checkpoint::Open(
    const ModelRef& ref, std::shared_ptr<ObjectStore> store) {
  auto checkpoint = std::make_shared<OpenedCheckpoint>(ref);
  const absl::Status opened = checkpoint->Open(std::move(store));
  if (!opened.ok()) return Annotate(opened, absl::StrCat("model ", ref.ToString()));
  return checkpoint;
}

absl::StatusOr<std::shared_ptr<const Checkpoint>> Checkpoint::OpenAdapter(const ModelRef& ref) {
  auto checkpoint = std::make_shared<OpenedCheckpoint>(ref);
  const absl::Status opened = checkpoint->OpenAdapter();
  if (!opened.ok()) return Annotate(opened, absl::StrCat("adapter ", ref.ToString()));
  return checkpoint;
}

}  // namespace pewter
