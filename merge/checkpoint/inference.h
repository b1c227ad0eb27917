// Architectures of families that no table knows, from the inputs' tensor names and shapes.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <vector>

#include "absl/status/statusor.h"
#include "merge/checkpoint/architecture_data.h"

namespace pewter {

// The first number in a name is the layer's: "h.3.mlp.w" is "mlp.w" of layer 3 of the stack "h".
// One stack makes one module, "default"; of several each is a module of its own and "default" holds
// what belongs to none. A tensor that some input lacks is optional. Vocabulary tensors are known by
// their names and by the configuration's vocab_size. `configs` are the inputs' config.json.
absl::StatusOr<ArchitecturePtr> InferArchitecture(Models inputs,
                                                  const std::vector<nlohmann::json>& configs);

}  // namespace pewter
