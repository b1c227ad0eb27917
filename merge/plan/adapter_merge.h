// A plan that merges LoRA adapters into one adapter (`output: {format: lora}`): neither a base nor
// an architecture takes part, and the output's modules are those of the inputs.
//
//   adapter_model.safetensors   the factors of each module that an input changes, and what inputs
//   save
//                               whole; each under PEFT's name
//   adapter_config.json         ranks, with lora_alpha = rank: scales and weights are in the
//   factors
//
// A module that some adapters do not change is merged from those that do. What is saved whole
// (modules_to_save) has no merge: it is copied when one adapter has it, or all the same.
#pragma once

#include "absl/status/statusor.h"
#include "merge/plan/plan.h"
#include "merge/recipe/recipe.h"

namespace pewter {

absl::StatusOr<Plan> MakeAdapterMergePlan(const Recipe& recipe, const PlanOptions& options);

}  // namespace pewter
