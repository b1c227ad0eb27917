// What a run does when its output holds something already, in one place for every front.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "merge/engine/run.h"
#include "merge/plan/plan.h"

namespace pewter {

enum class OnExisting {
  kFail,              // as RunOptions::mode says
  kReuseIfIdentical,  // a finished model of the plan's fingerprint is the result; else kFail
  kNewVersion,        // the output is OUTPUT/v1, OUTPUT/v2, ...: the first number after those there
};

struct ExistingOutput {
  OnExisting on_existing = OnExisting::kFail;
  // What an earlier attempt of this very run may have left, in the newest version: an unfinished
  // run of the plan is resumed, a finished model of the plan and RunOptions::job is the result.
  bool own_unfinished = false;
  bool own_finished = false;
};

struct PlacedManifest {
  std::string output;  // where the model is: RunOptions::output, or below it
  Manifest manifest;
  bool reused = false;  // it was there, and nothing was merged
};

// RunPlan for an output that may hold something. Of runs that take a new version together each gets
// one of its own, as RunPlan lets one of them begin.
absl::StatusOr<PlacedManifest> RunPlanInto(const Plan& plan, RunOptions options,
                                           const ExistingOutput& existing);

}  // namespace pewter
