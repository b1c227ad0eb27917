// The ops that each backend implements; adding an op is adding its header and its name here.
#pragma once

#include <variant>

#include "kernels/ops/combination.h"
#include "kernels/ops/elected_mean.h"
#include "kernels/ops/fisher_mean.h"
#include "kernels/ops/fusion.h"
#include "kernels/ops/near_swap.h"
#include "kernels/ops/overlap.h"
#include "kernels/ops/reduce_ops.h"
#include "kernels/ops/select_calculate_erase.h"
#include "kernels/ops/task_vector.h"
#include "kernels/ops/weighted_sum.h"

namespace pewter::kernels {

using MapOp = std::variant<WeightedSum, TaskVectorSum, NearSwap, OverlapMean, AxisCombination,
                           SelectedMean, ImportantElements, ElectedMean, FisherMean>;
using ReduceOp =
    std::variant<DotNorms, Gram, DeltaAbsSums, OverlapCounts, SelectedSquares, CountVarying,
                 Largest, ExpSums, SoftmaxDivergence, ElectedSigns, FisherSums>;
using MagnitudeOp = std::variant<DeltaMagnitude, ModelVariance, Importance, ScaledMagnitude>;

// Elements of the rows that the views of an op must hold whole; 0: they need not.
template <class Op>
int64_t WholeRows(const Op& op) {
  if constexpr (requires { op.whole_rows(); }) {
    return op.whole_rows();
  } else {
    return 0;
  }
}

// The values of rows or columns that an op reads; null when it reads none.
template <class Op>
AxisValues* AxisOf(Op& op) {
  if constexpr (requires { op.axis; }) {
    return &op.axis;
  } else if constexpr (requires { op.importance; }) {
    return &op.importance.axis;
  } else if constexpr (requires { op.task.axis; }) {
    return &op.task.axis;
  } else {
    return nullptr;
  }
}

}  // namespace pewter::kernels
