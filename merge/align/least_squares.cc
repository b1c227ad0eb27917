#include "merge/align/least_squares.h"

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/status.h"
#include "kernels/backend.h"
#include "merge/forward/layer_sites.h"

namespace pewter {
namespace {

using kernels::Transpose;

absl::StatusOr<std::vector<double>> ReadDoubles(const TensorSource& source) {
  const int64_t size = source.shape().elements();
  std::vector<std::byte> bytes(size * ByteWidth(source.dtype()));
  RETURN_IF_ERROR(source.Read(0, size, absl::MakeSpan(bytes), nullptr));
  std::vector<double> values(size);
  kernels::Convert({bytes.data(), source.dtype(), size}, {values.data(), DType::kF64, size});
  return values;
}

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

class Fitter {
 public:
  Fitter(const Symmetry& symmetry, const Checkpoint& reference, const Checkpoint& model,
         const Alignment& alignment, const MomentsLookup& moments, int model_index,
         const Ridge& ridge, kernels::LinearAlgebra& algebra)
      : symmetry_(symmetry),
        reference_(reference),
        model_(model),
        alignment_(alignment),
        moments_(moments),
        model_index_(model_index),
        ridge_(ridge),
        algebra_(algebra) {
    for (const SymmetricTensor& tensor : symmetry.tensors()) {
      const std::string stored = StoredName(model, tensor.tensor, /*with_tied=*/false);
      if (!stored.empty()) known_[stored] = &tensor;
    }
  }

  absl::Status Fit(const std::string& weight, const LayerSite& place,
                   const TensorSink& sink) const {
    const std::string bias = absl::StrCat(absl::StripSuffix(weight, ".weight"), ".bias");
    const absl::StatusOr<SiteMoments> site = moments_(place.site);
    if (absl::IsNotFound(site.status())) return absl::OkStatus();
    RETURN_IF_ERROR(site.status());
    ASSIGN_OR_RETURN(const LinearLayer a, Read(weight, bias, place, /*aligned=*/false));
    ASSIGN_OR_RETURN(const LinearLayer b, Read(weight, bias, place, /*aligned=*/true));
    if (a.weight.rows != b.weight.rows || a.weight.columns != b.weight.columns) {
      return absl::FailedPreconditionError("the models have it in different shapes");
    }
    ASSIGN_OR_RETURN(const JointInputs inputs, InputsOf(*site, weight, place, a.weight.columns));
    const auto whole = [](int64_t size) {
      std::vector<int32_t> identity(size);
      std::iota(identity.begin(), identity.end(), 0);
      return WholeMatch(identity);
    };
    ASSIGN_OR_RETURN(LinearLayer fitted, FitLayer(algebra_, a, b, whole(a.weight.rows),
                                                  whole(a.weight.columns), inputs, ridge_));
    if (place.input_axis == 0) fitted.weight = Transposed(fitted.weight);
    RETURN_IF_ERROR(sink(weight, fitted.weight.values));
    return fitted.bias.empty() ? absl::OkStatus() : sink(bias, fitted.bias);
  }

 private:
  absl::StatusOr<std::shared_ptr<const TensorSource>> Open(const std::string& name,
                                                           bool aligned) const {
    const Checkpoint& checkpoint = aligned ? model_ : reference_;
    ASSIGN_OR_RETURN(std::shared_ptr<const TensorSource> source, checkpoint.OpenTensor(name, 0));
    const auto known = known_.find(name);
    if (!aligned || known == known_.end()) return source;
    return AlignSource(symmetry_, *known->second, alignment_, std::move(source));
  }

  absl::StatusOr<LinearLayer> Read(const std::string& weight, const std::string& bias,
                                   const LayerSite& place, bool aligned) const {
    ASSIGN_OR_RETURN(const auto source, Open(weight, aligned));
    if (source->shape().rank() != 2) return absl::FailedPreconditionError("it is no matrix");
    ASSIGN_OR_RETURN(std::vector<double> values, ReadDoubles(*source));
    LinearLayer layer;
    layer.weight = {source->shape()[0], source->shape()[1], std::move(values)};
    if (place.input_axis == 0) layer.weight = Transposed(layer.weight);
    if (reference_.Find(bias) == nullptr || model_.Find(bias) == nullptr) return layer;
    ASSIGN_OR_RETURN(const auto biases, Open(bias, aligned));
    ASSIGN_OR_RETURN(layer.bias, ReadDoubles(*biases));
    return layer;
  }

  // The moments of the layer's inputs, those of the model as it is aligned.
  absl::StatusOr<JointInputs> InputsOf(const SiteMoments& site, const std::string& weight,
                                       const LayerSite& place, int64_t width) const {
    const auto gram = [&](int i, int j) -> absl::StatusOr<DenseMatrix> {
      const bool there =
          j < static_cast<int>(site.grams.size()) && j < static_cast<int>(site.grams[i].size());
      if (!there || static_cast<int64_t>(site.grams[i][j].size()) != width * width) {
        return absl::FailedPreconditionError(
            absl::StrCat("statistics of ", place.site, " do not have the products of the ", width,
                         " features of models ", i, " and ", j));
      }
      return DenseMatrix(width, width, site.grams[i][j]);
    };
    JointInputs inputs{.rows = static_cast<double>(site.count), .first_sum = site.sums[0]};
    ASSIGN_OR_RETURN(inputs.first, gram(0, 0));
    ASSIGN_OR_RETURN(inputs.cross, gram(0, model_index_));
    ASSIGN_OR_RETURN(inputs.second, gram(model_index_, model_index_));
    ASSIGN_OR_RETURN(const GroupAlignment order, OrderOfInputs(weight, place.input_axis));
    inputs.second_sum = AlignRows({width, 1, site.sums[model_index_]}, order).values;
    inputs.cross = Transposed(AlignRows(Transposed(inputs.cross), order));
    inputs.second = AlignRows(Transposed(AlignRows(inputs.second, order)), order);
    return inputs;
  }

  // How the features that a weight reads are aligned.
  absl::StatusOr<GroupAlignment> OrderOfInputs(const std::string& weight, int axis) const {
    const auto known = known_.find(weight);
    if (known == known_.end()) return GroupAlignment{};
    const auto& axes = known->second->axes;
    if (axis >= static_cast<int>(axes.size()) || axes[axis].empty()) return GroupAlignment{};
    if (axes[axis].size() > 1) {
      return absl::FailedPreconditionError("its inputs are of several groups of features");
    }
    const auto found = alignment_.groups.find(symmetry_.groups()[axes[axis][0].group].name);
    return found == alignment_.groups.end() ? GroupAlignment{} : found->second;
  }

  const Symmetry& symmetry_;
  const Checkpoint& reference_;
  const Checkpoint& model_;
  const Alignment& alignment_;
  const MomentsLookup& moments_;
  const int model_index_;
  const Ridge& ridge_;
  kernels::LinearAlgebra& algebra_;
  std::map<std::string, const SymmetricTensor*> known_;  // by stored name
};

}  // namespace

absl::Status FitLinearLayers(const Symmetry& symmetry, const Checkpoint& reference,
                             const Checkpoint& model, const Alignment& alignment,
                             const MomentsLookup& moments, int model_index, const Ridge& ridge,
                             kernels::LinearAlgebra& algebra, const TensorSink& sink) {
  RETURN_IF_ERROR(CheckAlignment(symmetry, alignment));
  const Fitter fitter(symmetry, reference, model, alignment, moments, model_index, ridge, algebra);
  for (const std::string& name : reference.tensor_names()) {
    const std::optional<LayerSite> place = FindLayerSite(reference.config_json(), name);
    // A head's rows are tokens, and it is tied to the embeddings more often than not.
    if (!place || place->site == "head_input" || model.Find(name) == nullptr) continue;
    RETURN_IF_ERROR(Annotate(fitter.Fit(name, *place, sink), absl::StrCat("tensor ", name)));
  }
  return absl::OkStatus();
}

}  // namespace pewter
