// Weight matching: the order of a model's features that brings its weights nearest to those of a
// reference, from the weights alone (Ainsworth, Hayase and Srinivasa, "Git Re-Basin", ICLR 2023).
//
// Maximises the sum over tensors of <reference, aligned>, group by group: with all other groups
// held, a group's best order is a linear assignment. An attention is one step: the orders inside
// heads by an assignment for each pair of heads, the order of heads by one over their scores; where
// query heads share keys and values the two alternate. A group on both axes of a tensor (the
// residual stream in a tied masked-LM head) makes the step an approximation, so a step is taken
// only when the true objective grows. What the model does not depend on (keys' biases without RoPE)
// is no evidence.
//
// Tensors are read as they are needed; memory is one of the reference, one of the model twice, and
// two doubles for each pair of features of the widest group, or one for all groups of an attention
// (WeightMatchingBytes). Results do not depend on threads.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "merge/align/alignment.h"
#include "merge/align/dense_matrix.h"
#include "merge/align/symmetry.h"
#include "merge/checkpoint/checkpoint.h"

namespace pewter {

struct WeightMatchingOptions {
  // Kinds of groups that may move (an attention moves when any kind of its groups is there); the
  // others keep the order that they start with.
  std::vector<GroupKind> kinds;
  // Ways to go through the groups: the first in their own order, the others shuffled by `seed`. The
  // one with the greatest objective counts.
  int restarts = 1;
  bool shuffle_all = false;  // the first way, too
  uint64_t seed = 0;
  int max_sweeps = 100;
  int threads = 1;
  // Asked between steps; an error ends the matching with it.
  std::function<absl::Status()> check;
};

struct WeightMatch {
  Alignment alignment;
  // Sum of <reference, aligned> over all tensors that count: as it was and after each sweep.
  std::vector<double> objective;
  double reference_square = 0, model_square = 0;  // sums of squares of the same tensors
  std::vector<std::string> skipped;  // tensors of different shapes, which are no evidence
};

// Host memory that matching these models takes at most.
int64_t WeightMatchingBytes(const Symmetry& symmetry);

// Kinds that attentions consist of.
bool IsAttentionKind(GroupKind kind);

// `start` has been checked against the symmetry; groups that it maps linearly stay as they are. The
// result has a permutation for every group that may move. FailedPrecondition for weights that are
// not finite, naming the group.
absl::StatusOr<WeightMatch> MatchWeights(const Symmetry& symmetry, const Checkpoint& reference,
                                         const Checkpoint& model, const Alignment& start,
                                         const WeightMatchingOptions& options,
                                         kernels::Backend& backend);

// What the weights say of one group: for each feature of the reference (rows) and of the model
// (columns, in the model's own order) what their pairing adds to the objective, with all other
// groups aligned.
absl::StatusOr<DenseMatrix> WeightSimilarity(const Symmetry& symmetry, const Checkpoint& reference,
                                             const Checkpoint& model, const Alignment& alignment,
                                             int group, kernels::Backend& backend);

}  // namespace pewter
