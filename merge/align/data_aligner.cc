#include "merge/align/data_aligner.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "merge/align/activation_matching.h"
#include "merge/align/aligned_model.h"
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
    return absl::StrCat(options_.staged ? "staged" : "permutation by activations",
                        options_.orthogonal ? ", orthogonal maps of heads" : "");
  }
  int64_t bytes() const override { return options_.memory_bytes; }

  absl::StatusOr<Alignment> Align(const AlignerRun& run) const override {
    if (run.store == nullptr) return absl::InternalError("no place for the statistics");
    ASSIGN_OR_RETURN(const auto reader, Collect(run));
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

  absl::StatusOr<std::shared_ptr<const StatisticsReader>> Collect(const AlignerRun& run) const {
    std::vector<ForwardModel> models;
    for (const Checkpoint* checkpoint : {&run.reference, &run.model}) {
      ASSIGN_OR_RETURN(models.emplace_back(), MakeForwardModel(Borrowed(*checkpoint)));
    }
    const StatisticsOptions options{.forward = Forward(run),
                                    .choose = [](absl::string_view) { return Grams::kCross; }};
    RETURN_IF_ERROR(
        CollectStatistics(models, options_.data, options, run.store, run.statistics).status());
    return StatisticsReader::Open(run.store, run.statistics);
  }

  absl::StatusOr<Alignment> ByActivations(const AlignerRun& run,
                                          const MomentsLookup& moments) const {
    ASSIGN_OR_RETURN(
        ActivationMatch match,
        MatchByActivations(run.symmetry, moments, 1,
                           {.feed_forward = Moves(GroupKind::kFfn),
                            .attention = Moves(GroupKind::kValueOutput) || Moves(GroupKind::kValue),
                            .residual = Moves(GroupKind::kResidual) ? ResidualEvidence::kAll
                                                                    : ResidualEvidence::kNone,
                            .pooler = Moves(GroupKind::kPooler),
                            .output_head = Moves(GroupKind::kHead),
                            .threads = run.threads}));
    if (options_.orthogonal) {
      RETURN_IF_ERROR(AddOrthogonalMaps(run.symmetry, run.reference, run.model, moments, {},
                                        run.backend, match.alignment));
    }
    json correlations = json::object();
    for (const auto& [group, mean] : match.correlations) {
      correlations[group] = {{"before", mean.first}, {"after", mean.second}};
    }
    json report = {{"data", options_.data->name()}, {"mean_correlation", std::move(correlations)}};
    if (!match.unmatched.empty()) report["groups_not_matched"] = match.unmatched;
    match.alignment.method = name();
    match.alignment.report = report.dump();
    return std::move(match.alignment);
  }

  absl::StatusOr<Alignment> InStages(const AlignerRun& run, const MomentsLookup& moments) const {
    const bool by_loss = !options_.data->labels().empty();
    const AlignmentObjective objective = [&](const Alignment& alignment) -> absl::StatusOr<double> {
      return by_loss ? LossHalfWay(run, alignment) : Distance(run, alignment);
    };
    ASSIGN_OR_RETURN(StagedAlignment staged,
                     AlignInStages(run.symmetry, run.reference, run.model, moments, objective,
                                   {.residual = Moves(GroupKind::kResidual),
                                    .orthogonal = options_.orthogonal,
                                    .ways = options_.ways,
                                    .seed = run.seed,
                                    .threads = run.threads,
                                    .check = run.check},
                                   run.backend));
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
                             {"objective", by_loss ? "loss half way" : "distance of the weights"},
                             {"stages", std::move(stages)},
                             {"residual_orders", std::move(orders)},
                             {"residual_order", staged.residual_orders[staged.chosen].first}})
                           .dump();
    return alignment;
  }

  absl::StatusOr<double> LossHalfWay(const AlignerRun& run, const Alignment& alignment) const {
    ASSIGN_OR_RETURN(const ForwardModel reference, MakeForwardModel(Borrowed(run.reference)));
    ASSIGN_OR_RETURN(const ForwardModel aligned,
                     AlignedModel(Borrowed(run.symmetry), Borrowed(run.model), alignment));
    const ForwardModel model = Interpolate(reference, aligned, 0.5);
    ASSIGN_OR_RETURN(const Metric metric, DefaultMetric(model));
    ASSIGN_OR_RETURN(const Evaluation evaluation,
                     Evaluate(model, options_.data, metric, Forward(run)));
    return evaluation.loss;
  }

  // |reference - aligned|^2 of what is evidence.
  absl::StatusOr<double> Distance(const AlignerRun& run, const Alignment& alignment) const {
    ASSIGN_OR_RETURN(const WeightMatch match, MatchWeights(run.symmetry, run.reference, run.model,
                                                           alignment, {}, run.backend));
    return match.reference_square + match.model_square - 2 * match.objective.front();
  }

  const DataAlignerOptions options_;
};

}  // namespace

std::shared_ptr<const Aligner> MakeDataAligner(DataAlignerOptions options) {
  return std::make_shared<DataAligner>(std::move(options));
}

}  // namespace pewter
