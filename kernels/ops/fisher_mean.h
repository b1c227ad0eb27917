// Averages of models by how much each knows of an element: its diagonal Fisher information (Fisher
// merging, arXiv 2111.09832).
//
//   out = sum_i weight_i (F_i + epsilon) x_i / sum_i weight_i (F_i + epsilon)
//   and where the divisor is 0, sum_i weight_i x_i / sum_i weight_i
//
// x[i] is model i, x[count + i] its F.
#pragma once

#include "kernels/ops/op.h"

namespace pewter::kernels {

struct FisherMean {
  int count = 0;
  double epsilon = 0;
  double weight[kMaxInputs / 2] = {};

  PEWTER_HD int inputs() const { return 2 * count; }

  template <class X>
  PEWTER_HD typename X::Value operator()(const X& x) const {
    using V = typename X::Value;
    using T = typename V::Scalar;
    const V zero = V::Broadcast(0);
    V sum = zero, divisor = zero, plain = zero, plain_divisor = zero;
    for (int i = 0; i < count; ++i) {
      const V model = x[i], share = V::Broadcast(static_cast<T>(weight[i]));
      const V certainty = (x[count + i] + V::Broadcast(static_cast<T>(epsilon))) * share;
      sum = sum + model * certainty;
      divisor = divisor + certainty;
      plain = plain + model * share;
      plain_divisor = plain_divisor + share;
    }
    return Select(divisor == T{0}, plain / plain_divisor, sum / divisor);
  }
};

// F.F, and how many F are below 0, for each of the inputs.
struct FisherSums {
  static constexpr int kTerms = 2;
  int count = 0;

  PEWTER_HD int inputs() const { return count; }
  PEWTER_HD int groups() const { return count; }
  PEWTER_HD int first(int g) const { return g; }
  PEWTER_HD int second(int g) const { return g; }

  template <class X, class V>
  PEWTER_HD void operator()(const X&, int, V a, V, V* terms) const {
    using T = typename V::Scalar;
    terms[0] = a * a;
    terms[1] = Select(a < T{0}, V::Broadcast(1), V::Broadcast(0));
  }
};

}  // namespace pewter::kernels
