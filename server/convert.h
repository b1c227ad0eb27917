// The one place where messages of the wire and types of the merge library meet.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "merge/engine/existing_output.h"
#include "merge/engine/run.h"
#include "merge/methods/adapter_method.h"
#include "merge/methods/method.h"
#include "merge/plan/plan.h"
#include "merge/recipe/recipe.h"
#include "pewter/v1/job.pb.h"
#include "pewter/v1/merge_service.pb.h"

namespace pewter::server {

// The recipe with the overrides of `options` applied. Errors as ParseRecipe gives them.
absl::StatusOr<Recipe> ToRecipe(const std::string& text, const v1::MergeOptions& options);
PlanOptions ToPlanOptions(const v1::MergeOptions& options);

// A model or adapter that a recipe names.
struct RecipePath {
  std::string path;  // as written, without revision
  TextPosition at;
};
std::vector<RecipePath> PathsOf(const Recipe& recipe);

v1::JobState ToState(Phase phase);
v1::Progress ToProgress(const Progress& progress);
v1::JobOutput ToOutput(const PlacedManifest& placed);
OnExisting ToOnExisting(v1::OnExisting on_existing);
v1::MethodInfo ToMethodInfo(const MergeMethod& method);
v1::MethodInfo ToMethodInfo(const AdapterMethod& method);

// What a status of the merge library says to a client: the code as it is, and a reason for it.
v1::JobError ToJobError(const absl::Status& status);
// One for each problem that the status tells.
std::vector<v1::Finding> ToFindings(const absl::Status& status);
v1::Finding ToWarning(const std::string& message);

// With the tensors from `first` on, at most `count`.
v1::PlanSummary ToPlanSummary(const Plan& plan, int64_t first, int64_t count);

}  // namespace pewter::server
