#include "merge/align/data_aligner.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status.h"
#include "merge/align/activation_matching.h"
#include "merge/align/aligned_model.h"
#include "merge/align/least_squares.h"
#include "merge/align/staged.h"
#include "merge/align/weight_matching.h"
#include "merge/forward/collect.h"
#include "merge/forward/evaluate.h"
#include "merge/forward/interpolation.h"

namespace pewter {
namespace {

using nlohmann::json;

// The run's checkpoints outlive what is made of them here.
template <class T>
std::shared_ptr<const T> Borrowed(const T& value) {
  return {std::shared_ptr<void>(), &value};
}

class DataAligner final : public Aligner {
 public:
  explicit DataAligner(DataAlignerOptions options) : options_(std::move(options)) {}

  std::string name() const override {
    if (options_.canonical) {
      std::vector<std::string> mapped;
      if (options_.canonical->heads) mapped.push_back("heads");
      if (options_.canonical->feed_forward) mapped.push_back("feed-forward units");
      if (options_.canonical->residual) mapped.push_back("the residual stream");
      return absl::StrCat("CCA maps of ", absl::StrJoin(mapped, ", "));
    }
    if (options_.staged) {
      return absl::StrCat("staged", options_.weights_last ? " up to the weights" : "",
                          options_.orthogonal ? ", orthogonal maps of heads" : "");
    }
    return absl::StrCat("permutation by activations",
                        options_.own_query_key ? "" : ", one order for queries, keys and values",
                        options_.orthogonal ? ", orthogonal maps of heads" : "");
  }
  int64_t bytes() const override { return options_.memory_bytes; }

  std::string caveat() const override {
    if (!options_.canonical) return "";
    std::vector<std::string> why;
    if (options_.canonical->feed_forward) {
      why.push_back("of feed-forward units, which an activation function sees one by one");
    }
    if (options_.canonical->residual) {
      why.push_back("of the residual stream, which norms scale feature by feature");
    }
    if (why.empty()) return "";
    return absl::StrCat("linear maps (`mapped`) ", absl::StrJoin(why, ", and "),
                        ", are no symmetry: aligned models do not compute what they did");
  }

  int64_t MapWidth(const Symmetry& symmetry, const SymmetryGroup& group) const override {
    if (options_.canonical) return CanonicalMapWidth(symmetry, group, *options_.canonical);
    if (!options_.orthogonal || group.attention < 0) return 0;
    const Attention& attention = symmetry.attentions()[group.attention];
    return attention.heads == attention.kv_heads ? attention.head_dim : 0;
  }

  absl::StatusOr<Alignment> Align(const AlignerRun& run) const override {
    const bool all = options_.canonical || options_.fit;
    ASSIGN_OR_RETURN(
        const auto reader,
        CollectPair(run, options_.data, all ? Grams::kAll : Grams::kCross, options_.memory_bytes));
    const MomentsLookup moments = [&](absl::string_view site) { return reader->Read(site); };
    return options_.staged ? InStages(run, moments) : ByActivations(run, moments);
  }

 private:
  bool Moves(GroupKind kind) const {
    return std::find(options_.kinds.begin(), options_.kinds.end(), kind) != options_.kinds.end();
  }

  ForwardOptions Forward(const AlignerRun& run) const {
    return {.backend = &run.backend, .memory_bytes = options_.memory_bytes};
  }

  absl::StatusOr<Alignment> ByActivations(const AlignerRun& run,
                                          const MomentsLookup& moments) const {
    ASSIGN_OR_RETURN(
        ActivationMatch match,
        MatchByActivations(run.symmetry, moments, 1,
                           {.feed_forward = Moves(GroupKind::kFfn),
                            .attention = Moves(GroupKind::kValueOutput) || Moves(GroupKind::kValue),
                            .own_query_key = options_.own_query_key,
                            .residual = Moves(GroupKind::kResidual) ? ResidualEvidence::kAll
                                                                    : ResidualEvidence::kNone,
                            .pooler = Moves(GroupKind::kPooler),
                            .output_head = Moves(GroupKind::kHead),
                            .threads = run.threads}));
    if (options_.orthogonal) {
      RETURN_IF_ERROR(AddOrthogonalMaps(run.symmetry, run.reference, run.model, moments, {},
                                        run.host, match.alignment));
    }
    std::map<std::string, double> canonical;
    if (options_.canonical) {
      ASSIGN_OR_RETURN(kernels::LinearAlgebra* const algebra, run.host.linear_algebra());
      RETURN_IF_ERROR(AddCanonicalMaps(run.symmetry, moments, *options_.canonical, *algebra,
                                       match.alignment, canonical));
    }
    json correlations = json::object();
    for (const auto& [group, mean] : match.correlations) {
      correlations[group] = {{"before", mean.first}, {"after", mean.second}};
    }
    json report = {{"data", options_.data->name()}, {"mean_correlation", std::move(correlations)}};
    if (!canonical.empty()) {
      report["gamma"] = options_.canonical->gamma;
      report["mean_canonical_correlation"] = canonical;
      report["keeps_function"] = match.alignment.keeps_function();
    }
    if (!match.unmatched.empty()) report["groups_not_matched"] = match.unmatched;
    match.alignment.method = name();
    match.alignment.report = report.dump();
    return std::move(match.alignment);
  }

  absl::StatusOr<Alignment> InStages(const AlignerRun& run, const MomentsLookup& moments) const {
    const std::shared_ptr<const ForwardData>& data =
        options_.objective != nullptr ? options_.objective : options_.data;
    const bool by_loss = !data->labels().empty();
    const AlignmentObjective objective = [&](const Alignment& alignment) -> absl::StatusOr<double> {
      return by_loss ? LossHalfWay(run, data, moments, alignment) : Distance(run, alignment);
    };
    ASSIGN_OR_RETURN(StagedAlignment staged,
                     AlignInStages(run.symmetry, run.reference, run.model, moments, objective,
                                   {.residual = Moves(GroupKind::kResidual),
                                    .orthogonal = options_.orthogonal,
                                    .weights_last = options_.weights_last,
                                    .ways = options_.ways,
                                    .seed = run.seed,
                                    .threads = run.threads,
                                    .check = run.check},
                                   run.host));
    json stages = json::array(), orders = json::array();
    for (const AlignmentStage& stage : staged.stages) {
      stages.push_back({{"stage", stage.name}, {"objective", stage.objective}});
    }
    for (const auto& [order, value] : staged.residual_orders) {
      orders.push_back({{"start", order}, {"objective", value}});
    }
    Alignment alignment = std::move(staged.stages.back().alignment);
    alignment.method = name();
    alignment.report = json({{"data", options_.data->name()},
                             {"objective", !by_loss       ? "distance of the weights"
                                           : options_.fit ? "loss half way, layers fitted"
                                                          : "loss half way"},
                             {"stages", std::move(stages)},
                             {"residual_orders", std::move(orders)},
                             {"residual_order", staged.residual_orders[staged.chosen].first}})
                           .dump();
    return alignment;
  }

  absl::StatusOr<double> LossHalfWay(const AlignerRun& run,
                                     const std::shared_ptr<const ForwardData>& data,
                                     const MomentsLookup& moments,
                                     const Alignment& alignment) const {
    ASSIGN_OR_RETURN(const ForwardModel model, HalfWay(run, moments, alignment));
    ASSIGN_OR_RETURN(const Metric metric, DefaultMetric(model));
    ASSIGN_OR_RETURN(const Evaluation evaluation, Evaluate(model, data, metric, Forward(run)));
    return evaluation.loss;
  }

  absl::StatusOr<ForwardModel> HalfWay(const AlignerRun& run, const MomentsLookup& moments,
                                       const Alignment& alignment) const {
    if (options_.fit) {
      ASSIGN_OR_RETURN(kernels::LinearAlgebra* const algebra, run.host.linear_algebra());
      return FitHalfWay({.symmetry = run.symmetry,
                         .reference = run.reference,
                         .model = run.model,
                         .alignment = alignment,
                         .moments = moments,
                         .ridge = *options_.fit,
                         .algebra = *algebra});
    }
    ASSIGN_OR_RETURN(const ForwardModel reference, MakeForwardModel(Borrowed(run.reference)));
    ASSIGN_OR_RETURN(const ForwardModel aligned,
                     AlignedModel(Borrowed(run.symmetry), Borrowed(run.model), alignment));
    return Interpolate(reference, aligned, 0.5);
  }

  // |reference - aligned|^2 of what is evidence.
  absl::StatusOr<double> Distance(const AlignerRun& run, const Alignment& alignment) const {
    ASSIGN_OR_RETURN(const WeightMatch match,
                     MatchWeights(run.symmetry, run.reference, run.model, alignment, {}, run.host));
    return match.reference_square + match.model_square - 2 * match.objective.front();
  }

  const DataAlignerOptions options_;
};

}  // namespace

absl::StatusOr<std::shared_ptr<const StatisticsReader>> CollectPair(
    const AlignerRun& run, std::shared_ptr<const ForwardData> data, Grams grams,
    int64_t memory_bytes) {
  if (run.store == nullptr) return absl::InternalError("no place for the statistics");
  std::vector<ForwardModel> models;
  for (const Checkpoint* checkpoint : {&run.reference, &run.model}) {
    ASSIGN_OR_RETURN(models.emplace_back(), MakeForwardModel(Borrowed(*checkpoint)));
  }
  const StatisticsOptions options{
      .forward = {.backend = &run.backend, .memory_bytes = memory_bytes},
      .choose = [grams](absl::string_view) { return grams; }};
  RETURN_IF_ERROR(
      CollectStatistics(models, std::move(data), options, run.store, run.statistics).status());
  return StatisticsReader::Open(run.store, run.statistics);
}

std::shared_ptr<const Aligner> MakeDataAligner(DataAlignerOptions options) {
  return std::make_shared<DataAligner>(std::move(options));
}

}  // namespace pewter
