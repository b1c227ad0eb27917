// SCE: select, calculate, erase (FuseChat 3, arXiv 2408.07990; mergekit `sce`):
//
//   D_i = x_i - base where the variance over the models is selected, else 0
//   majority = sum_i D_i >= 0 ? + : -;  counted: D_i with that sign (zero never has it)
//   out = base + sum of the counted weight_i D_i / max(sum of the counted weight_i, 1e-6)
//
// x[0] is the base, x[1 + i] model i.
#pragma once

#include "kernels/ops/op.h"

namespace pewter::kernels {

// Population variance over the models of x_i - base. A magnitude op.
struct ModelVariance {
  int count = 0;  // models, the base excluded

  PEWTER_HD int inputs() const { return count + 1; }

  template <class X>
  PEWTER_HD typename X::Value operator()(const X& x) const {
    using V = typename X::Value;
    using T = typename V::Scalar;
    const V base = x[0];
    V mean = V::Broadcast(0), variance = V::Broadcast(0);
    for (int i = 0; i < count; ++i) mean = mean + (x[1 + i] - base);
    mean = mean / static_cast<T>(count);
    for (int i = 0; i < count; ++i) {
      const V distance = (x[1 + i] - base) - mean;
      variance = variance + distance * distance;
    }
    return variance / static_cast<T>(count);
  }
};

struct SelectedMean {
  int count = 0;           // models, the base excluded
  bool select_all = true;  // else by variance > threshold, or equal to it with index < ties_end
  double threshold = 0;
  int64_t ties_end = 0;
  double weight[kMaxInputs - 1] = {};

  PEWTER_HD int inputs() const { return count + 1; }

  // Which elements are selected.
  template <class X>
  PEWTER_HD typename X::Value Selected(const X& x, typename X::Value value) const {
    using V = typename X::Value;
    using T = typename V::Scalar;
    if (select_all) return value;
    const V variance = ModelVariance{count}(x);
    const T least = static_cast<T>(threshold);
    return Select((variance > least) | ((variance == least) & x.IndexBelow(ties_end)), value,
                  V::Broadcast(0));
  }

  template <class X>
  PEWTER_HD typename X::Value operator()(const X& x) const {
    using V = typename X::Value;
    using T = typename V::Scalar;
    const V zero = V::Broadcast(0), base = x[0];
    V sum = zero, positive = zero, negative = zero, positive_weight = zero, negative_weight = zero;
    for (int i = 0; i < count; ++i) {
      const V delta = x[1 + i] - base;
      const V w = V::Broadcast(static_cast<T>(weight[i]));
      const V weighted = delta * w;
      const auto above = delta > T{0};
      const auto below = delta < T{0};
      sum = sum + delta;
      positive = positive + Select(above, weighted, zero);
      negative = negative + Select(below, weighted, zero);
      positive_weight = positive_weight + Select(above, w, zero);
      negative_weight = negative_weight + Select(below, w, zero);
    }
    const auto majority_positive = sum >= T{0};
    const V counted = Select(majority_positive, positive, negative);
    const V weights = Select(majority_positive, positive_weight, negative_weight);
    const T least = static_cast<T>(1e-6);
    const V mean = counted / Select(weights > least, weights, V::Broadcast(least));
    return base + Selected(x, mean);
  }
};

// For each model: sum of D_i^2. Term i is that of model i; those beyond the models are 0. Several
// in a group, because what is selected is found once a group.
struct SelectedSquares {
  static constexpr int kTerms = 4;
  SelectedMean task;

  PEWTER_HD int inputs() const { return task.inputs(); }
  PEWTER_HD int groups() const { return (task.count + kTerms - 1) / kTerms; }
  PEWTER_HD int first(int) const { return 0; }
  PEWTER_HD int second(int) const { return 0; }

  template <class X, class V>
  PEWTER_HD void operator()(const X& x, int g, V base, V, V* terms) const {
    const V one = task.Selected(x, V::Broadcast(1));
    for (int t = 0; t < kTerms; ++t) {
      const int i = g * kTerms + t;
      const V delta = i < task.count ? (x[1 + i] - base) * one : V::Broadcast(0);
      terms[t] = delta * delta;
    }
  }
};

// How many variances are not zero.
struct CountVarying {
  static constexpr int kTerms = 1;
  ModelVariance variance;

  PEWTER_HD int inputs() const { return variance.inputs(); }
  PEWTER_HD int groups() const { return 1; }
  PEWTER_HD int first(int) const { return 0; }
  PEWTER_HD int second(int) const { return 0; }

  template <class X, class V>
  PEWTER_HD void operator()(const X& x, int, V, V, V* terms) const {
    using T = typename V::Scalar;
    terms[0] = Select(variance(x) > T{0}, V::Broadcast(1), V::Broadcast(0));
  }
};

}  // namespace pewter::kernels
