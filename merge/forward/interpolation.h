// The models on the straight line between two.
#pragma once

#include <string>

#include "merge/forward/model.h"

namespace pewter {

// Whose tensors are lambda A + (1 - lambda) B in float32, read as they are asked for: A's bits for
// lambda = 1, B's for 0. B has A's configuration, and the tensors of A in A's shapes; a tensor that
// it lacks or has in another shape is FailedPrecondition, told by the lookup.
ForwardModel Interpolate(const ForwardModel& a, const ForwardModel& b, double lambda);

}  // namespace pewter
