// pewter merge: recipe, plan, run, on this machine.
#include <cstdio>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "base/units.h"
#include "client/commands.h"
#include "client/exit_code.h"
#include "client/interrupt.h"
#include "client/plan_report.h"
#include "client/progress.h"
#include "client/recipe_arguments.h"
#include "merge/pewter.h"

namespace pewter::client {

namespace {

struct MergeArguments {
  RecipeArguments recipe;
  PlanArguments plan;
  std::string output;
  bool resume = false;
  bool overwrite = false;
  bool allow_nonfinite = false;
  bool dry_run = false;
  bool no_hash = false;
  std::string stages;
  bool keep_stages = false;
};

void PrintResult(Output& out, const MergeArguments& arguments, const Plan& plan,
                 const Manifest& manifest) {
  const double rate = manifest.seconds > 0 ? manifest.bytes_written / manifest.seconds : 0;
  if (out.json()) {
    out.Print({{"output", arguments.output},
               {"method", plan.method},
               {"device", plan.options.device},
               {"tensors", plan.tensors.size()},
               {"shards", plan.shards.size()},
               {"shards_reused", manifest.shards_reused},
               {"bytes_written", manifest.bytes_written},
               {"seconds", manifest.seconds},
               {"bytes_per_second", rate},
               {"fingerprint", manifest.fingerprint},
               {"warnings", manifest.warnings}});
    return;
  }
  if (out.quiet()) {
    out.Text(absl::StrCat(arguments.output, "\n"));
    return;
  }
  std::string text = absl::StrCat(
      "Merged into ", arguments.output, "\n  ", FormatCount(plan.tensors.size(), "tensor"), " in ",
      FormatCount(plan.shards.size(), "file"), ", ", FormatBytes(manifest.bytes_written), " in ",
      FormatSeconds(manifest.seconds), " (", FormatRate(rate), ")");
  if (manifest.shards_reused > 0) {
    absl::StrAppend(&text, "; ", FormatCount(manifest.shards_reused, "finished file"),
                    " of the interrupted run kept");
  }
  if (!manifest.warnings.empty()) {
    absl::StrAppend(&text, "\n  ", FormatCount(manifest.warnings.size(), "warning"));
  }
  absl::StrAppend(&text, "\n\nNext:\n");
  if (!plan.config_json.empty()) {
    absl::StrAppend(&text,
                    "  python3 -c \"from transformers import AutoModel; "
                    "AutoModel.from_pretrained('",
                    arguments.output, "')\"\n");
  }
  absl::StrAppend(&text, "  pewter inspect ", arguments.output, "\n");
  out.Text(text);
}

absl::StatusOr<int> RunMerge(const MergeArguments& arguments, Output& out) {
  ASSIGN_OR_RETURN(const Plan plan, arguments.plan.MakePlanOf(arguments.recipe, out));
  if (arguments.dry_run) {
    PrintPlan(out, plan, {});
    return kExitDone;
  }

  ProgressDisplay progress(ChooseProgressStyle(out, stderr), /*print_warnings=*/!out.json(),
                           stderr);
  absl::StatusOr<Manifest> manifest;
  {
    Interrupt interrupt([&] {
      if (!out.json()) progress.Say("interrupted; stopping (press Ctrl-C again to quit at once)");
    });
    manifest = RunPlan(plan, {.output = arguments.output,
                              .mode = arguments.resume      ? OutputMode::kResume
                                      : arguments.overwrite ? OutputMode::kOverwrite
                                                            : OutputMode::kNew,
                              .allow_nonfinite = arguments.allow_nonfinite,
                              .hash_output = !arguments.no_hash,
                              .stages = arguments.stages,
                              .keep_stages = arguments.keep_stages,
                              .observer = &progress,
                              .stop = interrupt.token()});
  }
  progress.Finish();
  if (absl::IsCancelled(manifest.status())) {
    return absl::CancelledError(absl::StrCat("interrupted; what is finished stays in ",
                                             arguments.output,
                                             ": the same command with --resume continues"));
  }
  if (!manifest.ok()) return manifest.status();
  PrintResult(out, arguments, plan, *manifest);
  return kExitDone;
}

}  // namespace

CommandBody DeclareMerge(CLI::App& app) {
  auto arguments = std::make_shared<MergeArguments>();
  arguments->recipe.Declare(app);
  app.add_option("out", arguments->output, "Folder to write the model to")
      ->required()
      ->type_name(kPathType);
  CLI::Option* resume =
      app.add_flag("--resume", arguments->resume,
                   "Continue an interrupted run of the same recipe, or start when there is none");
  app.add_flag("--overwrite", arguments->overwrite, "Replace what is at OUT")->excludes(resume);
  app.add_flag("--allow-nonfinite", arguments->allow_nonfinite,
               "Go on when an input holds NaN or infinity");
  app.add_flag("--dry-run", arguments->dry_run, "Only show the plan, as pewter plan does");
  CLI::Option* stages =
      app.add_option("-I,--intermediate-dir", arguments->stages,
                     "Folder for the models of a recipe's stages, which stay there; default: "
                     "OUT.stages, and they go when the output is there")
          ->type_name(kPathType);
  app.add_flag("--keep-stages", arguments->keep_stages, "Keep the models in OUT.stages")
      ->excludes(stages);
  // Not for users: the empty group leaves it out of the help.
  app.add_flag("--no-hash", arguments->no_hash, "Leave out SHA-256, to measure what it costs")
      ->group("");
  arguments->plan.Declare(app);
  app.footer(
      "Examples:\n"
      "  pewter merge recipe.yaml ./merged\n"
      "  pewter merge recipe.yaml ./merged --set parameters.t=0.3 --device cuda\n"
      "  pewter merge recipe.yaml ./merged --resume    after Ctrl-C, a crash or a full disk");
  return [arguments](Output& out) { return RunMerge(*arguments, out); };
}

}  // namespace pewter::client
