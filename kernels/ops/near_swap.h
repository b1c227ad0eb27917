// Elements of a second model taken as far as they are near the first's (mergekit `nearswap`):
//   w = clamp(t / max(|x1 - x0|, 1e-6), 0, 1), out = w x1 + (1 - w) x0
#pragma once

#include "kernels/ops/op.h"

namespace pewter::kernels {

struct NearSwap {
  double t = 0;

  PEWTER_HD int inputs() const { return 2; }

  template <class X>
  PEWTER_HD typename X::Value operator()(const X& x) const {
    using V = typename X::Value;
    using T = typename V::Scalar;
    const V one = V::Broadcast(1);
    const V a = x[0], b = x[1];
    const V distance = Abs(b - a);
    const T least = static_cast<T>(1e-6);
    V w = V::Broadcast(static_cast<T>(t)) / Select(distance > least, distance, V::Broadcast(least));
    w = Select(w > T{1}, one, Select(w < T{0}, V::Broadcast(0), w));
    return w * b + (one - w) * a;
  }
};

}  // namespace pewter::kernels
