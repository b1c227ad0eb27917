// Arcee Fusion (mergekit `arcee_fusion`): takes over the elements of a second model that matter
// most. Formulas above kernels/ops/fusion.h.
//
// The quartiles are those of all elements; mergekit estimates them from a sample of a million.
#include <cmath>

#include "base/status.h"
#include "merge/methods/method.h"

namespace pewter::methods {
namespace {

// By how much the model's row differs from the base's: of each row.
absl::StatusOr<std::vector<double>> Divergences(MethodContext& context) {
  const std::vector<int> operands = context.AllOperands();
  kernels::AxisValues axis = {.row = context.row_elements(), .count = 2};
  ASSIGN_OR_RETURN(std::vector<double> largest, context.ReduceRows(kernels::Largest{}, operands));
  axis.values = largest.data();
  ASSIGN_OR_RETURN(const std::vector<double> sums,
                   context.ReduceRows(kernels::ExpSums{axis}, operands));
  std::vector<double> logarithms(sums.size());
  for (size_t row = 0; row < sums.size(); row += 2) {
    const double base = largest[row] + std::log(sums[row]);
    logarithms[row] = base;
    logarithms[row + 1] = largest[row + 1] + std::log(sums[row + 1]) - base;
  }
  axis.values = logarithms.data();
  return context.ReduceRows(kernels::SoftmaxDivergence{axis}, operands);
}

absl::Status Run(MethodContext& context) {
  const int64_t elements = context.shape().elements();
  if (elements == 0) return context.Copy(MethodContext::kBase);
  const std::vector<int> operands = context.AllOperands();
  ASSIGN_OR_RETURN(const std::vector<double> divergences, Divergences(context));
  const kernels::Importance importance{
      .axis = {.row = context.row_elements(), .count = 1, .values = divergences.data()}};
  // The f-quantile is the element with floor(f (n - 1)) before it in ascending order.
  std::vector<MethodContext::MagnitudeRank> quartiles;
  for (const double f : {0.25, 0.5, 0.75}) {
    const auto before = static_cast<int64_t>(f * static_cast<double>(elements - 1));
    quartiles.push_back({importance, operands, elements - before});
  }
  ASSIGN_OR_RETURN(const std::vector<kernels::Threshold> found, context.SelectLargest(quartiles));
  return context.Map(
      kernels::ImportantElements{
          .importance = importance,
          .threshold = found[1].value + 1.5 * (found[2].value - found[0].value)},
      operands);
}

}  // namespace

absl::Span<const MergeMethod> arcee_fusion() {
  static const MergeMethod methods[] = {{
      .name = "arcee_fusion",
      .title = "Arcee Fusion",
      .summary = "takes over the elements of a model that matter most, the base's else",
      .formula = "importance = |x - base| KL(softmax(x) || softmax(base)) by row; out = x where "
                 "importance >= median + 1.5 (third quartile - first), else base",
      .reference = "https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
      .base = BaseUse::kRequired,
      .min_inputs = 1,
      .max_inputs = 1,
      .single_input_passes = true,
      .selects = true,
      .by_rows = true,
      .run = &Run,
  }};
  return methods;
}

}  // namespace pewter::methods
