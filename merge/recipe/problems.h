// All that is wrong with a recipe's text, as one Status: its message has a line for each problem,
// and ProblemsOf gives them one by one.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "merge/recipe/recipe.h"

namespace pewter {

struct RecipeProblem {
  std::string message;  // "recipe:12:7: ..." where it has a place
  TextPosition at;      // of the message; 0:0 when it has none
};

// The place that a message begins with, as RecipeError writes it: 0:0 when there is none.
TextPosition PositionIn(absl::string_view message);

// OK when there are none. The code is that of the first; those after the hundredth are left out,
// and equal ones are told once.
absl::Status JoinProblems(const std::vector<absl::Status>& problems);

// One for a status that JoinProblems has not made; none for OK.
std::vector<RecipeProblem> ProblemsOf(const absl::Status& status);

}  // namespace pewter
