// pewter convert: one model, written as safetensors.
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/status.h"
#include "client/commands.h"
#include "client/recipe_arguments.h"
#include "client/run_arguments.h"
#include "merge/pewter.h"

namespace pewter::client {

namespace {

struct Arguments {
  std::string model;
  RunArguments run;
  std::string dtype;
  PlanArguments plan;
};

// Without the place in the recipe, which the user did not write.
absl::string_view WithoutPlace(absl::string_view message) {
  absl::string_view rest = message;
  if (!absl::ConsumePrefix(&rest, "recipe:")) return message;
  const size_t end = rest.find(": ");
  return end == absl::string_view::npos ? message : rest.substr(end + 2);
}

absl::StatusOr<Plan> PlanConversion(const Arguments& arguments) {
  std::string text = absl::StrCat(
      "merge_method: passthrough\nmodels:\n  - model: ",
      Json(arguments.model).dump(-1, ' ', false, Json::error_handler_t::replace), "\n");
  if (!arguments.dtype.empty()) absl::StrAppend(&text, "dtype: ", arguments.dtype, "\n");
  ASSIGN_OR_RETURN(const Recipe recipe, ParseRecipe(text));
  ASSIGN_OR_RETURN(PlanOptions options, arguments.plan.ToOptions());
  options.device = "cpu";
  options.write_model_card = false;
  options.name_by_name = true;
  return MakePlan(recipe, options);
}

absl::StatusOr<int> RunConvert(const Arguments& arguments, Output& out) {
  arguments.plan.mergekit.Explain(out);
  const absl::StatusOr<Plan> plan = PlanConversion(arguments);
  if (!plan.ok()) {
    return absl::Status(plan.status().code(), WithoutPlace(plan.status().message()));
  }
  for (const std::string& warning : plan->warnings) out.Warn(std::string(WithoutPlace(warning)));
  return arguments.run.Run(*plan, "Converted into", out);
}

}  // namespace

CommandBody DeclareConvert(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  app.add_option("model", arguments->model,
                 "Model: a folder, a .safetensors, .bin, .pt or .pth file, hf://ORG/NAME, "
                 "MODEL+ADAPTER")
      ->required()
      ->type_name(kModelType);
  arguments->run.DeclareOutput(app, "out", "Folder to write the model to");
  // A copy keeps what there is, NaN included, and says so.
  arguments->run.allow_nonfinite = true;
  static constexpr char kDTypes[] = "float32|float16|bfloat16|float64";
  app.add_option("--dtype", arguments->dtype,
                 "Round floating tensors to this type; default: each keeps its own")
      ->type_name(kDTypes)
      ->check(CLI::Validator(
          [](std::string& text) {
            for (absl::string_view dtype : absl::StrSplit(kDTypes, '|')) {
              if (text == dtype) return std::string();
            }
            return absl::StrCat("expected one of ", kDTypes, ", not ", text);
          },
          ""));
  arguments->plan.DeclareCopy(app);
  app.footer(
      "Every tensor is copied, with the configuration and the tokenizer where the model is a\n"
      "folder. Files of PyTorch are read without running anything that is in them.\n"
      "\nExamples:\n"
      "  pewter convert ./old-model ./model\n"
      "  pewter convert pytorch_model.bin ./model --dtype bfloat16");
  return [arguments](Output& out) { return RunConvert(*arguments, out); };
}

}  // namespace pewter::client
