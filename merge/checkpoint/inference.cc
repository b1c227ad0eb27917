#include "merge/checkpoint/inference.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/status.h"
#include "merge/checkpoint/dotted_key.h"

namespace pewter {
namespace {

using nlohmann::json;

// Keys that hold a layer count, and lists with one entry a layer beside them.
constexpr const char* kLayerCountKeys[] = {"num_hidden_layers",
                                           "n_layer",
                                           "n_layers",
                                           "num_layers",
                                           "encoder_layers",
                                           "decoder_layers",
                                           "num_encoder_layers",
                                           "num_decoder_layers",
                                           "depth"};
constexpr const char* kPerLayerLists[] = {"layer_types"};
// What names of tensors with a row for each token contain.
constexpr const char* kVocabularyNames[] = {"emb", "wte", "head", "vocab", "output", "predictions"};

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

bool ContainsAny(absl::string_view name, absl::Span<const char* const> words) {
  const std::string lower = absl::AsciiStrToLower(name);
  return std::any_of(words.begin(), words.end(),
                     [&](const char* word) { return absl::StrContains(lower, word); });
}

// A configuration and the objects in it, with what stands in front of their keys.
std::vector<std::pair<std::string, const json*>> Sections(const json& config) {
  std::vector<std::pair<std::string, const json*>> sections = {{"", &config}};
  for (const auto& [key, value] : config.items()) {
    if (value.is_object()) sections.emplace_back(absl::StrCat(key, "."), &value);
  }
  return sections;
}

bool IsNumber(const json& section, const char* key, int64_t number) {
  const auto it = section.find(key);
  return it != section.end() && it->is_number_integer() && it->get<int64_t>() == number;
}

// True for a tensor whose rows are tokens, as far as names and shapes tell.
bool LooksLikeVocabulary(const std::string& name, Models models, const std::vector<json>& configs) {
  if (!ContainsAny(name, kVocabularyNames) || ContainsAny(name, {"position"})) return false;
  for (size_t i = 0; i < models.size(); ++i) {
    const TensorInfo* info = models[i]->Find(name);
    if (info == nullptr) continue;
    if (!IsFloat(info->dtype) || info->shape.rank() < 1 || info->shape.rank() > 2) return false;
    return absl::c_any_of(VocabularySizeKeys(configs[i], ConfigParts::kAll),
                          [&](const std::string& key) {
                            return FindDotted(configs[i], key)->get<int64_t>() == info->shape[0];
                          });
  }
  return false;
}

// An output head that an input lacks has the values of the input embedding, unless the input's
// configuration denies that they are tied.
void TieHeads(Models models, const std::vector<json>& configs, std::vector<ArchTensor>& loose) {
  const auto is_matrix = [&](const ArchTensor& tensor) {
    return tensor.vocabulary && std::any_of(models.begin(), models.end(), [&](const auto& model) {
             const TensorInfo* info = model->Find(tensor.name);
             return info != nullptr && info->shape.rank() == 2;
           });
  };
  const ArchTensor* embedding = nullptr;
  for (const ArchTensor& tensor : loose) {
    if (!is_matrix(tensor) || tensor.optional) continue;
    if (embedding != nullptr) return;  // which one cannot be told
    embedding = &tensor;
  }
  if (embedding == nullptr) return;
  for (ArchTensor& tensor : loose) {
    if (!tensor.optional || !is_matrix(tensor)) continue;
    bool tied = true;
    for (size_t i = 0; i < models.size(); ++i) {
      if (models[i]->Find(tensor.name) != nullptr) continue;
      for (const auto& [prefix, section] : Sections(configs[i])) {
        const auto it = section->find("tie_word_embeddings");
        tied = tied && !(it != section->end() && *it == false);
      }
    }
    if (tied) tensor.tied_names = {embedding->name};
  }
}

}  // namespace

absl::StatusOr<ArchitecturePtr> InferArchitecture(Models models, const std::vector<json>& configs) {
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

  TieHeads(models, configs, loose);

  std::map<std::string, std::vector<int64_t>> counts;  // by prefix: layers of each input
  std::multiset<int64_t> first_counts;
  for (const auto& [prefix, rests] : templates) {
    for (const auto& model : models) {
      const int64_t count = CountNumbers(model->tensor_names(), absl::StrCat(prefix, "."), false);
      if (count > kMaxLayers) {
        return absl::FailedPreconditionError(absl::StrCat("model ", model->ref().ToString(),
                                                          ": tensor names count ", count,
                                                          " layers at \"", prefix, "\""));
      }
      counts[prefix].push_back(count);
    }
    first_counts.insert(counts[prefix].front());
  }

  auto architecture = std::make_shared<ArchitectureData>();
  architecture->name_ = "inferred";
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
    for (const std::string& rest : rests) {
      bool everywhere = true;
      for (size_t i = 0; i < models.size() && everywhere; ++i) {
        for (int64_t layer = 0; layer < counts[prefix][i] && everywhere; ++layer) {
          everywhere = models[i]->Find(absl::StrCat(prefix, ".", layer, ".", rest)) != nullptr;
        }
      }
      module->layer_.push_back(
          {.name = absl::StrCat(prefix, ".", kLayer, ".", rest), .optional = !everywhere});
    }
    // The configuration's count is kept right where it is plain which stack a key counts.
    const int64_t count = counts[prefix].front();
    for (const auto& [before, section] : Sections(configs[0])) {
      if (first_counts.count(count) != 1) break;
      for (const char* key : kLayerCountKeys) {
        if (!IsNumber(*section, key, count)) continue;
        module->layer_count_keys_.push_back(absl::StrCat(before, key));
        for (const char* list : kPerLayerLists) {
          const std::string full = absl::StrCat(before, list);
          if (!absl::c_linear_search(module->per_layer_keys_, full)) {
            module->per_layer_keys_.push_back(full);
          }
        }
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

}  // namespace pewter
