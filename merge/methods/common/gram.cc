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

absl::Status MapCombinationOfRows(
    MethodContext& context,
    absl::FunctionRef<std::vector<double>(const GramMatrix& gram)> coefficients) {
  const kernels::Gram op = OpOf(context, context.has_base());
  ASSIGN_OR_RETURN(const std::vector<double> sums, context.ReduceRows(op, context.AllOperands()));
  const int count = op.count, pairs = op.groups();
  const size_t rows = sums.size() / pairs;
  std::vector<double> of_rows;
  for (size_t row = 0; row < rows; ++row) {
    const std::vector<double> of_row =
        coefficients(FromSums(op, absl::MakeConstSpan(sums).subspan(row * pairs, pairs)));
    of_rows.insert(of_rows.end(), of_row.begin(), of_row.end());
  }
  return context.MapRows(
      [&](int64_t row) {
        return Combination(context, absl::MakeConstSpan(of_rows).subspan(row * count, count));
      },
      context.AllOperands());
}

}  // namespace pewter::methods
