// What the task-vector family shares (task_arithmetic, ties, breadcrumbs, dare_*, della*; formulas
// above kernels/ops/task_vector.h): parameters with mergekit's names, and the run: sparsify,
// rescale, weigh, elect, normalise, add to the base.
#pragma once

#include <vector>

#include "absl/status/status.h"
#include "merge/methods/method.h"

namespace pewter::methods {

enum class Sparsifier {
  kNone,
  kMagnitude,  // keep the floor(density n) largest, at least one; equal magnitudes: lowest index
               // first
  kBand,       // drop the floor(gamma n) largest, or what density leaves, keep the next
               // floor(density n)
  kRandom,     // keep each with probability `density`
  kRanked,     // likewise, from density - epsilon to density + epsilon by its rank in its row
};

struct TaskVectorOptions {
  Sparsifier sparsifier = Sparsifier::kNone;
  bool elect_sign = false;
};

// `normalize` and `rescale` are the family member's defaults. Without a sparsifier, density and
// rescale are accepted and have no effect, as in mergekit.
std::vector<Param> TaskVectorParams(const TaskVectorOptions& options, bool normalize, bool rescale);

absl::Status RunTaskVectors(MethodContext& context, const TaskVectorOptions& options);

}  // namespace pewter::methods
