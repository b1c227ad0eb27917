// The output's files: order of tensors, shards, headers, index. A function of the tensors and
// `shard_bytes` alone.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "merge/plan/plan.h"

namespace pewter {

// One shard of the given name with plan.tensors in their order: an adapter's file.
absl::Status LayOutAdapter(const std::string& file, Plan& plan);

// Orders plan.tensors as the first operand of each is stored, so that inputs are read
// sequentially, cuts them into shards of at most `shard_bytes` data bytes (a larger tensor has its
// own) and fills in shards, index_json and write_bytes.
absl::Status LayOutShards(int64_t shard_bytes, Plan& plan);

}  // namespace pewter
