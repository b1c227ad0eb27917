#include "merge/checkpoint/architecture.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status.h"
#include "merge/checkpoint/architecture_data.h"
#include "merge/checkpoint/families.h"
#include "merge/checkpoint/inference.h"

namespace pewter {
namespace {

using nlohmann::json;

// One module whose tensors are the names that `naming` asks for.
absl::StatusOr<ArchitecturePtr> RawArchitecture(Models models, const RawNaming& naming) {
  std::set<std::string> all;
  for (const auto& model : models) {
    if (model.get() == naming.base) continue;
    all.insert(model->tensor_names().begin(), model->tensor_names().end());
  }
  std::set<std::string> partial;  // names that a model lacks
  std::vector<std::string> missing;
  for (const auto& model : models) {
    std::vector<std::string> names;
    for (const std::string& name : all) {
      if (model->Find(name) == nullptr) names.push_back(name);
    }
    if (names.empty()) continue;
    partial.insert(names.begin(), names.end());
    const size_t count = names.size();
    constexpr size_t kShown = 5;
    if (count > kShown) names.resize(kShown);
    missing.push_back(absl::StrCat(
        model->ref().ToString(), " lacks ", absl::StrJoin(names, ", "),
        count > kShown ? absl::StrCat(" and ", count - kShown, " more") : std::string()));
  }
  if (!missing.empty() && naming.names == RawNames::kSame) {
    return absl::FailedPreconditionError(
        absl::StrCat("raw checkpoints are merged name by name, and their names differ: ",
                     absl::StrJoin(missing, "; "),
                     ". --tensor-intersection merges the names that all have, --tensor-union all"));
  }
  auto module = std::make_unique<ModuleData>();
  for (const std::string& name : all) {
    const bool optional = partial.contains(name);
    if (optional && naming.names == RawNames::kIntersection) continue;
    module->pre_.push_back({.name = name, .optional = optional});
  }
  auto architecture = std::make_shared<ArchitectureData>();
  architecture->name_ = "raw";
  architecture->modules_.push_back(std::move(module));
  return architecture;
}

absl::StatusOr<std::string> ArchitectureName(const Checkpoint& model, const json& config) {
  if (!model.ref().override_architecture.empty()) return model.ref().override_architecture;
  const auto names = config.find("architectures");
  if (names == config.end() || names->is_null()) return std::string();
  if (!names->is_array() || names->size() != 1 || !(*names)[0].is_string()) {
    return absl::FailedPreconditionError(
        absl::StrCat("model ", model.ref().ToString(),
                     ": \"architectures\" in config.json must be a list of one name"));
  }
  return (*names)[0].get<std::string>();
}

}  // namespace

std::string StoredName(const Checkpoint& model, const ArchTensor& tensor, bool with_tied) {
  if (model.Find(tensor.name) != nullptr) return tensor.name;
  for (const std::string& alias : tensor.aliases) {
    if (model.Find(alias) != nullptr) return alias;
  }
  if (with_tied) {
    for (const std::string& tied : tensor.tied_names) {
      if (model.Find(tied) != nullptr) return tied;
    }
  }
  return "";
}

absl::StatusOr<std::shared_ptr<const Architecture>> ResolveArchitecture(Models inputs,
                                                                        bool allow_mixed,
                                                                        const RawNaming& raw) {
  if (inputs.empty()) return absl::InvalidArgumentError("no models");
  for (const auto& model : inputs) {
    if (model->raw() != inputs[0]->raw()) {
      return absl::FailedPreconditionError(absl::StrCat(
          "model ", inputs[0]->ref().ToString(), inputs[0]->raw() ? " has no" : " has a",
          " config.json and model ", model->ref().ToString(), model->raw() ? " has none" : " has",
          "; raw checkpoints merge with raw checkpoints only"));
    }
  }
  if (inputs[0]->raw()) return RawArchitecture(inputs, raw);

  std::vector<json> configs;
  std::vector<std::string> names;
  std::vector<const KnownArchitecture*> known;
  for (const auto& model : inputs) {
    ASSIGN_OR_RETURN(json config, ParseConfig(*model));
    ASSIGN_OR_RETURN(std::string name, ArchitectureName(*model, config));
    const auto type = config.find("model_type");
    known.push_back(
        FindKnown(name, type != config.end() && type->is_string() ? type->get<std::string>() : ""));
    configs.push_back(std::move(config));
    names.push_back(name.empty() ? "no architecture" : std::move(name));
  }
  for (size_t i = 1; i < inputs.size() && !allow_mixed; ++i) {
    const bool same = known[0] != nullptr && known[i] != nullptr
                          ? SameTensors(*known[0], *known[i])
                          : known[0] == known[i] && names[0] == names[i];
    if (!same) {
      return absl::FailedPreconditionError(
          absl::StrCat("architectures differ: model ", inputs[0]->ref().ToString(), " has ",
                       names[0], ", model ", inputs[i]->ref().ToString(), " has ", names[i],
                       "; --allow-crimes merges them as if they were ", names[0]));
    }
  }
  if (std::find(known.begin(), known.end(), nullptr) != known.end()) {
    return InferArchitecture(inputs, configs);
  }
  return MakeKnown(*known[0], inputs);
}

std::shared_ptr<const Architecture> NameByName(const Architecture& family,
                                               const Checkpoint& model) {
  auto module = std::make_unique<ModuleData>();
  for (const std::string& name : model.tensor_names()) module->pre_.push_back({.name = name});
  auto architecture = std::make_shared<ArchitectureData>();
  architecture->name_ = family.name();
  architecture->tagalong_files_ = family.tagalong_files();
  architecture->modules_.push_back(std::move(module));
  return architecture;
}

absl::StatusOr<std::shared_ptr<const Architecture>> WithAllTensors(
    std::shared_ptr<const Architecture> family, Models models) {
  std::map<std::string, size_t> unknown;  // name -> models that have it
  for (const auto& model : models) {
    std::set<std::string> known;
    const auto add = [&](const ArchTensor& tensor) {
      known.insert(StoredName(*model, tensor, /*with_tied=*/false));
    };
    for (const auto& module : family->modules()) {
      ASSIGN_OR_RETURN(const int64_t layers, module->LayerCount(*model));
      for (const ArchTensor& tensor : module->pre()) add(tensor);
      for (int64_t layer = 0; layer < layers; ++layer) {
        for (const ArchTensor& tensor : module->LayerTensors(layer)) add(tensor);
      }
      for (const ArchTensor& tensor : module->post()) add(tensor);
    }
    for (const std::string& name : model->tensor_names()) {
      if (!known.contains(name)) ++unknown[name];
    }
  }
  if (unknown.empty()) return family;
  auto architecture = std::make_shared<ArchitectureData>();
  architecture->name_ = family->name();
  architecture->tagalong_files_ = family->tagalong_files();
  for (const auto& module : family->modules()) {
    architecture->modules_.push_back(
        std::make_unique<ModuleData>(static_cast<const ModuleData&>(*module)));
  }
  auto& last = static_cast<ModuleData&>(*architecture->modules_.back());
  for (const auto& [name, count] : unknown) {
    last.post_.push_back({.name = name, .optional = count < models.size()});
  }
  return architecture;
}

}  // namespace pewter
