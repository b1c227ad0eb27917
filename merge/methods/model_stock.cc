// Model Stock (arXiv 2403.19522, eq. 7): between the base and the mean of the models, where the
// angle between their task vectors puts the centre of the weights.
#include <algorithm>
#include <cmath>

#include "base/status.h"
#include "merge/methods/common/gram.h"
#include "merge/methods/method.h"

namespace pewter::methods {
namespace {

// t = n c / (1 + (n - 1) c), c the mean cosine of the pairs of task vectors.
double Ratio(const GramMatrix& gram) {
  constexpr double kTiny = 1e-6;
  const int n = gram.size();
  double cosines = 0;
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < i; ++j) {
      const double norms = std::sqrt(gram(i, i)) * std::sqrt(gram(j, j));
      cosines += std::clamp(gram(i, j) / std::max(norms, kTiny), -1.0, 1.0);
    }
  }
  const double cosine = cosines / (n * (n - 1) / 2);
  const double denominator = 1 + (n - 1) * cosine;
  return std::abs(denominator) < kTiny ? 0 : n * cosine / denominator;
}

std::vector<double> Coefficients(const GramMatrix& gram) {
  return std::vector<double>(gram.size(), Ratio(gram) / gram.size());
}

absl::Status Run(MethodContext& context) {
  if (context.inputs() < 2) return context.Copy(MethodContext::kBase);
  if (context.flag("filter_wise")) return MapCombinationOfAxis(context, Axis::kRows, &Coefficients);
  ASSIGN_OR_RETURN(const GramMatrix gram, InputGram(context, /*from_base=*/true));
  return MapCombination(context, Coefficients(gram));
}

}  // namespace

absl::Span<const MergeMethod> model_stock() {
  static const MergeMethod methods[] = {{
      .name = "model_stock",
      .title = "Model Stock",
      .summary =
          "between the base and the mean of the models, by the angle between their task vectors",
      .formula = "c = mean_{i < j} cos(x_i - base, x_j - base); t = n c / (1 + (n - 1) c); "
                 "out = t mean_i x_i + (1 - t) base",
      .reference = "https://arxiv.org/abs/2403.19522",
      .params = {{.name = "filter_wise",
                  .help = "an angle for each row (last axis) instead of one for the tensor",
                  .type = ParamType::kBool,
                  .fallback = false}},
      .base = BaseUse::kRequired,
      .min_inputs = 2,
      .by_rows = true,
      .run = &Run,
  }};
  return methods;
}

}  // namespace pewter::methods
