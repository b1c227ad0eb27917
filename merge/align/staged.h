// Staged alignment: by activations, then by weights from there, then by activations again in the
// residual order that the weights gave, then per-head orthogonal maps. Every stage is a whole
// alignment, so each may be evaluated and reported:
//
//   none           the model as it is
//   activations    feed-forward units and attention heads, one order for all features of a head
//                  (what Verma and Elbayad publish)
//   own_query_key  the same, queries and keys with an order of their own
//   weights        weight matching of all groups, the residual stream among them, from there
//   residual       the residual order of that, feed-forward units and heads by activations again
//   orthogonal     the same, with the best orthogonal map of the features of each head, where the
//                  architecture allows it, by activations and weights together
//
// The weight matching climbs to the nearest maximum, so it starts from several residual orders (by
// the first site, the last, and all), with either order of queries and keys, and goes through the
// groups in several ways; the last stage of each is compared by the objective, and a residual order
// counts only where it lowers it: else the stages `weights` and after keep the model's own.
//
// Memory: moments of one site, and what weight matching takes.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "merge/align/activation_matching.h"
#include "merge/align/alignment.h"
#include "merge/align/symmetry.h"
#include "merge/checkpoint/checkpoint.h"

namespace pewter {

// What is to be small: the loss on calibration data of the model half way between the reference and
// the aligned model, say.
using AlignmentObjective = std::function<absl::StatusOr<double>(const Alignment& alignment)>;

struct StagedOptions {
  bool residual = true;
  bool orthogonal = true;
  bool weights_last = false;  // neither `residual` nor `orthogonal`
  // Of the weights' evidence for orthogonal maps, where that of the activations counts 1: both as
  // matrices of norm 1.
  double weight_evidence = 1;
  int model = 1;  // in the statistics, where the reference is 0
  int ways = 4;   // through the groups, from each start
  uint64_t seed = 0;
  int threads = 1;
  std::function<absl::Status()> check;
};

struct AlignmentStage {
  std::string name;  // as above
  Alignment alignment;
  double objective = 0;
};
struct StagedAlignment {
  std::vector<AlignmentStage> stages;  // in the order above
  // Residual orders that were tried, with the objective of their last stage; "none" keeps the
  // model's. The first of the best ones counts.
  std::vector<std::pair<std::string, double>> residual_orders;
  int chosen = 0;
};

// FailedPrecondition as MatchByActivations and MatchWeights. The objective's errors are passed on.
absl::StatusOr<StagedAlignment> AlignInStages(const Symmetry& symmetry, const Checkpoint& reference,
                                              const Checkpoint& model, const MomentsLookup& moments,
                                              const AlignmentObjective& objective,
                                              const StagedOptions& options,
                                              kernels::Backend& backend);

// Puts the best orthogonal maps of heads behind the permutations of `alignment`, for every
// attention without RoPE where each head has keys and values of its own.
absl::Status AddOrthogonalMaps(const Symmetry& symmetry, const Checkpoint& reference,
                               const Checkpoint& model, const MomentsLookup& moments,
                               const StagedOptions& options, kernels::Backend& backend,
                               Alignment& alignment);

}  // namespace pewter
