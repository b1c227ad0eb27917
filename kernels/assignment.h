// Linear assignment: for a square matrix of costs the permutation q that makes the sum of
// costs[i][q[i]] least, or greatest. Exact.
//
// Shortest augmenting paths after column reduction and augmenting row reduction (Jonker and
// Volgenant, Computing 38, 1987), in double, with the scans of rows vectorised. Results do not
// depend on threads or on the instruction set. O(size^3) at worst, O(size) memory besides the
// costs.
//
// Errors: Internal for arguments that do not fit together, FailedPrecondition for costs that are
// not finite.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/linear_algebra.h"

namespace pewter::kernels {

struct AssignmentProblem {
  ConstMatrix costs;  // square, on the host, F32 or F64
  bool maximize = false;
  // Where to start: Assignment::prices of a problem that is like this one (an earlier sweep over
  // features that have moved little); empty for none. They change the time, not the optimum.
  absl::Span<const double> prices = {};
};

struct Assignment {
  std::vector<int32_t> columns;  // [size]: of each row
  double total = 0;              // the optimum
  std::vector<double> prices;    // [size]: the dual value of each column
};

absl::StatusOr<Assignment> SolveAssignment(const AssignmentProblem& problem);
// Problems that do not depend on each other, on `threads` threads.
absl::StatusOr<std::vector<Assignment>> SolveAssignments(
    absl::Span<const AssignmentProblem> problems, int threads);

}  // namespace pewter::kernels
