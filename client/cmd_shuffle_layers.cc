// pewter shuffle-layers: layers of several models, drawn at random, stacked into one.
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "client/commands.h"
#include "client/exit_code.h"
#include "client/recipe_arguments.h"
#include "client/run_arguments.h"
#include "merge/checkpoint/architecture.h"
#include "merge/checkpoint/checkpoint.h"
#include "merge/pewter.h"
#include "merge/recipe/layer_shuffle.h"

namespace pewter::client {

namespace {

struct Arguments {
  std::vector<std::string> models;
  std::vector<double> weights;
  bool full_random = false;
  bool print_yaml = false;
  std::string write_yaml;
  bool fp16 = false;
  PlanArguments plan;
  RunArguments run;
};

absl::StatusOr<int64_t> LayersOf(const std::string& model) {
  ASSIGN_OR_RETURN(const ModelRef ref, ParseModelRef(model));
  ASSIGN_OR_RETURN(const std::shared_ptr<const Checkpoint> checkpoint, Checkpoint::Open(ref));
  ASSIGN_OR_RETURN(const std::shared_ptr<const Architecture> architecture,
                   ResolveArchitecture({checkpoint}, /*allow_mixed=*/false));
  if (architecture->modules().size() != 1) {
    return absl::FailedPreconditionError(
        absl::StrCat("model ", model, " has several stacks of layers"));
  }
  ASSIGN_OR_RETURN(const int64_t layers, architecture->modules().front()->LayerCount(*checkpoint));
  if (layers == 0) {
    return absl::FailedPreconditionError(absl::StrCat("model ", model, " has no layers"));
  }
  return layers;
}

absl::StatusOr<int> RunShuffle(const Arguments& arguments, Output& out) {
  if (arguments.weights.size() != arguments.models.size()) {
    return absl::InvalidArgumentError(absl::StrCat("there are ", arguments.models.size(),
                                                   " models and ", arguments.weights.size(),
                                                   " weights; give one --weight for each --model"));
  }
  std::vector<ShuffleModel> models;
  for (size_t i = 0; i < arguments.models.size(); ++i) {
    ASSIGN_OR_RETURN(const int64_t layers, LayersOf(arguments.models[i]));
    models.push_back(
        {.ref = arguments.models[i], .weight = arguments.weights[i], .layers = layers});
  }
  ASSIGN_OR_RETURN(
      const std::string text,
      ShuffleLayers(models, arguments.full_random ? ShuffleOrder::kFull : ShuffleOrder::kKept,
                    arguments.plan.seed, arguments.fp16 ? "float16" : ""));
  if (arguments.print_yaml) out.Text(text);
  if (!arguments.write_yaml.empty()) {
    std::ofstream file(arguments.write_yaml, std::ios::binary);
    file << text;
    if (!file.flush()) {
      return absl::PermissionDeniedError(absl::StrCat("cannot write ", arguments.write_yaml));
    }
  }
  ASSIGN_OR_RETURN(const Recipe recipe, ParseRecipe(text));
  ASSIGN_OR_RETURN(const PlanOptions options, arguments.plan.ToOptions());
  arguments.plan.mergekit.Explain(out);
  ASSIGN_OR_RETURN(const Plan plan, MakePlan(recipe, options));
  for (const std::string& warning : plan.warnings) out.Warn(warning);
  // The recipe was what was asked for.
  if (arguments.run.dry_run && arguments.print_yaml) return kExitDone;
  return arguments.run.Run(plan, "Merged into", out);
}

}  // namespace

CommandBody DeclareShuffleLayers(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  arguments->run.DeclareOutput(app, "out", "Folder to write the model to");
  app.add_option("-m,--model", arguments->models, "A model to draw layers from; several times")
      ->required()
      ->type_name(kModelType)
      ->allow_extra_args(false);
  app.add_option("-w,--weight", arguments->weights,
                 "Of each model: how likely a layer is to be its own; with --full-random the share "
                 "of its layers")
      ->required()
      ->type_name("NUMBER")
      ->allow_extra_args(false);
  app.add_flag("--full-random", arguments->full_random,
               "Any layers in any order; without it layer i of the output is layer i of a model");
  app.add_flag("--print-yaml", arguments->print_yaml, "Print the recipe");
  app.add_option("--write-yaml", arguments->write_yaml, "Write the recipe to a file, too")
      ->type_name(kFileType);
  app.add_flag("--fp16,!--no-fp16", arguments->fp16, "Write float16");
  arguments->run.Declare(app);
  arguments->plan.Declare(app);
  app.footer(
      "Examples:\n"
      "  pewter shuffle-layers ./mixed -m ./a -w 2 -m ./b -w 1 --seed 7\n"
      "  pewter shuffle-layers ./mixed -m ./a -w 0.5 -m ./b -w 0.5 --full-random --dry-run "
      "--print-yaml");
  return [arguments](Output& out) { return RunShuffle(*arguments, out); };
}

}  // namespace pewter::client
