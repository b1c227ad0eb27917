// Plans of `pewter moe`: a mixture of experts from dense models. Everything but the MLPs is the
// base model's, every source model's MLP becomes an expert, and routers are made from prompts or at
// random. The plan is run by the same engine as a merge. Headers are read, and by the gate's mode
// the rows of the base's input embedding of the prompts' tokens, or all of the base's weights,
// layer by layer, to run it on the prompts.
#pragma once

#include "absl/status/statusor.h"
#include "merge/plan/plan.h"
#include "merge/recipe/moe_recipe.h"

namespace pewter {

struct MoeOptions {
  // Experts one by one, as most readers of mixtures know them; else as mergekit writes them: fused
  // in Mixtral's and Qwen3's style, as transformers 5 has them, one by one in the others.
  bool separate_experts = false;
  bool allow_all_same = false;  // all experts from one model
};

// InvalidArgument when the recipe asks for what no style of output can be; FailedPrecondition when
// the models do not fit one.
absl::StatusOr<Plan> MakeMoePlan(const MoeRecipe& recipe, const PlanOptions& options,
                                 const MoeOptions& moe);

}  // namespace pewter
