// pewter plan: everything that merging would do, without reading a tensor.
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "base/status.h"
#include "client/commands.h"
#include "client/exit_code.h"
#include "client/plan_report.h"
#include "client/recipe_arguments.h"
#include "merge/pewter.h"

namespace pewter::client {

namespace {

struct Arguments {
  RecipeArguments recipe;
  PlanArguments plan;
  PlanReportOptions report;
};

absl::StatusOr<int> RunPlanCommand(const Arguments& arguments, Output& out) {
  ASSIGN_OR_RETURN(const Plan plan, arguments.plan.MakePlanOf(arguments.recipe, out));
  RETURN_IF_ERROR(PrintPlan(out, plan, arguments.report));
  return kExitDone;
}

}  // namespace

CommandBody DeclarePlan(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  arguments->recipe.Declare(app);
  app.add_flag(
      "-t,--tensors,--full", arguments->report.every_tensor,
      "Explain every output tensor: inputs, parameters and where they were set, decisions");
  app.add_option("--tensor", arguments->report.tensors,
                 "Explain only this output tensor, or those that match a pattern")
      ->type_name("NAME|GLOB")
      ->allow_extra_args(false);
  arguments->plan.Declare(app);
  arguments->plan.DeclareRawNames(app);
  app.footer(
      "Examples:\n"
      "  pewter plan recipe.yaml\n"
      "  pewter plan recipe.yaml --tensor 'model.layers.7.*'\n"
      "  pewter plan recipe.yaml -o json | jq .peak_bytes");
  return [arguments](Output& out) { return RunPlanCommand(*arguments, out); };
}

}  // namespace pewter::client
