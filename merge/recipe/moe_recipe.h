// MoeRecipe: the text that `pewter moe` is given, parsed but unresolved. The grammar is
// mergekit-moe's, and token ids in the place of prompts.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "merge/recipe/recipe.h"

namespace pewter {

// Prompts that a router is to know, as texts and as lists of token ids.
struct MoePrompts {
  std::vector<std::string> texts;
  std::vector<std::vector<int64_t>> ids;
  bool empty() const { return texts.empty() && ids.empty(); }
  friend bool operator==(const MoePrompts&, const MoePrompts&) = default;
};

struct MoeExpert {
  ModelRef model;
  MoePrompts positive;
  MoePrompts negative;
  double noise_scale = 0;     // standard deviation of what is added to its weights
  double residual_scale = 1;  // factor of its down projections
  TextPosition at;
};

enum class MoeGate { kHiddenLast, kHiddenMean, kCheapEmbed, kRandom, kUniformRandom };

inline bool NeedsPrompts(MoeGate gate) {
  return gate != MoeGate::kRandom && gate != MoeGate::kUniformRandom;
}

struct MoeRecipe {
  std::string text;                                            // verbatim
  std::vector<std::pair<std::string, std::string>> overrides;  // applied to it
  ModelRef base_model;
  std::vector<MoeExpert> experts;
  std::vector<MoeExpert> shared_experts;
  MoeGate gate = MoeGate::kHiddenLast;
  std::optional<DType> dtype;
  int64_t experts_per_token = 2;
  std::string architecture;  // beginning of a name; empty for the first that fits
  TextPosition architecture_at;
  std::vector<std::string> warnings;
};

// InvalidArgument names line and column. Refused besides what is malformed: experts without prompts
// where the mode needs them, and experts that all have the same. `overrides` as for ParseRecipe.
absl::StatusOr<MoeRecipe> ParseMoeRecipe(
    absl::string_view text, const std::vector<std::pair<std::string, std::string>>& overrides = {});

}  // namespace pewter
