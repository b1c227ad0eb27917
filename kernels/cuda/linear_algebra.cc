#include "kernels/cuda/linear_algebra.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "base/random.h"
#include "base/status.h"
#include "kernels/cpu/linear_algebra.h"
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

// Factors of random vectors may be off by this share of what they should be: rounding makes 1e-14
// of it, wrong factors 0.1.
constexpr double kTolerance = 1e-9;
constexpr int64_t kProbes = 2;
constexpr int64_t kWidth = sizeof(double);

// A matrix on the host, rows without gaps.
struct HostMatrix {
  int64_t rows = 0, columns = 0;
  std::vector<double> values;

  HostMatrix(int64_t r, int64_t c) : rows(r), columns(c), values(r * c) {}
  Matrix view() { return {values.data(), rows, columns, columns}; }
};

HostMatrix RandomProbes(int64_t size) {
  HostMatrix probes(size, kProbes);
  const PhiloxKey key = MakePhiloxKey(0, "probes of a factorisation");
  for (size_t i = 0; i < probes.values.size(); ++i) {
    probes.values[i] = PhiloxWord(key, i) * 0x1p-31 - 1;
  }
  return probes;
}

double Largest(absl::Span<const double> values) {
  double largest = 0;
  for (double value : values) largest = std::max(largest, std::abs(value));
  return largest;
}

// Whether `got` is `want`, as far as rounding against numbers like `scale` allows. NaN is not.
bool Agree(const HostMatrix& got, const HostMatrix& want, double scale) {
  for (size_t i = 0; i < got.values.size(); ++i) {
    if (!(std::abs(got.values[i] - want.values[i]) <= kTolerance * scale)) return false;
  }
  return true;
}

// The matrix times the probes. `symmetric`: only the lower triangle is set.
HostMatrix TimesProbes(const HostMatrix& a, bool symmetric, const HostMatrix& probes) {
  HostMatrix product(a.rows, kProbes);
  for (int64_t i = 0; i < a.rows; ++i) {
    const double* const row = a.values.data() + i * a.columns;
    const int64_t end = symmetric ? i : a.columns;
    for (int64_t p = 0; p < kProbes; ++p) {
      double sum = 0;
      for (int64_t j = 0; j < end; ++j) {
        sum += row[j] * probes.values[j * kProbes + p];
        if (symmetric) {
          product.values[j * kProbes + p] += row[j] * probes.values[i * kProbes + p];
        }
      }
      if (symmetric) sum += row[i] * probes.values[i * kProbes + p];
      product.values[i * kProbes + p] += sum;
    }
  }
  return product;
}

// Row i times values[i].
HostMatrix RowsScaled(HostMatrix m, absl::Span<const double> values) {
  for (size_t i = 0; i < m.values.size(); ++i) m.values[i] *= values[i / m.columns];
  return m;
}

class CudaLinearAlgebra : public LinearAlgebra {
 public:
  CudaLinearAlgebra(const Plugin& plugin, int ordinal, Stream* stream, std::string name)
      : plugin_(plugin), ordinal_(ordinal), stream_(stream), name_(std::move(name)) {}

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
    for (const EigenProblem& problem : problems) RETURN_IF_ERROR(EigenChecked(problem));
    return absl::OkStatus();
  }

  absl::Status Svd(absl::Span<const SvdProblem> problems) override {
    for (const SvdProblem& problem : problems) RETURN_IF_ERROR(CheckSvd(problem));
    for (const SvdProblem& problem : problems) RETURN_IF_ERROR(SvdChecked(problem));
    return absl::OkStatus();
  }

  std::vector<std::string> TakeNotes() override { return std::exchange(notes_, {}); }

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
  // --- Factorisations, checked -------------------------------------------------------------------

  // Whether an error of the library leaves the matrix for another routine.
  static bool MayBeRepeated(int error) {
    return error == 0 || error == kNotConverged || error == kLibraryFailed;
  }

  absl::Status EigenChecked(const EigenProblem& problem) {
    const int64_t n = problem.a.rows;
    problem.values->assign(n, 0);
    if (n == 0) return absl::OkStatus();
    ASSIGN_OR_RETURN(HostMatrix kept, Fetch(problem.a));
    const EigenCall call = {.a = Arg(problem.a), .values = problem.values->data()};
    const int error = plugin_.eigen(stream_, &call);
    if (!MayBeRepeated(error)) return Status(error, "eigenvalues");
    if (error == 0) {
      std::reverse(problem.values->begin(), problem.values->end());
      ASSIGN_OR_RETURN(const bool right, IsRight(problem, kept));
      if (right) return absl::OkStatus();
    }
    Note(absl::StrCat("an eigenvalue problem of order ", n), error);
    RETURN_IF_ERROR(Host().SymmetricEigen({{kept.view(), problem.values}}));
    return Place(kept, problem.a);
  }

  // With v the rows of a, v^T diag(values) v x = A x and v^T v x = x.
  absl::StatusOr<bool> IsRight(const EigenProblem& problem, const HostMatrix& original) {
    const HostMatrix probes = RandomProbes(problem.a.rows);
    const HostMatrix want = TimesProbes(original, /*symmetric=*/true, probes);
    ASSIGN_OR_RETURN(const HostMatrix inside, Product(Transpose::kNo, problem.a, probes));
    ASSIGN_OR_RETURN(const HostMatrix back, Product(Transpose::kYes, problem.a, inside));
    ASSIGN_OR_RETURN(const HostMatrix got,
                     Product(Transpose::kYes, problem.a, RowsScaled(inside, *problem.values)));
    // Of sums of n terms.
    const double size = std::sqrt(static_cast<double>(probes.rows));
    const double largest = Largest(*problem.values);
    return std::isfinite(largest) && Agree(back, probes, size) &&
           Agree(got, want, std::max(size * largest, Largest(want.values)));
  }

  absl::Status SvdChecked(const SvdProblem& problem) {
    problem.values->assign(problem.vt.rows, 0);
    if (problem.values->empty()) return absl::OkStatus();
    ASSIGN_OR_RETURN(HostMatrix kept, Fetch(problem.a));
    const SvdCall call = {.a = Arg(problem.a),
                          .u = Arg(problem.u),
                          .vt = Arg(problem.vt),
                          .values = problem.values->data()};
    const int error = plugin_.svd(stream_, &call);
    if (!MayBeRepeated(error)) return Status(error, "singular values");
    if (error == 0) {
      ASSIGN_OR_RETURN(const bool right, IsRight(problem, kept));
      if (right) return absl::OkStatus();
    }
    Note(absl::StrCat("a singular value decomposition of ", kept.rows, " x ", kept.columns), error);
    HostMatrix u(problem.u.rows, problem.u.columns), vt(problem.vt.rows, problem.vt.columns);
    RETURN_IF_ERROR(Host().Svd({{kept.view(), u.view(), vt.view(), problem.values}}));
    RETURN_IF_ERROR(Place(u, problem.u));
    return Place(vt, problem.vt);
  }

  // u diag(values) vt x = A x, u^T u y = y and vt vt^T y = y for y of k elements.
  absl::StatusOr<bool> IsRight(const SvdProblem& problem, const HostMatrix& original) {
    const HostMatrix probes = RandomProbes(original.columns);
    const HostMatrix want = TimesProbes(original, /*symmetric=*/false, probes);
    ASSIGN_OR_RETURN(const HostMatrix inside, Product(Transpose::kNo, problem.vt, probes));
    ASSIGN_OR_RETURN(const HostMatrix got,
                     Product(Transpose::kNo, problem.u, RowsScaled(inside, *problem.values)));
    const HostMatrix shorter = RandomProbes(problem.vt.rows);
    ASSIGN_OR_RETURN(const HostMatrix by_u, Product(Transpose::kNo, problem.u, shorter));
    ASSIGN_OR_RETURN(const HostMatrix from_u, Product(Transpose::kYes, problem.u, by_u));
    ASSIGN_OR_RETURN(const HostMatrix by_vt, Product(Transpose::kYes, problem.vt, shorter));
    ASSIGN_OR_RETURN(const HostMatrix from_vt, Product(Transpose::kNo, problem.vt, by_vt));
    const double size = std::sqrt(static_cast<double>(probes.rows));
    const double largest = Largest(*problem.values);
    return std::isfinite(largest) && Agree(from_u, shorter, size) &&
           Agree(from_vt, shorter, size) &&
           Agree(got, want, std::max(size * largest, Largest(want.values)));
  }

  void Note(absl::string_view what, int error) {
    notes_.push_back(absl::StrCat(
        name_, ": ", what, " ",
        error == 0 ? "gave wrong vectors" : absl::StrCat("failed (", plugin_.describe(error), ")"),
        " and was repeated on the CPU"));
  }

  LinearAlgebra& Host() {
    if (host_ == nullptr) {
      pool_ = std::make_unique<ThreadPool>(1);
      host_ = cpu::MakeLinearAlgebra(*pool_);
    }
    return *host_;
  }

  // --- Between host and device -------------------------------------------------------------------

  absl::StatusOr<HostMatrix> Fetch(const Matrix& m) {
    HostMatrix host(m.rows, m.columns);
    // Without gaps in one piece.
    const int64_t rows = m.stride == m.columns ? m.rows : 1;
    for (int64_t row = 0; row < m.rows; row += rows) {
      RETURN_IF_ERROR(
          Status(plugin_.download(stream_, m.data + row * m.stride,
                                  host.values.data() + row * m.columns, rows * m.columns * kWidth),
                 "download"));
    }
    RETURN_IF_ERROR(Status(plugin_.synchronize(stream_), "download"));
    return host;
  }

  absl::Status Place(const HostMatrix& host, const Matrix& m) {
    const int64_t rows = m.stride == m.columns ? m.rows : 1;
    for (int64_t row = 0; row < m.rows; row += rows) {
      RETURN_IF_ERROR(Status(plugin_.upload(stream_, host.values.data() + row * m.columns,
                                            m.data + row * m.stride, rows * m.columns * kWidth),
                             "upload"));
    }
    return Status(plugin_.synchronize(stream_), "upload");
  }

  // op(a) x on the device.
  absl::StatusOr<HostMatrix> Product(Transpose transpose, const Matrix& a, const HostMatrix& x) {
    const int64_t rows = transpose == Transpose::kYes ? a.columns : a.rows;
    void* memory = nullptr;
    RETURN_IF_ERROR(Status(
        plugin_.allocate(ordinal_, (x.rows + rows) * x.columns * kWidth, &memory), "probes"));
    const absl::Cleanup release = [&] { plugin_.release(ordinal_, memory); };
    auto* const data = static_cast<double*>(memory);
    const Matrix from = {data, x.rows, x.columns, x.columns};
    const Matrix to = {data + x.rows * x.columns, rows, x.columns, x.columns};
    RETURN_IF_ERROR(Place(x, from));
    RETURN_IF_ERROR(Multiply(transpose, a, Transpose::kNo, from, 1, 0, to, /*mirror=*/false));
    return Fetch(to);
  }

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
  const int ordinal_;
  Stream* const stream_;
  const std::string name_;
  std::vector<std::string> notes_;
  std::unique_ptr<ThreadPool> pool_;  // of host_
  std::unique_ptr<LinearAlgebra> host_;    // made when a factorisation is repeated
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

std::unique_ptr<LinearAlgebra> MakeLinearAlgebra(const Plugin& plugin, int ordinal, Stream* stream,
                                                 std::string name) {
  return std::make_unique<CudaLinearAlgebra>(plugin, ordinal, stream, std::move(name));
}

}  // namespace pewter::kernels::cuda
