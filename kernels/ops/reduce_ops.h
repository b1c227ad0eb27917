// Terms that are summed over a tensor, and magnitudes that are ranked.
//
// A reduce op has kTerms terms for each of groups() groups; a group reads two inputs, first(g) and
// second(g):
//
//   template <class X> PEWTER_HD void operator()(const X& x, int g, V a, V b, V* terms) const;
//
// Terms are computed in the compute type and accumulated in double; those of group g are numbers
// g * kTerms and on. Where the op has `kLargest`, the largest is taken instead of the sum. A
// magnitude op is `V operator()(const X& x) const` with values >= 0.
//
// The order of a sum is fixed, so every backend gives the same bits: a block (kReduceBlock) is cut
// into rows of kReduceRow elements; a row has 32 lanes, lane l summing elements l, l + 32, ... in
// order; lanes are added as a tree (l and l + 16, then + 8, 4, 2, 1), and rows one after another.
#pragma once

#include "kernels/ops/task_vector.h"

namespace pewter::kernels {

// Elements of a reduction block: partial sums are per block, whatever the tiling.
inline constexpr int64_t kReduceBlock = 1 << 16;
inline constexpr int64_t kReduceRow = 1 << 10;

// x0.x0, x1.x1, x0.x1: norms and the angle of SLERP.
struct DotNorms {
  static constexpr int kTerms = 3;
  PEWTER_HD int inputs() const { return 2; }
  PEWTER_HD int groups() const { return 1; }
  PEWTER_HD int first(int) const { return 0; }
  PEWTER_HD int second(int) const { return 1; }

  template <class X, class V>
  PEWTER_HD void operator()(const X&, int, V a, V b, V* terms) const {
    terms[0] = a * a;
    terms[1] = b * b;
    terms[2] = a * b;
  }
};

// Inner products of all pairs of models, i >= j: those of the models, or of their deltas from the
// base, which is then x[0]. One term a pair.
struct Gram {
  static constexpr int kTerms = 1;
  int count = 0;  // models, the base excluded
  bool from_base = false;

  struct Pair {
    int i, j;
  };
  PEWTER_HD Pair PairOf(int g) const {
    int i = 0;
    while (g > i) g -= ++i;
    return {i, g};
  }

  PEWTER_HD int inputs() const { return count + (from_base ? 1 : 0); }
  PEWTER_HD int groups() const { return count * (count + 1) / 2; }
  PEWTER_HD int first(int g) const { return PairOf(g).i + (from_base ? 1 : 0); }
  PEWTER_HD int second(int g) const { return PairOf(g).j + (from_base ? 1 : 0); }

  template <class X, class V>
  PEWTER_HD void operator()(const X& x, int, V a, V b, V* terms) const {
    if (from_base) {
      const V base = x[0];
      a = a - base;
      b = b - base;
    }
    terms[0] = a * b;
  }
};

// For each model: sum |delta|, sum |kept delta| (scale not applied): the L1-preserving rescale of
// mergekit. Terms 2i and 2i + 1 belong to model i.
struct DeltaAbsSums {
  static constexpr int kTerms = 2;
  TaskVectorSum task;

  PEWTER_HD int inputs() const { return task.inputs(); }
  PEWTER_HD int groups() const { return task.count; }
  PEWTER_HD int first(int) const { return 0; }
  PEWTER_HD int second(int g) const { return 1 + g; }
  int64_t whole_rows() const { return task.whole_rows(); }

  template <class X, class V>
  PEWTER_HD void operator()(const X& x, int g, V base, V model, V* terms) const {
    const V delta = model - base;
    terms[0] = Abs(delta);
    terms[1] = Abs(task.Kept(x, g, delta));
  }
};

// |x[1] - x[0]| of two inputs (base, model), or |x[0]| of one.
struct DeltaMagnitude {
  int count = 2;

  PEWTER_HD int inputs() const { return count; }

  template <class X>
  PEWTER_HD typename X::Value operator()(const X& x) const {
    return count == 1 ? Abs(x[0]) : Abs(x[1] - x[0]);
  }
};

// Backend::Sift tells where magnitudes lie with respect to a window: from low to high, where those
// equal to `common` are so many that counting them must do. Values of the compute type.
struct SiftWindow {
  double low = 0;
  double high = 0;
  double common = __builtin_nan("");
};
struct SiftCandidate {
  float magnitude;  // of F64, rounded
  uint32_t index;   // in the views
};
struct SiftCounts {
  int64_t above = 0;       // larger than high; NaN counts as such
  int64_t common = 0;      // equal to `common`
  int64_t candidates = 0;  // the others in the window
};

}  // namespace pewter::kernels
