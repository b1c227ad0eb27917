#include "merge/align/least_squares.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/status.h"
#include "kernels/backend.h"
#include "merge/align/aligned_model.h"
#include "merge/checkpoint/held_source.h"
#include "merge/forward/interpolation.h"

namespace pewter {
namespace {

constexpr absl::string_view kWeight = ".weight";
constexpr absl::string_view kBias = ".bias";

DenseMatrix Transposed(const DenseMatrix& m) {
  DenseMatrix result(m.columns, m.rows);
  for (int64_t i = 0; i < m.rows; ++i) {
    for (int64_t j = 0; j < m.columns; ++j) result(j, i) = m(i, j);
  }
  return result;
}

// Rows of `m`, one a feature of a group, as the alignment has them: x' = T P x.
DenseMatrix AlignRows(const DenseMatrix& m, const GroupAlignment& alignment) {
  DenseMatrix ordered = m;
  for (size_t i = 0; i < alignment.permutation.size(); ++i) {
    std::copy_n(m.row(alignment.permutation[i]), m.columns, ordered.row(static_cast<int64_t>(i)));
  }
  const BlockTransform& transform = alignment.transform;
  if (transform.blocks == 0) return ordered;
  DenseMatrix mapped(m.rows, m.columns);
  for (int64_t i = 0; i < m.rows; ++i) {
    const int64_t block = i / transform.dim, inside = i % transform.dim;
    for (int64_t k = 0; k < transform.dim; ++k) {
      const double factor = transform.forward[(block * transform.dim + inside) * transform.dim + k];
      const double* const from = ordered.row(block * transform.dim + k);
      for (int64_t j = 0; j < m.columns; ++j) mapped(i, j) += factor * from[j];
    }
  }
  return mapped;
}

// What FitHalfWay's model is made of. Asked for one tensor at a time, from one thread.
class Fitter {
 public:
  Fitter(const FittedModel& fitted, ForwardModel reference, ForwardModel aligned, ForwardModel mean)
      : fitted_(fitted),
        reference_(std::move(reference)),
        aligned_(std::move(aligned)),
        mean_(std::move(mean)) {
    for (const SymmetricTensor& tensor : fitted.symmetry.tensors()) {
      const std::string stored = StoredName(fitted.model, tensor.tensor, /*with_tied=*/false);
      if (!stored.empty()) known_[stored] = &tensor;
    }
  }

  absl::StatusOr<std::shared_ptr<const TensorSource>> Tensor(absl::string_view name) {
    std::string weight(name);
    if (absl::EndsWith(name, kBias)) {
      weight = absl::StrCat(absl::StripSuffix(name, kBias), kWeight);
    }
    const std::optional<LayerSite> place = FittedSite(reference_.config_json, weight);
    if (!place) return mean_.tensors(name);
    ASSIGN_OR_RETURN(const auto stored, reference_.tensors(name));
    if (stored == nullptr) return nullptr;
    if (weight != weight_) RETURN_IF_ERROR(Annotate(Fit(weight, *place), weight));
    if (!layer_) return mean_.tensors(name);
    const std::vector<double>& values = weight == name ? layer_->weight.values : layer_->bias;
    std::vector<std::byte> bytes(values.size() * ByteWidth(DType::kF32));
    const auto size = static_cast<int64_t>(values.size());
    kernels::Convert({values.data(), DType::kF64, size}, {bytes.data(), DType::kF32, size});
    return std::make_shared<const HeldSource>(std::string(name), DType::kF32, stored->shape(),
                                              std::move(bytes));
  }

 private:
  static absl::StatusOr<LinearLayer> Read(const ForwardModel& model, const std::string& weight,
                                          const LayerSite& place) {
    ASSIGN_OR_RETURN(const auto source, model.tensors(weight));
    if (source == nullptr) {
      return absl::FailedPreconditionError(absl::StrCat(model.name, " does not have it"));
    }
    if (source->shape().rank() != 2) return absl::FailedPreconditionError("it is no matrix");
    ASSIGN_OR_RETURN(std::vector<double> values, ReadDoubles(*source));
    ASSIGN_OR_RETURN(const auto bias, model.tensors(BiasName(weight)));
    std::vector<double> biases;
    if (bias != nullptr) {
      ASSIGN_OR_RETURN(biases, ReadDoubles(*bias));
    }
    return LayerOf(source->shape(), place.input_axis, std::move(values), std::move(biases));
  }

  // Leaves the layer in layer_, its weight as it is stored; none where the statistics do not have
  // its inputs.
  absl::Status Fit(const std::string& weight, const LayerSite& place) {
    layer_.reset();
    weight_.clear();
    absl::StatusOr<SiteMoments> site = fitted_.moments(place.site);
    if (absl::IsNotFound(site.status())) {
      weight_ = weight;
      return absl::OkStatus();
    }
    RETURN_IF_ERROR(site.status());
    ASSIGN_OR_RETURN(const LinearLayer a, Read(reference_, weight, place));
    ASSIGN_OR_RETURN(const LinearLayer b, Read(aligned_, weight, place));
    if (a.weight.rows != b.weight.rows || a.weight.columns != b.weight.columns ||
        a.bias.size() != b.bias.size()) {
      return absl::FailedPreconditionError("the models have it in different shapes");
    }
    GroupAlignment order;
    if (const auto known = known_.find(weight); known != known_.end()) {
      ASSIGN_OR_RETURN(const int group, GroupOfAxis(*known->second, place.input_axis));
      if (group >= 0) order = AlignmentOf(group);
    }
    ASSIGN_OR_RETURN(JointInputs inputs, AlignedMoments(*std::move(site), fitted_.index, order));
    const auto whole = [](int64_t size) {
      std::vector<int32_t> identity(size);
      std::iota(identity.begin(), identity.end(), 0);
      return WholeMatch(identity);
    };
    if (inputs.first.rows != a.weight.columns) {
      return absl::FailedPreconditionError(absl::StrCat("statistics of ", place.site, " are of ",
                                                        inputs.first.rows, " features, it reads ",
                                                        a.weight.columns));
    }
    ASSIGN_OR_RETURN(LinearLayer layer,
                     FitLayer(fitted_.algebra, a, b, whole(a.weight.rows), whole(a.weight.columns),
                              std::move(inputs), fitted_.ridge));
    layer_.emplace();
    layer_->bias = layer.bias;
    layer_->weight.values = StoredWeight(std::move(layer), place.input_axis);
    weight_ = weight;
    return absl::OkStatus();
  }

  GroupAlignment AlignmentOf(int group) const {
    const auto found = fitted_.alignment.groups.find(fitted_.symmetry.groups()[group].name);
    return found == fitted_.alignment.groups.end() ? GroupAlignment{} : found->second;
  }

  const FittedModel fitted_;
  const ForwardModel reference_, aligned_, mean_;
  std::map<std::string, const SymmetricTensor*> known_;  // by stored name
  // The layer that was asked for last: its bias is asked for next.
  std::string weight_;
  std::optional<LinearLayer> layer_;
};

}  // namespace

std::optional<LayerSite> FittedSite(absl::string_view config_json, absl::string_view weight) {
  std::optional<LayerSite> place = FindLayerSite(config_json, weight);
  // A head's rows are tokens, and it is tied to the embeddings more often than not.
  if (place && place->site == "head_input") place.reset();
  return place;
}

std::string BiasName(absl::string_view weight) {
  return absl::StrCat(absl::StripSuffix(weight, kWeight), kBias);
}

absl::StatusOr<int> GroupOfAxis(const SymmetricTensor& tensor, int axis) {
  if (axis >= static_cast<int>(tensor.axes.size()) || tensor.axes[axis].empty()) return -1;
  if (tensor.axes[axis].size() > 1) {
    return absl::FailedPreconditionError(
        absl::StrCat(tensor.tensor.name, ": features of several groups lie on axis ", axis));
  }
  return tensor.axes[axis][0].group;
}

absl::StatusOr<JointInputs> AlignedMoments(SiteMoments site, int model,
                                           const GroupAlignment& alignment) {
  const auto width = static_cast<int64_t>(site.sums.empty() ? 0 : site.sums[0].size());
  const bool known = model > 0 && model < static_cast<int>(site.sums.size()) && site.count > 0 &&
                     static_cast<int64_t>(site.sums[model].size()) == width;
  if (!known) {
    return absl::FailedPreconditionError(absl::StrCat("statistics of ", site.site, " are not of ",
                                                      width,
                                                      " features of both models, or of no rows"));
  }
  for (const auto& [i, j] : {std::pair{0, 0}, std::pair{0, model}, std::pair{model, model}}) {
    const bool there =
        i < static_cast<int>(site.grams.size()) && j < static_cast<int>(site.grams[i].size());
    if (!there || static_cast<int64_t>(site.grams[i][j].size()) != width * width) {
      return absl::FailedPreconditionError(absl::StrCat("statistics of ", site.site,
                                                        " do not have the products of the ", width,
                                                        " features of models ", i, " and ", j));
    }
  }
  const auto size = static_cast<int64_t>(
      std::max(alignment.permutation.size(),
               static_cast<size_t>(alignment.transform.blocks * alignment.transform.dim)));
  if (size != 0 && size != width) {
    return absl::FailedPreconditionError(absl::StrCat(
        "statistics of ", site.site, " are of ", width, " features, their alignment of ", size));
  }
  const auto gram = [&](int i, int j) {
    return DenseMatrix(width, width, std::move(site.grams[i][j]));
  };
  JointInputs inputs{.rows = static_cast<double>(site.count), .first_sum = site.sums[0]};
  inputs.first = gram(0, 0);
  inputs.second_sum = AlignRows({width, 1, site.sums[model]}, alignment).values;
  inputs.cross = Transposed(AlignRows(Transposed(gram(0, model)), alignment));
  inputs.second = AlignRows(Transposed(AlignRows(gram(model, model), alignment)), alignment);
  return inputs;
}

std::vector<double> PairCorrelations(const JointInputs& moments) {
  constexpr double kLeastScale = 1e-7;
  const double n = moments.rows;
  std::vector<double> correlations;
  for (int64_t i = 0; i < moments.first.rows; ++i) {
    const double a = moments.first_sum[i] / n, b = moments.second_sum[i] / n;
    const double of_a = std::sqrt(std::max(0.0, moments.first(i, i) / n - a * a));
    const double of_b = std::sqrt(std::max(0.0, moments.second(i, i) / n - b * b));
    correlations.push_back((moments.cross(i, i) / n - a * b) / std::max(of_a * of_b, kLeastScale));
  }
  return correlations;
}

LinearLayer LayerOf(const Shape& weight, int input_axis, std::vector<double> values,
                    std::vector<double> bias) {
  LinearLayer layer{{weight[0], weight[1], std::move(values)}, std::move(bias)};
  if (input_axis == 0) layer.weight = Transposed(layer.weight);
  return layer;
}

std::vector<double> StoredWeight(LinearLayer layer, int input_axis) {
  return input_axis == 0 ? Transposed(layer.weight).values : std::move(layer.weight.values);
}

absl::StatusOr<ForwardModel> FitHalfWay(const FittedModel& fitted) {
  // What is referred to outlives the model.
  const auto borrowed = [](const auto& value) {
    return std::shared_ptr<const std::decay_t<decltype(value)>>(std::shared_ptr<void>(), &value);
  };
  ASSIGN_OR_RETURN(ForwardModel reference, MakeForwardModel(borrowed(fitted.reference)));
  ASSIGN_OR_RETURN(ForwardModel aligned, AlignedModel(borrowed(fitted.symmetry),
                                                      borrowed(fitted.model), fitted.alignment));
  ForwardModel model = Interpolate(reference, aligned, 0.5);
  model.identity.clear();
  const auto fitter =
      std::make_shared<Fitter>(fitted, std::move(reference), std::move(aligned), model);
  model.tensors = [fitter](absl::string_view name) { return fitter->Tensor(name); };
  return model;
}

}  // namespace pewter
