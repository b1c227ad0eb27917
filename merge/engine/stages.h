// The stages of a plan: merged before the output, or found as an earlier run left them.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "merge/engine/run.h"
#include "merge/plan/plan.h"

namespace pewter {

// InvalidArgument when there is no place for the plan's stages.
absl::Status CheckStagesFolder(const Plan& plan, const RunOptions& options);
// Merges the plan's stages in their order and binds each one's store to its folder; returns their
// manifests. On an error what is bound stays bound.
absl::StatusOr<std::vector<std::string>> MergeStages(const Plan& plan, const RunOptions& options);
void UnbindStages(const Plan& plan);

// Removes what the manifests of MergeStages list, but for what the user wants or nothing depends
// on.
absl::Status RemoveStages(const Plan& plan, absl::Span<const std::string> manifests,
                          const RunOptions& options);

}  // namespace pewter
