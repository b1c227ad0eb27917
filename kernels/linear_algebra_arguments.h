// What every backend's LinearAlgebra checks before it calls a library. Internal, naming what does
// not fit; ResourceExhausted for extents beyond kMaxExtent.
#pragma once

#include "absl/status/status.h"
#include "kernels/linear_algebra.h"

namespace pewter::kernels {

absl::Status CheckGemm(Transpose transpose_a, const ConstMatrix& a, Transpose transpose_b,
                       const ConstMatrix& b, const Matrix& c);
absl::Status CheckGram(Transpose transpose, const ConstMatrix& a, const Matrix& g);
absl::Status CheckEigen(const LinearAlgebra::EigenProblem& problem);
absl::Status CheckSvd(const LinearAlgebra::SvdProblem& problem);
absl::Status CheckQr(const Matrix& a, const Matrix& r);
absl::Status CheckSolve(const Matrix& a, const Matrix& b);

}  // namespace pewter::kernels
