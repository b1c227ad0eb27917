#include "merge/align/dense_matrix.h"

#include "base/status.h"

namespace pewter {

absl::StatusOr<DenseMatrix> Product(kernels::LinearAlgebra& algebra, kernels::Transpose transpose_a,
                                    const DenseMatrix& a, kernels::Transpose transpose_b,
                                    const DenseMatrix& b) {
  DenseMatrix c(transpose_a == kernels::Transpose::kYes ? a.columns : a.rows,
                transpose_b == kernels::Transpose::kYes ? b.rows : b.columns);
  RETURN_IF_ERROR(algebra.Gemm(transpose_a, a.view(), transpose_b, b.view(), 1, 0, c.view()));
  return c;
}

}  // namespace pewter
