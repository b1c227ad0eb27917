// Dotted keys of configurations: "text_config.num_hidden_layers".
#pragma once

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"

namespace pewter {

// The value below a dotted key; null when there is none. `Json` is any of nlohmann's, const or not.
template <class Json>
Json* FindDotted(Json& root, absl::string_view key) {
  Json* at = &root;
  for (absl::string_view part : absl::StrSplit(key, '.')) {
    if (!at->is_object()) return nullptr;
    const auto it = at->find(std::string(part));
    if (it == at->end()) return nullptr;
    at = &*it;
  }
  return at;
}

// Where models of several parts have the configuration of their language model.
inline constexpr absl::string_view kLanguageModelParts[] = {"text_config", "llm_config",
                                                            "language_config"};

// A setting of the language model: of its part, else of the whole. Null when there is none.
template <class Json>
Json* FindInLanguageModel(Json& config, absl::string_view key) {
  for (absl::string_view part : kLanguageModelParts) {
    if (Json* value = FindDotted(config, absl::StrCat(part, ".", key))) return value;
  }
  return FindDotted(config, key);
}

enum class ConfigParts { kLanguageModel, kAll };

// The dotted keys that hold a number of tokens: the language model's first, then those of other
// parts (codes of sounds or images) where they are asked for.
template <class Json>
std::vector<std::string> VocabularySizeKeys(const Json& config, ConfigParts parts) {
  constexpr absl::string_view kKey = "vocab_size";
  std::vector<std::string> keys;
  const auto add = [&](std::string key) {
    const Json* size = FindDotted(config, key);
    if (size != nullptr && size->is_number_integer()) keys.push_back(std::move(key));
  };
  for (absl::string_view part : kLanguageModelParts) add(absl::StrCat(part, ".", kKey));
  add(std::string(kKey));
  if (parts == ConfigParts::kLanguageModel || !config.is_object()) return keys;
  for (const auto& [name, part] : config.items()) {
    bool known = false;
    for (absl::string_view language : kLanguageModelParts) known = known || name == language;
    if (part.is_object() && !known && part.contains(std::string(kKey))) {
      add(absl::StrCat(name, ".", kKey));
    }
  }
  return keys;
}

}  // namespace pewter
