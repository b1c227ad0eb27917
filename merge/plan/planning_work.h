// Work on the values of tensors while planning, where the plan itself depends on them: ranks that
// follow from singular values.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/backend.h"
#include "merge/checkpoint/tensor_source.h"
#include "merge/methods/tensor_task.h"
#include "merge/plan/plan.h"

namespace pewter {

// All elements, in the backend's memory.
absl::StatusOr<std::unique_ptr<kernels::Buffer>> LoadWhole(kernels::Backend& backend,
                                                           const TensorSource& source);

// What `task` gives for `inputs`, floats.
absl::StatusOr<std::vector<float>> RunWhilePlanning(kernels::Backend& backend,
                                                    const TensorTask& task, int64_t elements,
                                                    const std::vector<PlanInput>& inputs);

// fn(backend, i) for each i below `count`, each on one thread of its own backend, as many at a time
// as the plan's threads and memory allow: one holds `bytes` at most. Returns the first error.
// ResourceExhausted when not even one fits; `what` says what needs the memory.
absl::Status ForEachWhilePlanning(
    const PlanOptions& options, int64_t count, int64_t bytes, absl::string_view what,
    absl::FunctionRef<absl::Status(kernels::Backend& backend, int64_t i)> fn);

// How many of the singular values, largest first, are the fewest that keep the share `energy` of
// their squares' sum: at most `most`, and none that is not above `epsilon`. An energy of 0: all.
int64_t RankOfEnergy(const std::vector<double>& values, int64_t most, double epsilon,
                     double energy);

}  // namespace pewter
