// Least squares on top of an alignment (PLeaS with nothing kept apart, pleas.h): the model half way
// between a reference and an aligned model, each of its linear layers fitted so that, of the means
// of both models' inputs, it makes the means of both models' outputs. The layers are those whose
// inputs the statistics have (merge/forward/layer_sites.h), output heads of tokens excepted; all
// other tensors stay the means.
//
// One layer at a time: memory is its weights and the moments of its site. Errors:
// FailedPrecondition for statistics without all of a site's Gram matrices (Grams::kAll), naming the
// site.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "kernels/linear_algebra.h"
#include "merge/align/activation_matching.h"
#include "merge/align/alignment.h"
#include "merge/align/pleas.h"
#include "merge/align/symmetry.h"
#include "merge/checkpoint/checkpoint.h"

namespace pewter {

// Is given a tensor of the merged model, by the name and with the shape that the reference stores.
using TensorSink =
    std::function<absl::Status(absl::string_view name, const std::vector<double>& values)>;

// `algebra` is the CPU's; model `model` of the moments is aligned with model 0.
absl::Status FitLinearLayers(const Symmetry& symmetry, const Checkpoint& reference,
                             const Checkpoint& model, const Alignment& alignment,
                             const MomentsLookup& moments, int model_index, const Ridge& ridge,
                             kernels::LinearAlgebra& algebra, const TensorSink& sink);

}  // namespace pewter
