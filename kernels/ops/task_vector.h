// Task arithmetic and its sparse, sign-elected relatives (TIES arXiv 2306.01708, DARE 2311.03099),
// in one pass:
//
//   delta_i = keep_i(x_i - base) * scale_i,  D_i = weight_i delta_i
//   elected: s = sum D_i, majority = s >= 0 ? + : -, D_i counts where its sign is the majority's
//   (zero never does) out = base + lambda * (sum counted D_i) / (normalize ? sum of the counted
//   weight_i, 0 -> 1 : 1)
//
// x[0] is the base, x[1 + i] model i. Formulas and their corner cases: mergekit
// `generalized_task_arithmetic`.
#pragma once

#include "base/random.h"
#include "kernels/ops/op.h"

namespace pewter::kernels {

// Which elements of a delta stay.
enum class Keep : int {
  kAll,
  kNone,
  kMagnitude,  // |delta| > threshold, and of those equal to it the ones with index < ties_end
  kRandom,     // Philox word of (key, index) < draw_below
};

struct TaskVectorSum {
  struct Model {
    double weight = 1;
    double scale = 1;
    Keep keep = Keep::kAll;
    double threshold = 0;
    int64_t ties_end = 0;
    PhiloxKey key;
    uint64_t draw_below = 0;  // density * 2^32
  };
  int count = 0;  // models, the base excluded
  bool elect_sign = false;
  bool normalize = false;
  double lambda = 1;
  double weight_sum = 1;  // divisor without election; the caller replaces |sum| < 1e-8 by 1
  Model model[kMaxInputs - 1];

  PEWTER_HD int inputs() const { return count + 1; }

  // operator() is completed by the owner of kernels/: see the formula above.
};

}  // namespace pewter::kernels
