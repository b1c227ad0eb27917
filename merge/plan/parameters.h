// Parameters of a merge method, from what the recipe says at each level.
//
// A parameter of scope kModel is asked of the input's own `parameters`, then the slice's, the
// module's, the recipe's; kTensor starts at the slice, kJob at the recipe. The first level with a
// case whose filter is part of the tensor's name decides. Gradients are evaluated at t, the layer's
// place in its slice (0 to 1). Pure functions; errors name line and column.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
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

// Where a value was found.
struct ParamOrigin {
  const char* level = "default";  // "model", "slice", "module", "recipe"
  TextPosition at;                // not of a default
  std::string filter;             // the condition under which it holds; empty: always
  std::optional<double> t;        // where a gradient was evaluated
  // "default"; "slice, recipe:4:17, filter \"mlp\", gradient at 0.5".
  std::string ToString() const;
};
using ParamOrigins = std::map<std::string, ParamOrigin>;

struct ResolvedParams {
  ParamValues values;
  ParamOrigins origins;  // of each value
};

// Which settings have decided something: position of the value, and the least and largest t of a
// gradient. Settings of the command line have no position and are not here.
class ParamUse {
 public:
  void Add(const ParamOrigins& origins);
  // Null when it has decided nothing.
  const std::pair<double, double>* Find(TextPosition at) const;

 private:
  std::map<std::pair<int, int>, std::pair<double, double>> range_;
};

// Checks every setting of the recipe against the method's table: types, ranges, choices. Warns of
// parameters that the method does not have, of those that are ignored where they stand, and of
// those without effect.
absl::Status CheckParameters(const Recipe& recipe, const MergeMethod& method,
                             std::vector<std::string>& warnings);

// Warns of settings that changed nothing once all tensors are planned: filters that are part of no
// name in `tensors`, values that nearer levels hide, parameters of the base, gradients that were
// evaluated at one place only.
void WarnOfIdleSettings(const Recipe& recipe, const MergeMethod& method, const ParamUse& use,
                        const absl::flat_hash_set<std::string>& tensors,
                        std::vector<std::string>& warnings);

// Values of scopes kTensor and kJob for an output tensor. InvalidArgument when a required one is
// missing.
absl::StatusOr<ResolvedParams> TensorParameters(const MergeMethod& method, const ParamPlace& place,
                                                absl::string_view output_tensor);

// Values of scope kModel for one input. `own` is the input's `parameters`, null for a model that
// the recipe lists only as base_model. Filters see `source_tensor`.
absl::StatusOr<ResolvedParams> ModelParameters(const MergeMethod& method, const ParamPlace& place,
                                               const ParamScope* own, absl::string_view model,
                                               absl::string_view source_tensor);

}  // namespace pewter
