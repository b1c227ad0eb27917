// CCA-Merge on a transformer (arXiv 2407.05385; linear_maps.h has the map): linear maps between the
// features of groups instead of their order. From the covariances of what the groups' sites show,
//
//   heads         one map for the value and output features of each head (of each head of values,
//                 where query heads share them), and one for its queries, x' = T x, with keys by
//                 T^-T, so that scores stay. Both are symmetries. Behind the order of heads; none
//                 for queries and keys that rotary positions turn or norms scale
//   feed-forward  one map of all units of a block, from what its second layer reads. No symmetry:
//                 the activation function lies between the rows that are mapped and those features
//   residual      one map for all of its sites, from the mean of their covariances. No symmetry:
//                 norms scale features one by one
//
// Groups of the last two are Alignment::inexact.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "absl/status/status.h"
#include "kernels/linear_algebra.h"
#include "merge/align/activation_matching.h"
#include "merge/align/alignment.h"
#include "merge/align/symmetry.h"

namespace pewter {

struct CanonicalOptions {
  bool heads = true;
  bool feed_forward = false;
  bool residual = false;
  double gamma = 0.1;  // added to the variances of features
  int model = 1;       // in the statistics, where the reference is 0
};

// Features that a map of the group mixes; 0: the group keeps an order. The same for all models.
int64_t CanonicalMapWidth(const Symmetry& symmetry, const SymmetryGroup& group,
                          const CanonicalOptions& options);

// Adds the maps to `alignment`, behind the permutations of heads and instead of others.
// `correlations`: the mean canonical correlation by group. FailedPrecondition for statistics
// without the Gram matrices of both models, and for features without variance when gamma is 0.
absl::Status AddCanonicalMaps(const Symmetry& symmetry, const MomentsLookup& moments,
                              const CanonicalOptions& options, kernels::LinearAlgebra& algebra,
                              Alignment& alignment, std::map<std::string, double>& correlations);

}  // namespace pewter
