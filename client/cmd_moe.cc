// pewter moe: a mixture of experts from dense models, on this machine.
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "base/status.h"
#include "client/commands.h"
#include "client/recipe_arguments.h"
#include "client/run_arguments.h"
#include "merge/pewter.h"

namespace pewter::client {

namespace {

struct MoeArguments {
  RecipeArguments recipe;
  PlanArguments plan;
  RunArguments run;
  MoeOptions moe;
  bool quantized = false;
};

absl::StatusOr<int> RunMoe(const MoeArguments& arguments, Output& out) {
  ASSIGN_OR_RETURN(const std::string text, arguments.recipe.ReadText());
  ASSIGN_OR_RETURN(const auto overrides, SplitAssignments("--set", arguments.recipe.set));
  const absl::StatusOr<MoeRecipe> recipe = ParseMoeRecipe(text, overrides);
  if (!recipe.ok()) return arguments.recipe.NameFile(recipe.status());
  ASSIGN_OR_RETURN(const PlanOptions options, arguments.plan.ToOptions());
  arguments.plan.mergekit.Explain(out);
  if (arguments.quantized) {
    out.Note("--load-in-4bit and --load-in-8bit change nothing: no model is run to make routers");
  }
  const absl::StatusOr<Plan> plan = MakeMoePlan(*recipe, options, arguments.moe);
  if (!plan.ok()) return arguments.recipe.NameFile(plan.status());
  for (const std::string& warning : plan->warnings) out.Warn(arguments.recipe.NameFile(warning));
  return arguments.run.Run(*plan, "Mixture in", out);
}

}  // namespace

CommandBody DeclareMoe(CLI::App& app) {
  auto arguments = std::make_shared<MoeArguments>();
  arguments->recipe.Declare(app);
  arguments->run.DeclareOutput(app, "out", "Folder to write the model to");
  arguments->run.Declare(app);
  app.add_flag("--separate-experts", arguments->moe.separate_experts,
               "Write experts one by one, as vLLM, llama.cpp and transformers 4 read them; without "
               "it those of Mixtral and Qwen3 are fused, as mergekit and transformers 5 have them");
  app.add_flag("--i-understand-this-is-not-useful-without-training", arguments->moe.allow_all_same,
               "Let all experts be the same model");
  app.add_flag("--load-in-4bit,--load-in-8bit", arguments->quantized, "Accepted, without effect")
      ->group("Options of mergekit");
  arguments->plan.Declare(app);
  app.footer(
      "Examples:\n"
      "  pewter moe mixture.yaml ./mixture --dry-run\n"
      "  pewter moe mixture.yaml ./mixture --separate-experts");
  return [arguments](Output& out) { return RunMoe(*arguments, out); };
}

}  // namespace pewter::client
