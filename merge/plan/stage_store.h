// StageStore: the model that a plan will make, as a read-only store.
//
// Headers, index, config and small files are there from the beginning, so that what depends on the
// model can be planned; bytes of tensors are those of the folder that the model has been merged
// into, and an error before Bind. Tensors that the plan copies can be read before, too: planning
// compares those that are not floating. Everything is identified by the plan's fingerprint, so
// that plans built on it do not depend on when and where the model was merged. Thread-safe.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "merge/plan/plan.h"
#include "store/object_store.h"

namespace pewter {

class StageStore final : public ObjectStore {
 public:
  StageStore(std::string name, std::shared_ptr<const Plan> plan);

  // `folder` holds the merged model from now on. FailedPrecondition when one is bound already, or
  // when a file has not the planned size.
  absl::Status Bind(std::shared_ptr<ObjectStore> folder);
  void Unbind();

  // FailedPrecondition when a shard of the bound folder has changed since Bind.
  absl::StatusOr<ObjectStat> Stat(absl::string_view key) override;
  absl::Status ReadInto(absl::string_view key, int64_t offset, absl::Span<std::byte> out) override;
  std::shared_ptr<void> WillRead(absl::string_view key, int64_t offset, int64_t bytes) override;
  absl::StatusOr<std::vector<ObjectEntry>> List(absl::string_view prefix) override;
  absl::Status Remove(absl::string_view key) override;
  absl::StatusOr<std::unique_ptr<ObjectWriter>> Create(absl::string_view key) override;
  absl::StatusOr<std::unique_ptr<ObjectWriter>> CreateNew(absl::string_view key) override;
  std::string Describe(absl::string_view key) const override;

 private:
  // A file of the plan: a shard, text, or a copy of a model's file.
  struct File {
    int shard = -1;
    const std::string* text = nullptr;
    int model = -1;
  };

  absl::StatusOr<File> Find(absl::string_view key) const;
  absl::Status NotMerged() const;
  std::shared_ptr<ObjectStore> folder() const;
  absl::Status ReadCopied(const PlanShard& shard, int64_t offset, absl::Span<std::byte> out) const;

  const std::string name_;
  const std::shared_ptr<const Plan> plan_;
  mutable std::mutex mutex_;
  std::shared_ptr<ObjectStore> folder_;  // guarded by mutex_
  std::vector<ObjectStat> bound_;        // guarded by mutex_; of the shards, at Bind
};

}  // namespace pewter
