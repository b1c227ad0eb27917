// What Decom-Renorm-Merge (merge/methods/drm.cc) does with the blocks of a joint decomposition:
// rows of norm 1 are trimmed to one threshold, signs are elected, and what agrees is averaged.
// Errors are the backend's.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "merge/methods/common/joint_space.h"
#include "merge/methods/tensor_task.h"

namespace pewter::methods {

struct TrimmedMerge {
  double density = 0.2;
  bool disjoint = true;
  std::vector<double> weights;  // by model
};

// Where its report goes.
struct TrimmedMergeReport {
  TaskContext* context = nullptr;  // null: there is none
  std::string part;
  std::vector<double> squares;  // of the models' task vectors
};

double Sign(double x);

// How many of n entries stay: all but the k - 1 smallest.
int64_t Survivors(int64_t n, double density);

// Merges the blocks; the result takes the place of the first. `largest` is the largest singular
// value.
absl::Status MergeTrimmed(kernels::Backend& backend, const JointBlocks& blocks, double largest,
                          const TrimmedMerge& options, const TrimmedMergeReport& report);

}  // namespace pewter::methods
