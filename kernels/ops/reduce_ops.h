// Terms that are summed over a tensor, and magnitudes that are ranked. A reduce op is
//   template <class V, class I> PEWTER_HD void operator()(const V* x, I index, V* terms) const;
// Its terms are computed in the compute type and accumulated in double.
#pragma once

#include "kernels/ops/task_vector.h"

namespace pewter::kernels {

// x0.x0, x1.x1, x0.x1: norms and the angle of SLERP.
struct DotNorms {
  static constexpr int kTerms = 3;
};

// For each model: sum |delta|, sum |kept delta| (scale not applied): the L1-preserving rescale of
// mergekit. Terms 2i and 2i + 1 belong to model i.
struct DeltaAbsSums {
  TaskVectorSum task;
};

// For each model: how many |delta| equal its threshold. One term a model.
struct CountEqualMagnitude {
  TaskVectorSum task;
};

// |x[1] - x[0]| of two inputs (base, model), or |x[0]| of one.
struct DeltaMagnitude {
  int count = 2;
};

}  // namespace pewter::kernels
