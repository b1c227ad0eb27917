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
  PrintPlan(out, plan, arguments.report);
  return kExitDone;
}

}  // namespace

CommandBody DeclarePlan(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  arguments->recipe.Declare(app);
  app.add_flag("-t,--tensors", arguments->report.every_tensor,
               "List every output tensor with its inputs and parameters");
  arguments->plan.Declare(app);
  arguments->plan.DeclareRawNames(app);
  app.footer(
      "Examples:\n"
      "  pewter plan recipe.yaml\n"
      "  pewter plan recipe.yaml -o json | jq .peak_bytes");
  return [arguments](Output& out) { return RunPlanCommand(*arguments, out); };
}

}  // namespace pewter::client
