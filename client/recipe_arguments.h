// The arguments that merge, plan and submit share: a recipe, and what a plan is made with.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "client/mergekit_options.h"
#include "client/output.h"
#include "merge/pewter.h"

namespace pewter::client {

// "key=value" options of any kind, split at the first '='. InvalidArgument when there is none.
absl::StatusOr<std::vector<std::pair<std::string, std::string>>> SplitAssignments(
    absl::string_view option, const std::vector<std::string>& assignments);

// A whole number from `min` to `max`.
CLI::Validator InRange(int min, int max);

// Parsed into by CLI11: must outlive the parse and stay in place.
struct RecipeArguments {
  std::string path;  // "-": standard input
  std::vector<std::string> set;

  void Declare(CLI::App& app);
  absl::StatusOr<std::string> ReadText() const;
  // Messages name the recipe's file: "merge.yaml:12:7: ...".
  absl::StatusOr<Recipe> Parse(absl::string_view text) const;
  // Puts the file's name where a message says "recipe:LINE".
  absl::Status NameFile(const absl::Status& status) const;
  std::string NameFile(absl::string_view message) const;
};

struct PlanArguments {
  std::string device = "auto";
  std::string memory;
  std::string shard_size;
  int64_t shard_bytes = 0;  // --out-shard-size; 0: not given
  int threads = 0;
  uint64_t seed = 0;
  bool allow_crimes = false;
  bool truncate_embeddings = false;
  bool tensor_intersection = false;
  bool tensor_union = false;
  bool strict = false;
  bool copy_tokenizer = true;
  bool write_model_card = true;
  MergekitOptions mergekit;

  // Those that every command has a use for that plans, those of recipes, and those of recipes and
  // of copies of one model.
  void Declare(CLI::App& app);
  void DeclareRawNames(CLI::App& app);
  void DeclareCopy(CLI::App& app);
  absl::StatusOr<PlanOptions> ToOptions() const;
  // Reads and plans the recipe; prints the plan's warnings.
  absl::StatusOr<Plan> MakePlanOf(const RecipeArguments& recipe, Output& out) const;
};

}  // namespace pewter::client
