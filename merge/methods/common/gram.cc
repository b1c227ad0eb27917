#include "merge/methods/common/gram.h"

#include <algorithm>
#include <cmath>

#include "base/status.h"

namespace pewter::methods {

double GramMatrix::DotWith(int i, absl::Span<const double> coefficients) const {
  double dot = 0;
  for (int j = 0; j < size_; ++j) dot += (*this)(i, j) * coefficients[j];
  return dot;
}

double GramMatrix::Norm(absl::Span<const double> coefficients) const {
  double square = 0;
  for (int i = 0; i < size_; ++i) square += coefficients[i] * DotWith(i, coefficients);
  return std::sqrt(std::max(square, 0.0));
}

namespace {

kernels::Gram OpOf(const MethodContext& context, bool from_base) {
  return {.count = context.inputs(), .from_base = from_base};
}

std::vector<int> OperandsOf(const MethodContext& context, bool from_base) {
  std::vector<int> operands = context.AllOperands();
  if (context.has_base() && !from_base) operands.erase(operands.begin());
  return operands;
}

GramMatrix FromSums(const kernels::Gram& op, absl::Span<const double> sums) {
  GramMatrix gram(op.count);
  for (int g = 0; g < op.groups(); ++g) {
    const kernels::Gram::Pair pair = op.PairOf(g);
    gram(pair.i, pair.j) = gram(pair.j, pair.i) = sums[g];
  }
  return gram;
}

kernels::MapOp Combination(const MethodContext& context, absl::Span<const double> coefficients) {
  if (context.has_base()) {
    kernels::TaskVectorSum op;
    op.count = context.inputs();
    for (int i = 0; i < op.count; ++i) op.model[i].weight = coefficients[i];
    return op;
  }
  kernels::WeightedSum op;
  op.count = context.inputs();
  std::copy(coefficients.begin(), coefficients.end(), op.weight);
  return op;
}

}  // namespace

absl::StatusOr<GramMatrix> InputGram(MethodContext& context, bool from_base) {
  const kernels::Gram op = OpOf(context, from_base);
  ASSIGN_OR_RETURN(const std::vector<double> sums,
                   context.Reduce(op, OperandsOf(context, from_base)));
  return FromSums(op, sums);
}

absl::Status MapCombination(MethodContext& context, absl::Span<const double> coefficients) {
  return context.Map(Combination(context, coefficients), context.AllOperands());
}

absl::Status MapCombinationOfAxis(
    MethodContext& context, Axis axis,
    absl::FunctionRef<std::vector<double>(const GramMatrix& gram)> coefficients) {
  const bool columns = axis == Axis::kColumns;
  const kernels::Gram op = OpOf(context, context.has_base());
  ASSIGN_OR_RETURN(const std::vector<double> sums,
                   columns ? context.ReduceColumns(op, context.AllOperands())
                           : context.ReduceRows(op, context.AllOperands()));
  const int pairs = op.groups();
  const auto lines = static_cast<int64_t>(sums.size()) / pairs;
  std::vector<double> values(lines * op.count), of_line(pairs);
  for (int64_t line = 0; line < lines; ++line) {
    for (int pair = 0; pair < pairs; ++pair) {
      of_line[pair] = columns ? sums[pair * lines + line] : sums[line * pairs + pair];
    }
    const std::vector<double> chosen = coefficients(FromSums(op, of_line));
    for (int i = 0; i < op.count; ++i) {
      values[columns ? i * lines + line : line * op.count + i] = chosen[i];
    }
  }
  const kernels::AxisCombination combination = {
      .count = op.count,
      .from_base = context.has_base(),
      .axis = {.row = columns ? lines : context.row_elements(),
               .count = op.count,
               .columns = columns,
               .values = values.data()}};
  return context.Map(combination, context.AllOperands());
}

}  // namespace pewter::methods
