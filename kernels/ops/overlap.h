// Task vectors that few models share (RAM, arXiv 2601.13572; mergekit `ram`, `ramplus_tl`):
//
//   delta_i = x_i - base, active_i = |delta_i| > epsilon, c = number of active models
//   out = base + (c = 1 ? unique_scale_i delta_i of the one that is active : sum of the active / c)
//
// x[0] is the base, x[1 + i] model i.
#pragma once

#include "kernels/ops/op.h"

namespace pewter::kernels {

struct OverlapMean {
  int count = 0;  // models, the base excluded
  double epsilon = 0;
  double unique_scale[kMaxInputs - 1] = {};

  PEWTER_HD int inputs() const { return count + 1; }

  template <class X>
  PEWTER_HD typename X::Value operator()(const X& x) const {
    using V = typename X::Value;
    using T = typename V::Scalar;
    const V zero = V::Broadcast(0), base = x[0];
    V sum = zero, unique = zero, active_count = zero;
    for (int i = 0; i < count; ++i) {
      const V delta = x[1 + i] - base;
      const auto active = Abs(delta) > static_cast<T>(epsilon);
      active_count = active_count + Select(active, V::Broadcast(1), zero);
      sum = sum + Select(active, delta, zero);
      unique = unique + Select(active, delta * static_cast<T>(unique_scale[i]), zero);
    }
    const V mean = sum / Select(active_count == T{0}, V::Broadcast(1), active_count);
    return base + Select(active_count == T{1}, unique, mean);
  }
};

// For each model: how many of its active elements others share, and how many they do not.
struct OverlapCounts {
  static constexpr int kTerms = 2;
  OverlapMean task;

  PEWTER_HD int inputs() const { return task.inputs(); }
  PEWTER_HD int groups() const { return task.count; }
  PEWTER_HD int first(int) const { return 0; }
  PEWTER_HD int second(int g) const { return 1 + g; }

  template <class X, class V>
  PEWTER_HD void operator()(const X& x, int, V base, V model, V* terms) const {
    using T = typename V::Scalar;
    const V zero = V::Broadcast(0), one = V::Broadcast(1);
    const T epsilon = static_cast<T>(task.epsilon);
    V active_count = zero;
    for (int i = 0; i < task.count; ++i) {
      active_count = active_count + Select(Abs(x[1 + i] - base) > epsilon, one, zero);
    }
    const auto active = Abs(model - base) > epsilon;
    terms[0] = Select(active & (active_count > T{1}), one, zero);
    terms[1] = Select(active & (active_count == T{1}), one, zero);
  }
};

}  // namespace pewter::kernels
