#include "store/housekeeping.h"

#include "store/file_store.h"
#include "store/s3_store.h"

namespace pewter {

std::optional<int64_t> FreeBytes(const ObjectStore& store) {
  const auto* files = dynamic_cast<const FileStore*>(&store);
  return files == nullptr ? std::nullopt : files->FreeBytes();
}

absl::StatusOr<int64_t> RemoveUnfinished(ObjectStore& store, absl::Time before) {
  if (auto* files = dynamic_cast<FileStore*>(&store)) return files->RemoveTemporaries(before);
  if (auto* s3 = dynamic_cast<S3Store*>(&store)) return s3->AbortUploads(before);
  return 0;
}

}  // namespace pewter
