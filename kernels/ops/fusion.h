// Arcee Fusion (mergekit `arcee_fusion`): the elements of the other model that matter most.
//
//   p, q = softmax of the model's and the base's row, each + 1e-8;  divergence = sum_row p log(p /
//   q) importance = |x[1] - x[0]| divergence(row);  out = importance >= threshold ? x[1] : x[0]
//
// x[0] is the base. In every reduction here a row is a block.
#pragma once

#include "kernels/ops/elementary.h"

namespace pewter::kernels {

// The largest of x[0] and of x[1].
struct Largest {
  static constexpr int kTerms = 2;
  static constexpr bool kLargest = true;
  PEWTER_HD int inputs() const { return 2; }
  PEWTER_HD int groups() const { return 1; }
  PEWTER_HD int first(int) const { return 0; }
  PEWTER_HD int second(int) const { return 1; }

  template <class X, class V>
  PEWTER_HD void operator()(const X&, int, V a, V b, V* terms) const {
    terms[0] = a;
    terms[1] = b;
  }
};

// Values of a row: 0 and 1 are the largest of x[0] and of x[1].
struct ExpSums {
  static constexpr int kTerms = 2;
  AxisValues axis;
  PEWTER_HD int inputs() const { return 2; }
  PEWTER_HD int groups() const { return 1; }
  PEWTER_HD int first(int) const { return 0; }
  PEWTER_HD int second(int) const { return 1; }

  template <class X, class V>
  PEWTER_HD void operator()(const X& x, int, V a, V b, V* terms) const {
    terms[0] = Exp(a - x.Of(axis, 0));
    terms[1] = Exp(b - x.Of(axis, 1));
  }
};

// Terms of sum p log(p / q), as q h(p / q - 1) with h(r) = (1 + r) log(1 + r) - r: the same sum,
// since p and q add up to the same, of terms that are all positive. Values of a row: the logarithms
// of the sums of e^x[0], then by how much that of x[1] is larger.
struct SoftmaxDivergence {
  static constexpr int kTerms = 1;
  AxisValues axis;
  PEWTER_HD int inputs() const { return 2; }
  PEWTER_HD int groups() const { return 1; }
  PEWTER_HD int first(int) const { return 0; }
  PEWTER_HD int second(int) const { return 1; }

  template <class X, class V>
  PEWTER_HD void operator()(const X& x, int, V a, V b, V* terms) const {
    using T = typename V::Scalar;
    const V share = Exp(a - x.Of(axis, 0));
    const V q = share + T(1e-8);
    const V difference = share * ExpMinusOne((b - a) - x.Of(axis, 1));  // p - q
    terms[0] = q * DivergenceTerm(difference / q);
  }
};

// A magnitude op. Value 0 of a row is its divergence.
struct Importance {
  AxisValues axis;
  PEWTER_HD int inputs() const { return 2; }

  template <class X>
  PEWTER_HD typename X::Value operator()(const X& x) const {
    return Abs(x[1] - x[0]) * x.Of(axis, 0);
  }
};

struct ImportantElements {
  Importance importance;
  double threshold = 0;
  PEWTER_HD int inputs() const { return 2; }

  template <class X>
  PEWTER_HD typename X::Value operator()(const X& x) const {
    using T = typename X::Value::Scalar;
    return Select(importance(x) >= static_cast<T>(threshold), x[1], x[0]);
  }
};

}  // namespace pewter::kernels
