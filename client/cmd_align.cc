// pewter align: a model with its features in the order of another one's.
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/status.h"
#include "client/commands.h"
#include "client/output.h"
#include "client/recipe_arguments.h"
#include "client/run_arguments.h"
#include "merge/pewter.h"

namespace pewter::client {

namespace {

struct Arguments {
  std::string reference;
  std::string model;
  std::string method = "permutation";
  std::string evidence;
  std::string groups;
  std::string heads;
  std::string query_key;
  std::string last_stage;
  std::string mapped;
  std::optional<double> gamma;
  std::string calibration;
  std::string objective;
  std::string verify;
  int restarts = 1;
  bool print_yaml = false;
  PlanArguments plan;
  RunArguments run;
};

// As a recipe: the model by itself, aligned. JSON is YAML.
std::string RecipeText(const Arguments& arguments) {
  Json align = {{"reference", arguments.reference}, {"method", arguments.method}};
  for (const auto& [key, value] : {std::pair{"evidence", &arguments.evidence},
                                   {"heads", &arguments.heads},
                                   {"query_key", &arguments.query_key},
                                   {"last_stage", &arguments.last_stage},
                                   {"calibration", &arguments.calibration},
                                   {"objective", &arguments.objective},
                                   {"verify", &arguments.verify}}) {
    if (!value->empty()) align[key] = *value;
  }
  for (const auto& [key, value] :
       {std::pair{"groups", &arguments.groups}, {"mapped", &arguments.mapped}}) {
    if (value->empty()) continue;
    const std::vector<std::string> groups = absl::StrSplit(*value, ',');
    align[key] = groups;
  }
  if (arguments.gamma) align["gamma"] = *arguments.gamma;
  if (arguments.restarts != 1) align["restarts"] = arguments.restarts;
  const auto line = [](const Json& value) {
    return value.dump(-1, ' ', false, Json::error_handler_t::replace);
  };
  return absl::StrCat("merge_method: passthrough\nmodels: [{model: ", line(arguments.model),
                      "}]\nalign: ", line(align), "\n");
}

absl::StatusOr<int> RunAlign(const Arguments& arguments, Output& out) {
  const std::string text = RecipeText(arguments);
  if (arguments.print_yaml) out.Text(text);
  ASSIGN_OR_RETURN(const Recipe recipe, ParseRecipe(text));
  ASSIGN_OR_RETURN(const PlanOptions options, arguments.plan.ToOptions());
  arguments.plan.mergekit.Explain(out);
  ASSIGN_OR_RETURN(const Plan plan, MakePlan(recipe, options));
  for (const std::string& warning : plan.warnings) out.Warn(warning);
  return arguments.run.Run(plan, "Aligned model in", out);
}

}  // namespace

CommandBody DeclareAlign(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  app.add_option("reference", arguments->reference, "The model whose order of features counts")
      ->required()
      ->type_name(kModelType);
  app.add_option("model", arguments->model, "The model to align with it")
      ->required()
      ->type_name(kModelType);
  arguments->run.DeclareOutput(app, "out",
                               "Folder to write the aligned model and alignment.safetensors to");
  constexpr char kAlignment[] = "Alignment";
  app.add_option("--method", arguments->method, "How features are paired")
      ->type_name("permutation|staged|cca")
      ->check(CLI::IsMember({"permutation", "staged", "cca"}))
      ->capture_default_str()
      ->group(kAlignment);
  app.add_option("--evidence", arguments->evidence,
                 "What tells that features are alike; default: weights, and activations with "
                 "--calibration")
      ->type_name("activations|weights")
      ->check(CLI::IsMember({"activations", "weights"}))
      ->group(kAlignment);
  app.add_option("--groups", arguments->groups,
                 "What may move, of ffn, heads, residual, pooler and output_head; default: "
                 "ffn,heads,residual")
      ->type_name("GROUP,...")
      ->group(kAlignment);
  app.add_option("--heads", arguments->heads, "What is done inside attention heads")
      ->type_name("permutation|orthogonal")
      ->check(CLI::IsMember({"permutation", "orthogonal"}))
      ->group(kAlignment);
  app.add_option("--query-key", arguments->query_key,
                 "The order of queries and keys inside heads, by activations: their own (default), "
                 "or that of the values")
      ->type_name("own|shared")
      ->check(CLI::IsMember({"own", "shared"}))
      ->group(kAlignment);
  app.add_option("--last-stage", arguments->last_stage, "Where --method staged ends")
      ->type_name("weights|residual")
      ->check(CLI::IsMember({"weights", "residual"}))
      ->group(kAlignment);
  app.add_option(
         "--mapped", arguments->mapped,
         "With --method cca, groups of which features are mapped linearly, of heads, ffn and "
         "residual; default: heads, the only ones for which the model computes what it did")
      ->type_name("GROUP,...")
      ->group(kAlignment);
  app.add_option("--gamma", arguments->gamma,
                 "With --method cca, what is added to the variances of features; default: 0.1")
      ->type_name("X")
      ->group(kAlignment);
  app.add_option("--objective", arguments->objective,
                 "Data with labels that --method staged compares its ways by; default: "
                 "--calibration")
      ->type_name(kFileType)
      ->group(kAlignment);
  app.add_option("--calibration", arguments->calibration, "Data that activations are measured on")
      ->type_name(kFileType)
      ->group(kAlignment);
  app.add_option("--verify", arguments->verify,
                 "Data on which the aligned model must have the model's loss, before it is written")
      ->type_name(kFileType)
      ->group(kAlignment);
  app.add_option("--restarts", arguments->restarts,
                 "Ways through the groups, drawn by --seed, of which the best counts")
      ->type_name("N")
      ->check(InRange(1, 1000))
      ->capture_default_str()
      ->group(kAlignment);
  app.add_flag("--print-yaml", arguments->print_yaml, "Print the recipe");
  arguments->run.Declare(app);
  arguments->plan.Declare(app);
  app.footer(
      "The aligned model computes what the model does, with its features where the reference has "
      "theirs,\nunless --mapped says otherwise.\n"
      "Examples:\n"
      "  pewter align ./a ./b ./b-aligned\n"
      "  pewter align ./a ./b ./b-aligned --groups ffn,heads --restarts 5");
  return [arguments](Output& out) { return RunAlign(*arguments, out); };
}

}  // namespace pewter::client
