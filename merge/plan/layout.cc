#include "merge/plan/layout.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "base/status.h"
#include "base/units.h"
#include "merge/checkpoint/safetensors.h"

namespace pewter {
namespace {

// Where the first operand of a tensor is stored: (file, offset). What is made and not read comes
// first.
std::pair<int, int64_t> StoredAt(const Plan& plan, const PlanTensor& tensor) {
  const PlanInput& first = tensor.base ? *tensor.base : tensor.inputs.front();
  if (first.tensor.empty()) return {-1, 0};
  const PlanModel& model = plan.models[first.model];
  return {model.file_base + model.checkpoint->FileOf(first.tensor),
          model.checkpoint->Find(first.tensor)->offset};
}

void SortAsStored(Plan& plan) {
  using Key = std::tuple<int, int64_t, std::string, size_t>;
  std::vector<Key> keys;
  keys.reserve(plan.tensors.size());
  for (size_t i = 0; i < plan.tensors.size(); ++i) {
    const auto [file, offset] = StoredAt(plan, plan.tensors[i]);
    keys.emplace_back(file, offset, plan.tensors[i].name, i);
  }
  std::sort(keys.begin(), keys.end());
  std::vector<PlanTensor> sorted;
  sorted.reserve(keys.size());
  for (const Key& key : keys) sorted.push_back(std::move(plan.tensors[std::get<3>(key)]));
  plan.tensors = std::move(sorted);
}

// Cuts the tensors, in their order, into shards.
absl::Status CutShards(int64_t shard_bytes, Plan& plan, int64_t& total) {
  int64_t in_shard = 0;
  for (size_t i = 0; i < plan.tensors.size(); ++i) {
    PlanTensor& tensor = plan.tensors[i];
    ASSIGN_OR_RETURN(tensor.bytes, CheckedMul(tensor.shape.elements(), ByteWidth(tensor.dtype)));
    ASSIGN_OR_RETURN(total, CheckedAdd(total, tensor.bytes));
    if (plan.shards.empty() || in_shard + tensor.bytes > shard_bytes) {
      plan.shards.emplace_back();
      in_shard = 0;
    }
    in_shard += tensor.bytes;
    tensor.shard = static_cast<int>(plan.shards.size()) - 1;
    plan.shards.back().tensors.push_back(static_cast<int>(i));
  }
  return absl::OkStatus();
}

// Makes the shard's header and places its tensors.
absl::Status LayOutShard(PlanShard& shard, Plan& plan) {
  std::vector<TensorInfo> infos;
  std::vector<size_t> first_part;  // of each tensor
  for (int index : shard.tensors) {
    const PlanTensor& tensor = plan.tensors[index];
    first_part.push_back(infos.size());
    if (tensor.parts.empty()) {
      infos.push_back({.name = tensor.name, .dtype = tensor.dtype, .shape = tensor.shape});
    }
    for (const PlanPart& part : tensor.parts) {
      infos.push_back({.name = part.name, .dtype = tensor.dtype, .shape = part.shape});
    }
  }
  ASSIGN_OR_RETURN(shard.header, LayOutSafetensors(infos, {{"format", "pt"}}));
  shard.bytes = static_cast<int64_t>(shard.header.size());
  for (size_t i = 0; i < shard.tensors.size(); ++i) {
    PlanTensor& tensor = plan.tensors[shard.tensors[i]];
    tensor.offset = infos[first_part[i]].offset;
    shard.bytes += tensor.bytes;
  }
  plan.write_bytes += shard.bytes;
  return absl::OkStatus();
}

}  // namespace

absl::Status LayOutAdapter(const std::string& file, Plan& plan) {
  int64_t total = 0;
  RETURN_IF_ERROR(CutShards(std::numeric_limits<int64_t>::max(), plan, total));
  plan.shards.front().file = file;
  return LayOutShard(plan.shards.front(), plan);
}

absl::Status LayOutShards(int64_t shard_bytes, Plan& plan) {
  SortAsStored(plan);
  int64_t total = 0;
  RETURN_IF_ERROR(CutShards(shard_bytes, plan, total));

  const int count = static_cast<int>(plan.shards.size());
  // Loaders that take every safetensors file of a folder go by the index where there is one, and
  // alignments and statistics lie beside the model.
  const bool indexed = count > 1 || !plan.alignments.empty();
  nlohmann::ordered_json weight_map = nlohmann::ordered_json::object();
  for (int s = 0; s < count; ++s) {
    PlanShard& shard = plan.shards[s];
    shard.file = count == 1 ? "model.safetensors"
                            : absl::StrFormat("model-%05d-of-%05d.safetensors", s + 1, count);
    RETURN_IF_ERROR(LayOutShard(shard, plan));
    if (!indexed) continue;
    for (int index : shard.tensors) {
      const PlanTensor& tensor = plan.tensors[index];
      if (tensor.parts.empty()) weight_map[tensor.name] = shard.file;
      for (const PlanPart& part : tensor.parts) weight_map[part.name] = shard.file;
    }
  }
  if (indexed) {
    const nlohmann::ordered_json index = {{"metadata", {{"total_size", total}}},
                                          {"weight_map", std::move(weight_map)}};
    plan.index_json =
        index.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
  }
  return absl::OkStatus();
}

}  // namespace pewter
