// Linear maps between features: against references computed elsewhere in float64 (a folder beside
// the checkout), and with maps that were planted.
#include "merge/align/linear_maps.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "alignment_goldens.h"
#include "kernels/backends.h"
#include "tests/support/matchers.h"
#include "tests/support/tiny_model.h"

namespace pewter {
namespace {

namespace fs = std::filesystem;
using kernels::Transpose;
using nlohmann::json;
using ::testing::HasSubstr;
using testing::IsOk;
using testing::MatrixOf;
using testing::ReadFile;
using testing::ReadTensors;
using testing::StatusIs;

fs::path Goldens() { return testing::AlignmentGoldenFolder() / "cca_pleas"; }

class LinearMapsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto backend = kernels::OpenBackend({}, 1);
    ASSERT_THAT(backend, IsOk());
    backend_ = *std::move(backend);
    auto algebra = backend_->linear_algebra();
    ASSERT_THAT(algebra, IsOk());
    algebra_ = *algebra;
  }
  DenseMatrix Times(const DenseMatrix& a, const DenseMatrix& b, bool transpose_b = false) {
    auto product =
        Product(*algebra_, Transpose::kNo, a, transpose_b ? Transpose::kYes : Transpose::kNo, b);
    EXPECT_THAT(product, IsOk());
    return *std::move(product);
  }

  std::unique_ptr<kernels::Backend> backend_;
  kernels::LinearAlgebra* algebra_ = nullptr;
};

double Apart(const DenseMatrix& got, const DenseMatrix& want) {
  EXPECT_EQ(got.values.size(), want.values.size());
  double largest = 0, scale = 0;
  for (size_t i = 0; i < want.values.size(); ++i) {
    const double difference = std::abs(got.values[i] - want.values[i]);
    if (!(difference <= largest)) largest = difference;
    scale = std::max(scale, std::abs(want.values[i]));
  }
  return largest / scale;
}

DenseMatrix Identity(int64_t n) {
  DenseMatrix identity(n, n);
  for (int64_t i = 0; i < n; ++i) identity(i, i) = 1;
  return identity;
}

DenseMatrix Random(int64_t rows, int64_t columns, int seed) {
  DenseMatrix m(rows, columns);
  std::mt19937_64 engine(seed);
  std::normal_distribution<double> normal;
  for (double& value : m.values) value = normal(engine);
  return m;
}

DenseMatrix Mean(const std::vector<DenseMatrix>& matrices) {
  DenseMatrix mean = matrices[0];
  for (size_t i = 0; i < mean.values.size(); ++i) {
    for (size_t m = 1; m < matrices.size(); ++m) mean.values[i] += matrices[m].values[i];
    mean.values[i] /= static_cast<double>(matrices.size());
  }
  return mean;
}

TEST_F(LinearMapsTest, CanonicalMapsAreTheReferences) {
  if (!fs::exists(Goldens() / "cca_pleas.safetensors")) GTEST_SKIP() << "no references";
  auto golden = ReadTensors(Goldens() / "cca_pleas.safetensors");
  const json facts = json::parse(ReadFile(Goldens() / "cca_pleas.json"));
  for (const char* id : {"cca_n8_g0.001", "cca_n24_g0.1", "cca_n24_g0.0", "cca_n48_g1.0"}) {
    SCOPED_TRACE(id);
    const auto of = [&](const char* name) {
      return MatrixOf(golden.at(absl::StrCat(id, ".", name)));
    };
    const auto map = CanonicalMapOf(*algebra_, of("Sxx"), of("Syy"), of("Sxy"),
                                    facts[id]["gamma"].get<double>());
    ASSERT_THAT(map, IsOk());
    EXPECT_LE(Apart(map->forward, of("T")), 1e-6);
    EXPECT_LE(Apart(map->inverse, of("Tinv")), 1e-6);
    EXPECT_LE(Apart(Times(map->forward, map->inverse), Identity(map->forward.rows)), 1e-9);
    for (size_t i = 0; i < map->correlations.size(); ++i) {
      EXPECT_NEAR(map->correlations[i], of("canon").values[i], 1e-6);
    }
    EXPECT_LE(Apart(Mean({of("W1a"), Times(map->forward, of("W1b"))}), of("W1m")), 1e-6);
    EXPECT_LE(Apart(Mean({of("b1a"), Times(map->forward, of("b1b"))}), of("b1m")), 1e-6);
    EXPECT_LE(Apart(Mean({of("W2a"), Times(of("W2b"), map->inverse)}), of("W2m")), 1e-6);
  }
}

// Covariance over rows, biased.
DenseMatrix Covariance(const DenseMatrix& x, const DenseMatrix& y) {
  DenseMatrix covariance(x.columns, y.columns);
  const auto mean = [](const DenseMatrix& m, int64_t column) {
    double sum = 0;
    for (int64_t r = 0; r < m.rows; ++r) sum += m(r, column);
    return sum / static_cast<double>(m.rows);
  };
  for (int64_t i = 0; i < x.columns; ++i) {
    for (int64_t j = 0; j < y.columns; ++j) {
      double sum = 0;
      for (int64_t r = 0; r < x.rows; ++r) sum += x(r, i) * y(r, j);
      covariance(i, j) = sum / static_cast<double>(x.rows) - mean(x, i) * mean(y, j);
    }
  }
  return covariance;
}

TEST_F(LinearMapsTest, ManyModelsGoToTheFirst) {
  if (!fs::exists(Goldens() / "cca_pleas.safetensors")) GTEST_SKIP() << "no references";
  auto golden = ReadTensors(Goldens() / "cca_pleas.safetensors");
  const auto of = [&](const std::string& name) { return MatrixOf(golden.at("cca3." + name)); };
  std::vector<DenseMatrix> own, cross;
  for (int i = 0; i < 3; ++i) {
    const DenseMatrix x = of(absl::StrCat("x", i));
    own.push_back(Covariance(x, x));
    if (i > 0) cross.push_back(Covariance(of("x0"), x));
  }
  const auto maps = CanonicalMapsOf(*algebra_, own, cross, 0.01);
  ASSERT_THAT(maps, IsOk());
  std::vector<DenseMatrix> written = {of("W0")}, read = {of("R0")};
  for (int i = 1; i < 3; ++i) {
    const CanonicalMap& map = (*maps)[i - 1];
    written.push_back(Times(map.forward, of(absl::StrCat("W", i))));
    read.push_back(Times(of(absl::StrCat("R", i)), map.inverse));
  }
  EXPECT_LE(Apart(Mean(written), of("Wm")), 1e-6);
  EXPECT_LE(Apart(Mean(read), of("Rm")), 1e-6);
}

TEST_F(LinearMapsTest, FeaturesWithoutVarianceNeedARidge) {
  const DenseMatrix half = Random(6, 3, 1);
  const DenseMatrix singular = Times(half, half, true);
  EXPECT_THAT(CanonicalMapOf(*algebra_, singular, singular, singular, 0),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("gamma")));
  EXPECT_THAT(CanonicalMapOf(*algebra_, singular, singular, singular, 1e-3), IsOk());
}

// An orthogonal matrix, by the polar factor of a random one.
DenseMatrix RandomOrthogonal(kernels::LinearAlgebra& algebra, int64_t n, int seed) {
  const auto maps = OrthogonalMapsOf(algebra, Random(n, n, seed), n);
  EXPECT_THAT(maps, IsOk());
  return {n, n, maps->transform.forward};
}

TEST_F(LinearMapsTest, OrthogonalMapsOfHeadsAreFound) {
  // y = R^T x in every head: T = R.
  constexpr int64_t kHeads = 3, kDim = 5, kWidth = kHeads * kDim;
  const DenseMatrix x = Random(200, kWidth, 2);
  DenseMatrix rotation(kWidth, kWidth);
  for (int64_t h = 0; h < kHeads; ++h) {
    const DenseMatrix one = RandomOrthogonal(*algebra_, kDim, 10 + static_cast<int>(h));
    EXPECT_LE(Apart(Times(one, one, true), Identity(kDim)), 1e-12);
    for (int64_t i = 0; i < kDim; ++i) {
      for (int64_t j = 0; j < kDim; ++j) rotation(h * kDim + i, h * kDim + j) = one(i, j);
    }
  }
  const DenseMatrix y = Times(x, rotation);
  const auto maps = OrthogonalMapsOf(*algebra_, Covariance(x, y), kDim);
  ASSERT_THAT(maps, IsOk());
  ASSERT_EQ(maps->transform.blocks, kHeads);
  double trace = 0;
  for (int64_t h = 0; h < kHeads; ++h) {
    for (int64_t i = 0; i < kDim; ++i) {
      trace += Covariance(x, x)(h * kDim + i, h * kDim + i);
      for (int64_t j = 0; j < kDim; ++j) {
        const size_t at = (h * kDim + i) * kDim + j;
        EXPECT_NEAR(maps->transform.forward[at], rotation(h * kDim + i, h * kDim + j), 1e-10);
        EXPECT_NEAR(maps->transform.inverse[at], rotation(h * kDim + j, h * kDim + i), 1e-10);
      }
    }
  }
  EXPECT_NEAR(maps->affinity, trace, 1e-9);
}

}  // namespace
}  // namespace pewter
