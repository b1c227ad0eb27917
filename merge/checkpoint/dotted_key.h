// Dotted keys of configurations: "text_config.num_hidden_layers".
#pragma once

#include <string>

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

}  // namespace pewter
