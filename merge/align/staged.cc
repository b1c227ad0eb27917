#include "merge/align/staged.h"

#include <cmath>
#include <cstdint>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "merge/align/linear_maps.h"
#include "merge/align/weight_matching.h"

namespace pewter {
namespace {

double Norm(const DenseMatrix& m) {
  double square = 0;
  for (double value : m.values) square += value * value;
  return std::sqrt(square);
}

// Adds `term` scaled to norm `share`; nothing where it is zero.
void AddNormed(const DenseMatrix& term, double share, DenseMatrix& sum) {
  const double norm = Norm(term);
  if (!(norm > 0)) return;
  for (size_t i = 0; i < sum.values.size(); ++i) sum.values[i] += share / norm * term.values[i];
}

class Stager {
  using Stages = std::vector<std::pair<std::string, Alignment>>;

 public:
  Stager(const Symmetry& symmetry, const Checkpoint& reference, const Checkpoint& model,
         const MomentsLookup& moments, const AlignmentObjective& objective,
         const StagedOptions& options, kernels::Backend& backend)
      : symmetry_(symmetry),
        reference_(reference),
        model_(model),
        moments_(moments),
        objective_(objective),
        options_(options),
        backend_(backend) {}

  absl::StatusOr<StagedAlignment> Run() {
    Alignment none;
    none.family = symmetry_.family();
    ASSIGN_OR_RETURN(const Alignment shared, ByActivations(/*own_query_key=*/false));
    ASSIGN_OR_RETURN(own_, ByActivations(/*own_query_key=*/true));
    // The model's own residual order first, so that another one must be better.
    RETURN_IF_ERROR(Try("none", own_, /*residual=*/false, /*way=*/0));
    if (options_.residual) {
      for (const auto& [name, evidence] :
           {std::pair{"all", ResidualEvidence::kAll}, std::pair{"first", ResidualEvidence::kFirst},
            std::pair{"last", ResidualEvidence::kLast}}) {
        ASSIGN_OR_RETURN(const ActivationMatch match,
                         MatchByActivations(symmetry_, moments_, options_.model,
                                            {.feed_forward = false,
                                             .attention = false,
                                             .residual = evidence,
                                             .threads = options_.threads}));
        for (const bool own : {true, false}) {
          Alignment start = own ? own_ : shared;
          for (const auto& [group, of] : match.alignment.groups) start.groups[group] = of;
          for (int way = 0; way < options_.ways; ++way) {
            RETURN_IF_ERROR(
                Try(absl::StrCat(name, own ? "" : ", shared query and key order", ", way ", way),
                    start, /*residual=*/true, way));
          }
        }
      }
    }
    RETURN_IF_ERROR(Add("none", std::move(none)));
    RETURN_IF_ERROR(Add("activations", shared));
    RETURN_IF_ERROR(Add("own_query_key", own_));
    for (auto& [name, alignment] : best_) RETURN_IF_ERROR(Add(name, std::move(alignment)));
    return std::move(result_);
  }

 private:
  absl::Status Add(std::string name, Alignment alignment) {
    alignment.method = name;
    ASSIGN_OR_RETURN(const double objective, objective_(alignment));
    result_.stages.push_back({std::move(name), std::move(alignment), objective});
    return absl::OkStatus();
  }

  absl::StatusOr<Alignment> ByActivations(bool own_query_key) const {
    ASSIGN_OR_RETURN(ActivationMatch match, MatchByActivations(symmetry_, moments_, options_.model,
                                                               {.own_query_key = own_query_key,
                                                                .pooler = true,
                                                                .output_head = true,
                                                                .threads = options_.threads}));
    return std::move(match.alignment);
  }

  // The stages from the weight matching on. `best_` becomes them where their last one is better.
  absl::Status Try(const std::string& name, const Alignment& start, bool residual, int way) {
    if (options_.check) RETURN_IF_ERROR(options_.check());
    WeightMatchingOptions matching{.shuffle_all = way > 0,
                                   .seed = options_.seed + static_cast<uint64_t>(way),
                                   .threads = options_.threads,
                                   .check = options_.check};
    for (const SymmetryGroup& group : symmetry_.groups()) {
      if (group.kind != GroupKind::kResidual || residual) matching.kinds.push_back(group.kind);
    }
    ASSIGN_OR_RETURN(WeightMatch match,
                     MatchWeights(symmetry_, reference_, model_, start, matching, backend_));
    Stages stages = {{"weights", std::move(match.alignment)}};
    if (!options_.weights_last) RETURN_IF_ERROR(MatchAgain(residual, stages));
    ASSIGN_OR_RETURN(const double reached, objective_(stages.back().second));
    if (best_.empty() || reached < best_objective_) {
      result_.chosen = static_cast<int>(result_.residual_orders.size());
      best_ = std::move(stages);
      best_objective_ = reached;
    }
    result_.residual_orders.emplace_back(name, reached);
    return absl::OkStatus();
  }

  // The stages after the weight matching.
  absl::Status MatchAgain(bool residual, Stages& stages) const {
    const Alignment& matched = stages.front().second;
    Alignment again = own_;
    for (const SymmetryGroup& group : symmetry_.groups()) {
      const auto found = matched.groups.find(group.name);
      if (group.kind == GroupKind::kResidual && residual && found != matched.groups.end()) {
        again.groups[group.name] = found->second;
      }
    }
    stages.emplace_back("residual", again);
    if (!options_.orthogonal) return absl::OkStatus();
    RETURN_IF_ERROR(
        AddOrthogonalMaps(symmetry_, reference_, model_, moments_, options_, backend_, again));
    stages.emplace_back("orthogonal", std::move(again));
    return absl::OkStatus();
  }

  const Symmetry& symmetry_;
  const Checkpoint& reference_;
  const Checkpoint& model_;
  const MomentsLookup& moments_;
  const AlignmentObjective& objective_;
  const StagedOptions& options_;
  kernels::Backend& backend_;
  Alignment own_;
  Stages best_;
  double best_objective_ = 0;
  StagedAlignment result_;
};

}  // namespace

absl::StatusOr<StagedAlignment> AlignInStages(const Symmetry& symmetry, const Checkpoint& reference,
                                              const Checkpoint& model, const MomentsLookup& moments,
                                              const AlignmentObjective& objective,
                                              const StagedOptions& options,
                                              kernels::Backend& backend) {
  return Stager(symmetry, reference, model, moments, objective, options, backend).Run();
}

absl::Status AddOrthogonalMaps(const Symmetry& symmetry, const Checkpoint& reference,
                               const Checkpoint& model, const MomentsLookup& moments,
                               const StagedOptions& options, kernels::Backend& backend,
                               Alignment& alignment) {
  ASSIGN_OR_RETURN(kernels::LinearAlgebra* const algebra, backend.linear_algebra());
  const Alignment ordered = alignment;
  for (const Attention& attention : symmetry.attentions()) {
    // A key head that several query heads read, or positions that rotate it: not this symmetry.
    if (attention.heads != attention.kv_heads) continue;
    const auto add = [&](int group, absl::StatusOr<DenseMatrix> covariance) -> absl::Status {
      RETURN_IF_ERROR(covariance.status());
      const SymmetryGroup& of = symmetry.groups()[group];
      if (covariance->rows != of.width || covariance->columns != of.width) {
        return absl::FailedPreconditionError(
            absl::StrCat("statistics of ", attention.name, " are of ", covariance->rows, " and ",
                         covariance->columns, " features, and group ", of.name, " has ", of.width));
      }
      DenseMatrix similarity(of.width, of.width);
      AddNormed(*covariance, 1, similarity);
      if (options.weight_evidence > 0) {
        ASSIGN_OR_RETURN(const DenseMatrix weights,
                         WeightSimilarity(symmetry, reference, model, ordered, group, backend));
        AddNormed(weights, options.weight_evidence, similarity);
      }
      // The maps come after the permutation.
      GroupAlignment& result = alignment.groups[of.name];
      if (!result.permutation.empty()) {
        const DenseMatrix own = similarity;
        for (int64_t i = 0; i < of.width; ++i) {
          for (int64_t j = 0; j < of.width; ++j) {
            similarity(i, j) = own(i, result.permutation[j]);
          }
        }
      }
      ASSIGN_OR_RETURN(OrthogonalMaps maps,
                       OrthogonalMapsOf(*algebra, similarity, attention.head_dim));
      result.transform = std::move(maps.transform);
      return absl::OkStatus();
    };
    RETURN_IF_ERROR(add(attention.value, ValueCovariance(attention, moments, options.model)));
    if (!attention.rotary) {
      RETURN_IF_ERROR(add(attention.query, QueryKeyCovariance(attention, moments, options.model)));
    }
  }
  return CheckAlignment(symmetry, alignment);
}

}  // namespace pewter
