// Spherical interpolation of any number of models in the tangent space of their mean direction
// (mergekit `multislerp`), of the task vectors where there is a base.
//
// Every vector on the way is a combination of the inputs, so all is computed from their Gram
// matrix.
#include <cmath>

#include "base/status.h"
#include "merge/methods/common/gram.h"
#include "merge/methods/method.h"

namespace pewter::methods {
namespace {

absl::Status Run(MethodContext& context) {
  const int n = context.inputs();
  if (n == 1) return context.Copy(0);
  const double eps = context.number("eps");
  std::vector<double> weights(n);
  double weight_sum = 0;
  for (int i = 0; i < n; ++i) weight_sum += weights[i] = context.number(i, "weight");
  if (context.flag("normalize_weights")) {
    if (weight_sum == 0) {
      return absl::InvalidArgumentError(
          "the weights sum to 0; set `normalize_weights: false` or change them");
    }
    for (double& weight : weights) weight /= weight_sum;
  }
  ASSIGN_OR_RETURN(const GramMatrix gram, InputGram(context, context.has_base()));

  // Coefficients of the inputs, or of their task vectors. unit[i] makes x_i a unit vector.
  std::vector<double> unit(n), mean(n), out(n);
  double norm = 0;
  bool all_zero = true;
  for (int i = 0; i < n; ++i) {
    const double length = std::sqrt(gram(i, i));
    unit[i] = 1 / (length + eps);
    mean[i] = weights[i] * unit[i];
    norm += weights[i] * length;
    all_zero = all_zero && length == 0;
  }
  const double mean_length = gram.Norm(mean);
  if (mean_length < eps) {
    // A tensor that no model has changed stays as it is.
    if (n > 2 && !all_zero) {
      return absl::InvalidArgumentError(
          "the directions of the models cancel, so that there is no mean direction; change the "
          "weights");
    }
    out = weights;
  } else {
    for (double& value : mean) value /= mean_length;
    std::vector<double> tangent(n);
    double along = 0;
    for (int i = 0; i < n; ++i) {
      tangent[i] = weights[i] * unit[i];
      along += weights[i] * unit[i] * gram.DotWith(i, mean);
    }
    for (int i = 0; i < n; ++i) tangent[i] -= along * mean[i];
    const double length = gram.Norm(tangent) + eps;
    for (int i = 0; i < n; ++i) {
      out[i] = norm * (std::cos(length) * mean[i] + std::sin(length) / length * tangent[i]);
    }
  }
  return MapCombination(context, out);
}

}  // namespace

absl::Span<const MergeMethod> multislerp() {
  static const MergeMethod methods[] = {{
      .name = "multislerp",
      .title = "Multi-SLERP",
      .summary = "spherical interpolation of any number of models around their mean direction",
      .formula =
          "u_i = v_i / |v_i|, v_i = x_i - base (x_i without a base); m = sum_i weight_i u_i, unit; "
          "T = sum_i weight_i (u_i - <u_i, m> m); "
          "out = base + (cos|T| m + sin|T| T / |T|) sum_i weight_i |v_i|",
      .reference = "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
      .params =
          {{.name = "weight", .help = "share of this model", .scope = ParamScopeKind::kModel},
           {.name = "normalize_weights",
            .help = "divide the weights by their sum",
            .type = ParamType::kBool,
            .fallback = true},
           {.name = "eps", .help = "a length that counts as none", .fallback = 1e-8, .min = 0}},
      .base = BaseUse::kOptional,
      .run = &Run,
  }};
  return methods;
}

}  // namespace pewter::methods
