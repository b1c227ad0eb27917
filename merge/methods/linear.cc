// Weighted average (Model Soups, arXiv 2203.05482; mergekit `linear`).
#include "merge/methods/method.h"

namespace pewter::methods {
namespace {

absl::Status Run(MethodContext& context) {
  kernels::WeightedSum op;
  op.count = context.inputs();
  double sum = 0;
  for (int i = 0; i < op.count; ++i) sum += op.weight[i] = context.number(i, "weight");
  if (context.flag("normalize")) {
    if (sum == 0) {
      return absl::InvalidArgumentError(
          "the weights sum to 0; set `normalize: false` or change them");
    }
    op.divisor = sum;
  }
  return context.Map(op, context.AllOperands());
}

}  // namespace

absl::Span<const MergeMethod> linear() {
  static const MergeMethod methods[] = {{
      .name = "linear",
      .title = "Linear",
      .summary = "weighted average of the models",
      .formula = "out = sum_i weight_i x_i / (normalize ? sum_i weight_i : 1)",
      .reference = "https://arxiv.org/abs/2203.05482",
      .params = {{.name = "weight", .help = "share of this model", .scope = ParamScopeKind::kModel},
                 {.name = "normalize",
                  .help = "divide by the sum of the weights",
                  .type = ParamType::kBool,
                  .fallback = true}},
      .run = &Run,
  }};
  return methods;
}

}  // namespace pewter::methods
