#include "merge/methods/common/singular_vectors.h"

#include <algorithm>
#include <utility>

#include "absl/algorithm/container.h"
#include "base/status.h"

namespace pewter::methods {
namespace {

using kernels::Matrix;
using kernels::Transpose;

constexpr int64_t kWidth = sizeof(double);
// Rows whose smallest singular value is below this share of the largest depend on each other as far
// as stored weights can tell.
constexpr double kLeastIndependent = 1e-9;

kernels::View All(const Matrix& m) { return {m.data, DType::kF64, m.rows * m.columns}; }
kernels::ConstView AllOf(const Matrix& m) { return {m.data, DType::kF64, m.rows * m.columns}; }

}  // namespace

absl::StatusOr<OwnMatrix> SumOf(kernels::Backend& backend, Deltas deltas) {
  ASSIGN_OR_RETURN(kernels::LinearAlgebra* const algebra, backend.linear_algebra());
  const MatrixShape shape = deltas[0].shape;
  const int64_t size = shape.rows * shape.columns;
  ASSIGN_OR_RETURN(OwnMatrix sum, OwnMatrix::Make(backend, shape.rows, shape.columns));
  bool first = true;
  for (const TaskVector& delta : deltas) {
    if (!delta.product()) continue;
    RETURN_IF_ERROR(algebra->Gemm(Transpose::kNo, delta.left, Transpose::kNo, delta.right, 1,
                                  std::exchange(first, false) ? 0 : 1, sum.view));
  }
  const auto dense = absl::c_find_if(deltas, [](const TaskVector& d) { return !d.product(); });
  if (dense == deltas.end()) {
    RETURN_IF_ERROR(backend.Synchronize());
    return sum;
  }
  ASSIGN_OR_RETURN(const OwnMatrix term, OwnMatrix::Make(backend, shape.rows, shape.columns));
  ASSIGN_OR_RETURN(const OwnMatrix base, OwnMatrix::Make(backend, shape.rows, shape.columns));
  // Widening is exact, the difference is of doubles.
  const auto widen = [&](const void* data, const OwnMatrix& to) {
    kernels::WeightedSum op;
    op.count = 1;
    op.weight[0] = 1;
    return backend.Map(op, {{data, dense->dense.dtype, size}}, All(to.view), 0);
  };
  RETURN_IF_ERROR(widen(dense->dense.minus, base));
  for (const TaskVector& delta : deltas) {
    if (delta.product()) continue;
    RETURN_IF_ERROR(widen(delta.dense.data, term));
    kernels::WeightedSum op;
    op.count = first ? 2 : 3;
    op.weight[0] = 1;
    op.weight[1] = -1;
    op.weight[2] = 1;
    std::vector<kernels::ConstView> views = {AllOf(term.view), AllOf(base.view)};
    if (!std::exchange(first, false)) views.push_back(AllOf(sum.view));
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
  // The matrix and a copy, its vectors, and what LAPACK works in.
  return kWidth * (2 * shape.rows * shape.columns + k * (shape.rows + shape.columns) + 6 * k * k +
                   64 * (shape.rows + shape.columns));
}

absl::StatusOr<ThinSvd> SvdOf(kernels::Backend& backend, const TaskVector& delta) {
  if (!delta.product()) {
    ASSIGN_OR_RETURN(OwnMatrix sum, SumOf(backend, {&delta, 1}));
    return SvdOf(backend, std::move(sum));
  }
  // L = Q_L R_L and R^T = Q_R R_R leave R_L R_R^T, of the extent of the rank.
  ASSIGN_OR_RETURN(kernels::LinearAlgebra* const algebra, backend.linear_algebra());
  const int64_t rank = delta.left.columns, rows = delta.shape.rows, columns = delta.shape.columns;
  const int64_t of_left = std::min(rows, rank), of_right = std::min(columns, rank);
  const int64_t k = std::min(of_left, of_right);
  ASSIGN_OR_RETURN(const OwnMatrix identity, MakeIdentity(backend, rank));
  ASSIGN_OR_RETURN(const OwnMatrix left, OwnMatrix::Make(backend, rows, rank));
  ASSIGN_OR_RETURN(const OwnMatrix right, OwnMatrix::Make(backend, columns, rank));
  ASSIGN_OR_RETURN(const OwnMatrix left_r, OwnMatrix::Make(backend, of_left, rank));
  ASSIGN_OR_RETURN(const OwnMatrix right_r, OwnMatrix::Make(backend, of_right, rank));
  ASSIGN_OR_RETURN(OwnMatrix core, OwnMatrix::Make(backend, of_left, of_right));
  // Copies, by exact products.
  RETURN_IF_ERROR(
      algebra->Gemm(Transpose::kNo, delta.left, Transpose::kNo, identity.view, 1, 0, left.view));
  RETURN_IF_ERROR(
      algebra->Gemm(Transpose::kYes, delta.right, Transpose::kNo, identity.view, 1, 0, right.view));
  RETURN_IF_ERROR(algebra->QrFactor(left.view, left_r.view));
  RETURN_IF_ERROR(algebra->QrFactor(right.view, right_r.view));
  RETURN_IF_ERROR(
      algebra->Gemm(Transpose::kNo, left_r.view, Transpose::kYes, right_r.view, 1, 0, core.view));
  ASSIGN_OR_RETURN(const ThinSvd inner, SvdOf(backend, std::move(core)));
  ThinSvd svd;
  svd.values = inner.values;
  ASSIGN_OR_RETURN(svd.u, OwnMatrix::Make(backend, rows, k));
  ASSIGN_OR_RETURN(svd.vt, OwnMatrix::Make(backend, k, columns));
  const Matrix left_q = {left.view.data, rows, of_left, rank};
  const Matrix right_q = {right.view.data, columns, of_right, rank};
  RETURN_IF_ERROR(
      algebra->Gemm(Transpose::kNo, left_q, Transpose::kNo, inner.u.view, 1, 0, svd.u.view));
  RETURN_IF_ERROR(
      algebra->Gemm(Transpose::kNo, inner.vt.view, Transpose::kYes, right_q, 1, 0, svd.vt.view));
  RETURN_IF_ERROR(backend.Synchronize());  // before the parts go
  return svd;
}

absl::Status LeftVectors(kernels::Backend& backend, const TaskVector& delta, const Matrix& vt,
                         absl::Span<const double> values, Matrix to) {
  RETURN_IF_ERROR(MultiplyTransposed(backend, vt, delta, to));
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
