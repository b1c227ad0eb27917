#include "merge/methods/common/singular_vectors.h"

#include <algorithm>
#include <utility>

#include "base/status.h"
#include "merge/methods/common/joint_space.h"

namespace pewter::methods {
namespace {

using kernels::ConstMatrix;
using kernels::Matrix;
using kernels::Transpose;

constexpr int64_t kWidth = sizeof(double);
// Rows whose smallest singular value is below this share of the largest depend on each other as far
// as stored weights can tell.
constexpr double kLeastIndependent = 1e-9;

kernels::View All(const Matrix& m) { return {m.data, DType::kF64, m.rows * m.columns}; }
kernels::ConstView AllOf(const Matrix& m) { return {m.data, DType::kF64, m.rows * m.columns}; }

}  // namespace

absl::StatusOr<OwnMatrix> OwnMatrix::Make(kernels::Backend& backend, int64_t rows,
                                          int64_t columns) {
  OwnMatrix m;
  ASSIGN_OR_RETURN(m.memory, backend.Allocate(rows * columns * kWidth));
  m.view = {static_cast<double*>(m.memory->data()), rows, columns, columns};
  return m;
}

absl::StatusOr<OwnMatrix> SumOf(kernels::Backend& backend, absl::Span<const ConstMatrix> deltas) {
  const ConstMatrix& first = deltas[0];
  const int64_t size = first.rows * first.columns;
  ASSIGN_OR_RETURN(OwnMatrix sum, OwnMatrix::Make(backend, first.rows, first.columns));
  ASSIGN_OR_RETURN(const OwnMatrix term, OwnMatrix::Make(backend, first.rows, first.columns));
  ASSIGN_OR_RETURN(const OwnMatrix base, OwnMatrix::Make(backend, first.rows, first.columns));
  // Widening is exact, the difference is of doubles.
  const auto widen = [&](const void* data, const OwnMatrix& to) {
    kernels::WeightedSum op;
    op.count = 1;
    op.weight[0] = 1;
    return backend.Map(op, {{data, first.dtype, size}}, All(to.view), 0);
  };
  RETURN_IF_ERROR(widen(first.minus, base));
  for (size_t t = 0; t < deltas.size(); ++t) {
    RETURN_IF_ERROR(widen(deltas[t].data, term));
    kernels::WeightedSum op;
    op.count = t == 0 ? 2 : 3;
    op.weight[0] = 1;
    op.weight[1] = -1;
    op.weight[2] = 1;
    std::vector<kernels::ConstView> views = {AllOf(term.view), AllOf(base.view)};
    if (t > 0) views.push_back(AllOf(sum.view));
    RETURN_IF_ERROR(backend.Map(op, views, All(sum.view), 0));
  }
  RETURN_IF_ERROR(backend.Synchronize());  // before the terms go
  return sum;
}

absl::StatusOr<ThinSvd> SvdOf(kernels::Backend& backend, OwnMatrix a) {
  ASSIGN_OR_RETURN(kernels::LinearAlgebra* const algebra, backend.linear_algebra());
  const int64_t k = std::min(a.view.rows, a.view.columns);
  ThinSvd svd;
  ASSIGN_OR_RETURN(svd.u, OwnMatrix::Make(backend, a.view.rows, k));
  ASSIGN_OR_RETURN(svd.vt, OwnMatrix::Make(backend, k, a.view.columns));
  RETURN_IF_ERROR(algebra->Svd({{a.view, svd.u.view, svd.vt.view, &svd.values}}));
  RETURN_IF_ERROR(backend.Synchronize());  // before `a` goes
  return svd;
}

int64_t SvdBytes(MatrixShape shape) {
  const int64_t k = std::min(shape.rows, shape.columns);
  // The matrix, its vectors, and what LAPACK works in.
  return kWidth * (shape.rows * shape.columns + k * (shape.rows + shape.columns) + 6 * k * k +
                   64 * (shape.rows + shape.columns));
}

absl::Status LeftVectors(kernels::Backend& backend, const ConstMatrix& a, const Matrix& vt,
                         absl::Span<const double> values, Matrix to) {
  ASSIGN_OR_RETURN(kernels::LinearAlgebra* const algebra, backend.linear_algebra());
  RETURN_IF_ERROR(algebra->Gemm(Transpose::kNo, vt, Transpose::kYes, a, 1, 0, to));
  std::vector<double> inverse;
  for (int64_t j = 0; j < vt.rows; ++j) inverse.push_back(1 / values[j]);
  return ScaleRows(backend, std::move(inverse), to);
}

absl::Status ScaleRows(kernels::Backend& backend, std::vector<double> factors, const Matrix& m) {
  ASSIGN_OR_RETURN(const PlacedValues placed, PlacedValues::Make(backend, std::move(factors)));
  const kernels::AxisCombination scale = {
      .count = 1, .axis = {.row = m.columns, .count = 1, .values = placed.data()}};
  RETURN_IF_ERROR(backend.Map(scale, {AllOf(m)}, All(m), 0));
  return backend.Synchronize();  // before the factors go
}

absl::Status MakeRowsOrthonormal(kernels::Backend& backend, OwnMatrix& m) {
  ASSIGN_OR_RETURN(kernels::LinearAlgebra* const algebra, backend.linear_algebra());
  const MatrixShape shape = {m.view.rows, m.view.columns};
  ASSIGN_OR_RETURN(const ThinSvd svd, SvdOf(backend, std::move(m)));
  if (!(svd.values.back() > kLeastIndependent * svd.values.front())) {
    return absl::FailedPreconditionError("they depend on each other");
  }
  ASSIGN_OR_RETURN(m, OwnMatrix::Make(backend, shape.rows, shape.columns));
  RETURN_IF_ERROR(
      algebra->Gemm(Transpose::kNo, svd.u.view, Transpose::kNo, svd.vt.view, 1, 0, m.view));
  return backend.Synchronize();
}

}  // namespace pewter::methods
