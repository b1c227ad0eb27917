// ShardIndex: model.safetensors.index.json, which says in which file of a folder a tensor lies.
//
//   {"metadata": {...}, "weight_map": {TENSOR: FILE, ...}}
#pragma once

#include <map>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pewter {

struct ShardIndex {
  std::map<std::string, std::string> file_of;  // by tensor
};

// DataLoss for malformed JSON, duplicate keys, and file names that lead out of the folder.
absl::StatusOr<ShardIndex> ParseShardIndex(absl::string_view json);

}  // namespace pewter
