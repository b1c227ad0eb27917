// pewter extract-lora: the difference of two models as a LoRA adapter.
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/dtype_names.h"
#include "base/status.h"
#include "client/commands.h"
#include "client/exit_code.h"
#include "client/plan_report.h"
#include "client/recipe_arguments.h"
#include "client/run_arguments.h"
#include "merge/pewter.h"
#include "merge/plan/extract_lora.h"

namespace pewter::client {

namespace {

struct ExtractArguments {
  std::string model;
  std::string base;
  std::string dtype = "float32";
  std::vector<std::string> rank_of;  // REGEX=N
  ExtractLoraOptions extract;
  PlanArguments plan;
  RunArguments run;
};

absl::StatusOr<ExtractLoraOptions> ToOptions(const ExtractArguments& arguments) {
  ExtractLoraOptions options = arguments.extract;
  ASSIGN_OR_RETURN(options.model, ParseModelRef(arguments.model));
  ASSIGN_OR_RETURN(options.base, ParseModelRef(arguments.base));
  ASSIGN_OR_RETURN(options.dtype, DTypeFromTorch(arguments.dtype));
  for (const std::string& text : arguments.rank_of) {
    // The last '=': a regular expression may have some.
    const size_t at = text.rfind('=');
    int64_t rank = 0;
    if (at == std::string::npos || !absl::SimpleAtoi(text.substr(at + 1), &rank)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--rank-of ", text, ": want REGEX=N, as in --rank-of 'mlp=16'"));
    }
    options.rank_of.emplace_back(text.substr(0, at), rank);
  }
  return options;
}

absl::StatusOr<int> RunExtract(const ExtractArguments& arguments, Output& out) {
  ASSIGN_OR_RETURN(const ExtractLoraOptions extract, ToOptions(arguments));
  ASSIGN_OR_RETURN(const PlanOptions options, arguments.plan.ToOptions());
  arguments.plan.mergekit.Explain(out);
  if (!out.json() && (extract.energy > 0 || extract.sv_epsilon > 0)) {
    out.Note("finding singular values, to choose ranks by");
  }
  ASSIGN_OR_RETURN(const Plan plan, MakeExtractLoraPlan(extract, options));
  for (const std::string& warning : plan.warnings) out.Warn(warning);
  return arguments.run.Run(plan, "Adapter in", out);
}

}  // namespace

CommandBody DeclareExtractLora(CLI::App& app) {
  auto arguments = std::make_shared<ExtractArguments>();
  ExtractLoraOptions& extract = arguments->extract;
  app.add_option("--model", arguments->model, "The fine-tuned model")
      ->required()
      ->type_name(kModelType);
  app.add_option("--base-model", arguments->base, "What it was tuned from")
      ->required()
      ->type_name(kModelType);
  arguments->run.DeclareOutput(app, "--out-path", "Folder to write the adapter to");
  constexpr char kRanks[] = "Ranks";
  app.add_option("--max-rank", extract.max_rank, "Largest rank of a module")
      ->type_name("N")
      ->check(InRange(1, 1 << 20))
      ->capture_default_str()
      ->group(kRanks);
  app.add_option("--rank-of", arguments->rank_of,
                 "Largest rank of the modules whose name matches; the first that matches counts")
      ->type_name("REGEX=N")
      ->allow_extra_args(false)
      ->group(kRanks);
  app.add_option("--energy", extract.energy,
                 "Least rank that keeps this share of the squared singular values, as in 0.99")
      ->type_name("SHARE")
      ->group(kRanks);
  app.add_option("--sv-epsilon", extract.sv_epsilon, "Drop singular values up to this")
      ->type_name("VALUE")
      ->group(kRanks);
  constexpr char kModules[] = "Modules";
  app.add_option("-i,--include-regex", extract.include, "Only modules whose name matches one")
      ->type_name("REGEX")
      ->allow_extra_args(false)
      ->group(kModules);
  app.add_option("-e,--exclude-regex", extract.exclude, "No modules whose name matches one")
      ->type_name("REGEX")
      ->allow_extra_args(false)
      ->group(kModules);
  app.add_option("--save-module", extract.save_modules, "Modules to save whole, by name")
      ->type_name("NAME")
      ->allow_extra_args(false)
      ->group(kModules);
  app.add_flag("--embed-lora", extract.embed_lora,
               "Embeddings and output heads as factors; they are saved whole otherwise")
      ->group(kModules);
  app.add_flag("--skip-undecomposable", extract.skip_undecomposable,
               "Leave out what cannot be factors, norms for one; it is saved whole otherwise")
      ->group(kModules);
  app.add_flag("--distribute-scale,!--no-distribute-scale", extract.distribute_scale,
               "Roots of the singular values into both factors (the default), or all into A");
  app.add_option("--dtype", arguments->dtype, "Of the factors")
      ->type_name("float32|float16|bfloat16")
      ->check(CLI::IsMember({"float32", "float16", "bfloat16"}))
      ->capture_default_str();
  arguments->run.Declare(app);
  arguments->plan.Declare(app);
  app.footer(
      "Examples:\n"
      "  pewter extract-lora --model ./tuned --base-model ./base --out-path ./lora --max-rank 32\n"
      "  pewter extract-lora --model ./tuned --base-model ./base --out-path ./lora --energy 0.95\n"
      "      --rank-of 'mlp\\.=64' --exclude-regex lm_head");
  return [arguments](Output& out) { return RunExtract(*arguments, out); };
}

}  // namespace pewter::client
