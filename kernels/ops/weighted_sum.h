// sum_i weight_i x_i / divisor: linear merges, SLERP's blend, scaling. Source: mergekit `linear`;
// the accumulation order is that of the inputs.
#pragma once

#include "kernels/ops/op.h"

namespace pewter::kernels {

struct WeightedSum {
  int count = 0;
  double weight[kMaxInputs] = {};
  double divisor = 1;

  PEWTER_HD int inputs() const { return count; }

  template <class X>
  PEWTER_HD typename X::Value operator()(const X& x) const {
    using V = typename X::Value;
    using T = typename V::Scalar;
    V sum = x[0] * static_cast<T>(weight[0]);
    for (int i = 1; i < count; ++i) sum = sum + x[i] * static_cast<T>(weight[i]);
    return divisor == 1 ? sum : sum / static_cast<T>(divisor);
  }
};

}  // namespace pewter::kernels
