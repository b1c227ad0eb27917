#include "merge/recipe/referenced_models.h"

#include <optional>

namespace pewter {

std::vector<ModelRef> ReferencedModels(const Recipe& recipe) {
  std::vector<ModelRef> refs;
  const auto add = [&refs](const std::optional<ModelRef>& ref) {
    if (ref.has_value()) refs.push_back(*ref);
  };
  for (const RecipeModule& module : recipe.modules) {
    for (const RecipeSlice& slice : module.slices) {
      for (const RecipeSource& source : slice.sources) add(source.model);
      add(slice.base_model);
    }
  }
  add(recipe.base_model);
  add(recipe.tokenizer_model);
  return refs;
}

}  // namespace pewter
