#include "merge/methods/common/weighted_mean.h"

#include <numeric>

#include "base/status.h"

namespace pewter::methods {

Param MeanWeightParam(const char* help) {
  return {.name = "weight", .help = help, .scope = ParamScopeKind::kModel, .fallback = 1.0};
}

absl::Status CheckWeights(absl::Span<const double> weights) {
  if (std::accumulate(weights.begin(), weights.end(), 0.0) != 0) return absl::OkStatus();
  return absl::InvalidArgumentError("the weights sum to 0; change them");
}

absl::Status RunWeightedMean(MethodContext& context) {
  kernels::WeightedSum op;
  op.count = context.inputs();
  op.divisor = 0;
  for (int i = 0; i < op.count; ++i) op.divisor += op.weight[i] = context.number(i, "weight");
  RETURN_IF_ERROR(CheckWeights({op.weight, static_cast<size_t>(op.count)}));
  return context.Map(op, context.AllOperands());
}

}  // namespace pewter::methods
