#include "merge/checkpoint/architecture_data.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "base/status.h"
#include "merge/checkpoint/dotted_key.h"

namespace pewter {

using nlohmann::json;

absl::StatusOr<json> ParseConfig(const Checkpoint& model) {
  json config = json::parse(model.config_json(), nullptr, /*allow_exceptions=*/false);
  if (!config.is_object()) {
    return absl::DataLossError(
        absl::StrCat("model ", model.ref().ToString(), ": config.json is not a JSON object"));
  }
  return config;
}

int64_t CountNumbers(absl::Span<const std::string> names, absl::string_view before, bool anywhere) {
  int64_t count = 0;
  for (absl::string_view name : names) {
    const size_t at = anywhere ? name.find(before) : (name.rfind(before, 0) == 0 ? 0 : name.npos);
    if (at == name.npos) continue;
    name.remove_prefix(at + before.size());
    const size_t digits =
        std::find_if_not(name.begin(), name.end(), absl::ascii_isdigit) - name.begin();
    int64_t number = 0;
    if ((digits == name.size() || name[digits] == '.') &&
        absl::SimpleAtoi(name.substr(0, digits), &number)) {
      count = std::max(count, number + 1);
    }
  }
  return count;
}

std::vector<std::string> ExpandLists(absl::string_view text) {
  for (size_t open = text.find('{'); open != text.npos; open = text.find('{', open + 1)) {
    const size_t close = text.find('}', open);
    const absl::string_view inside = text.substr(open + 1, close - open - 1);
    if (!absl::StrContains(inside, ',')) continue;
    std::vector<std::string> result;
    const std::vector<std::string> rest = ExpandLists(text.substr(close + 1));
    for (absl::string_view one : absl::StrSplit(inside, ',')) {
      for (const std::string& ending : rest) {
        result.push_back(absl::StrCat(text.substr(0, open), one, ending));
      }
    }
    return result;
  }
  return {std::string(text)};
}

std::vector<ArchTensor> ModuleData::LayerTensors(int64_t layer) const {
  const std::string number = absl::StrCat(layer);
  const auto fill = [&](std::string& name) {
    name = absl::StrReplaceAll(name, {{kLayer, number}});
  };
  std::vector<ArchTensor> tensors = layer_;
  for (ArchTensor& tensor : tensors) {
    fill(tensor.name);
    for (std::string& alias : tensor.aliases) fill(alias);
    for (std::string& tied : tensor.tied_names) fill(tied);
  }
  return tensors;
}

absl::StatusOr<int64_t> ModuleData::LayerCount(const Checkpoint& model) const {
  if (!count_prefix_.empty()) {
    return CountNumbers(model.tensor_names(), absl::StrCat(count_prefix_, "."), false);
  }
  if (layer_.empty()) return 0;
  ASSIGN_OR_RETURN(const json config, ParseConfig(model));
  for (const std::string& key : layer_count_keys_) {
    const json* count = FindDotted(config, key);
    if (count != nullptr && count->is_number_integer() && count->get<int64_t>() >= 0 &&
        count->get<int64_t>() <= kMaxLayers) {
      return count->get<int64_t>();
    }
  }
  return absl::FailedPreconditionError(
      absl::StrCat("model ", model.ref().ToString(), ": config.json has no usable \"",
                   absl::StrJoin(layer_count_keys_, "\" or \""), "\""));
}

}  // namespace pewter
