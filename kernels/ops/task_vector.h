// Task arithmetic and its sparse, sign-elected relatives (TIES arXiv 2306.01708, DARE 2311.03099),
// in one pass:
//
//   delta_i = keep_i(x_i - base) * scale_i,  D_i = delta_i * weight_i
//   mixed = sum D_i;  elected: s = sum D_i, majority = s >= 0 ? + : -, and only those D_i count
//     whose sign is the majority's (zero never does)
//   normalized: mixed /= elected ? sum of the counted weight_i, 0 -> 1 : weight_sum
//   out = base + mixed * lambda
//
// x[0] is the base, x[1 + i] model i; sums are in the order of the models. Formulas and their
// corner cases: mergekit `generalized_task_arithmetic`.
#pragma once

#include "base/random.h"
#include "kernels/ops/op.h"
#include "kernels/ops/ranked_draw.h"

namespace pewter::kernels {

// Which elements of a delta stay.
enum class Keep : int {
  kAll,
  kNone,
  kMagnitude,  // |delta| > threshold, and of those equal to it the ones with index < ties_end
  kBand,       // as kMagnitude, and not |delta| > ceiling, nor equal to it with index < ceiling_end
  kRandom,     // Philox word of (key, index) < draw_below
  kRanked,     // by `ranked`; views hold whole rows
};

struct TaskVectorSum {
  struct Model {
    double weight = 1;
    double scale = 1;
    Keep keep = Keep::kAll;
    double threshold = 0;
    int64_t ties_end = 0;
    double ceiling = 0;
    int64_t ceiling_end = 0;
    PhiloxKey key;
    uint64_t draw_below = 0;  // density * 2^32
    RankedDraw ranked;
  };
  int count = 0;  // models, the base excluded
  bool elect_sign = false;
  bool normalize = false;
  double lambda = 1;
  double weight_sum = 1;  // divisor without election; the caller replaces |sum| < 1e-8 by 1
  Model model[kMaxInputs - 1];

  PEWTER_HD int inputs() const { return count + 1; }
  // Elements of the rows that views must hold whole; 0: they need not.
  int64_t whole_rows() const {
    for (int i = 0; i < count; ++i) {
      if (model[i].keep == Keep::kRanked) return model[i].ranked.row;
    }
    return 0;
  }

  // Model i's delta where it is kept, else 0; not scaled.
  template <class X>
  PEWTER_HD typename X::Value Kept(const X& x, int i, typename X::Value delta) const {
    using V = typename X::Value;
    const Model& m = model[i];
    const V zero = V::Broadcast(0);
    switch (m.keep) {
      case Keep::kAll:
        return delta;
      case Keep::kNone:
        return zero;
      case Keep::kMagnitude:
        return Select(Largest(x, Abs(delta), m.threshold, m.ties_end), delta, zero);
      case Keep::kBand: {
        const V magnitude = Abs(delta);
        const V kept = Select(Largest(x, magnitude, m.threshold, m.ties_end), delta, zero);
        return Select(Largest(x, magnitude, m.ceiling, m.ceiling_end), zero, kept);
      }
      case Keep::kRandom:
        return Select(x.RandomBelow(i, m.key, m.draw_below), delta, zero);
      case Keep::kRanked:
        return Select(x.Outranks(i, m.ranked), delta, zero);
    }
    return zero;
  }

  template <class X>
  PEWTER_HD typename X::Value operator()(const X& x) const {
    using V = typename X::Value;
    using T = typename V::Scalar;
    const V base = x[0];
    const V mixed = elect_sign ? (normalize ? Elected<true>(x, base) : Elected<false>(x, base))
                               : Plain(x, base);
    return base + mixed * static_cast<T>(lambda);
  }

 private:
  // Which magnitudes are above a threshold, or equal to it and early enough.
  template <class X, class V>
  static PEWTER_HD auto Largest(const X& x, const V& magnitude, double threshold,
                                int64_t ties_end) {
    const auto value = static_cast<typename V::Scalar>(threshold);
    return (magnitude > value) | ((magnitude == value) & x.IndexBelow(ties_end));
  }

  template <class X>
  PEWTER_HD typename X::Value Weighted(const X& x, int i, typename X::Value base) const {
    using T = typename X::Value::Scalar;
    return Kept(x, i, x[1 + i] - base) * static_cast<T>(model[i].scale) *
           static_cast<T>(model[i].weight);
  }

  template <class X>
  PEWTER_HD typename X::Value Plain(const X& x, typename X::Value base) const {
    using V = typename X::Value;
    using T = typename V::Scalar;
    V sum = V::Broadcast(0);
    for (int i = 0; i < count; ++i) sum = sum + Weighted(x, i, base);
    return normalize ? sum / static_cast<T>(weight_sum) : sum;
  }

  // The sums over the positive and over the negative D_i are both made, so that one pass over the
  // models does and no D_i is stored.
  template <bool kNormalize, class X>
  PEWTER_HD typename X::Value Elected(const X& x, typename X::Value base) const {
    using V = typename X::Value;
    using T = typename V::Scalar;
    const V zero = V::Broadcast(0);
    V sum = zero, positive = zero, negative = zero, positive_weight = zero, negative_weight = zero;
    for (int i = 0; i < count; ++i) {
      const V d = Weighted(x, i, base);
      const auto above = d > T{0};
      const auto below = d < T{0};
      sum = sum + d;
      positive = Select(above, positive + d, positive);
      negative = Select(below, negative + d, negative);
      if constexpr (kNormalize) {
        const T weight = static_cast<T>(model[i].weight);
        positive_weight = Select(above, positive_weight + weight, positive_weight);
        negative_weight = Select(below, negative_weight + weight, negative_weight);
      }
    }
    const auto majority_positive = sum >= T{0};
    const V counted = Select(majority_positive, positive, negative);
    if constexpr (!kNormalize) return counted;
    const V divisor = Select(majority_positive, positive_weight, negative_weight);
    return counted / Select(divisor == T{0}, V::Broadcast(1), divisor);
  }
};

}  // namespace pewter::kernels
