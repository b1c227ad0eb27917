// What an S3 store does of what Pewter asks of it, found out by trying: some small objects below
// the given place, which are removed again.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "store/s3_store.h"

namespace pewter {

struct StoreFinding {
  std::string feature;  // "conditional create"
  bool supported = false;
  bool needed = false;  // without it models cannot be read, or not be published safely
  std::string detail;   // what the store did, and what follows from it; may be empty
};

// An error when the store cannot be reached, written or read at all; then nothing else is known.
absl::StatusOr<std::vector<StoreFinding>> CheckS3Store(S3Client& client,
                                                       const S3Store::Place& place);

}  // namespace pewter
