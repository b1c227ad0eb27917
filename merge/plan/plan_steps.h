// Steps that every kind of plan takes: of a recipe, a mixture, an extraction, a merge of adapters.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "merge/plan/plan.h"

namespace pewter {

// Fills in what was left to us: memory, threads, device. InvalidArgument for what makes no sense.
absl::Status ResolveOptions(PlanOptions& options);

// Adds a model with its files and its warnings, which name it as a `kind`. Returns its index.
int AddModel(absl::string_view kind, std::string ref, std::shared_ptr<const Checkpoint> checkpoint,
             Plan& plan);

// The last step, when tensors, shards and files are there: sets the memory that the run needs and
// the fingerprint of all the rest. `overrides` are changes of plan.recipe_text. ResourceExhausted
// as SizeRun; InvalidArgument when there are warnings and options.strict.
absl::Status FinishPlan(const std::vector<std::pair<std::string, std::string>>& overrides,
                        Plan& plan);

// Names, shortened for a message.
std::string Listed(const std::vector<std::string>& names);

// Whether two tensors of one dtype and shape hold the same bytes. Reads them.
absl::StatusOr<bool> EqualBytes(const TensorSource& a, const TensorSource& b);

}  // namespace pewter
