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
#include "merge/checkpoint/printable.h"
#include "merge/plan/tokenizer_files.h"

namespace pewter {
namespace {

using nlohmann::ordered_json;

constexpr absl::string_view kChatTemplate = "chat_template.jinja";
// Further templates, by name.
constexpr absl::string_view kMoreChatTemplates = "additional_chat_templates/";
// What a tokenizer may consist of, processors of multimodal models included.
constexpr absl::string_view kTokenizerFiles[] = {"tokenizer.json",
                                                 "tokenizer_config.json",
                                                 "special_tokens_map.json",
                                                 "tokenizer.model",
                                                 "added_tokens.json",
                                                 "vocab.json",
                                                 "vocab.txt",
                                                 "merges.txt",
                                                 kChatTemplate,
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

// Ids of tokens in a configuration follow their tokens.
class IdMover {
 public:
  // `given` is the configuration whose ids for the usual roles are taken instead, or no object.
  IdMover(const TokenIds& ids, const ordered_json& given, absl::string_view file,
          std::vector<std::string>& warnings)
      : ids_(ids), given_(given), file_(file), warnings_(warnings) {}

  // Members of one object: "eos_token_id": 2, "eos_token_id": [2, 7], "suppress_tokens": [...]
  void Move(ordered_json& object) {
    if (!object.is_object()) return;
    for (auto& [key, value] : object.items()) {
      if (key == "forced_decoder_ids" && value.is_array() && !value.empty()) {
        warnings_.push_back(absl::StrCat(file_, ": ", key, " is kept though ids of tokens move"));
      }
      const bool ids = absl::EndsWith(key, "token_id") || absl::EndsWith(key, "token_ids") ||
                       absl::EndsWith(key, "token_index") || key == "suppress_tokens" ||
                       key == "begin_suppress_tokens" || key == "bad_words_ids";
      const bool role =
          std::find(std::begin(kRoleIds), std::end(kRoleIds), key) != std::end(kRoleIds);
      const ordered_json* const own = role ? FindInLanguageModel(given_, key) : nullptr;
      if (own != nullptr) {
        value = *own;
      } else if (ids) {
        MoveValue(key, value);
      }
    }
  }

  // Ids that the given configuration has and `config` does not, beside the number of tokens.
  void AddRoles(ordered_json& config) const {
    const auto sizes = VocabularySizeKeys(config, ConfigParts::kLanguageModel);
    const size_t dot = sizes.empty() ? std::string::npos : sizes.front().rfind('.');
    ordered_json& part =
        dot == std::string::npos ? config : *FindDotted(config, sizes.front().substr(0, dot));
    for (absl::string_view key : kRoleIds) {
      const ordered_json* const id = FindInLanguageModel(given_, key);
      if (id != nullptr && !id->is_null() && FindInLanguageModel(config, key) == nullptr) {
        part[std::string(key)] = *id;
      }
    }
  }

 private:
  // An id, or lists of them; an id that is gone becomes null, or leaves its list.
  void MoveValue(const std::string& key, ordered_json& value) {
    if (value.is_array()) {
      ordered_json kept = ordered_json::array();
      for (ordered_json& entry : value) {
        MoveValue(key, entry);
        if (!entry.is_null()) kept.push_back(std::move(entry));
      }
      value = kept.empty() && !value.empty() ? ordered_json() : std::move(kept);
      return;
    }
    if (!value.is_number_integer()) return;
    const int64_t id = value.get<int64_t>();
    const auto token = ids_.tokens.find(id);
    if (token == ids_.tokens.end()) return;  // -1, or what never was a token
    const auto moved = ids_.output.find(token->second);
    if (moved != ids_.output.end()) {
      value = moved->second;
      return;
    }
    // "eos_token_id": what the output's tokenizer has for the end.
    const std::string was = absl::StrCat(file_, ": ", key, " ", id, ", ", Printable(token->second),
                                         ", is not in the output's vocabulary");
    const auto role = ids_.roles.find(std::string(absl::StripSuffix(key, "_id")));
    const auto other =
        role == ids_.roles.end() ? ids_.output.end() : ids_.output.find(role->second);
    if (other != ids_.output.end()) {
      warnings_.push_back(
          absl::StrCat(was, "; it becomes ", other->second, ", ", Printable(other->first)));
      value = other->second;
    } else {
      warnings_.push_back(absl::StrCat(was, " and is left out"));
      value = nullptr;
    }
  }

  static constexpr absl::string_view kRoleIds[] = {"bos_token_id", "eos_token_id", "pad_token_id",
                                                   "unk_token_id", "mask_token_id"};

  const TokenIds& ids_;
  const ordered_json& given_;
  const absl::string_view file_;
  std::vector<std::string>& warnings_;
};

// generation_config.json names tokens by id, too.
absl::Status AddGenerationConfig(int donor, const ConfigChanges& changes, Plan& plan) {
  constexpr absl::string_view kFile = "generation_config.json";
  ASSIGN_OR_RETURN(const bool present, CopyIfPresent(kFile, donor, plan));
  if (!present || changes.token_ids == nullptr) return absl::OkStatus();
  ObjectStore& store = plan.models[donor].checkpoint->store();
  ASSIGN_OR_RETURN(const std::string text, ReadText(store, kFile, kMaxSmallJson));
  ordered_json config = ordered_json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!config.is_object()) {
    return absl::DataLossError(absl::StrCat(store.Describe(kFile), ": not a JSON object"));
  }
  const ordered_json before = config;
  ordered_json given;
  if (changes.token_id_donor >= 0) {
    given = ordered_json::parse(plan.models[changes.token_id_donor].checkpoint->config_json(),
                                nullptr, /*allow_exceptions=*/false);
  }
  IdMover(*changes.token_ids, given, kFile, plan.warnings).Move(config);
  if (config == before) return absl::OkStatus();
  const std::string moved = config.dump(2, ' ', false, ordered_json::error_handler_t::replace);
  for (PlanFile& file : plan.aux_files) {
    if (file.name == kFile) file = {.name = file.name, .text = moved + "\n"};
  }
  return absl::OkStatus();
}

// The tokenizer of a model, copied or edited.
absl::Status AddTokenizerFiles(int donor, const TokenizerEdit& edit, Plan& plan) {
  const Checkpoint& model = *plan.models[donor].checkpoint;
  bool any = false;
  for (absl::string_view name : kTokenizerFiles) {
    ASSIGN_OR_RETURN(const bool present, Exists(model, name));
    if (!present) continue;
    any = true;
    std::optional<std::string> text;
    if (!edit.empty()) {
      ASSIGN_OR_RETURN(text, EditTokenizerFile(model, name, edit, plan.warnings));
    }
    if (text && text->empty()) continue;
    const auto of_family = std::find_if(plan.aux_files.begin(), plan.aux_files.end(),
                                        [&](const PlanFile& file) { return file.name == name; });
    if (of_family != plan.aux_files.end()) plan.aux_files.erase(of_family);
    if (text) {
      plan.aux_files.push_back({.name = std::string(name), .text = *std::move(text)});
    } else {
      plan.aux_files.push_back({.name = std::string(name), .model = donor});
    }
  }
  if (!any) {
    plan.warnings.push_back(absl::StrCat("model ", plan.models[donor].ref,
                                         " has no tokenizer files; the output has none"));
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(std::optional<std::string> added, MakeAddedTokensFile(model, edit));
  if (added) plan.aux_files.push_back({.name = "added_tokens.json", .text = *std::move(added)});
  ASSIGN_OR_RETURN(const bool has_template, Exists(model, kChatTemplate));
  if (edit.chat_template && !has_template) {
    plan.aux_files.push_back({.name = std::string(kChatTemplate), .text = *edit.chat_template});
  }
  ASSIGN_OR_RETURN(const auto more, model.store().List(kMoreChatTemplates));
  for (const ObjectEntry& entry : more) {
    if (edit.chat_template) {
      plan.warnings.push_back(absl::StrCat(entry.key, " is left out: the recipe sets a template"));
    } else {
      plan.aux_files.push_back({.name = entry.key, .model = donor});
    }
  }
  return absl::OkStatus();
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
  for (const auto& [key, width] : changes.widths) config[key] = width;
  if (changes.vocabulary_rows) {
    const auto keys = VocabularySizeKeys(config, ConfigParts::kLanguageModel);
    for (const std::string& key : keys) *FindDotted(config, key) = *changes.vocabulary_rows;
    if (keys.empty()) {
      warnings.push_back(absl::StrCat("config.json of ", plan.models[donor].ref,
                                      " has no vocab_size; the output's has none either"));
    }
  }
  if (changes.token_ids != nullptr) {
    const ordered_json given =
        changes.token_id_donor >= 0 ? configs[changes.token_id_donor] : ordered_json();
    IdMover mover(*changes.token_ids, given, "config.json", warnings);
    mover.Move(config);
    for (absl::string_view name : kLanguageModelParts) {
      if (ordered_json* part = FindDotted(config, name)) mover.Move(*part);
    }
    mover.AddRoles(config);
  }
  return config.dump(2, ' ', false, ordered_json::error_handler_t::replace) + "\n";
}

absl::Status AddModelFiles(int donor, int tokenizer_donor, const Architecture& architecture,
                           const ConfigChanges& changes, const TokenizerEdit& tokenizer,
                           Plan& plan) {
  RETURN_IF_ERROR(AddGenerationConfig(donor, changes, plan));
  for (const std::string& file : architecture.tagalong_files()) {
    RETURN_IF_ERROR(CopyIfPresent(file, donor, plan).status());
  }
  for (absl::string_view file : kSentenceFiles) {
    ASSIGN_OR_RETURN(const bool present, CopyIfPresent(file, donor, plan));
    if (present && file == "modules.json") RETURN_IF_ERROR(CopySentenceModules(donor, plan));
  }
  return plan.options.copy_tokenizer ? AddTokenizerFiles(tokenizer_donor, tokenizer, plan)
                                     : absl::OkStatus();
}

std::string RecipeFileText(absl::string_view recipe,
                           absl::Span<const std::pair<std::string, std::string>> overrides) {
  std::string text(recipe);
  if (!text.empty() && text.back() != '\n') text += '\n';
  for (const auto& [key, value] : overrides) {
    absl::StrAppend(&text, "# set on the command line: ", key, "=",
                    absl::StrReplaceAll(value, {{"\n", " "}, {"\r", " "}}), "\n");
  }
  return text;
}

void AddModelCard(const ModelCard& model_card, Plan& plan) {
  std::string text = RecipeFileText(model_card.recipe, model_card.overrides);
  std::string card = "---\n";
  std::vector<std::string> ids;
  for (int model : model_card.models) {
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
                  "# Merged model\n\nMade with Pewter.\n\n## Method\n\n",
                  model_card.method);
  if (model_card.base >= 0) {
    absl::StrAppend(&card, " The base model is `", plan.models[model_card.base].ref, "`.");
  }
  absl::StrAppend(&card, "\n\n## Models\n\n");
  for (int model : model_card.models) {
    if (model != model_card.base) absl::StrAppend(&card, "- `", plan.models[model].ref, "`\n");
  }
  // A fence longer than any in the recipe, so that no recipe can end it.
  std::string fence = "```";
  while (absl::StrContains(text, fence)) fence += '`';
  absl::StrAppend(&card, "\n## Recipe\n\n", fence, "yaml\n", text, fence, "\n");
  plan.aux_files.push_back({.name = "README.md", .text = std::move(card)});
  plan.aux_files.push_back({.name = model_card.recipe_file, .text = std::move(text)});
}

}  // namespace pewter
