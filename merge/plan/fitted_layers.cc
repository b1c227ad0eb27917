#include "merge/plan/fitted_layers.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "base/units.h"
#include "kernels/backends.h"
#include "merge/align/aligner.h"
#include "merge/align/least_squares.h"
#include "merge/align/symmetry.h"
#include "merge/forward/family.h"
#include "merge/forward/layer_sites.h"

namespace pewter {
namespace {

// A side of a layer of which features stay apart.
struct Apart {
  int64_t features = 0;  // of one model; 0: no such side
  int64_t apart = 0;
  std::string site, group;  // what tells how alike they are

  int64_t merged() const { return features + apart; }
};

// Loaded operands are the two weights, then the two biases where there are any.
class LayerTask final : public TensorTask {
 public:
  struct Facts {
    Shape weight;  // of one model
    LayerSite place;
    std::string inputs;  // the group that orders them; empty: none
    bool biased = false;
    int reference = 0;  // of the inputs, the one that is not aligned
    Apart from, to;     // inputs and outputs
    Ridge ridge;
    DType result_dtype = DType::kF32;
    std::shared_ptr<const AlignmentSlot> slot;
  };
  explicit LayerTask(Facts facts) : facts_(std::move(facts)) {}

  const char* name() const override { return "least squares"; }
  DType result_dtype() const override { return facts_.result_dtype; }
  int64_t bytes() const override {
    const int64_t in = inputs(), out = outputs();
    // The moments of a site as they are read and while they are put in the model's order.
    const int64_t widest = std::max(in, facts_.to.features);
    const int64_t moments = 6 * widest * widest * static_cast<int64_t>(sizeof(double));
    const int64_t layers = 2 * in * out * static_cast<int64_t>(2 * sizeof(double));
    const int64_t merged = merged_inputs() * merged_outputs();
    return std::max(moments + layers,
                    layers + FitLayerBytes(out, in, merged_outputs(), merged_inputs())) +
           merged * ByteWidth(facts_.result_dtype);
  }

  absl::Status Run(TaskContext& context, kernels::View result) const override {
    const auto statistics = facts_.slot->statistics();
    const auto alignment = facts_.slot->Get();
    if (statistics == nullptr || alignment == nullptr) {
      return absl::InternalError("fitted before the models have been compared");
    }
    // Matrices are small and in host memory, whatever the device.
    ASSIGN_OR_RETURN(const auto backend, kernels::OpenBackend({}, /*threads=*/1));
    ASSIGN_OR_RETURN(kernels::LinearAlgebra* const algebra, backend->linear_algebra());
    const MomentsLookup moments = [&](absl::string_view site) { return statistics->Read(site); };
    ASSIGN_OR_RETURN(const PartialMatch to, OutputsOf(moments, *alignment));
    ASSIGN_OR_RETURN(const LinearLayer first, Load(context, facts_.reference));
    ASSIGN_OR_RETURN(const LinearLayer second, Load(context, 1 - facts_.reference));
    ASSIGN_OR_RETURN(JointInputs from_moments,
                     MomentsOf(moments, facts_.place.site, facts_.inputs, *alignment, inputs()));
    const PartialMatch from = MatchOf(facts_.from, inputs(), from_moments);
    ASSIGN_OR_RETURN(LinearLayer layer, FitLayer(*algebra, first, second, to, from,
                                                 std::move(from_moments), facts_.ridge));
    std::vector<double> bias = std::move(layer.bias);
    std::vector<double> values = StoredWeight(std::move(layer), facts_.place.input_axis);
    values.insert(values.end(), bias.begin(), bias.end());
    if (static_cast<int64_t>(values.size()) != result.size) {
      return absl::InternalError("the fitted layer is not as wide as planned");
    }
    kernels::Convert({values.data(), DType::kF64, result.size}, result);
    return absl::OkStatus();
  }

 private:
  int64_t inputs() const { return facts_.weight[facts_.place.input_axis]; }
  int64_t outputs() const { return facts_.weight[1 - facts_.place.input_axis]; }
  int64_t merged_inputs() const { return inputs() + facts_.from.apart; }
  int64_t merged_outputs() const { return outputs() + facts_.to.apart; }

  absl::StatusOr<LinearLayer> Load(TaskContext& context, int input) const {
    const auto doubles = [&](int operand) -> absl::StatusOr<std::vector<double>> {
      ASSIGN_OR_RETURN(const auto stored, context.Load(operand, TaskContext::Where::kHost));
      std::vector<double> values(context.shape(operand).elements());
      const auto size = static_cast<int64_t>(values.size());
      kernels::Convert({stored->data(), context.dtype(operand), size},
                       {values.data(), DType::kF64, size});
      return values;
    };
    ASSIGN_OR_RETURN(std::vector<double> weight, doubles(input));
    std::vector<double> bias;
    if (facts_.biased) {
      ASSIGN_OR_RETURN(bias, doubles(2 + input));
    }
    return LayerOf(facts_.weight, facts_.place.input_axis, std::move(weight), std::move(bias));
  }

  static absl::StatusOr<JointInputs> MomentsOf(const MomentsLookup& moments,
                                               const std::string& site, const std::string& group,
                                               const Alignment& alignment, int64_t width) {
    ASSIGN_OR_RETURN(SiteMoments stored, moments(site));
    const auto found = alignment.groups.find(group);
    ASSIGN_OR_RETURN(
        JointInputs joint,
        AlignedMoments(std::move(stored), /*model=*/1,
                       found == alignment.groups.end() ? GroupAlignment{} : found->second));
    if (joint.first.rows == width) return joint;
    return absl::FailedPreconditionError(absl::StrCat(
        "statistics of ", site, " are of ", joint.first.rows, " features and not of ", width));
  }

  static PartialMatch MatchOf(const Apart& apart, int64_t width, const JointInputs& moments) {
    std::vector<int32_t> pairs(width);
    std::iota(pairs.begin(), pairs.end(), 0);  // the model is aligned
    return apart.apart == 0 ? WholeMatch(pairs)
                            : MatchAllBut(apart.apart, pairs, PairCorrelations(moments));
  }

  absl::StatusOr<PartialMatch> OutputsOf(const MomentsLookup& moments,
                                         const Alignment& alignment) const {
    if (facts_.to.apart == 0) return MatchOf({}, outputs(), {});
    ASSIGN_OR_RETURN(const JointInputs of,
                     MomentsOf(moments, facts_.to.site, facts_.to.group, alignment, outputs()));
    return MatchOf(facts_.to, outputs(), of);
  }

  const Facts facts_;
};

class Planner {
 public:
  Planner(const LayerFits& fits, Plan& plan)
      : fits_(fits), plan_(plan), symmetry_(*fits.alignment.symmetry) {}

  absl::StatusOr<std::map<std::string, int64_t>> Make() {
    for (size_t i = 0; i < plan_.tensors.size(); ++i) by_name_[plan_.tensors[i].name] = i;
    RETURN_IF_ERROR(FindLayers());
    if (layers_.empty()) {
      return absl::FailedPreconditionError(
          "the models have no linear layer whose inputs the forward pass shows");
    }
    const ParamValues& params = plan_.tensors[layers_.front().weight].params;
    const double budget = std::get<double>(params.at("budget"));
    if (budget > 1) RETURN_IF_ERROR(SpendBudget(budget));
    const Ridge ridge = RidgeOf(params);
    for (const Layer& layer : layers_) Fit(layer, ridge);
    Drop();
    return std::move(widths_);
  }

 private:
  struct Layer {
    size_t weight = 0;  // index into the plan's tensors
    std::optional<size_t> bias;
    LayerSite place;
    int from = -1, to = -1;  // groups; -1: none
    bool fitted = true;      // else the mean, which only counts as work
    int64_t inputs = 0, outputs = 0;
  };

  // How the tensor's features lie; null: the symmetry does not move it.
  const SymmetricTensor* SymmetryOf(const PlanTensor& tensor) const {
    return symmetry_.Find(tensor.name);
  }

  int ReferenceOf(const PlanTensor& tensor) const {
    return tensor.inputs[0].model == fits_.alignment.reference ? 0 : 1;
  }

  absl::Status FindLayers() {
    const std::string& config = plan_.models[fits_.alignment.reference].checkpoint->config_json();
    for (size_t i = 0; i < plan_.tensors.size(); ++i) {
      PlanTensor& tensor = plan_.tensors[i];
      if (tensor.method == nullptr || tensor.inputs.size() != 2 || tensor.shape.rank() != 2) {
        continue;
      }
      const std::string& stored = tensor.inputs[ReferenceOf(tensor)].tensor;
      const std::optional<LayerSite> place = FittedSite(config, stored);
      if (!place) continue;
      Layer layer{.weight = i,
                  .place = *place,
                  .inputs = tensor.shape[place->input_axis],
                  .outputs = tensor.shape[1 - place->input_axis]};
      layer.fitted = fits_.sites.contains(place->site);
      if (!layer.fitted) {
        tensor.notes.push_back(absl::StrCat("mean: the data shows nothing of ", place->site));
      }
      RETURN_IF_ERROR(Annotate(Describe(layer), tensor.name));
      layers_.push_back(std::move(layer));
    }
    return absl::OkStatus();
  }

  absl::Status Describe(Layer& layer) const {
    const PlanTensor& tensor = plan_.tensors[layer.weight];
    const auto bias = by_name_.find(BiasName(tensor.name));
    if (bias != by_name_.end()) {
      const PlanTensor& of = plan_.tensors[bias->second];
      if (of.method == nullptr || of.inputs.size() != 2 || of.shape.rank() != 1 ||
          of.shape[0] != layer.outputs) {
        return absl::FailedPreconditionError(
            absl::StrCat("its bias is not one of ", layer.outputs, " outputs in both models"));
      }
      if (of.dtype != tensor.dtype || of.inputs[0].model != tensor.inputs[0].model) {
        return absl::FailedPreconditionError(
            "a layer's weight and bias are fitted together and must have one type; set `dtype`");
      }
      layer.bias = bias->second;
    }
    const SymmetricTensor* const symmetric = SymmetryOf(tensor);
    if (symmetric == nullptr) return absl::OkStatus();
    ASSIGN_OR_RETURN(layer.from, GroupOfAxis(*symmetric, layer.place.input_axis));
    // Outputs may be of several groups (queries, keys and values in one), which stay as they are.
    const auto to = GroupOfAxis(*symmetric, 1 - layer.place.input_axis);
    layer.to = to.value_or(-1);
    return absl::OkStatus();
  }

  bool IsFeedForward(int group) const {
    return group >= 0 && symmetry_.groups()[group].kind == GroupKind::kFfn;
  }

  // Decides how many feed-forward units stay apart in each layer.
  absl::Status SpendBudget(double budget) {
    int64_t width = 0;
    for (const SymmetryGroup& group : symmetry_.groups()) {
      if (group.kind != GroupKind::kFfn) continue;
      if (width != 0 && group.width != width) {
        return absl::FailedPreconditionError(absl::StrCat(
            "`budget`: feed-forward blocks of ", width, " and of ", group.width,
            " units have no width in common that config.json could state; only 1 is possible"));
      }
      width = group.width;
    }
    BudgetProblem problem{.sizes = {static_cast<double>(width)}, .weights = {1}};
    for (const Layer& layer : layers_) {
      const auto inputs = static_cast<double>(layer.inputs);
      const auto outputs = static_cast<double>(layer.outputs);
      if (IsFeedForward(layer.from)) {
        problem.terms.push_back({outputs, {0}});
        sites_[layer.from] = layer.place.site;
      } else if (IsFeedForward(layer.to)) {
        problem.terms.push_back({inputs, {0}});
      } else {
        problem.terms.push_back({inputs * outputs, {}});
      }
    }
    RETURN_IF_ERROR(CheckBounded());
    ASSIGN_OR_RETURN(const std::vector<double> ratios, SolveBudget(problem, budget));
    // Rounding of the ratio.
    constexpr double kRounding = 1e-9;
    apart_ = static_cast<int64_t>(ratios[0] * static_cast<double>(width) + kRounding);
    if (apart_ == 0) {
      plan_.warnings.push_back(
          absl::StrCat("`budget: ", budget, "` is too little for one more feed-forward unit"));
      return absl::OkStatus();
    }
    const PlanModel& reference = plan_.models[fits_.alignment.reference];
    ASSIGN_OR_RETURN(const NetworkShape shape,
                     ParseNetworkShape(reference.checkpoint->config_json()));
    widths_[shape.family->inner_key] = width + apart_;
    return absl::OkStatus();
  }

  // That every tensor with feed-forward units is a layer that is fitted, or its bias.
  absl::Status CheckBounded() const {
    std::set<size_t> fitted;
    for (const Layer& layer : layers_) {
      if (!layer.fitted) continue;
      fitted.insert(layer.weight);
      if (layer.bias) fitted.insert(*layer.bias);
    }
    for (size_t i = 0; i < plan_.tensors.size(); ++i) {
      const SymmetricTensor* const symmetric = SymmetryOf(plan_.tensors[i]);
      if (symmetric == nullptr || fitted.contains(i)) continue;
      for (const auto& axis : symmetric->axes) {
        for (const AxisSegment& segment : axis) {
          if (!IsFeedForward(segment.group)) continue;
          return absl::FailedPreconditionError(absl::StrCat(
              "`budget`: the feed-forward units of ", plan_.tensors[i].name,
              " cannot stay apart, because the forward pass does not show its layer's inputs; "
              "only 1 is possible"));
        }
      }
    }
    for (const SymmetryGroup& group : symmetry_.groups()) {
      const int index = symmetry_.FindGroup(group.name);
      if (group.kind == GroupKind::kFfn && !sites_.contains(index)) {
        return absl::FailedPreconditionError(
            absl::StrCat("`budget`: nothing tells how alike the units of ", group.name, " are"));
      }
    }
    if (sites_.empty()) {
      return absl::FailedPreconditionError(
          "`budget`: the models have no feed-forward units to keep apart; only 1 is possible");
    }
    return absl::OkStatus();
  }

  Apart ApartOf(int group, int64_t features) const {
    if (apart_ == 0 || !IsFeedForward(group)) return {};
    return {.features = features,
            .apart = apart_,
            .site = sites_.at(group),
            .group = symmetry_.groups()[group].name};
  }

  void Fit(const Layer& layer, const Ridge& ridge) {
    if (!layer.fitted) return;
    PlanTensor& tensor = plan_.tensors[layer.weight];
    LayerTask::Facts facts{.weight = tensor.shape,
                           .place = layer.place,
                           .inputs = layer.from < 0 ? "" : symmetry_.groups()[layer.from].name,
                           .biased = layer.bias.has_value(),
                           .reference = ReferenceOf(tensor),
                           .from = ApartOf(layer.from, layer.inputs),
                           .to = ApartOf(layer.to, layer.outputs),
                           .ridge = ridge,
                           .result_dtype = tensor.result_dtype,
                           .slot = fits_.alignment.slot};
    const int64_t inputs = layer.inputs + facts.from.apart;
    const int64_t outputs = layer.outputs + facts.to.apart;
    const bool transposed = layer.place.input_axis == 0;
    tensor.notes.push_back("fitted to both models' layers by least squares");
    for (const auto& [side, what] : {std::pair{&facts.from, "inputs"}, {&facts.to, "outputs"}}) {
      if (side->apart == 0) continue;
      tensor.notes.push_back(absl::StrCat(side->features, " ", what, " become ", side->merged(),
                                          ": the least alike of ", side->group, " stay apart"));
    }
    const Shape weight = transposed ? Shape({inputs, outputs}) : Shape({outputs, inputs});
    tensor.shape = weight;
    if (layer.bias) {
      PlanTensor& bias = plan_.tensors[*layer.bias];
      tensor.parts = {{tensor.name, weight}, {bias.name, Shape({outputs})}};
      tensor.shape = Shape({weight.elements() + outputs});
      for (PlanInput& input : bias.inputs) tensor.inputs.push_back(std::move(input));
      joined_.insert(*layer.bias);
    }
    tensor.task = std::make_shared<const LayerTask>(std::move(facts));
  }

  // The biases, which are now parts of other tensors.
  void Drop() {
    std::vector<PlanTensor> kept;
    for (size_t i = 0; i < plan_.tensors.size(); ++i) {
      if (!joined_.contains(i)) kept.push_back(std::move(plan_.tensors[i]));
    }
    plan_.tensors = std::move(kept);
  }

  const LayerFits& fits_;
  Plan& plan_;
  const Symmetry& symmetry_;
  std::map<std::string, size_t> by_name_;
  std::vector<Layer> layers_;
  std::map<int, std::string> sites_;  // of groups whose features may stay apart
  int64_t apart_ = 0;                 // of each
  std::set<size_t> joined_;
  std::map<std::string, int64_t> widths_;
};

}  // namespace

Ridge RidgeOf(const ParamValues& params) {
  return {.strength = std::get<double>(params.at("ridge"))};
}

absl::StatusOr<std::map<std::string, int64_t>> FitPlannedLayers(const LayerFits& fits, Plan& plan) {
  return Planner(fits, plan).Make();
}

}  // namespace pewter
