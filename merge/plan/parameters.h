// Parameters of a merge method, from what the recipe says at each level.
//
// A parameter of scope kModel is asked of the input's own `parameters`, then the slice's, the
// module's, the recipe's; kTensor starts at the slice, kJob at the recipe. The first level with a
// case whose filter is part of the tensor's name decides. Gradients are evaluated at t, the layer's
// place in its slice (0 to 1). Pure functions; errors name line and column.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "merge/methods/method.h"
#include "merge/recipe/recipe.h"

namespace pewter {

// Where in the recipe a tensor stands.
struct ParamPlace {
  const ParamScope* slice = nullptr;
  const ParamScope* module = nullptr;
  const ParamScope* recipe = nullptr;
  double t = 0;
};

// Checks every setting of the recipe against the method's table: types, ranges, choices. Warns of
// parameters that the method does not have, of those that are ignored where they stand, and of
// those without effect.
absl::Status CheckParameters(const Recipe& recipe, const MergeMethod& method,
                             std::vector<std::string>& warnings);

// Values of scopes kTensor and kJob for an output tensor. InvalidArgument when a required one is
// missing.
absl::StatusOr<ParamValues> TensorParameters(const MergeMethod& method, const ParamPlace& place,
                                             absl::string_view output_tensor);

// Values of scope kModel for one input. `own` is the input's `parameters`, null for a model that
// the recipe lists only as base_model. Filters see `source_tensor`.
absl::StatusOr<ParamValues> ModelParameters(const MergeMethod& method, const ParamPlace& place,
                                            const ParamScope* own, absl::string_view model,
                                            absl::string_view source_tensor);

}  // namespace pewter
