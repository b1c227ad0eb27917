// Recipes of several documents: which depends on which.
#pragma once

#include <cstddef>
#include <vector>

#include "absl/status/statusor.h"
#include "merge/recipe/recipe.h"

namespace pewter {

inline constexpr size_t kMaxDocuments = 64;

// The recipe of the output, with the others as its stages in the order in which they can be merged
// (as written where the order is free). The output's is the one without a name; when all have one,
// the only one that no other depends on. Only references to models are taken for stages, never
// other text. InvalidArgument, with the position, for names that are given twice or cannot be used
// as a folder's name, several documents without a name, and circles.
absl::StatusOr<Recipe> LinkStages(std::vector<Recipe> documents);

}  // namespace pewter
