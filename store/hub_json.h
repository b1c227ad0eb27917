// What the Hugging Face hub's API answers, as far as it is used here. DataLoss for other texts.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pewter {

// Of /api/models/ORG/NAME/revision/REVISION: the commit, 40 hex digits.
absl::StatusOr<std::string> ParseHubCommit(absl::string_view json);

struct HubFile {
  std::string path;
  int64_t size = 0;
  std::string etag;  // what a cache names its blob: the SHA-256 of a large file, else git's hash
};
// Of /api/models/ORG/NAME/tree/COMMIT?recursive=true: the files of a page.
absl::StatusOr<std::vector<HubFile>> ParseHubTree(absl::string_view json);

// The URL of rel="next" in a Link header; empty when there is none.
std::string NextPage(absl::string_view link);

}  // namespace pewter
