#include "merge/plan/output_files.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"
#include "base/dtype_names.h"
#include "base/status.h"
#include "merge/checkpoint/dotted_key.h"

namespace pewter {
namespace {

using nlohmann::ordered_json;

// What a tokenizer may consist of, processors of multimodal models included.
constexpr absl::string_view kTokenizerFiles[] = {"tokenizer.json",
                                                 "tokenizer_config.json",
                                                 "special_tokens_map.json",
                                                 "tokenizer.model",
                                                 "added_tokens.json",
                                                 "vocab.json",
                                                 "vocab.txt",
                                                 "merges.txt",
                                                 "chat_template.jinja",
                                                 "chat_template.json",
                                                 "preprocessor_config.json",
                                                 "video_preprocessor_config.json",
                                                 "sentencepiece.bpe.model"};
// Pooling and normalisation of embedding models (sentence-transformers). modules.json lists
// folders.
constexpr absl::string_view kSentenceFiles[] = {"modules.json", "config_sentence_transformers.json",
                                                "sentence_bert_config.json"};
constexpr int64_t kMaxSmallJson = int64_t{16} << 20;

absl::StatusOr<bool> Exists(const Checkpoint& model, absl::string_view key) {
  const auto stat = model.store().Stat(key);
  if (stat.ok()) return true;
  if (absl::IsNotFound(stat.status())) return false;
  return stat.status();
}

absl::StatusOr<bool> CopyIfPresent(absl::string_view key, int model, Plan& plan) {
  for (const PlanFile& file : plan.aux_files) {
    if (file.name == key) return true;
  }
  ASSIGN_OR_RETURN(const bool present, Exists(*plan.models[model].checkpoint, key));
  if (present) plan.aux_files.push_back({.name = std::string(key), .model = model});
  return present;
}

// Files of the folders that modules.json names ("1_Pooling").
absl::Status CopySentenceModules(int donor, Plan& plan) {
  const Checkpoint& model = *plan.models[donor].checkpoint;
  ASSIGN_OR_RETURN(const std::string text, ReadText(model.store(), "modules.json", kMaxSmallJson));
  const ordered_json modules = ordered_json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!modules.is_array()) return absl::OkStatus();
  for (const ordered_json& module : modules) {
    if (!module.is_object() || !module.contains("path") || !module["path"].is_string()) continue;
    const std::string path = module["path"].get<std::string>();
    if (path.empty() || path[0] == '/' || absl::StrContains(path, "..")) continue;
    ASSIGN_OR_RETURN(const auto entries, model.store().List(absl::StrCat(path, "/")));
    for (const ObjectEntry& entry : entries) {
      plan.aux_files.push_back({.name = entry.key, .model = donor});
      if (absl::EndsWith(entry.key, ".safetensors") || absl::EndsWith(entry.key, ".bin")) {
        plan.warnings.push_back(
            absl::StrCat(entry.key, " is copied from ", plan.models[donor].ref, ", not merged"));
      }
    }
  }
  return absl::OkStatus();
}

// "org/name" of a hub model; empty for other references.
std::string HubId(const PlanModel& model) {
  absl::string_view path = model.checkpoint->ref().path;
  const bool hub = absl::ConsumePrefix(&path, "hf://");
  const auto good = [](char c) {
    return absl::ascii_isalnum(c) || c == '-' || c == '_' || c == '.' || c == '/';
  };
  if (!std::all_of(path.begin(), path.end(), good) ||
      std::count(path.begin(), path.end(), '/') != 1 || !absl::ascii_isalnum(path[0])) {
    return "";
  }
  // Without the scheme it is a hub id when it is not a folder here.
  const bool folder = absl::StartsWith(model.checkpoint->files().front().Describe(), path);
  return hub || !folder ? std::string(path) : "";
}

}  // namespace

absl::StatusOr<std::string> MakeConfigJson(const Plan& plan, int donor,
                                           const ConfigChanges& changes,
                                           std::vector<std::string>& warnings) {
  std::vector<ordered_json> configs;
  for (const PlanModel& model : plan.models) {
    configs.push_back(ordered_json::parse(model.checkpoint->config_json(), nullptr,
                                          /*allow_exceptions=*/false));
  }
  ordered_json config = configs[donor];
  if (!config.is_object()) {
    return absl::DataLossError(
        absl::StrCat("model ", plan.models[donor].ref, ": config.json is not a JSON object"));
  }
  if (changes.dtype) {
    for (const char* key : {"torch_dtype", "dtype"}) {
      if (config.contains(key)) config[key] = std::string(TorchName(*changes.dtype));
    }
  }
  for (const ModuleLayers& module : changes.modules) {
    const auto layers = static_cast<int64_t>(module.layers.size());
    for (const std::string& key : module.module->layer_count_keys()) {
      if (ordered_json* count = FindDotted(config, key); count != nullptr) *count = layers;
    }
    if (module.module->layer_count_keys().empty()) {
      const auto before = module.module->LayerCount(*plan.models[donor].checkpoint);
      if (before.ok() && *before != layers) {
        warnings.push_back(absl::StrCat("config.json is not told that module \"",
                                        module.module->name(), "\" has ", layers, " layers, not ",
                                        *before, ": which key counts them is not known"));
      }
    }
    for (const std::string& key : module.module->per_layer_keys()) {
      ordered_json* list = FindDotted(config, key);
      if (list == nullptr || !list->is_array()) continue;
      ordered_json entries = ordered_json::array();
      for (const LayerOrigin& origin : module.layers) {
        ordered_json* from = FindDotted(configs[origin.model], key);
        if (from == nullptr || !from->is_array() ||
            origin.layer >= static_cast<int64_t>(from->size())) {
          from = list;
        }
        if (origin.layer >= static_cast<int64_t>(from->size())) {
          return absl::FailedPreconditionError(
              absl::StrCat("model ", plan.models[origin.model].ref, ": config.json's \"", key,
                           "\" has no entry for layer ", origin.layer));
        }
        entries.push_back((*from)[origin.layer]);
      }
      *list = std::move(entries);
    }
  }
  if (changes.vocabulary_rows) {
    if (config.contains("vocab_size")) {
      config["vocab_size"] = *changes.vocabulary_rows;
    } else {
      warnings.push_back(absl::StrCat("config.json of ", plan.models[donor].ref,
                                      " has no vocab_size; the output's has none either"));
    }
  }
  return config.dump(2, ' ', false, ordered_json::error_handler_t::replace) + "\n";
}

absl::Status AddCopiedFiles(int donor, int tokenizer_donor, const Architecture& architecture,
                            Plan& plan) {
  RETURN_IF_ERROR(CopyIfPresent("generation_config.json", donor, plan).status());
  for (const std::string& file : architecture.tagalong_files()) {
    RETURN_IF_ERROR(CopyIfPresent(file, donor, plan).status());
  }
  for (absl::string_view file : kSentenceFiles) {
    ASSIGN_OR_RETURN(const bool present, CopyIfPresent(file, donor, plan));
    if (present && file == "modules.json") RETURN_IF_ERROR(CopySentenceModules(donor, plan));
  }
  if (!plan.options.copy_tokenizer) return absl::OkStatus();
  bool any = false;
  for (absl::string_view file : kTokenizerFiles) {
    ASSIGN_OR_RETURN(const bool present, CopyIfPresent(file, tokenizer_donor, plan));
    any = any || present;
  }
  if (!any) {
    plan.warnings.push_back(absl::StrCat("model ", plan.models[tokenizer_donor].ref,
                                         " has no tokenizer files; the output has none"));
  }
  return absl::OkStatus();
}

void AddModelCard(const Recipe& recipe, const MergeMethod& method, absl::Span<const int> models,
                  int base, Plan& plan) {
  std::string text = recipe.text;
  if (!text.empty() && text.back() != '\n') text += '\n';
  for (const auto& [key, value] : recipe.overrides) {
    absl::StrAppend(&text, "# set on the command line: ", key, "=",
                    absl::StrReplaceAll(value, {{"\n", " "}, {"\r", " "}}), "\n");
  }

  std::string card = "---\n";
  std::vector<std::string> ids;
  for (int model : models) {
    std::string id = HubId(plan.models[model]);
    if (!id.empty() && std::find(ids.begin(), ids.end(), id) == ids.end()) {
      ids.push_back(std::move(id));
    }
  }
  if (!ids.empty()) {
    absl::StrAppend(&card, "base_model:\n");
    for (const std::string& id : ids) absl::StrAppend(&card, "- ", id, "\n");
  }
  absl::StrAppend(&card,
                  "library_name: transformers\ntags:\n- mergekit\n- merge\n- pewter\n---\n"
                  "# Merged model\n\nMade with Pewter.\n\n## Method\n\n[",
                  method.title, "](", method.reference, ")", ": ", method.summary, ".");
  if (base >= 0) {
    absl::StrAppend(&card, " The base model is `", plan.models[base].ref, "`.");
  }
  absl::StrAppend(&card, "\n\n## Models\n\n");
  for (int model : models) {
    if (model != base) absl::StrAppend(&card, "- `", plan.models[model].ref, "`\n");
  }
  // A fence longer than any in the recipe, so that no recipe can end it.
  std::string fence = "```";
  while (absl::StrContains(text, fence)) fence += '`';
  absl::StrAppend(&card, "\n## Recipe\n\n", fence, "yaml\n", text, fence, "\n");
  plan.aux_files.push_back({.name = "README.md", .text = std::move(card)});
  plan.aux_files.push_back({.name = "mergekit_config.yml", .text = std::move(text)});
}

}  // namespace pewter
