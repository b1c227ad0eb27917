// Means over models after a trim and an election of signs: of the blocks of a joint decomposition,
// whose rows are trimmed as rows of norm 1 (DRM, arXiv 2505.23117), and of task vectors.
//
//   value_t = x_t, or x_t - base;  magnitude_t = |value_t|, or |value_t| scale of its row
//   kept_t = value_t where magnitude_t >= threshold_t, else 0
//   elected: e = sign(sum_t kept_t), sign(0) = sign_of_zero; the kept_t of another sign become 0
//   out = sum_t weight_t kept_t / n [+ base]
//   n = disjoint ? how many of the terms are not 0, at least 1 : count
//
// The base is x[0] where there is one.
#pragma once

#include "kernels/ops/op.h"

namespace pewter::kernels {

// A magnitude op: |x[0]| times value `value` of its row.
struct ScaledMagnitude {
  AxisValues axis;
  int value = 0;

  PEWTER_HD int inputs() const { return 1; }

  template <class X>
  PEWTER_HD typename X::Value operator()(const X& x) const {
    return Abs(x[0]) * x.Of(axis, value);
  }
};

struct ElectedMean {
  int count = 0;  // models, the base excluded
  bool from_base = false;
  bool scaled =
      false;  // value t of a row is the scale of model t's; a row of scale 0 has no values
  bool elect = true;
  bool disjoint = true;
  double sign_of_zero = 0;  // -1, 0 or 1
  AxisValues axis;
  double threshold[kMaxInputs - 1] = {};
  double weight[kMaxInputs - 1] = {};

  PEWTER_HD int inputs() const { return count + (from_base ? 1 : 0); }

  template <class X>
  PEWTER_HD typename X::Value Kept(const X& x, int t, typename X::Value base) const {
    using V = typename X::Value;
    using T = typename V::Scalar;
    const V zero = V::Broadcast(0);
    const V value = from_base ? x[1 + t] - base : x[t];
    const T least = static_cast<T>(threshold[t]);
    if (scaled) {
      const V magnitude = Abs(value) * x.Of(axis, t);
      return Select((magnitude >= least) & (magnitude > T{0}), value, zero);
    }
    return least > T{0} ? Select(Abs(value) >= least, value, zero) : value;
  }

  // The sum over the models of what is kept: its sign is the elected one.
  template <class X>
  PEWTER_HD typename X::Value Mass(const X& x, typename X::Value base) const {
    typename X::Value mass = Kept(x, 0, base);
    for (int t = 1; t < count; ++t) mass = mass + Kept(x, t, base);
    return mass;
  }

  template <class X>
  PEWTER_HD typename X::Value operator()(const X& x) const {
    using V = typename X::Value;
    using T = typename V::Scalar;
    const V zero = V::Broadcast(0), one = V::Broadcast(1);
    const V base = from_base ? x[0] : zero;
    // 1 where positive terms count, and where negative ones do.
    V positive = one, negative = one;
    if (elect) {
      const V mass = Mass(x, base);
      positive = Select(mass > T{0}, one,
                        Select(mass == T{0}, V::Broadcast(sign_of_zero > 0 ? T{1} : T{0}), zero));
      negative = Select(mass < T{0}, one,
                        Select(mass == T{0}, V::Broadcast(sign_of_zero < 0 ? T{1} : T{0}), zero));
    }
    V sum = zero, terms = zero;
    for (int t = 0; t < count; ++t) {
      const V kept = Kept(x, t, base);
      const V counts = Select(kept > T{0}, positive, Select(kept < T{0}, negative, zero));
      const V term = Select(counts > T{0}, kept * static_cast<T>(weight[t]), zero);
      sum = sum + term;
      if (disjoint) terms = terms + Select(Abs(term) > T{0}, one, zero);
    }
    const V mean = disjoint ? sum / Select(terms > T{1}, terms, one) : sum / static_cast<T>(count);
    return from_base ? base + mean : mean;
  }
};

// The sum of the elected signs: its sign is that of zero.
struct ElectedSigns {
  static constexpr int kTerms = 1;
  ElectedMean task;

  PEWTER_HD int inputs() const { return task.inputs(); }
  PEWTER_HD int groups() const { return 1; }
  PEWTER_HD int first(int) const { return 0; }
  PEWTER_HD int second(int) const { return 0; }

  template <class X, class V>
  PEWTER_HD void operator()(const X& x, int, V first, V, V* terms) const {
    using T = typename V::Scalar;
    const V zero = V::Broadcast(0);
    const V mass = task.Mass(x, task.from_base ? first : zero);
    terms[0] = Select(mass > T{0}, V::Broadcast(1), Select(mass < T{0}, V::Broadcast(-1), zero));
  }
};

}  // namespace pewter::kernels
