#include "merge/recipe/referenced_models.h"

#include <algorithm>
#include <optional>

namespace pewter {

std::vector<ModelRef> ModelsOfDocument(const Recipe& recipe) {
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
  for (const RecipeStatistics& statistics : recipe.statistics) {
    add(statistics.model);
    add(statistics.file);
  }
  if (recipe.evaluation.has_value()) add(recipe.evaluation->data);
  if (recipe.tokenizer.has_value()) {
    add(recipe.tokenizer->model);
    for (const RecipeToken& token : recipe.tokenizer->tokens) add(token.model);
  }
  if (recipe.align.has_value()) {
    add(recipe.align->reference);
    add(recipe.align->calibration);
    add(recipe.align->objective);
    add(recipe.align->verify);
  }
  return refs;
}

std::vector<ModelRef> ReferencedModels(const Recipe& recipe) {
  std::vector<ModelRef> refs = ModelsOfDocument(recipe);
  for (const Recipe& stage : recipe.stages) {
    const std::vector<ModelRef> own = ModelsOfDocument(stage);
    refs.insert(refs.end(), own.begin(), own.end());
  }
  std::erase_if(refs, [&](const ModelRef& ref) {
    return std::any_of(recipe.stages.begin(), recipe.stages.end(),
                       [&](const Recipe& stage) { return stage.name == ref.path; });
  });
  return refs;
}

}  // namespace pewter
