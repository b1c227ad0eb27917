// ParseRecipe and ParseMoeRecipe on any bytes: no crash, no exception, bounded time; every refusal
// is InvalidArgument. Text before the first 0xFF byte is the recipe, the rest an override.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "merge/recipe/moe_recipe.h"
#include "merge/recipe/recipe.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t cut = input.find('\xff');
  std::vector<std::pair<std::string, std::string>> overrides;
  if (cut != absl::string_view::npos) {
    const absl::string_view rest = input.substr(cut + 1);
    const size_t equals = rest.find('=');
    if (equals != absl::string_view::npos) {
      overrides.emplace_back(rest.substr(0, equals), rest.substr(equals + 1));
    }
  }
  const absl::StatusOr<pewter::MoeRecipe> mixture =
      pewter::ParseMoeRecipe(input.substr(0, cut), overrides);
  if (mixture.ok()) {
    if (mixture->base_model.ToString().empty() || mixture->experts.empty()) abort();
  } else if (!absl::IsInvalidArgument(mixture.status()) || mixture.status().message().empty()) {
    abort();
  }
  const absl::StatusOr<pewter::Recipe> recipe =
      pewter::ParseRecipe(input.substr(0, cut), overrides);
  if (!recipe.ok()) {
    if (!absl::IsInvalidArgument(recipe.status()) || recipe.status().message().empty()) abort();
    return 0;
  }
  // What was accepted can be used.
  if (recipe->merge_method.empty() || recipe->modules.empty()) abort();
  for (const pewter::RecipeModule& module : recipe->modules) {
    for (const pewter::RecipeSlice& slice : module.slices) {
      for (const pewter::RecipeSource& source : slice.sources) {
        if (source.model.ToString().empty()) abort();
      }
    }
  }
  return 0;
}
