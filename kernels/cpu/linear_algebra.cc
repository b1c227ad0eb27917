#include "kernels/cpu/linear_algebra.h"

#include <lapack.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "kernels/backend.h"
#include "kernels/cpu/blas.h"
#include "kernels/linear_algebra_arguments.h"

namespace pewter::kernels::cpu {
namespace {

// A product is cut into blocks of the result, and the sum into steps. The library packs both
// operands of a call, and we widen what is not double: the larger the block, the smaller a share of
// multiplying that is. What is widened is held. Sizes never depend on threads.
constexpr int64_t kWidenedExtent = 1024;
constexpr int64_t kPlainExtent = 2048;
constexpr int64_t kDepth = 512;

absl::Status NotConverged(absl::string_view what, lapack_int info) {
  return absl::FailedPreconditionError(
      absl::StrCat("the ", what, " did not converge (", info, ")"));
}

bool Finite(const Matrix& m) {
  for (int64_t i = 0; i < m.rows; ++i) {
    // A sum is NaN or infinite if a term is; it may also overflow, so look closer then.
    const double* const row = m.data + i * m.stride;
    double sum = 0;
    for (int64_t j = 0; j < m.columns; ++j) sum += row[j];
    if (!std::isfinite(sum) &&
        !std::all_of(row, row + m.columns, [](double x) { return std::isfinite(x); })) {
      return false;
    }
  }
  return true;
}

absl::Status CheckFinite(const Matrix& m) {
  if (Finite(m)) return absl::OkStatus();
  return absl::FailedPreconditionError("a matrix that is to be factored has values not finite");
}

// The difference of stored values. What most weights are stored as has loops of its own, so that
// widening is little beside multiplying.
template <class Stored, class Widened>
void Subtract(const void* a, const void* b, int64_t count, const Widened& widened, double* to) {
  const auto* const from = static_cast<const Stored*>(a);
  const auto* const subtracted = static_cast<const Stored*>(b);
  for (int64_t i = 0; i < count; ++i) to[i] = widened(from[i]) - widened(subtracted[i]);
}

bool IsPlain(const ConstMatrix& m) { return m.dtype == DType::kF64 && m.minus == nullptr; }

// Elements [row, row + rows) x [column, column + columns) of `m`, widened into `scratch` where they
// are not double already. `stride` is that of the result.
const double* Widen(const ConstMatrix& m, int64_t row, int64_t rows, int64_t column,
                    int64_t columns, std::vector<double>& scratch, int64_t* stride) {
  const int64_t width = ByteWidth(m.dtype);
  const auto at = [&](const void* data, int64_t i) {
    return static_cast<const void*>(static_cast<const char*>(data) +
                                    ((row + i) * m.stride + column) * width);
  };
  if (IsPlain(m)) {
    *stride = m.stride;
    return static_cast<const double*>(m.data) + row * m.stride + column;
  }
  const size_t needed = rows * columns + columns;
  if (scratch.size() < needed) scratch.resize(needed);
  double* const subtracted = scratch.data() + rows * columns;
  for (int64_t i = 0; i < rows; ++i) {
    double* const to = scratch.data() + i * columns;
    if (m.minus != nullptr && m.dtype == DType::kF32) {
      const auto widened = [](float x) { return static_cast<double>(x); };
      Subtract<float>(at(m.data, i), at(m.minus, i), columns, widened, to);
      continue;
    }
    if (m.minus != nullptr && m.dtype == DType::kBF16) {
      const auto widened = [](uint16_t bits) {
        return static_cast<double>(std::bit_cast<float>(uint32_t{bits} << 16));
      };
      Subtract<uint16_t>(at(m.data, i), at(m.minus, i), columns, widened, to);
      continue;
    }
    Convert({at(m.data, i), m.dtype, columns}, {to, DType::kF64, columns});
    if (m.minus == nullptr) continue;
    Convert({at(m.minus, i), m.dtype, columns}, {subtracted, DType::kF64, columns});
    for (int64_t j = 0; j < columns; ++j) to[j] -= subtracted[j];
  }
  *stride = columns;
  return scratch.data();
}

// Fixes the sign of row-major `vectors` (and of `partners` with them) as linear_algebra.h says.
// `by_column`: a vector is a column.
void FixSigns(const Matrix& vectors, bool by_column, const Matrix* partners) {
  const int64_t count = by_column ? vectors.columns : vectors.rows;
  const int64_t length = by_column ? vectors.rows : vectors.columns;
  const int64_t next = by_column ? vectors.stride : 1;
  for (int64_t v = 0; v < count; ++v) {
    double* const first = vectors.data + (by_column ? v : v * vectors.stride);
    int64_t largest = 0;
    for (int64_t i = 1; i < length; ++i) {
      if (std::abs(first[i * next]) > std::abs(first[largest * next])) largest = i;
    }
    if (length == 0 || !(first[largest * next] < 0)) continue;
    for (int64_t i = 0; i < length; ++i) first[i * next] = -first[i * next];
    if (partners == nullptr) continue;
    double* const partner = partners->data + v * partners->stride;
    for (int64_t i = 0; i < partners->columns; ++i) partner[i] = -partner[i];
  }
}

// Sets the upper triangle, in squares that stay in the cache.
void MirrorLower(const Matrix& g) {
  constexpr int64_t kSide = 32;
  for (int64_t i = 0; i < g.rows; i += kSide) {
    for (int64_t j = 0; j <= i; j += kSide) {
      for (int64_t row = i; row < std::min(i + kSide, g.rows); ++row) {
        for (int64_t column = j; column < std::min(j + kSide, row); ++column) {
          g.data[column * g.stride + row] = g.data[row * g.stride + column];
        }
      }
    }
  }
}

// LAPACK is column-major: it sees the transpose of a row-major matrix, and every call below is
// about that.
lapack_int Int(int64_t value) { return static_cast<lapack_int>(value); }
lapack_int Stride(const Matrix& m) { return Int(std::max<int64_t>(m.stride, 1)); }

// Runs both routines of a factorisation in turn: `restore` gives the second what the first has
// destroyed.
template <class Factor, class Restore>
absl::Status FactorSafely(absl::string_view what, const Factor& factor, const Restore& restore,
                          std::string& note) {
  const int info = factor(Factorisations::Routine::kFast);
  if (info == 0) return absl::OkStatus();
  restore();
  const int again = factor(Factorisations::Routine::kSafe);
  if (again != 0) return NotConverged(what, again);
  note = absl::StrCat("a ", what, " did not converge (", info,
                      ") and was repeated by a slower routine, which did");
  return absl::OkStatus();
}

absl::Status Eigen(const Factorisations& factorisations, const LinearAlgebra::EigenProblem& problem,
                   std::string& note) {
  const Matrix& a = problem.a;
  const int64_t n = a.rows;
  problem.values->assign(n, 0);
  if (n == 0) return absl::OkStatus();
  // The lower triangle may be all that is set, so only this is looked at.
  std::vector<double> kept;
  kept.reserve(n * (n + 1) / 2);
  for (int64_t i = 0; i < n; ++i) {
    double* const row = a.data + i * a.stride;
    RETURN_IF_ERROR(CheckFinite({row, 1, i + 1, n}));
    kept.insert(kept.end(), row, row + i + 1);
  }
  const auto restore = [&] {
    auto from = kept.begin();
    for (int64_t i = 0; i < n; from += ++i) std::copy_n(from, i + 1, a.data + i * a.stride);
  };
  const auto factor = [&](Factorisations::Routine routine) {
    return factorisations.Eigen(routine, a, problem.values->data());
  };
  RETURN_IF_ERROR(
      FactorSafely(absl::StrCat("eigenvalue iteration of order ", n), factor, restore, note));
  std::reverse(problem.values->begin(), problem.values->end());
  for (int64_t i = 0; i < n / 2; ++i) {
    double* const row = a.data + i * a.stride;
    std::swap_ranges(row, row + n, a.data + (n - 1 - i) * a.stride);
  }
  FixSigns(a, /*by_column=*/false, nullptr);
  return absl::OkStatus();
}

absl::Status SvdOf(const Factorisations& factorisations, const LinearAlgebra::SvdProblem& problem,
                   std::string& note) {
  const Matrix& a = problem.a;
  const int64_t k = std::min(a.rows, a.columns);
  problem.values->assign(k, 0);
  if (k == 0) return absl::OkStatus();
  RETURN_IF_ERROR(CheckFinite(a));
  std::vector<double> kept;
  kept.reserve(a.rows * a.columns);
  for (int64_t i = 0; i < a.rows; ++i) {
    kept.insert(kept.end(), a.data + i * a.stride, a.data + i * a.stride + a.columns);
  }
  const auto restore = [&] {
    for (int64_t i = 0; i < a.rows; ++i) {
      std::copy_n(kept.begin() + i * a.columns, a.columns, a.data + i * a.stride);
    }
  };
  const auto factor = [&](Factorisations::Routine routine) {
    return factorisations.Svd(routine, a, problem.u, problem.vt, problem.values->data());
  };
  RETURN_IF_ERROR(
      FactorSafely(absl::StrCat("singular value iteration of ", a.rows, " x ", a.columns), factor,
                   restore, note));
  FixSigns(problem.u, /*by_column=*/true, &problem.vt);
  return absl::OkStatus();
}

// Runs fn on each item and gives the error of the first that has one.
template <class F>
absl::Status ForEach(ThreadPool& pool, int64_t count, const F& fn) {
  std::vector<absl::Status> statuses(count);
  pool.ForEach(count, [&](int64_t item, int thread) { statuses[item] = fn(item, thread); });
  for (const absl::Status& status : statuses) RETURN_IF_ERROR(status);
  return absl::OkStatus();
}

class CpuLinearAlgebra : public LinearAlgebra {
 public:
  CpuLinearAlgebra(ThreadPool& pool, std::unique_ptr<const Factorisations> factorisations)
      : pool_(pool), factorisations_(std::move(factorisations)) {
    UseOneThread();
  }

  std::vector<std::string> TakeNotes() override { return std::exchange(notes_, {}); }

  absl::Status Gemm(Transpose transpose_a, const ConstMatrix& a, Transpose transpose_b,
                    const ConstMatrix& b, double alpha, double beta, Matrix c) override {
    RETURN_IF_ERROR(CheckGemm(transpose_a, a, transpose_b, b, c));
    Multiply(transpose_a == Transpose::kYes, a, transpose_b == Transpose::kYes, b, alpha, beta, c,
             /*lower_only=*/false);
    return absl::OkStatus();
  }

  absl::Status Gram(Transpose transpose, const ConstMatrix& a, double beta, Matrix g) override {
    RETURN_IF_ERROR(CheckGram(transpose, a, g));
    const bool columns = transpose == Transpose::kYes;
    Multiply(columns, a, !columns, a, 1, beta, g, /*lower_only=*/true);
    MirrorLower(g);
    return absl::OkStatus();
  }

  absl::Status SymmetricEigen(absl::Span<const EigenProblem> problems) override {
    for (const EigenProblem& problem : problems) RETURN_IF_ERROR(CheckEigen(problem));
    std::vector<std::string> notes(problems.size());
    RETURN_IF_ERROR(ForEach(pool_, problems.size(), [&](int64_t i, int) {
      return Eigen(*factorisations_, problems[i], notes[i]);
    }));
    Note(std::move(notes));
    return absl::OkStatus();
  }

  absl::Status Svd(absl::Span<const SvdProblem> problems) override {
    for (const SvdProblem& problem : problems) RETURN_IF_ERROR(CheckSvd(problem));
    std::vector<std::string> notes(problems.size());
    RETURN_IF_ERROR(ForEach(pool_, problems.size(), [&](int64_t i, int) {
      return SvdOf(*factorisations_, problems[i], notes[i]);
    }));
    Note(std::move(notes));
    return absl::OkStatus();
  }

  absl::Status QrFactor(Matrix a, Matrix r) override {
    RETURN_IF_ERROR(CheckQr(a, r));
    const int64_t k = r.rows;
    if (k == 0) return absl::OkStatus();
    RETURN_IF_ERROR(CheckFinite(a));
    // a^T = L Q, so a = Q^T L^T.
    const lapack_int rows = Int(a.columns), columns = Int(a.rows), count = Int(k);
    const lapack_int stride = Stride(a);
    const lapack_int work_size = Int(64 * a.columns);
    std::vector<double> work(work_size), tau(k);
    lapack_int info = 0;
    const LibraryCall call;
    LAPACK_dgelqf(&rows, &columns, a.data, &stride, tau.data(), work.data(), &work_size, &info);
    if (info != 0) return absl::InternalError(absl::StrCat("dgelqf: ", info));
    for (int64_t i = 0; i < k; ++i) {
      double* const row = r.data + i * r.stride;
      std::fill(row, row + i, 0.0);
      std::copy(a.data + i * a.stride + i, a.data + i * a.stride + a.columns, row + i);
    }
    LAPACK_dorglq(&count, &columns, &count, a.data, &stride, tau.data(), work.data(), &work_size,
                  &info);
    if (info != 0) return absl::InternalError(absl::StrCat("dorglq: ", info));
    return absl::OkStatus();
  }

  absl::Status SolvePosDef(Matrix a, Matrix b) override {
    RETURN_IF_ERROR(CheckSolve(a, b));
    const int64_t n = a.rows;
    if (n == 0 || b.columns == 0) return absl::OkStatus();
    for (int64_t i = 0; i < n; ++i) {
      RETURN_IF_ERROR(CheckFinite({a.data + i * a.stride, 1, i + 1, n}));
    }
    const lapack_int order = Int(n), stride = Stride(a);
    lapack_int info = 0;
    const LibraryCall call;
    LAPACK_dpotrf("U", &order, a.data, &stride, &info);
    if (info != 0) {
      return absl::FailedPreconditionError(
          absl::StrCat("the matrix is not positive definite (leading minor ", info, ")"));
    }
    for (const CBLAS_TRANSPOSE transpose : {CblasNoTrans, CblasTrans}) {
      cblas_dtrsm(CblasRowMajor, CblasLeft, CblasLower, transpose, CblasNonUnit, Int(n),
                  Int(b.columns), 1, a.data, stride, b.data, Stride(b));
    }
    return absl::OkStatus();
  }

 private:
  void Note(std::vector<std::string> notes) {
    for (std::string& note : notes) {
      if (!note.empty()) notes_.push_back(std::move(note));
    }
  }

  // `lower_only`: b is a, so that the result is symmetric, and only its lower triangle is set.
  void Multiply(bool transpose_a, const ConstMatrix& a, bool transpose_b, const ConstMatrix& b,
                double alpha, double beta, const Matrix& c, bool lower_only) {
    const int64_t inner = transpose_a ? a.rows : a.columns;
    int64_t tall = IsPlain(a) ? kPlainExtent : kWidenedExtent;
    int64_t wide = IsPlain(b) ? kPlainExtent : kWidenedExtent;
    // Of a small triangle there would be one block, and work for one thread.
    if (lower_only && c.rows <= tall) tall = wide = tall / 2;
    const int64_t down = (c.rows + tall - 1) / tall, across = (c.columns + wide - 1) / wide;
    pool_.ForEach(down * across, [&](int64_t item, int) {
      const int64_t i = item / across * tall, j = item % across * wide;
      if (lower_only && j > i) return;
      const int64_t rows = std::min(tall, c.rows - i), columns = std::min(wide, c.columns - j);
      thread_local Scratch scratch;
      double* const to = c.data + i * c.stride + j;
      for (int64_t row = 0; row < rows; ++row) {
        double* const begin = to + row * c.stride;
        if (beta == 0) {
          std::fill(begin, begin + columns, 0.0);
        } else if (beta != 1) {
          for (int64_t column = 0; column < columns; ++column) begin[column] *= beta;
        }
      }
      for (int64_t k = 0; k < inner; k += kDepth) {
        const int64_t depth = std::min(kDepth, inner - k);
        int64_t a_stride = 0, b_stride = 0;
        const double* const left = transpose_a ? Widen(a, k, depth, i, rows, scratch.a, &a_stride)
                                               : Widen(a, i, rows, k, depth, scratch.a, &a_stride);
        if (lower_only && i == j) {
          const LibraryCall call;
          cblas_dsyrk(CblasRowMajor, CblasLower, transpose_a ? CblasTrans : CblasNoTrans, Int(rows),
                      Int(depth), alpha, left, Int(a_stride), 1, to, Int(c.stride));
          continue;
        }
        const double* const right = transpose_b
                                        ? Widen(b, j, columns, k, depth, scratch.b, &b_stride)
                                        : Widen(b, k, depth, j, columns, scratch.b, &b_stride);
        const LibraryCall call;
        cblas_dgemm(CblasRowMajor, transpose_a ? CblasTrans : CblasNoTrans,
                    transpose_b ? CblasTrans : CblasNoTrans, Int(rows), Int(columns), Int(depth),
                    alpha, left, Int(a_stride), right, Int(b_stride), 1, to, Int(c.stride));
      }
    });
  }

  // Operands of a block, widened: LinearAlgebra::kThreadBytes. Kept by each thread: memory that is
  // given back is cleared before it comes again.
  struct Scratch {
    std::vector<double> a, b;
  };

  ThreadPool& pool_;
  const std::unique_ptr<const Factorisations> factorisations_;
  std::vector<std::string> notes_;
};

}  // namespace

int Factorisations::Eigen(Routine routine, const Matrix& a, double* values) const {
  // The lower triangle of the rows is the upper one of LAPACK's columns.
  const lapack_int order = Int(a.rows), stride = Stride(a);
  lapack_int info = 0;
  const LibraryCall call;
  if (routine == Routine::kSafe) {
    const lapack_int work_size = 34 * order;
    std::vector<double> work(work_size);
    LAPACK_dsyev("V", "U", &order, a.data, &stride, values, work.data(), &work_size, &info);
    return info;
  }
  const lapack_int work_size = Int(1 + 6 * a.rows + 2 * a.rows * a.rows),
                   int_work_size = Int(3 + 5 * a.rows);
  std::vector<double> work(work_size);
  std::vector<lapack_int> int_work(int_work_size);
  LAPACK_dsyevd("V", "U", &order, a.data, &stride, values, work.data(), &work_size, int_work.data(),
                &int_work_size, &info);
  return info;
}

int Factorisations::Svd(Routine routine, const Matrix& a, const Matrix& u, const Matrix& vt,
                        double* values) const {
  // a^T = V S U^T: LAPACK's left vectors are the columns of vt^T, its right ones the rows of u^T.
  const lapack_int rows = Int(a.columns), columns = Int(a.rows);
  const lapack_int a_stride = Stride(a), u_stride = Stride(u), vt_stride = Stride(vt);
  std::vector<lapack_int> int_work(8 * std::min(a.rows, a.columns));
  lapack_int info = 0, work_size = -1;
  double wanted = 0;
  const auto call = [&](double* work) {
    if (routine == Routine::kSafe) {
      LAPACK_dgesvd("S", "S", &rows, &columns, a.data, &a_stride, values, vt.data, &vt_stride,
                    u.data, &u_stride, work, &work_size, &info);
      return;
    }
    LAPACK_dgesdd("S", &rows, &columns, a.data, &a_stride, values, vt.data, &vt_stride, u.data,
                  &u_stride, work, &work_size, int_work.data(), &info);
  };
  const LibraryCall turn;
  call(&wanted);
  work_size = static_cast<lapack_int>(wanted);
  std::vector<double> work(work_size);
  call(work.data());
  return info;
}

std::unique_ptr<LinearAlgebra> MakeLinearAlgebra(
    ThreadPool& pool, std::unique_ptr<const Factorisations> factorisations) {
  return std::make_unique<CpuLinearAlgebra>(pool, std::move(factorisations));
}

}  // namespace pewter::kernels::cpu
