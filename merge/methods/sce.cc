// SCE (FuseChat, arXiv 2408.07990; formulas above kernels/ops/select_calculate_erase.h).
#include <algorithm>
#include <cmath>

#include "base/status.h"
#include "merge/methods/method.h"

namespace pewter::methods {
namespace {

absl::Status Run(MethodContext& context) {
  constexpr double kTinySum = 1e-6;
  const int count = context.inputs();
  if (count == 0) return context.Copy(MethodContext::kBase);
  const std::vector<int> operands = context.AllOperands();
  kernels::SelectedMean op;
  op.count = count;
  const double share = context.number("select_topk");
  if (share < 1) {
    const kernels::ModelVariance variance{count};
    int64_t k = 0;
    if (share > 0) {
      ASSIGN_OR_RETURN(const std::vector<double> varying,
                       context.Reduce(kernels::CountVarying{variance}, operands));
      k = static_cast<int64_t>(varying[0] * share);
    }
    if (k == 0) return context.Copy(MethodContext::kBase);
    ASSIGN_OR_RETURN(const std::vector<kernels::Threshold> thresholds,
                     context.SelectLargest({{variance, operands, k}}));
    op.select_all = false;
    op.threshold = thresholds[0].value;
    op.ties_end = thresholds[0].ties_end;
  }
  ASSIGN_OR_RETURN(std::vector<double> squares,
                   context.Reduce(kernels::SelectedSquares{op}, operands));
  squares.resize(count);
  double sum = 0;
  for (double& square : squares) {
    square /= static_cast<double>(context.shape().elements());
    sum += square;
  }
  for (int i = 0; i < count; ++i) op.weight[i] = sum < kTinySum ? 1.0 / count : squares[i] / sum;
  return context.Map(op, operands);
}

}  // namespace

absl::Span<const MergeMethod> sce() {
  static const MergeMethod methods[] = {{
      .name = "sce",
      .title = "SCE",
      .summary = "selects elements in which the models differ most, weighs models by the size of "
                 "their task vectors, erases minority signs",
      .formula =
          "D_i = x_i - base where var_i(x_i) is among the select_topk largest of those not "
          "0, else 0; weight_i = mean(D_i^2) / sum_j mean(D_j^2) (1 / n where that sum is "
          "below 1e-6); out = base + the weighted mean of the D_i with the sign of sum_j D_j",
      .reference = "https://arxiv.org/abs/2408.07990",
      .params = {{.name = "select_topk",
                  .help =
                      "share of the elements that differ between the models which is kept, those "
                      "of the largest variance",
                  .fallback = 1.0},
                 {.name = "int8_mask",
                  .help = "mergekit: dtype of a temporary mask",
                  .type = ParamType::kBool,
                  .fallback = false,
                  .no_effect = true}},
      .base = BaseUse::kRequired,
      .min_inputs = 0,
      .selects = true,
      .run = &Run,
  }};
  return methods;
}

}  // namespace pewter::methods
