#include "merge/forward/layer_sites.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "merge/forward/family.h"

namespace pewter {
namespace {

// A layer's name after the number in it, as in `pattern` ("encoder.layer.{layer}."): sets both, or
// returns false.
bool SplitLayer(absl::string_view name, absl::string_view pattern, absl::string_view& number,
                absl::string_view& rest) {
  constexpr absl::string_view kNumber = "{layer}";
  const size_t at = pattern.find(kNumber);
  if (at == absl::string_view::npos || !absl::ConsumePrefix(&name, pattern.substr(0, at))) {
    return false;
  }
  const auto end = std::find_if_not(name.begin(), name.end(), absl::ascii_isdigit);
  number = name.substr(0, end - name.begin());
  rest = name.substr(number.size());
  return !number.empty() && absl::ConsumePrefix(&rest, pattern.substr(at + kNumber.size()));
}

std::optional<LayerSite> FindIn(const Family& family, absl::string_view name) {
  const auto is = [](absl::string_view text, const char* known) {
    return known != nullptr && text == known;
  };
  if (is(name, family.transform)) return LayerSite{"transform_input", 1};
  if (is(name, family.decoder)) return LayerSite{"head_input", 1};
  if (is(name, family.classifier)) return LayerSite{"classifier_input", 1};
  if (!family.pooler_inside && is(name, family.pooler)) return LayerSite{"pooler_input", 1};
  for (const char* prefix : family.prefixes) {
    if (prefix == nullptr) continue;
    absl::string_view inside = name, number, rest;
    if (!absl::ConsumePrefix(&inside, prefix)) continue;
    if (family.pooler_inside && is(inside, family.pooler)) return LayerSite{"pooler_input", 1};
    if (!SplitLayer(inside, family.layer, number, rest)) continue;
    const char* site = nullptr;
    if (is(rest, family.query) || is(rest, family.key) || is(rest, family.value)) {
      site = "attention_input.";
    } else if (is(rest, family.attention_out)) {
      site = "attention.";
    } else if (is(rest, family.gate) || is(rest, family.up) || is(rest, family.plain)) {
      site = "ffn_input.";
    } else if (is(rest, family.down)) {
      site = "ffn.";
    }
    if (site != nullptr) return LayerSite{absl::StrCat(site, number), family.transposed ? 0 : 1};
  }
  return std::nullopt;
}

}  // namespace

std::optional<LayerSite> FindLayerSite(absl::string_view config_json, absl::string_view weight) {
  const nlohmann::json config =
      nlohmann::json::parse(config_json, nullptr, /*allow_exceptions=*/false);
  const auto type = config.is_object() ? config.find("model_type") : config.end();
  if (!config.is_object() || type == config.end() || !type->is_string() ||
      !absl::ConsumeSuffix(&weight, ".weight")) {
    return std::nullopt;
  }
  for (const Family& family : Families()) {
    if (type->get<std::string>() == family.model_type) return FindIn(family, weight);
  }
  return std::nullopt;
}

}  // namespace pewter
