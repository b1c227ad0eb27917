// FileStore: objects are the files below one folder.
//
// Reads use pread on a bounded cache of open descriptors, so concurrent reads of any number of
// files neither lock each other out nor run out of descriptors. A cached descriptor keeps reading
// the file that it opened, even when another process replaces that file.
//
// A writer fills ".NAME.PID-N.pewter-tmp" beside the object and renames it at Commit, after fsync.
// The writer holds a lock on that file; what a killed process leaves behind is recognised by the
// missing lock and removed by the next writer of the same key, or RemoveTemporaries. Full disk or
// quota: ResourceExhausted; EACCES, EPERM, EROFS: PermissionDenied.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "absl/time/time.h"
#include "store/object_store.h"

namespace pewter {

class FileStore final : public ObjectStore {
 public:
  // The folder need not exist yet; Create makes it.
  explicit FileStore(std::string root);
  ~FileStore() override;

  absl::StatusOr<ObjectStat> Stat(absl::string_view key) override;
  absl::Status ReadInto(absl::string_view key, int64_t offset, absl::Span<std::byte> out) override;
  // Follows links to files, not links to folders.
  absl::StatusOr<std::vector<ObjectEntry>> List(absl::string_view prefix) override;
  absl::Status Remove(absl::string_view key) override;
  absl::StatusOr<std::unique_ptr<ObjectWriter>> Create(absl::string_view key) override;
  absl::StatusOr<std::unique_ptr<ObjectWriter>> CreateNew(absl::string_view key) override;
  std::string Describe(absl::string_view key) const override;

  // Of the disk that the root is on, or will be.
  std::optional<int64_t> FreeBytes() const;
  // Those below the root that nobody has written to since `before` and no living writer holds.
  // Their number.
  absl::StatusOr<int64_t> RemoveTemporaries(absl::Time before);

 private:
  class DescriptorCache;
  class Writer;

  const std::string root_;
  const std::shared_ptr<DescriptorCache> descriptors_;  // writers may outlive the store
};

}  // namespace pewter
