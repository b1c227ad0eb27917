#include "kernels/linear_algebra.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/dtype_names.h"
#include "base/random.h"
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

namespace {

// Directions beyond the rank that the range finder looks for, and how many times the rank the
// shorter side must be for it to be tried.
constexpr int64_t kOversampled = 8;
constexpr int64_t kLeastShare = 8;
constexpr int kRefinements = 2;
// Residuals above this share of the largest eigenvalue are more than rounding.
constexpr double kLeadingTolerance = 1e-11;

struct Owned {
  std::unique_ptr<Buffer> memory;
  Matrix view;

  static absl::StatusOr<Owned> Make(Backend& backend, int64_t rows, int64_t columns) {
    Owned m;
    ASSIGN_OR_RETURN(m.memory, backend.Allocate(rows * columns * int64_t{sizeof(double)}));
    m.view = {static_cast<double*>(m.memory->data()), rows, columns, columns};
    return m;
  }
};

absl::StatusOr<std::vector<double>> Fetch(Backend& backend, const Matrix& m) {
  std::vector<double> values(m.rows * m.columns);
  RETURN_IF_ERROR(backend.Download(m.data, values.data(),
                                   static_cast<int64_t>(values.size() * sizeof(double))));
  RETURN_IF_ERROR(backend.Synchronize());
  return values;
}

bool TriesRangeFinder(int64_t side, int64_t rank) {
  return rank > 0 && kLeastShare * (rank + kOversampled) <= side;
}

// Nothing where what was found is not accurate.
absl::StatusOr<std::optional<LowRankFactors>> FindRange(Backend& backend, const ConstMatrix& a,
                                                        int64_t rank) {
  ASSIGN_OR_RETURN(LinearAlgebra* const algebra, backend.linear_algebra());
  const bool tall = a.columns < a.rows;
  const int64_t side = tall ? a.columns : a.rows, length = tall ? a.rows : a.columns;
  const int64_t k = rank + kOversampled;
  // S [side, length] is a or a^T.
  const Transpose as_s = tall ? Transpose::kYes : Transpose::kNo;
  const Transpose as_s_t = tall ? Transpose::kNo : Transpose::kYes;
  ASSIGN_OR_RETURN(const Owned q, Owned::Make(backend, side, k));
  ASSIGN_OR_RETURN(const Owned z, Owned::Make(backend, length, k));
  ASSIGN_OR_RETURN(const Owned r, Owned::Make(backend, k, k));
  {
    std::vector<double> random(length * k);
    const PhiloxKey key = MakePhiloxKey(0, "range finder");
    for (size_t i = 0; i < random.size(); ++i) random[i] = PhiloxWord(key, i) * 0x1p-31 - 1;
    RETURN_IF_ERROR(backend.Upload(random.data(), z.view.data,
                                   static_cast<int64_t>(random.size() * sizeof(double))));
    RETURN_IF_ERROR(backend.Synchronize());  // before they go
  }
  for (int i = 0; i <= kRefinements; ++i) {
    RETURN_IF_ERROR(algebra->Gemm(as_s, a, Transpose::kNo, z.view, 1, 0, q.view));
    RETURN_IF_ERROR(algebra->QrFactor(q.view, r.view));
    if (i == kRefinements) break;
    RETURN_IF_ERROR(algebra->Gemm(as_s_t, a, Transpose::kNo, q.view, 1, 0, z.view));
    RETURN_IF_ERROR(algebra->QrFactor(z.view, r.view));
  }
  // The eigenvectors of Q^T S S^T Q.
  ASSIGN_OR_RETURN(const Owned projected, Owned::Make(backend, k, length));
  ASSIGN_OR_RETURN(const Owned gram, Owned::Make(backend, k, k));
  RETURN_IF_ERROR(algebra->Gemm(Transpose::kYes, q.view, as_s, a, 1, 0, projected.view));
  RETURN_IF_ERROR(algebra->Gram(Transpose::kNo, projected.view, 0, gram.view));
  std::vector<double> squares;
  RETURN_IF_ERROR(algebra->SymmetricEigen({{gram.view, &squares}}));

  LowRankFactors factors;
  ASSIGN_OR_RETURN(factors.memory,
                   backend.Allocate(rank * (a.rows + a.columns) * int64_t{sizeof(double)}));
  auto* const data = static_cast<double*>(factors.memory->data());
  factors.left = {data, rank, a.rows, a.rows};
  factors.right = {data + rank * a.rows, rank, a.columns, a.columns};
  const Matrix& unit = tall ? factors.right : factors.left;
  const Matrix& other = tall ? factors.left : factors.right;
  const Matrix leading = {gram.view.data, rank, k, k};
  RETURN_IF_ERROR(algebra->Gemm(Transpose::kNo, leading, Transpose::kYes, q.view, 1, 0, unit));
  // Signs are those of eigenvectors of the whole.
  ASSIGN_OR_RETURN(std::vector<double> vectors, Fetch(backend, unit));
  ASSIGN_OR_RETURN(std::vector<double> coordinates, Fetch(backend, leading));
  for (int64_t i = 0; i < rank; ++i) {
    double* const row = vectors.data() + i * side;
    const double largest = *std::max_element(
        row, row + side, [](double x, double y) { return std::abs(x) < std::abs(y); });
    if (!(largest < 0)) continue;
    for (int64_t j = 0; j < side; ++j) row[j] = -row[j];
    for (int64_t j = 0; j < k; ++j) coordinates[i * k + j] = -coordinates[i * k + j];
  }
  RETURN_IF_ERROR(backend.Upload(coordinates.data(), leading.data,
                                 static_cast<int64_t>(coordinates.size() * sizeof(double))));
  RETURN_IF_ERROR(algebra->Gemm(Transpose::kNo, leading, Transpose::kYes, q.view, 1, 0, unit));
  RETURN_IF_ERROR(algebra->Gemm(Transpose::kNo, unit, as_s, a, 1, 0, other));
  ASSIGN_OR_RETURN(const Owned again, Owned::Make(backend, rank, side));
  RETURN_IF_ERROR(algebra->Gemm(Transpose::kNo, other, as_s_t, a, 1, 0, again.view));
  ASSIGN_OR_RETURN(const std::vector<double> images, Fetch(backend, again.view));
  for (int64_t i = 0; i < rank; ++i) {
    double square = 0;
    for (int64_t j = i * side; j < (i + 1) * side; ++j) {
      const double difference = images[j] - squares[i] * vectors[j];
      square += difference * difference;
    }
    if (!(std::sqrt(square) <= kLeadingTolerance * squares[0])) return std::nullopt;
    factors.values.push_back(std::sqrt(std::max(squares[i], 0.0)));
  }
  return factors;
}

}  // namespace

absl::StatusOr<LowRankFactors> FactorLeading(Backend& backend, const ConstMatrix& a, int64_t rank) {
  if (TriesRangeFinder(std::min(a.rows, a.columns), rank)) {
    ASSIGN_OR_RETURN(std::optional<LowRankFactors> found, FindRange(backend, a, rank));
    if (found) return *std::move(found);
  }
  ASSIGN_OR_RETURN(LowRankFactors factors, FactorLowRank(backend, a, rank));
  factors.values.resize(rank);
  return factors;
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
  // The Gram matrix, twice that and a copy of a half to find its vectors, the factors.
  const int64_t side = std::min(rows, columns), k = rank + kOversampled;
  // The range finder is done before that, but for its factors.
  const int64_t range = TriesRangeFinder(side, rank) ? 3 * k * (rows + columns) + 4 * k * k : 0;
  const int64_t by_gram = 7 * side * side / 2 + 6 * side;
  return 8 * (std::max(by_gram, range) + rank * (rows + columns));
}

}  // namespace pewter::kernels
