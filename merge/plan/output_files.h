// The output's small files: config.json, tokenizer, generation config, model card, recipe.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "merge/plan/plan.h"

namespace pewter {

// Which layer of which model became a layer of the output's module.
struct LayerOrigin {
  int model = 0;
  int64_t layer = 0;
};
struct ModuleLayers {
  const ArchModule* module = nullptr;
  std::vector<LayerOrigin> layers;
};

struct ConfigChanges {
  std::optional<DType> dtype;         // of the output's tensors
  std::vector<ModuleLayers> modules;  // layer counts and per-layer lists
  std::optional<int64_t> vocabulary_rows;
};

// The donor's config.json with the changes applied; everything else, and the order of keys, stays.
absl::StatusOr<std::string> MakeConfigJson(const Plan& plan, int donor,
                                           const ConfigChanges& changes,
                                           std::vector<std::string>& warnings);

// Files copied from `donor` (generation config, files of the family) and `tokenizer_donor`.
absl::Status AddCopiedFiles(int donor, int tokenizer_donor, const Architecture& architecture,
                            Plan& plan);

// README.md and mergekit_config.yml. `models` in the recipe's order, `base` -1 for none.
void AddModelCard(const Recipe& recipe, const MergeMethod& method, absl::Span<const int> models,
                  int base, Plan& plan);

}  // namespace pewter
