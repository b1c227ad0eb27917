// The ops that each backend implements; adding an op is adding its header and its name here.
#pragma once

#include <variant>

#include "kernels/ops/near_swap.h"
#include "kernels/ops/overlap.h"
#include "kernels/ops/reduce_ops.h"
#include "kernels/ops/task_vector.h"
#include "kernels/ops/weighted_sum.h"

namespace pewter::kernels {

using MapOp = std::variant<WeightedSum, TaskVectorSum, NearSwap, OverlapMean>;
using ReduceOp = std::variant<DotNorms, Gram, DeltaAbsSums, CountEqualMagnitude, OverlapCounts>;
using MagnitudeOp = std::variant<DeltaMagnitude>;

}  // namespace pewter::kernels
