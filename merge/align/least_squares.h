// Least squares on top of an alignment (PLeaS, pleas.h): the linear layers of a model between a
// reference and an aligned model, each fitted so that, of the means of both models' inputs, it
// makes the means of both models' outputs. The layers are those whose inputs the statistics have
// (merge/forward/layer_sites.h), output heads of tokens excepted.
//
// One layer at a time: memory is its weights and the moments of its site. Errors:
// FailedPrecondition for statistics without all of a site's Gram matrices (Grams::kAll), naming the
// site.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/linear_algebra.h"
#include "merge/align/activation_matching.h"
#include "merge/align/alignment.h"
#include "merge/align/pleas.h"
#include "merge/align/symmetry.h"
#include "merge/checkpoint/checkpoint.h"
#include "merge/forward/layer_sites.h"
#include "merge/forward/model.h"

namespace pewter {

// Where the inputs of a layer that is fitted are; nothing for tensors that are no such layer's
// weight. `config_json` is the model's, `weight` what it stores.
std::optional<LayerSite> FittedSite(absl::string_view config_json, absl::string_view weight);
// Of the bias beside a weight.
std::string BiasName(absl::string_view weight);

// The group that orders an axis of a tensor; -1: none. FailedPrecondition for several.
absl::StatusOr<int> GroupOfAxis(const SymmetricTensor& tensor, int axis);

// The moments of a site's features, those of model `model` as they are aligned; model 0 is the
// reference.
absl::StatusOr<JointInputs> AlignedMoments(SiteMoments site, int model,
                                           const GroupAlignment& alignment);
// How alike features i of both models are, as they are aligned: their correlation.
std::vector<double> PairCorrelations(const JointInputs& moments);

// A layer in PyTorch's order, whichever axis of `weight` its inputs lie on.
LinearLayer LayerOf(const Shape& weight, int input_axis, std::vector<double> values,
                    std::vector<double> bias);
// And its weight as it is stored.
std::vector<double> StoredWeight(LinearLayer layer, int input_axis);

// The model half way between them, with its layers fitted when their tensors are asked for, in
// float32. What is referred to must outlive it; `algebra` is the CPU's.
struct FittedModel {
  const Symmetry& symmetry;
  const Checkpoint& reference;
  const Checkpoint& model;
  const Alignment& alignment;
  const MomentsLookup& moments;
  int index = 1;  // of the model, in the moments
  Ridge ridge;
  kernels::LinearAlgebra& algebra;
};
absl::StatusOr<ForwardModel> FitHalfWay(const FittedModel& fitted);

}  // namespace pewter
