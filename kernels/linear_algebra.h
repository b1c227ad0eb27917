// LinearAlgebra: dense linear algebra of a Backend (Backend::linear_algebra()).
//
// Matrices are row-major in the backend's memory; vectors of values are host memory and complete on
// return. Arithmetic is double throughout. Inputs that are only read may have any floating dtype
// and may be the difference of two tensors: they are widened to double, which is exact, a block at
// a time, so that nobody holds a double copy of a weight.
//
// On the CPU one library call runs on one thread, and work is cut into blocks of a fixed size, so
// bits do not depend on the number of threads. They do depend on the processor (the library picks
// its kernels) and on the backend: results agree within rounding, about 1e-15 of the largest
// singular value times the dimension. Signs are fixed: the entry of largest magnitude of an
// eigenvector, and of a left singular vector, is positive (the first of several).
//
// A factorisation that does not converge is repeated by a routine that is slower and safer: on the
// CPU dsyevd -> dsyev and dgesdd -> dgesvd. On a GPU whatever a factorisation gives is checked, on
// two random vectors: finite, the residual, the orthogonality. What fails (libraries have given
// wrong factors without an error) is repeated on the CPU. Either is told by TakeNotes.
//
// Order, threads and ownership are the Backend's. Errors: Internal for arguments that do not fit
// together; FailedPrecondition for values that are not finite, for a matrix that is not positive
// definite and where no routine converges; ResourceExhausted when memory ran out or an
// extent is beyond kMaxExtent.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/dtype.h"

namespace pewter::kernels {

class Backend;
class Buffer;

// Of a matrix to be factored: LAPACK counts workspace in 32 bits. QR takes more rows, as long as
// there are no more elements than in a square of this side.
inline constexpr int64_t kMaxExtent = 32000;

// Element (i, j) is at data[i * stride + j], minus the one at the same place of `minus` if set.
struct ConstMatrix {
  const void* data = nullptr;
  DType dtype = DType::kF64;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t stride = 0;
  const void* minus = nullptr;
};
struct Matrix {
  double* data = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t stride = 0;

  operator ConstMatrix() const { return {data, DType::kF64, rows, columns, stride}; }
};

enum class Transpose : bool { kNo = false, kYes = true };

class LinearAlgebra {
 public:
  // What a thread holds to multiply, as long as it lives.
  static constexpr int64_t kThreadBytes = int64_t{8} << 20;

  virtual ~LinearAlgebra() = default;

  // c = alpha * op(a) op(b) + beta * c; c is not read when beta is 0 and overlaps no input.
  virtual absl::Status Gemm(Transpose transpose_a, const ConstMatrix& a, Transpose transpose_b,
                            const ConstMatrix& b, double alpha, double beta, Matrix c) = 0;
  // g = beta * g + a a^T (kNo), or + a^T a (kYes). All of g is written, exactly symmetric.
  virtual absl::Status Gram(Transpose transpose, const ConstMatrix& a, double beta, Matrix g) = 0;

  // Eigenvalues, largest first, and row i of `a` becomes the eigenvector of the i-th: for a matrix
  // A, afterwards A = a^T diag(values) a. Only the lower triangle is read.
  struct EigenProblem {
    Matrix a;  // [n, n]
    std::vector<double>* values = nullptr;
  };
  virtual absl::Status SymmetricEigen(absl::Span<const EigenProblem> problems) = 0;

  // Thin: a = u diag(values) vt with k = min(rows, columns) values, largest first. `a` is
  // destroyed.
  struct SvdProblem {
    Matrix a;   // [m, n]
    Matrix u;   // [m, k]
    Matrix vt;  // [k, n]
    std::vector<double>* values = nullptr;
  };
  virtual absl::Status Svd(absl::Span<const SvdProblem> problems) = 0;

  // Thin: a = q r with k = min(rows, columns). q takes the place of a's first k columns; r is
  // [k, columns], upper triangular.
  virtual absl::Status QrFactor(Matrix a, Matrix r) = 0;

  // b = a^-1 b for a symmetric positive definite `a`, of which only the lower triangle is read. `a`
  // is destroyed.
  virtual absl::Status SolvePosDef(Matrix a, Matrix b) = 0;

  // What was repeated by another routine since this was last asked: a sentence each.
  virtual std::vector<std::string> TakeNotes() = 0;
};

// The best approximation of a given rank, as factors: a ~ left^T right. Row i of one factor has
// norm 1 and is orthogonal to its others, row i of the other has about norm values[i].
struct LowRankFactors {
  // Singular values of a, largest first: all min(rows, columns) of them, or the leading `rank`.
  std::vector<double> values;
  std::unique_ptr<Buffer> memory;  // holds the factors
  Matrix left;                     // [rank, rows]; orthonormal rows where rows <= columns
  Matrix right;                    // [rank, columns]; orthonormal rows where not
};
// By the Gram matrix of the shorter side, whose eigenvectors are the singular vectors of that side:
// cheaper than an SVD, and `a` is read in place. The product is U U^T a for orthonormal U, so that
// it is `a` to rounding at full rank, and of lower ranks as near as an SVD's product but for values
// below 1e-8 of the largest, which are noise.
absl::StatusOr<LowRankFactors> FactorLowRank(Backend& backend, const ConstMatrix& a, int64_t rank);
// The same factors where few of many directions are asked for, without the other values: of the
// space that `a` makes of random vectors, refined twice (a randomised range finder). They are taken
// only if each is a singular vector to rounding: of matrices whose rank is about as low as `rank`,
// say of adapters' products, at a cost that goes with the rank. Else by FactorLowRank.
absl::StatusOr<LowRankFactors> FactorLeading(Backend& backend, const ConstMatrix& a, int64_t rank);
// Bytes of the backend's memory that either takes at most, besides `a`.
int64_t FactorLowRankBytes(int64_t rows, int64_t columns, int64_t rank);

}  // namespace pewter::kernels
