// DELLA (arXiv 2406.11617): as DARE, but elements of larger magnitude are kept more likely. The
// probability follows the rank in the row of the weight matrix; how it is drawn without ranking is
// in kernels/ops/ranked_draw.h. The scale keeps the L1 norm, as mergekit does, and is not the
// paper's 1 / probability.
#include <algorithm>
#include <variant>

#include "absl/strings/str_cat.h"
#include "merge/methods/common/task_vectors.h"

namespace pewter::methods {
namespace {

constexpr TaskVectorOptions kLinear = {.sparsifier = Sparsifier::kRanked};
constexpr TaskVectorOptions kTies = {.sparsifier = Sparsifier::kRanked, .elect_sign = true};

// Probabilities are probabilities.
absl::Status Check(const ParamValues& params) {
  const double density = std::get<double>(params.at("density"));
  const double epsilon = std::get<double>(params.at("epsilon"));
  if (density <= 0 || density >= 1 || (density - epsilon > 0 && density + epsilon < 1)) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("density ", density, " and epsilon ", epsilon,
                   ": density - epsilon and density + epsilon must lie between 0 and 1; choose an "
                   "epsilon below ",
                   std::min(density, 1 - density)));
}

}  // namespace

absl::Span<const MergeMethod> della() {
  static const MergeMethod methods[] = {
      {
          .name = "della",
          .title = "DELLA",
          .summary = "drops elements of the task vectors at random, small ones more likely, then "
                     "merges those that agree in sign",
          .formula = "d_i as della_linear; D_i, m and out as ties",
          .reference = "https://arxiv.org/abs/2406.11617",
          .params = TaskVectorParams(kTies, /*normalize=*/true, /*rescale=*/true),
          .base = BaseUse::kRequired,
          .min_inputs = 0,
          .by_rows = true,
          .check_input = &Check,
          .run = [](MethodContext& context) { return RunTaskVectors(context, kTies); },
      },
      {
          .name = "della_linear",
          .title = "DELLA, linear",
          .summary = "drops elements of the task vectors at random, small ones more likely, then "
                     "task arithmetic",
          .formula =
              "p = density - epsilon + 2 epsilon (r - 1) / (n - 1), r the rank of |x_i - base| in "
              "its row of n; d_i = (x_i - base) * Bernoulli(p) * (rescale ? L1 before / L1 after : "
              "1); out = base + lambda sum_i weight_i d_i / (normalize ? sum_i weight_i : 1)",
          .reference = "https://arxiv.org/abs/2406.11617",
          .params = TaskVectorParams(kLinear, /*normalize=*/false, /*rescale=*/true),
          .base = BaseUse::kRequired,
          .min_inputs = 0,
          .by_rows = true,
          .check_input = &Check,
          .run = [](MethodContext& context) { return RunTaskVectors(context, kLinear); },
      }};
  return methods;
}

}  // namespace pewter::methods
