// Steps that every kind of plan takes: of a recipe, of an extraction.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "merge/plan/plan.h"

namespace pewter {

// Fills in what was left to us: memory, threads, device. InvalidArgument for what makes no sense.
absl::Status ResolveOptions(PlanOptions& options);

// Sets plan.fingerprint from all the rest. `overrides` are changes of plan.recipe_text.
absl::Status SetFingerprint(const std::vector<std::pair<std::string, std::string>>& overrides,
                            Plan& plan);

// InvalidArgument when there are warnings and options.strict.
absl::Status CheckStrict(const Plan& plan);

// Names, shortened for a message.
std::string Listed(const std::vector<std::string>& names);

// Whether two tensors of one dtype and shape hold the same bytes. Reads them.
absl::StatusOr<bool> EqualBytes(const TensorSource& a, const TensorSource& b);

}  // namespace pewter
