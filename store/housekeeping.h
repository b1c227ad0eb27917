// What keeps the places of models in order, beside what a merge needs of them: how much room there
// is, and what interrupted writers have left.
#pragma once

#include <cstdint>
#include <optional>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "store/object_store.h"

namespace pewter {

// Bytes that can still be written; nothing where nobody says, as of S3.
std::optional<int64_t> FreeBytes(const ObjectStore& store);

// Removes what writers that never committed have left below the root and that was begun before
// `before`: temporary files that no living writer holds, multipart uploads. No object is touched.
// Other stores have nothing of the kind. The number removed.
absl::StatusOr<int64_t> RemoveUnfinished(ObjectStore& store, absl::Time before);

}  // namespace pewter
