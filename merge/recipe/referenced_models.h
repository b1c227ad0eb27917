// Every model that a recipe names.
#pragma once

#include <vector>

#include "merge/recipe/recipe.h"

namespace pewter {

// Sources and bases of the slices in order, then the base model, those of the statistics with their
// files, the evaluation's file, those of the tokenizer, and what models are aligned to and
// with; repeated where the recipe repeats. Models of the stages too, and none that a stage makes.
std::vector<ModelRef> ReferencedModels(const Recipe& recipe);

// Those of its own document, stages among them.
std::vector<ModelRef> ModelsOfDocument(const Recipe& recipe);

}  // namespace pewter
