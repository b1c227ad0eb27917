// What families and inference make: plain data behind the interfaces of architecture.h.
#pragma once

#include <cstdint>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "merge/checkpoint/architecture.h"

namespace pewter {

using Models = absl::Span<const std::shared_ptr<const Checkpoint>>;

// Stands for the layer's number in names of layer tensors.
inline constexpr absl::string_view kLayer = "{layer}";
inline constexpr int64_t kMaxLayers = 100'000;

class ModuleData final : public ArchModule {
 public:
  const std::string& name() const override { return name_; }
  const std::vector<ArchTensor>& pre() const override { return pre_; }
  const std::vector<ArchTensor>& post() const override { return post_; }
  std::vector<ArchTensor> LayerTensors(int64_t layer) const override;
  absl::StatusOr<int64_t> LayerCount(const Checkpoint& model) const override;
  const std::vector<std::string>& layer_count_keys() const override { return layer_count_keys_; }
  std::vector<std::string> per_layer_keys() const override { return per_layer_keys_; }

  std::string name_ = "default";
  std::vector<ArchTensor> pre_;
  std::vector<ArchTensor> layer_;  // names with {layer}
  std::vector<ArchTensor> post_;
  std::vector<std::string> layer_count_keys_;
  std::vector<std::string> per_layer_keys_;
  std::string count_prefix_;  // not empty: layers are counted from tensor names
};

class ArchitectureData final : public Architecture {
 public:
  const std::string& name() const override { return name_; }
  const std::vector<std::unique_ptr<ArchModule>>& modules() const override { return modules_; }
  const std::vector<std::string>& tagalong_files() const override { return tagalong_files_; }

  std::string name_;
  std::vector<std::unique_ptr<ArchModule>> modules_;
  std::vector<std::string> tagalong_files_;
};

using ArchitecturePtr = std::shared_ptr<const ArchitectureData>;

// A model's config.json; DataLoss when it is not an object.
absl::StatusOr<nlohmann::json> ParseConfig(const Checkpoint& model);

// "x.{a,b}.{layer}" -> x.a.{layer}, x.b.{layer}. Braced words without a comma stay.
std::vector<std::string> ExpandLists(absl::string_view text);

// One more than the greatest number that stands behind `before` and in front of `after` in a name
// (0: there is none). Names that begin with `before` count, and with `anywhere` those that contain
// it.
int64_t CountNumbers(absl::Span<const std::string> names, absl::string_view before, bool anywhere);

}  // namespace pewter
