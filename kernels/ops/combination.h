// Combinations of models with coefficients for each row or column:
//   out = sum_i c_i x_i, or base + sum_i c_i (x_i - base), where the base is x[0].
#pragma once

#include "kernels/ops/op.h"

namespace pewter::kernels {

struct AxisCombination {
  int count = 0;  // models, the base excluded
  bool from_base = false;
  AxisValues axis;  // the coefficients

  PEWTER_HD int inputs() const { return count + (from_base ? 1 : 0); }

  template <class X>
  PEWTER_HD typename X::Value operator()(const X& x) const {
    using V = typename X::Value;
    if (!from_base) {
      V sum = x[0] * x.Of(axis, 0);
      for (int i = 1; i < count; ++i) sum = sum + x[i] * x.Of(axis, i);
      return sum;
    }
    const V base = x[0];
    V sum = V::Broadcast(0);
    for (int i = 0; i < count; ++i) sum = sum + (x[1 + i] - base) * x.Of(axis, i);
    return base + sum;
  }
};

}  // namespace pewter::kernels
