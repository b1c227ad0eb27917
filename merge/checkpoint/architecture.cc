#include "merge/checkpoint/architecture.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/status.h"
#include "merge/checkpoint/architectures/table.h"
#include "merge/checkpoint/dotted_key.h"

namespace pewter {
namespace {

using nlohmann::json;

constexpr absl::string_view kLayer = "{layer}";
// Keys that hold the layer count in configurations of families that are not known.
constexpr absl::string_view kUsualLayerCountKeys[] = {"num_hidden_layers", "n_layer", "n_layers",
                                                      "num_layers"};
// Per-layer lists of configurations of families that are not known.
constexpr const char* kUsualPerLayerLists[] = {"layer_types"};

std::string FillLayer(absl::string_view name, int64_t layer) {
  return absl::StrReplaceAll(name, {{kLayer, absl::StrCat(layer)}});
}

absl::StatusOr<json> ParseConfig(const Checkpoint& model) {
  json config = json::parse(model.config_json(), nullptr, /*allow_exceptions=*/false);
  if (!config.is_object()) {
    return absl::DataLossError(
        absl::StrCat("model ", model.ref().ToString(), ": config.json is not a JSON object"));
  }
  return config;
}

class ModuleData final : public ArchModule {
 public:
  const std::string& name() const override { return name_; }
  const std::vector<ArchTensor>& pre() const override { return pre_; }
  const std::vector<ArchTensor>& post() const override { return post_; }

  std::vector<ArchTensor> LayerTensors(int64_t layer) const override {
    std::vector<ArchTensor> tensors = layer_;
    for (ArchTensor& tensor : tensors) {
      tensor.name = FillLayer(tensor.name, layer);
      for (std::string& alias : tensor.aliases) alias = FillLayer(alias, layer);
      for (std::string& tied : tensor.tied_names) tied = FillLayer(tied, layer);
    }
    return tensors;
  }

  absl::StatusOr<int64_t> LayerCount(const Checkpoint& model) const override {
    if (!count_prefix_.empty()) return CountLayers(model.tensor_names(), count_prefix_);
    if (layer_count_key_.empty()) return 0;
    ASSIGN_OR_RETURN(const json config, ParseConfig(model));
    const json* count = FindDotted(config, layer_count_key_);
    if (count == nullptr || !count->is_number_integer() || count->get<int64_t>() < 0 ||
        count->get<int64_t>() > kMaxLayers) {
      return absl::FailedPreconditionError(absl::StrCat("model ", model.ref().ToString(),
                                                        ": config.json has no usable \"",
                                                        layer_count_key_, "\""));
    }
    return count->get<int64_t>();
  }

  const std::string& layer_count_key() const override { return layer_count_key_; }
  std::vector<std::string> per_layer_keys() const override { return per_layer_keys_; }

  // One more than the greatest number that follows `prefix` and a dot.
  static int64_t CountLayers(const std::vector<std::string>& names, absl::string_view prefix) {
    int64_t count = 0;
    for (absl::string_view name : names) {
      if (!absl::ConsumePrefix(&name, prefix) || !absl::ConsumePrefix(&name, ".")) continue;
      int64_t layer = 0;
      if (absl::SimpleAtoi(name.substr(0, name.find('.')), &layer)) {
        count = std::max(count, layer + 1);
      }
    }
    return count;
  }

  static constexpr int64_t kMaxLayers = 100'000;

  std::string name_ = "default";
  std::vector<ArchTensor> pre_;
  std::vector<ArchTensor> layer_;  // names with {layer}
  std::vector<ArchTensor> post_;
  std::string layer_count_key_;
  std::vector<std::string> per_layer_keys_;
  std::string count_prefix_;  // not empty: layers are counted from tensor names
};

class ArchitectureData final : public Architecture {
 public:
  const std::string& name() const override { return name_; }
  const std::vector<std::unique_ptr<ArchModule>>& modules() const override { return modules_; }
  const std::vector<std::string>& tagalong_files() const override { return tagalong_files_; }

  std::string name_;
  std::string model_type_;
  std::vector<std::unique_ptr<ArchModule>> modules_;
  std::vector<std::string> tagalong_files_;
};

using ArchitecturePtr = std::shared_ptr<const ArchitectureData>;

// --- known families -------------------------------------------------------------------------

std::vector<std::string> Strings(const json& object, const char* key) {
  const auto it = object.find(key);
  return it == object.end() ? std::vector<std::string>{} : it->get<std::vector<std::string>>();
}

// Reads the weights of `list`. For the backbone, names are made with the prefix (or without, for a
// bare model) and the other form becomes an alias.
class FamilyReader {
 public:
  explicit FamilyReader(const json& family) : family_(family) {
    prefix_ = family.at("prefix").get<std::string>();
    if (const auto it = family.find("legacy_names"); it != family.end()) {
      legacy_ = it->get<std::map<std::string, std::string>>();
    }
  }

  ArchitecturePtr Read(const std::string& name, const json& head) const {
    const bool bare = head.value("bare", false);
    auto module = std::make_unique<ModuleData>();
    module->layer_count_key_ = family_.at("layer_count").get<std::string>();
    module->per_layer_keys_ = Strings(family_, "per_layer_lists");
    ReadBackbone("pre", bare, module->pre_);
    ReadBackbone("layer", bare, module->layer_);
    ReadBackbone("post", bare, module->post_);
    if (const auto post = head.find("post"); post != head.end()) {
      for (const json& weight : *post) module->post_.push_back(ReadWeight(weight));
    }
    auto architecture = std::make_shared<ArchitectureData>();
    architecture->name_ = name;
    architecture->model_type_ = family_.at("model_type").get<std::string>();
    architecture->tagalong_files_ = Strings(family_, "files");
    architecture->modules_.push_back(std::move(module));
    return architecture;
  }

 private:
  static ArchTensor ReadWeight(const json& weight) {
    ArchTensor tensor;
    if (weight.is_string()) {
      tensor.name = weight.get<std::string>();
      return tensor;
    }
    tensor.name = weight.at("name").get<std::string>();
    tensor.optional = weight.value("optional", false);
    tensor.vocabulary = weight.value("vocabulary", false);
    tensor.tied_names = Strings(weight, "tied");
    return tensor;
  }

  void ReadBackbone(const char* key, bool bare, std::vector<ArchTensor>& tensors) const {
    for (const json& weight : family_.at(key)) {
      ArchTensor tensor = ReadWeight(weight);
      const std::string with_prefix = prefix_ + tensor.name;
      const std::string& first = bare ? tensor.name : with_prefix;
      const std::string& second = bare ? with_prefix : tensor.name;
      for (const std::string& form : {first, second}) {
        if (form != first) tensor.aliases.push_back(form);
        for (const auto& [ending, legacy] : legacy_) {
          if (absl::EndsWith(form, ending)) {
            tensor.aliases.push_back(
                absl::StrCat(absl::StripSuffix(absl::string_view(form), ending), legacy));
          }
        }
      }
      tensor.name = first;
      tensors.push_back(std::move(tensor));
    }
  }

  const json& family_;
  std::string prefix_;
  std::map<std::string, std::string> legacy_;
};

using ArchitectureTable = std::multimap<std::string, ArchitecturePtr>;

// The files are part of the program: a malformed one is our bug and shows in the first test.
const ArchitectureTable& KnownArchitectures() {
  static const ArchitectureTable* const table = [] {
    auto* result = new ArchitectureTable;
    for (const ArchitectureFile& file : ArchitectureFiles()) {
      const json family = json::parse(file.json);
      const FamilyReader reader(family);
      const json& heads = family.at("architectures");
      std::map<std::string, ArchitecturePtr> own;
      for (const auto& [name, head] : heads.items()) {
        if (head.is_object()) own[name] = reader.Read(name, head);
      }
      for (const auto& [name, head] : heads.items()) {
        result->emplace(name, own.at(head.is_string() ? head.get<std::string>() : name));
      }
    }
    return result;
  }();
  return *table;
}

// Null when the name is not known. Same names are told apart by model_type.
ArchitecturePtr FindKnown(const std::string& name, const std::string& model_type) {
  const auto [begin, end] = KnownArchitectures().equal_range(name);
  for (auto it = begin; it != end; ++it) {
    if (it->second->model_type_ == model_type) return it->second;
  }
  return begin != end && std::next(begin) == end ? begin->second : nullptr;
}

// --- raw checkpoints ------------------------------------------------------------------------

using Models = absl::Span<const std::shared_ptr<const Checkpoint>>;

absl::StatusOr<ArchitecturePtr> RawArchitecture(Models models) {
  std::set<std::string> all;
  for (const auto& model : models) {
    all.insert(model->tensor_names().begin(), model->tensor_names().end());
  }
  std::vector<std::string> missing;
  for (const auto& model : models) {
    std::vector<std::string> names;
    for (const std::string& name : all) {
      if (model->Find(name) == nullptr) names.push_back(name);
    }
    if (names.empty()) continue;
    const size_t count = names.size();
    constexpr size_t kShown = 5;
    if (count > kShown) names.resize(kShown);
    missing.push_back(absl::StrCat(
        model->ref().ToString(), " lacks ", absl::StrJoin(names, ", "),
        count > kShown ? absl::StrCat(" and ", count - kShown, " more") : std::string()));
  }
  if (!missing.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat("raw checkpoints are merged name by name, and their names differ: ",
                     absl::StrJoin(missing, "; ")));
  }
  auto module = std::make_unique<ModuleData>();
  for (const std::string& name : all) module->pre_.push_back({.name = name});
  auto architecture = std::make_shared<ArchitectureData>();
  architecture->name_ = "raw";
  architecture->modules_.push_back(std::move(module));
  return architecture;
}

// --- inference ------------------------------------------------------------------------------

struct LayerName {
  std::string prefix;  // "model.layers"
  std::string rest;    // "mlp.up_proj.weight"
  int64_t layer = 0;
};

// Splits at the first part that is a number and has parts on both sides.
std::optional<LayerName> SplitLayerName(absl::string_view name) {
  const std::vector<absl::string_view> parts = absl::StrSplit(name, '.');
  for (size_t i = 1; i + 1 < parts.size(); ++i) {
    int64_t layer = 0;
    if (!parts[i].empty() && std::all_of(parts[i].begin(), parts[i].end(), absl::ascii_isdigit) &&
        absl::SimpleAtoi(parts[i], &layer)) {
      return LayerName{.prefix = absl::StrJoin(parts.begin(), parts.begin() + i, "."),
                       .rest = absl::StrJoin(parts.begin() + i + 1, parts.end(), "."),
                       .layer = layer};
    }
  }
  return std::nullopt;
}

// True for a tensor whose rows are tokens, as far as shapes tell.
bool LooksLikeVocabulary(const std::string& name, Models models, const std::vector<json>& configs) {
  for (size_t i = 0; i < models.size(); ++i) {
    const TensorInfo* info = models[i]->Find(name);
    if (info == nullptr) continue;
    const json* size = FindDotted(configs[i], "vocab_size");
    return size != nullptr && size->is_number_integer() && IsFloat(info->dtype) &&
           (info->shape.rank() == 1 || info->shape.rank() == 2) &&
           info->shape[0] == size->get<int64_t>();
  }
  return false;
}

absl::StatusOr<ArchitecturePtr> InferArchitecture(const std::string& name, Models models,
                                                  const std::vector<json>& configs) {
  std::set<std::string> all;
  for (const auto& model : models) {
    all.insert(model->tensor_names().begin(), model->tensor_names().end());
  }
  std::map<std::string, std::set<std::string>> templates;  // by prefix
  std::vector<ArchTensor> loose;
  for (const std::string& tensor : all) {
    if (const auto split = SplitLayerName(tensor)) {
      templates[split->prefix].insert(split->rest);
      continue;
    }
    const bool everywhere = std::all_of(models.begin(), models.end(), [&](const auto& model) {
      return model->Find(tensor) != nullptr;
    });
    loose.push_back({.name = tensor,
                     .optional = !everywhere,
                     .vocabulary = LooksLikeVocabulary(tensor, models, configs)});
  }

  auto architecture = std::make_shared<ArchitectureData>();
  architecture->name_ = name;
  const bool one = templates.size() <= 1;
  if (!one && !loose.empty()) {
    auto module = std::make_unique<ModuleData>();
    module->pre_ = loose;
    architecture->modules_.push_back(std::move(module));
  }
  for (const auto& [prefix, rests] : templates) {
    auto module = std::make_unique<ModuleData>();
    module->count_prefix_ = prefix;
    if (one) {
      module->pre_ = loose;
    } else {
      module->name_ = prefix;
    }
    std::vector<int64_t> counts;
    for (const auto& model : models) {
      counts.push_back(ModuleData::CountLayers(model->tensor_names(), prefix));
      if (counts.back() > ModuleData::kMaxLayers) {
        return absl::FailedPreconditionError(absl::StrCat("model ", model->ref().ToString(),
                                                          ": tensor names count ", counts.back(),
                                                          " layers at \"", prefix, "\""));
      }
    }
    for (const std::string& rest : rests) {
      bool everywhere = true;
      for (size_t i = 0; i < models.size() && everywhere; ++i) {
        for (int64_t layer = 0; layer < counts[i] && everywhere; ++layer) {
          everywhere = models[i]->Find(absl::StrCat(prefix, ".", layer, ".", rest)) != nullptr;
        }
      }
      module->layer_.push_back(
          {.name = absl::StrCat(prefix, ".", kLayer, ".", rest), .optional = !everywhere});
    }
    // The configuration's count is kept right when it is plain which key holds it.
    for (absl::string_view key : kUsualLayerCountKeys) {
      const json* count = one ? FindDotted(configs[0], key) : nullptr;
      if (count != nullptr && count->is_number_integer() && count->get<int64_t>() == counts[0]) {
        module->layer_count_key_ = std::string(key);
        module->per_layer_keys_.assign(std::begin(kUsualPerLayerLists),
                                       std::end(kUsualPerLayerLists));
        break;
      }
    }
    architecture->modules_.push_back(std::move(module));
  }
  if (architecture->modules_.empty()) {  // loose tensors only
    auto module = std::make_unique<ModuleData>();
    module->pre_ = loose;
    architecture->modules_.push_back(std::move(module));
  }
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

absl::StatusOr<std::shared_ptr<const Architecture>> ResolveArchitecture(Models inputs,
                                                                        bool allow_mixed) {
  if (inputs.empty()) return absl::InvalidArgumentError("no models");
  for (const auto& model : inputs) {
    if (model->raw() != inputs[0]->raw()) {
      return absl::FailedPreconditionError(absl::StrCat(
          "model ", inputs[0]->ref().ToString(), inputs[0]->raw() ? " has no" : " has a",
          " config.json and model ", model->ref().ToString(), model->raw() ? " has none" : " has",
          "; raw checkpoints merge with raw checkpoints only"));
    }
  }
  if (inputs[0]->raw()) return RawArchitecture(inputs);

  std::vector<json> configs;
  std::vector<std::string> names;
  std::vector<ArchitecturePtr> known;
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
    if (known[i] != known[0] || (known[0] == nullptr && names[i] != names[0])) {
      return absl::FailedPreconditionError(
          absl::StrCat("architectures differ: model ", inputs[0]->ref().ToString(), " has ",
                       names[0], ", model ", inputs[i]->ref().ToString(), " has ", names[i],
                       "; --allow-crimes merges them as if they were ", names[0]));
    }
  }
  if (std::find(known.begin(), known.end(), nullptr) != known.end()) {
    return InferArchitecture("inferred", inputs, configs);
  }
  return known[0];
}

}  // namespace pewter
