#include "kernels/cuda/linear_algebra.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "kernels/linear_algebra_arguments.h"

namespace pewter::kernels::cuda {
namespace {

constexpr int kOutOfMemory = 2;  // cudaErrorMemoryAllocation

MatrixArg Arg(const ConstMatrix& m) {
  return {.data = const_cast<void*>(m.data),
          .minus = m.minus,
          .dtype = m.dtype,
          .rows = m.rows,
          .columns = m.columns,
          .stride = m.stride};
}

class CudaLinearAlgebra : public LinearAlgebra {
 public:
  CudaLinearAlgebra(const Plugin& plugin, Stream* stream, std::string name)
      : plugin_(plugin), stream_(stream), name_(std::move(name)) {}

  absl::Status Gemm(Transpose transpose_a, const ConstMatrix& a, Transpose transpose_b,
                    const ConstMatrix& b, double alpha, double beta, Matrix c) override {
    RETURN_IF_ERROR(CheckGemm(transpose_a, a, transpose_b, b, c));
    return Multiply(transpose_a, a, transpose_b, b, alpha, beta, c, /*mirror=*/false);
  }

  absl::Status Gram(Transpose transpose, const ConstMatrix& a, double beta, Matrix g) override {
    RETURN_IF_ERROR(CheckGram(transpose, a, g));
    const bool columns = transpose == Transpose::kYes;
    return Multiply(transpose, a, Transpose{!columns}, a, 1, beta, g, /*mirror=*/true);
  }

  absl::Status SymmetricEigen(absl::Span<const EigenProblem> problems) override {
    for (const EigenProblem& problem : problems) RETURN_IF_ERROR(CheckEigen(problem));
    for (const EigenProblem& problem : problems) {
      problem.values->assign(problem.a.rows, 0);
      if (problem.values->empty()) continue;
      const EigenCall call = {.a = Arg(problem.a), .values = problem.values->data()};
      RETURN_IF_ERROR(Status(plugin_.eigen(stream_, &call), "eigenvalues"));
      std::reverse(problem.values->begin(), problem.values->end());
    }
    return absl::OkStatus();
  }

  absl::Status Svd(absl::Span<const SvdProblem> problems) override {
    for (const SvdProblem& problem : problems) RETURN_IF_ERROR(CheckSvd(problem));
    for (const SvdProblem& problem : problems) {
      problem.values->assign(problem.vt.rows, 0);
      if (problem.values->empty()) continue;
      const SvdCall call = {.a = Arg(problem.a),
                            .u = Arg(problem.u),
                            .vt = Arg(problem.vt),
                            .values = problem.values->data()};
      RETURN_IF_ERROR(Status(plugin_.svd(stream_, &call), "singular values"));
    }
    return absl::OkStatus();
  }

  absl::Status QrFactor(Matrix a, Matrix r) override {
    RETURN_IF_ERROR(CheckQr(a, r));
    if (r.rows == 0) return absl::OkStatus();
    const QrCall call = {.a = Arg(a), .r = Arg(r)};
    return Status(plugin_.qr(stream_, &call), "QR");
  }

  absl::Status SolvePosDef(Matrix a, Matrix b) override {
    RETURN_IF_ERROR(CheckSolve(a, b));
    if (b.rows == 0 || b.columns == 0) return absl::OkStatus();
    const SolveCall call = {.a = Arg(a), .b = Arg(b)};
    return Status(plugin_.solve_pos_def(stream_, &call), "solving");
  }

 private:
  absl::Status Multiply(Transpose transpose_a, const ConstMatrix& a, Transpose transpose_b,
                        const ConstMatrix& b, double alpha, double beta, const Matrix& c,
                        bool mirror) {
    if (c.rows == 0 || c.columns == 0) return absl::OkStatus();
    const MultiplyCall call = {.transpose_a = transpose_a == Transpose::kYes,
                               .transpose_b = transpose_b == Transpose::kYes,
                               .a = Arg(a),
                               .b = Arg(b),
                               .c = Arg(c),
                               .alpha = alpha,
                               .beta = beta,
                               .mirror = mirror};
    return Status(plugin_.multiply(stream_, &call), "a product");
  }

  absl::Status Status(int error, absl::string_view doing) const {
    return Annotate(ToStatus(plugin_, error, doing), name_);
  }

  const Plugin& plugin_;
  Stream* const stream_;
  const std::string name_;
};

}  // namespace

absl::Status ToStatus(const Plugin& plugin, int error, absl::string_view doing) {
  if (error == 0) return absl::OkStatus();
  const std::string message = absl::StrCat(doing, ": ", plugin.describe(error));
  switch (error) {
    case kOutOfMemory:
      return absl::ResourceExhaustedError(message);
    case kLibrariesMissing:
    case kNotFinite:
    case kNotConverged:
    case kNotPositiveDefinite:
      return absl::FailedPreconditionError(message);
    default:
      return absl::UnavailableError(message);
  }
}

std::unique_ptr<LinearAlgebra> MakeLinearAlgebra(const Plugin& plugin, Stream* stream,
                                                 std::string name) {
  return std::make_unique<CudaLinearAlgebra>(plugin, stream, std::move(name));
}

}  // namespace pewter::kernels::cuda
