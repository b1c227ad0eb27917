// Where the inputs of a linear layer are among the sites of statistics.h, by the weight's name.
#pragma once

#include <optional>
#include <string>

#include "absl/strings/string_view.h"

namespace pewter {

struct LayerSite {
  std::string site;  // "ffn.3"
  int input_axis;    // of the weight
};

// Of a model whose config.json is given; nothing for weights that are no linear layers, and for
// families that the forward pass does not know.
std::optional<LayerSite> FindLayerSite(absl::string_view config_json, absl::string_view weight);

}  // namespace pewter
