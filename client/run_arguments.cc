#include "client/run_arguments.h"

#include <cstdio>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status.h"
#include "base/units.h"
#include "client/commands.h"
#include "client/exit_code.h"
#include "client/interrupt.h"
#include "client/plan_report.h"
#include "client/progress.h"

namespace pewter::client {

namespace {

// As evaluation.json has it.
void AppendEvaluation(const Json& evaluation, std::string& text) {
  absl::StrAppendFormat(&text, "\n  loss %.4f, perplexity %.2f, accuracy %.4f of %d predictions",
                        evaluation["loss"].get<double>(), evaluation["perplexity"].get<double>(),
                        evaluation["accuracy"].get<double>(),
                        evaluation["predictions"].get<int64_t>());
  for (const auto& line : evaluation["lines"]) {
    for (const auto& curve : line["curves"]) {
      absl::StrAppendFormat(&text, "\n  %s to %s, %s: loss barrier %.3f at lambda %g",
                            line["b"].get<std::string>(), line["a"].get<std::string>(),
                            curve["label"].get<std::string>(), curve["barrier"].get<double>(),
                            curve["barrier_at"].get<double>());
    }
  }
}

void PrintResult(Output& out, absl::string_view done, const Plan& plan,
                 const PlacedManifest& placed) {
  const std::string& output = placed.output;
  const Manifest& manifest = placed.manifest;
  const double rate = manifest.seconds > 0 ? manifest.bytes_written / manifest.seconds : 0;
  const Json evaluation =
      manifest.evaluation_json.empty() ? Json() : Json::parse(manifest.evaluation_json);
  if (out.json()) {
    out.Print({{"output", output},
               {"method", plan.method},
               {"device", plan.options.device},
               {"tensors", plan.tensors.size()},
               {"shards", plan.shards.size()},
               {"shards_reused", manifest.shards_reused},
               {"reused", placed.reused},
               {"bytes_written", manifest.bytes_written},
               {"seconds", manifest.seconds},
               {"bytes_per_second", rate},
               {"fingerprint", manifest.fingerprint},
               {"evaluation", evaluation},
               {"warnings", manifest.warnings}});
    return;
  }
  if (out.quiet()) {
    out.Text(absl::StrCat(output, "\n"));
    return;
  }
  if (placed.reused) {
    out.Text(absl::StrCat(output, " holds the model of this plan already; nothing was merged\n"));
    return;
  }
  const bool model = plan.config_file == "config.json";
  std::string text = absl::StrCat(
      done, " ", output, "\n  ", FormatCount(plan.tensors.size(), model ? "tensor" : "module"),
      " in ", FormatCount(plan.shards.size(), "file"), ", ", FormatBytes(manifest.bytes_written),
      " in ", FormatSeconds(manifest.seconds), " (", FormatRate(rate), ")");
  if (manifest.shards_reused > 0) {
    absl::StrAppend(&text, "; ", FormatCount(manifest.shards_reused, "finished file"),
                    " of the interrupted run kept");
  }
  if (!evaluation.is_null()) AppendEvaluation(evaluation, text);
  if (!manifest.warnings.empty()) {
    absl::StrAppend(&text, "\n  ", FormatCount(manifest.warnings.size(), "warning"));
  }
  absl::StrAppend(&text, "\n\nNext:\n");
  if (model && !plan.config_json.empty() && !absl::StrContains(output, "://")) {
    absl::StrAppend(&text,
                    "  python3 -c \"from transformers import AutoModel; "
                    "AutoModel.from_pretrained('",
                    output, "')\"\n");
  }
  absl::StrAppend(&text, "  pewter inspect ", output, "\n");
  out.Text(text);
}

}  // namespace

CLI::Option* DeclareOnExisting(CLI::App& app, std::string& value) {
  return app
      .add_option("--on-existing", value,
                  "When OUT holds something: fail; reuse_if_identical takes the model of the same "
                  "plan that is there; new_version writes to OUT/v1, OUT/v2, ...; default: fail")
      ->type_name("fail|reuse_if_identical|new_version")
      ->check(CLI::IsMember({"fail", "reuse_if_identical", "new_version"}));
}

void RunArguments::DeclareOutput(CLI::App& app, const std::string& name, const std::string& help) {
  app.add_option(name, output, help)->required()->type_name(kPathType);
  CLI::Option* const resume_option =
      app.add_flag("--resume", resume,
                   "Continue an interrupted run of the same command, or start when there is none");
  CLI::Option* const overwrite_option =
      app.add_flag("--overwrite", overwrite, "Replace what is at OUT")->excludes(resume_option);
  DeclareOnExisting(app, on_existing)->excludes(overwrite_option);
}

void RunArguments::Declare(CLI::App& app) {
  app.add_flag("--allow-nonfinite", allow_nonfinite, "Go on when an input holds NaN or infinity");
  app.add_flag("--dry-run", dry_run, "Only show the plan, as pewter plan does");
  // Not for users: the empty group leaves it out of the help.
  app.add_flag("--no-hash", no_hash, "Leave out SHA-256, to measure what it costs")->group("");
}

absl::StatusOr<int> RunArguments::Run(const Plan& plan, absl::string_view done, Output& out) const {
  if (dry_run) {
    RETURN_IF_ERROR(PrintPlan(out, plan, {}));
    return kExitDone;
  }

  ProgressDisplay progress(ChooseProgressStyle(out, stderr), /*print_warnings=*/!out.json(),
                           stderr);
  absl::StatusOr<PlacedManifest> placed;
  {
    Interrupt interrupt([&] {
      if (!out.json()) progress.Say("interrupted; stopping (press Ctrl-C again to quit at once)");
    });
    const RunOptions options{.output = output,
                             .mode = resume      ? OutputMode::kResume
                                     : overwrite ? OutputMode::kOverwrite
                                                 : OutputMode::kNew,
                             .allow_nonfinite = allow_nonfinite,
                             .hash_output = !no_hash,
                             .stages = stages,
                             .keep_stages = keep_stages,
                             .observer = &progress,
                             .stop = interrupt.token()};
    placed = RunPlanInto(
        plan, options,
        {.on_existing = on_existing == "reuse_if_identical" ? OnExisting::kReuseIfIdentical
                        : on_existing == "new_version"      ? OnExisting::kNewVersion
                                                            : OnExisting::kFail,
         // Of an output that is named --resume says so itself.
         .own_unfinished = resume && on_existing == "new_version"});
  }
  progress.Finish();
  if (absl::IsCancelled(placed.status())) {
    return absl::CancelledError(absl::StrCat("interrupted; what is finished stays in ", output,
                                             ": the same command with --resume continues"));
  }
  if (!placed.ok()) return placed.status();
  PrintResult(out, done, plan, *placed);
  return kExitDone;
}

}  // namespace pewter::client
