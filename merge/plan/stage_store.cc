#include "merge/plan/stage_store.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace pewter {
namespace {

constexpr char kConfig[] = "config.json";
constexpr char kIndex[] = "model.safetensors.index.json";

absl::Status CopyRange(absl::string_view text, int64_t offset, absl::Span<std::byte> out,
                       absl::string_view name) {
  if (offset < 0 || offset > static_cast<int64_t>(text.size()) ||
      out.size() > text.size() - static_cast<size_t>(offset)) {
    return absl::DataLossError(absl::StrCat(name, " ends before it was to"));
  }
  if (!out.empty()) std::memcpy(out.data(), text.data() + offset, out.size());
  return absl::OkStatus();
}

}  // namespace

StageStore::StageStore(std::string name, std::shared_ptr<const Plan> plan)
    : name_(std::move(name)), plan_(std::move(plan)) {}

absl::Status StageStore::Bind(std::shared_ptr<ObjectStore> folder) {
  std::vector<ObjectStat> bound;
  for (const PlanShard& shard : plan_->shards) {
    ASSIGN_OR_RETURN(ObjectStat stat, folder->Stat(shard.file));
    if (stat.size != shard.bytes) {
      return absl::FailedPreconditionError(
          absl::StrCat(folder->Describe(shard.file), " has not the size that was planned"));
    }
    bound.push_back(std::move(stat));
  }
  std::lock_guard lock(mutex_);
  if (folder_ != nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("stage ", name_, " is being used by another run of the same plan"));
  }
  folder_ = std::move(folder);
  bound_ = std::move(bound);
  return absl::OkStatus();
}

void StageStore::Unbind() {
  std::lock_guard lock(mutex_);
  folder_.reset();
  bound_.clear();
}

std::shared_ptr<ObjectStore> StageStore::folder() const {
  std::lock_guard lock(mutex_);
  return folder_;
}

absl::Status StageStore::NotMerged() const {
  return absl::FailedPreconditionError(absl::StrCat("stage ", name_, " is not merged yet"));
}

absl::StatusOr<StageStore::File> StageStore::Find(absl::string_view key) const {
  for (size_t i = 0; i < plan_->shards.size(); ++i) {
    if (plan_->shards[i].file == key) return File{.shard = static_cast<int>(i)};
  }
  if (key == kConfig && !plan_->config_json.empty()) return File{.text = &plan_->config_json};
  if (key == kIndex && !plan_->index_json.empty()) return File{.text = &plan_->index_json};
  for (const PlanFile& file : plan_->aux_files) {
    if (file.name != key) continue;
    if (file.model >= 0) return File{.model = file.model};
    return File{.text = &file.text};
  }
  return absl::NotFoundError(absl::StrCat(Describe(key), " does not exist"));
}

absl::StatusOr<ObjectStat> StageStore::Stat(absl::string_view key) {
  ASSIGN_OR_RETURN(const File file, Find(key));
  if (file.model >= 0) return plan_->models[file.model].checkpoint->store().Stat(key);
  ObjectStat stat{.etag = plan_->fingerprint};
  if (file.text != nullptr) {
    stat.size = static_cast<int64_t>(file.text->size());
    return stat;
  }
  stat.size = plan_->shards[file.shard].bytes;
  std::lock_guard lock(mutex_);
  if (folder_ == nullptr) return stat;
  ASSIGN_OR_RETURN(const ObjectStat now, folder_->Stat(key));
  const ObjectStat& then = bound_[file.shard];
  if (now.size != then.size || now.mtime_ns != then.mtime_ns || now.etag != then.etag) {
    return absl::FailedPreconditionError(
        absl::StrCat(folder_->Describe(key), " changed since it was merged; run again"));
  }
  return stat;
}

absl::Status StageStore::ReadInto(absl::string_view key, int64_t offset,
                                  absl::Span<std::byte> out) {
  ASSIGN_OR_RETURN(const File file, Find(key));
  if (file.model >= 0) {
    return plan_->models[file.model].checkpoint->store().ReadInto(key, offset, out);
  }
  if (file.text != nullptr) return CopyRange(*file.text, offset, out, Describe(key));
  const PlanShard& shard = plan_->shards[file.shard];
  const auto header = static_cast<int64_t>(shard.header.size());
  if (offset < header) {
    const size_t count = std::min(out.size(), static_cast<size_t>(header - offset));
    RETURN_IF_ERROR(CopyRange(shard.header, offset, out.subspan(0, count), Describe(key)));
    offset += static_cast<int64_t>(count);
    out.remove_prefix(count);
  }
  if (out.empty()) return absl::OkStatus();
  if (const std::shared_ptr<ObjectStore> merged = folder()) {
    return merged->ReadInto(key, offset, out);
  }
  return ReadCopied(shard, offset, out);
}

std::shared_ptr<void> StageStore::WillRead(absl::string_view key, int64_t offset, int64_t bytes) {
  const std::shared_ptr<ObjectStore> merged = folder();
  return merged == nullptr ? nullptr : merged->WillRead(key, offset, bytes);
}

absl::Status StageStore::ReadCopied(const PlanShard& shard, int64_t offset,
                                    absl::Span<std::byte> out) const {
  for (int index : shard.tensors) {
    const PlanTensor& tensor = plan_->tensors[index];
    if (offset < tensor.offset || offset >= tensor.offset + tensor.bytes) continue;
    const TensorSource& source = *tensor.inputs[0].source;
    const int64_t width = ByteWidth(tensor.dtype);
    const auto count = static_cast<int64_t>(out.size());
    const int64_t first = offset - tensor.offset;
    if (tensor.method != nullptr || tensor.task != nullptr || source.dtype() != tensor.dtype ||
        first + count > tensor.bytes || first % width != 0 || count % width != 0) {
      return NotMerged();
    }
    return source.Read(first / width, count / width, out, /*observer=*/nullptr);
  }
  return NotMerged();
}

absl::StatusOr<std::vector<ObjectEntry>> StageStore::List(absl::string_view prefix) {
  std::vector<std::string> keys;
  for (const PlanShard& shard : plan_->shards) keys.push_back(shard.file);
  if (!plan_->config_json.empty()) keys.push_back(kConfig);
  if (!plan_->index_json.empty()) keys.push_back(kIndex);
  for (const PlanFile& file : plan_->aux_files) keys.push_back(file.name);
  std::sort(keys.begin(), keys.end());
  std::vector<ObjectEntry> entries;
  for (std::string& key : keys) {
    if (!absl::StartsWith(key, prefix)) continue;
    ASSIGN_OR_RETURN(ObjectStat stat, Stat(key));
    entries.push_back({.key = std::move(key), .stat = std::move(stat)});
  }
  return entries;
}

absl::Status StageStore::Remove(absl::string_view key) {
  return absl::UnimplementedError(absl::StrCat(Describe(key), " is read-only"));
}

absl::StatusOr<std::unique_ptr<ObjectWriter>> StageStore::Create(absl::string_view key) {
  return absl::UnimplementedError(absl::StrCat(Describe(key), " is read-only"));
}

absl::StatusOr<std::unique_ptr<ObjectWriter>> StageStore::CreateNew(absl::string_view key) {
  return Create(key);
}

std::string StageStore::Describe(absl::string_view key) const {
  const std::shared_ptr<ObjectStore> merged = folder();
  return merged != nullptr ? merged->Describe(key) : absl::StrCat("stage ", name_, ": ", key);
}

}  // namespace pewter
