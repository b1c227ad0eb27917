// The output's small files: config.json, tokenizer, generation config, model card, recipe.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "merge/plan/plan.h"
#include "merge/plan/tokenizer.h"

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
  std::map<std::string, int64_t> widths;  // by key, of groups that became wider
  const TokenIds* token_ids = nullptr;    // null: ids stay
  int token_id_donor = -1;  // >= 0: the model whose configuration says which tokens begin, end, pad
};

// The donor's config.json with the changes applied; everything else, and the order of keys, stays.
absl::StatusOr<std::string> MakeConfigJson(const Plan& plan, int donor,
                                           const ConfigChanges& changes,
                                           std::vector<std::string>& warnings);

// Files of `donor` (generation config, files of the family) and of `tokenizer_donor`: copied, or
// with the changes applied.
absl::Status AddModelFiles(int donor, int tokenizer_donor, const Architecture& architecture,
                           const ConfigChanges& changes, const TokenizerEdit& tokenizer,
                           Plan& plan);

// What README.md says, and the recipe that it shows and that is written beside it.
struct ModelCard {
  std::string method;       // Markdown
  std::vector<int> models;  // in the recipe's order
  int base = -1;            // -1: none
  std::string recipe;
  std::vector<std::pair<std::string, std::string>> overrides;  // applied to it
  std::string recipe_file;
};
void AddModelCard(const ModelCard& card, Plan& plan);

// A recipe as it is written beside the output: what was set on the command line stands in comments.
std::string RecipeFileText(absl::string_view recipe,
                           absl::Span<const std::pair<std::string, std::string>> overrides);

}  // namespace pewter
