// pewter merge: recipe, plan, run, on this machine.
#include <memory>

#include "absl/status/statusor.h"
#include "base/status.h"
#include "client/commands.h"
#include "client/recipe_arguments.h"
#include "client/run_arguments.h"
#include "merge/pewter.h"

namespace pewter::client {

namespace {

struct MergeArguments {
  RecipeArguments recipe;
  PlanArguments plan;
  RunArguments run;
};

absl::StatusOr<int> RunMerge(const MergeArguments& arguments, Output& out) {
  ASSIGN_OR_RETURN(const Plan plan, arguments.plan.MakePlanOf(arguments.recipe, out));
  return arguments.run.Run(plan, "Merged into", out);
}

}  // namespace

CommandBody DeclareMerge(CLI::App& app) {
  auto arguments = std::make_shared<MergeArguments>();
  arguments->recipe.Declare(app);
  arguments->run.DeclareOutput(app, "out", "Folder to write the model to");
  arguments->run.Declare(app);
  CLI::Option* stages =
      app.add_option("-I,--intermediate-dir", arguments->run.stages,
                     "Folder for the models of a recipe's stages, which stay there; default: "
                     "OUT.stages, and they go when the output is there")
          ->type_name(kPathType);
  app.add_flag("--keep-stages", arguments->run.keep_stages, "Keep the models in OUT.stages")
      ->excludes(stages);
  arguments->plan.Declare(app);
  arguments->plan.DeclareRawNames(app);
  app.footer(
      "Examples:\n"
      "  pewter merge recipe.yaml ./merged\n"
      "  pewter merge recipe.yaml ./merged --set parameters.t=0.3 --device cuda\n"
      "  pewter merge recipe.yaml ./merged --resume    after Ctrl-C, a crash or a full disk");
  return [arguments](Output& out) { return RunMerge(*arguments, out); };
}

}  // namespace pewter::client
