#include "kernels/linear_algebra.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/dtype_names.h"
#include "base/status.h"
#include "kernels/backend.h"
#include "kernels/linear_algebra_arguments.h"

namespace pewter::kernels {
namespace {

std::string Describe(const ConstMatrix& m) {
  return absl::StrCat("[", m.rows, ", ", m.columns, "] with rows ", m.stride, " apart");
}

absl::Status CheckMatrix(const ConstMatrix& m) {
  if (m.rows < 0 || m.columns < 0 || m.stride < m.columns || !IsFloat(m.dtype)) {
    return absl::InternalError(
        absl::StrCat("a matrix ", Describe(m), " of ", SafetensorsName(m.dtype)));
  }
  return absl::OkStatus();
}

absl::Status CheckExtents(const Matrix& m) {
  RETURN_IF_ERROR(CheckMatrix(m));
  if (std::max(m.rows, m.columns) > kMaxExtent) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "a matrix ", Describe(m), " is too large to be factored; the limit is ", kMaxExtent));
  }
  return absl::OkStatus();
}

absl::Status CheckShape(const Matrix& m, int64_t rows, int64_t columns, absl::string_view what) {
  RETURN_IF_ERROR(CheckMatrix(m));
  if (m.rows == rows && m.columns == columns) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat(what, " is ", Describe(m), " and not [", rows, ", ", columns, "]"));
}

}  // namespace

absl::Status CheckGemm(Transpose transpose_a, const ConstMatrix& a, Transpose transpose_b,
                       const ConstMatrix& b, const Matrix& c) {
  RETURN_IF_ERROR(CheckMatrix(a));
  RETURN_IF_ERROR(CheckMatrix(b));
  const bool ta = transpose_a == Transpose::kYes, tb = transpose_b == Transpose::kYes;
  const int64_t inner = ta ? a.rows : a.columns;
  if (inner != (tb ? b.columns : b.rows)) {
    return absl::InternalError(
        absl::StrCat("a product of ", Describe(a), " and ", Describe(b), " does not exist"));
  }
  return CheckShape(c, ta ? a.columns : a.rows, tb ? b.rows : b.columns, "a product");
}

absl::Status CheckGram(Transpose transpose, const ConstMatrix& a, const Matrix& g) {
  RETURN_IF_ERROR(CheckMatrix(a));
  const int64_t side = transpose == Transpose::kYes ? a.columns : a.rows;
  return CheckShape(g, side, side, "a Gram matrix");
}

absl::Status CheckEigen(const LinearAlgebra::EigenProblem& problem) {
  RETURN_IF_ERROR(CheckExtents(problem.a));
  return CheckShape(problem.a, problem.a.rows, problem.a.rows, "a symmetric matrix");
}

absl::Status CheckSvd(const LinearAlgebra::SvdProblem& problem) {
  const Matrix& a = problem.a;
  RETURN_IF_ERROR(CheckExtents(a));
  const int64_t k = std::min(a.rows, a.columns);
  RETURN_IF_ERROR(CheckShape(problem.u, a.rows, k, "the matrix of left singular vectors"));
  return CheckShape(problem.vt, k, a.columns, "the matrix of right singular vectors");
}

absl::Status CheckQr(const Matrix& a, const Matrix& r) {
  // Its workspace goes with the columns, so there may be many rows as long as they can be counted.
  RETURN_IF_ERROR(CheckMatrix(a));
  if (a.columns > kMaxExtent ||
      a.rows > kMaxExtent * kMaxExtent / std::max<int64_t>(a.columns, 1)) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "a matrix ", Describe(a), " is too large for a QR factorisation; the limit is ", kMaxExtent,
        " columns and ", kMaxExtent * kMaxExtent, " elements"));
  }
  return CheckShape(r, std::min(a.rows, a.columns), a.columns, "the triangular factor");
}

absl::Status CheckSolve(const Matrix& a, const Matrix& b) {
  RETURN_IF_ERROR(CheckExtents(a));
  RETURN_IF_ERROR(CheckShape(a, a.rows, a.rows, "a symmetric matrix"));
  return CheckShape(b, a.rows, b.columns, "the right-hand side");
}

absl::StatusOr<LowRankFactors> FactorLowRank(Backend& backend, const ConstMatrix& a, int64_t rank) {
  const bool tall = a.columns < a.rows;
  const int64_t side = tall ? a.columns : a.rows;
  if (rank < 0 || rank > side) {
    return absl::InternalError(
        absl::StrCat("rank ", rank, " of a matrix of ", a.rows, " x ", a.columns));
  }
  ASSIGN_OR_RETURN(LinearAlgebra* const algebra, backend.linear_algebra());
  constexpr int64_t kWidth = sizeof(double);
  ASSIGN_OR_RETURN(const std::unique_ptr<Buffer> gram_memory,
                   backend.Allocate(side * side * kWidth));
  const Matrix gram = {static_cast<double*>(gram_memory->data()), side, side, side};
  RETURN_IF_ERROR(algebra->Gram(tall ? Transpose::kYes : Transpose::kNo, a, 0, gram));

  LowRankFactors factors;
  RETURN_IF_ERROR(algebra->SymmetricEigen({{gram, &factors.values}}));
  for (double& value : factors.values) value = std::sqrt(std::max(value, 0.0));

  ASSIGN_OR_RETURN(factors.memory, backend.Allocate(rank * (a.rows + a.columns) * kWidth));
  auto* const data = static_cast<double*>(factors.memory->data());
  factors.left = {data, rank, a.rows, a.rows};
  factors.right = {data + rank * a.rows, rank, a.columns, a.columns};
  const Matrix vectors = {gram.data, rank, side, side};
  const Matrix& unit = tall ? factors.right : factors.left;
  RETURN_IF_ERROR(backend.Copy(vectors.data, unit.data, rank * side * kWidth));
  RETURN_IF_ERROR(algebra->Gemm(Transpose::kNo, vectors, tall ? Transpose::kYes : Transpose::kNo, a,
                                1, 0, tall ? factors.left : factors.right));
  RETURN_IF_ERROR(backend.Synchronize());  // before the Gram matrix goes
  return factors;
}

int64_t FactorLowRankBytes(int64_t rows, int64_t columns, int64_t rank) {
  // The Gram matrix, twice that to find its vectors, the factors, blocks that are being multiplied.
  constexpr int64_t kBlocks = int64_t{8} << 20;
  const int64_t side = std::min(rows, columns);
  return 8 * (3 * side * side + 6 * side + rank * (rows + columns)) + kBlocks;
}

}  // namespace pewter::kernels
