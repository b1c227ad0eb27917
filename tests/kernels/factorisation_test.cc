// What becomes of factorisations that fail: on the CPU those that do not converge are repeated by
// another routine, on a GPU those that are wrong are noticed and repeated on the CPU. The GPU is
// one of our own here, whose memory is the host's and whose library errs as it is told.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>

#include "kernels/cpu/linear_algebra.h"
#include "kernels/cuda/linear_algebra.h"

namespace pewter::kernels {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::vector<double> Random(int64_t size, int seed) {
  std::vector<double> values(size);
  std::mt19937_64 engine(seed);
  std::normal_distribution<double> normal;
  for (double& value : values) value = normal(engine);
  return values;
}

std::vector<double> RandomSymmetric(int64_t n, int seed) {
  std::vector<double> a = Random(n * n, seed);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < i; ++j) a[j * n + i] = a[i * n + j];
  }
  return a;
}

// The largest entry of v^T diag(values) v - a and of v v^T - 1, for rows v.
double EigenError(const std::vector<double>& a, const std::vector<double>& v,
                  const std::vector<double>& values) {
  const auto n = static_cast<int64_t>(values.size());
  double error = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = -a[i * n + j], product = i == j ? -1 : 0;
      for (int64_t k = 0; k < n; ++k) {
        sum += v[k * n + i] * values[k] * v[k * n + j];
        product += v[i * n + k] * v[j * n + k];
      }
      error = std::max({error, std::abs(sum), std::abs(product)});
    }
  }
  return error;
}

double SvdError(const std::vector<double>& a, const std::vector<double>& u,
                const std::vector<double>& values, const std::vector<double>& vt, int64_t rows,
                int64_t columns) {
  const auto k = static_cast<int64_t>(values.size());
  double error = 0;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      double sum = -a[i * columns + j];
      for (int64_t p = 0; p < k; ++p) sum += u[i * k + p] * values[p] * vt[p * columns + j];
      error = std::max(error, std::abs(sum));
    }
  }
  return error;
}

Matrix View(std::vector<double>& values, int64_t rows, int64_t columns) {
  return {values.data(), rows, columns, columns};
}

// --- CPU --------------------------------------------------------------------------------------

// Fails as a routine that does not converge does: after it has overwritten its input.
class Failing : public cpu::Factorisations {
 public:
  explicit Failing(bool always) : always_(always) {}
  int Eigen(Routine routine, const Matrix& a, double* values) const override {
    return Fails(routine, a) ? 7 : Factorisations::Eigen(routine, a, values);
  }
  int Svd(Routine routine, const Matrix& a, const Matrix& u, const Matrix& vt,
          double* values) const override {
    return Fails(routine, a) ? 3 : Factorisations::Svd(routine, a, u, vt, values);
  }

 private:
  bool Fails(Routine routine, const Matrix& a) const {
    if (!always_ && routine == Routine::kSafe) return false;
    for (int64_t i = 0; i < a.rows; ++i) std::fill_n(a.data + i * a.stride, a.columns, 123.0);
    return true;
  }
  const bool always_;
};

TEST(CpuFactorisations, BothRoutinesGiveTheSame) {
  const std::vector<double> a = RandomSymmetric(23, 1), b = Random(23 * 9, 2);
  for (const auto routine :
       {cpu::Factorisations::Routine::kFast, cpu::Factorisations::Routine::kSafe}) {
    std::vector<double> v = a, values(23);
    ASSERT_EQ(cpu::Factorisations().Eigen(routine, View(v, 23, 23), values.data()), 0);
    EXPECT_LE(EigenError(a, v, values), 1e-13);
    for (const bool wide : {false, true}) {
      const int64_t rows = wide ? 9 : 23, columns = wide ? 23 : 9;
      std::vector<double> m = b, u(rows * 9), vt(9 * columns), singular(9);
      ASSERT_EQ(cpu::Factorisations().Svd(routine, View(m, rows, columns), View(u, rows, 9),
                                          View(vt, 9, columns), singular.data()),
                0);
      EXPECT_LE(SvdError(b, u, singular, vt, rows, columns), 1e-13);
    }
  }
}

TEST(CpuFactorisations, WhatDoesNotConvergeIsRepeatedAndTold) {
  ThreadPool pool(2);
  const auto algebra = cpu::MakeLinearAlgebra(pool, std::make_unique<Failing>(false));
  const std::vector<double> a = RandomSymmetric(17, 1), m = Random(12 * 8, 2);
  std::vector<double> v = a, values;
  // Only the lower triangle is set.
  for (int64_t i = 0; i < 17; ++i) {
    for (int64_t j = i + 1; j < 17; ++j) v[i * 17 + j] = std::numeric_limits<double>::quiet_NaN();
  }
  ASSERT_TRUE(algebra->SymmetricEigen({{View(v, 17, 17), &values}}).ok());
  EXPECT_LE(EigenError(a, v, values), 1e-13);
  EXPECT_TRUE(std::is_sorted(values.rbegin(), values.rend()));
  EXPECT_THAT(algebra->TakeNotes(), ElementsAre(HasSubstr("order 17 did not converge (7)")));
  EXPECT_THAT(algebra->TakeNotes(), IsEmpty());

  std::vector<double> in = m, u(12 * 8), vt(8 * 8), singular;
  ASSERT_TRUE(algebra->Svd({{View(in, 12, 8), View(u, 12, 8), View(vt, 8, 8), &singular}}).ok());
  EXPECT_LE(SvdError(m, u, singular, vt, 12, 8), 1e-13);
  EXPECT_THAT(algebra->TakeNotes(), ElementsAre(HasSubstr("12 x 8 did not converge (3)")));
}

TEST(CpuFactorisations, WhatNoRoutineSolvesIsAnError) {
  ThreadPool pool(1);
  const auto algebra = cpu::MakeLinearAlgebra(pool, std::make_unique<Failing>(true));
  std::vector<double> a = RandomSymmetric(5, 1), values;
  const absl::Status status = algebra->SymmetricEigen({{View(a, 5, 5), &values}});
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("did not converge (7)"));
}

// --- A GPU that errs --------------------------------------------------------------------------

enum class Fault { kNone, kNotConverged, kLibrary, kWrong, kNotOrthogonal, kNan, kOutOfMemory };
Fault fault = Fault::kNone;

const char* Describe(int error) {
  return error == cuda::kNotConverged ? "it did not converge" : "?";
}
int Allocate(int, int64_t bytes, void** data) {
  *data = std::malloc(std::max<int64_t>(bytes, 1));
  return 0;
}
void Release(int, void* data) { std::free(data); }
int Copy(cuda::Stream*, const void* from, void* to, int64_t bytes) {
  std::memcpy(to, from, bytes);
  return 0;
}
int Synchronize(cuda::Stream*) { return 0; }

Matrix Of(const cuda::MatrixArg& m) {
  return {static_cast<double*>(m.data), m.rows, m.columns, m.stride};
}
LinearAlgebra& Host() {
  static auto* const pool = new ThreadPool(1);
  static auto* const host = cpu::MakeLinearAlgebra(*pool).release();
  return *host;
}
int Multiply(cuda::Stream*, const cuda::MultiplyCall* call) {
  const auto transpose = [](bool yes) { return yes ? Transpose::kYes : Transpose::kNo; };
  return Host().Gemm(transpose(call->transpose_a), Of(call->a), transpose(call->transpose_b),
                     Of(call->b), call->alpha, call->beta, Of(call->c))
                 .ok()
             ? 0
             : static_cast<int>(cuda::kLibraryFailed);
}

// Spoils a right result; or gives the error of one that is none.
int Err(const Matrix& vectors, double* values) {
  switch (fault) {
    case Fault::kNone:
      return 0;
    case Fault::kNotConverged:
      std::fill_n(vectors.data, vectors.columns, 5.0);
      return cuda::kNotConverged;
    case Fault::kLibrary:
      return cuda::kLibraryFailed;
    case Fault::kOutOfMemory:
      return 2;
    case Fault::kWrong:
      std::swap(values[0], values[1]);
      values[0] *= 1.001;
      return 0;
    case Fault::kNotOrthogonal:
      vectors.data[1] += 1e-3;
      return 0;
    case Fault::kNan:
      vectors.data[2] = std::numeric_limits<double>::quiet_NaN();
      return 0;
  }
  return 0;
}
int Eigen(cuda::Stream*, const cuda::EigenCall* call) {
  std::vector<double> values;
  if (!Host().SymmetricEigen({{Of(call->a), &values}}).ok()) return cuda::kNotFinite;
  std::reverse_copy(values.begin(), values.end(), call->values);
  return Err(Of(call->a), call->values);
}
int Svd(cuda::Stream*, const cuda::SvdCall* call) {
  std::vector<double> values;
  if (!Host().Svd({{Of(call->a), Of(call->u), Of(call->vt), &values}}).ok()) {
    return cuda::kNotFinite;
  }
  std::copy(values.begin(), values.end(), call->values);
  return Err(Of(call->vt), call->values);
}

class DeviceFactorisations : public ::testing::TestWithParam<Fault> {
 protected:
  DeviceFactorisations() {
    plugin_.describe = &Describe;
    plugin_.allocate = &Allocate;
    plugin_.release = &Release;
    plugin_.upload = plugin_.download = plugin_.copy = &Copy;
    plugin_.synchronize = &Synchronize;
    plugin_.multiply = &Multiply;
    plugin_.eigen = &Eigen;
    plugin_.svd = &Svd;
    algebra_ = cuda::MakeLinearAlgebra(plugin_, 0, nullptr, "gpu");
    fault = GetParam();
  }
  ~DeviceFactorisations() override { fault = Fault::kNone; }

  void ExpectTold() {
    const std::vector<std::string> notes = algebra_->TakeNotes();
    if (GetParam() == Fault::kNone) {
      EXPECT_THAT(notes, IsEmpty());
    } else {
      EXPECT_THAT(notes, ElementsAre(HasSubstr("was repeated on the CPU")));
    }
  }

  cuda::Plugin plugin_ = {};
  std::unique_ptr<LinearAlgebra> algebra_;
};

TEST_P(DeviceFactorisations, EigenvectorsAreRightInTheEnd) {
  const std::vector<double> a = RandomSymmetric(19, 3);
  // Rows further apart than they are long; the upper triangle is not set.
  std::vector<double> in(19 * 22, std::numeric_limits<double>::quiet_NaN()), values;
  for (int64_t i = 0; i < 19; ++i) std::copy_n(a.begin() + i * 19, i + 1, in.begin() + i * 22);
  const absl::Status status = algebra_->SymmetricEigen({{{in.data(), 19, 19, 22}, &values}});
  if (GetParam() == Fault::kOutOfMemory) {
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    return;
  }
  ASSERT_TRUE(status.ok()) << status;
  std::vector<double> v(19 * 19);
  for (int64_t i = 0; i < 19; ++i) std::copy_n(in.begin() + i * 22, 19, v.begin() + i * 19);
  EXPECT_LE(EigenError(a, v, values), 1e-12);
  ExpectTold();
}

TEST_P(DeviceFactorisations, SingularVectorsAreRightInTheEnd) {
  for (const auto& [rows, columns] : {std::pair<int64_t, int64_t>{14, 9}, {9, 14}, {6, 5}}) {
    const int64_t k = std::min(rows, columns);
    const std::vector<double> a = Random(rows * columns, 4);
    std::vector<double> in = a, u(rows * k), vt(k * columns), values;
    const absl::Status status =
        algebra_->Svd({{View(in, rows, columns), View(u, rows, k), View(vt, k, columns), &values}});
    if (GetParam() == Fault::kOutOfMemory) {
      EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
      continue;
    }
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_LE(SvdError(a, u, values, vt, rows, columns), 1e-12);
    ExpectTold();
  }
}

// Sizes at which squares overflow and underflow.
TEST_P(DeviceFactorisations, OfAnyScale) {
  if (GetParam() == Fault::kOutOfMemory) return;
  for (const double scale : {1e200, 1e-200}) {
    std::vector<double> a = Random(8 * 6, 4);
    for (double& value : a) value *= scale;
    std::vector<double> in = a, u(8 * 6), vt(6 * 6), values;
    ASSERT_TRUE(algebra_->Svd({{View(in, 8, 6), View(u, 8, 6), View(vt, 6, 6), &values}}).ok());
    EXPECT_LE(SvdError(a, u, values, vt, 8, 6), 1e-12 * scale);
    ExpectTold();
  }
}

INSTANTIATE_TEST_SUITE_P(Faults, DeviceFactorisations,
                         ::testing::Values(Fault::kNone, Fault::kNotConverged, Fault::kLibrary,
                                           Fault::kWrong, Fault::kNotOrthogonal, Fault::kNan,
                                           Fault::kOutOfMemory));

}  // namespace
}  // namespace pewter::kernels
