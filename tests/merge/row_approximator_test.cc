#include "merge/plan/row_approximator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <thread>

#include "tests/support/matchers.h"

namespace pewter {
namespace {

using ::testing::DoubleNear;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::IsOk;
using ::testing::Pointwise;
using testing::StatusIs;
using Method = TokenApproximation::Method;
using Matrix = std::vector<std::vector<double>>;

class InMemory final : public TensorSource {
 public:
  explicit InMemory(const Matrix& rows)
      : shape_({static_cast<int64_t>(rows.size()), static_cast<int64_t>(rows[0].size())}) {
    for (const auto& row : rows) values_.insert(values_.end(), row.begin(), row.end());
  }
  DType dtype() const override { return DType::kF64; }
  const Shape& shape() const override { return shape_; }
  const std::string& name() const override { return name_; }
  absl::Status Read(int64_t first, int64_t count, absl::Span<std::byte> out,
                    ReadObserver* /*observer*/) const override {
    std::memcpy(out.data(), values_.data() + first, count * sizeof(double));
    return absl::OkStatus();
  }

 private:
  Shape shape_;
  std::string name_ = "matrix";
  std::vector<double> values_;
};

std::shared_ptr<const TensorSource> Source(const Matrix& rows) {
  return std::make_shared<InMemory>(rows);
}

// Values that float holds.
Matrix Random(int rows, int columns, int seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  Matrix matrix(rows, std::vector<double>(columns));
  for (auto& row : matrix) {
    for (double& value : row) value = normal(engine);
  }
  return matrix;
}

Matrix Product(const Matrix& a, const Matrix& b) {
  Matrix product(a.size(), std::vector<double>(b[0].size(), 0.0));
  for (size_t i = 0; i < a.size(); ++i) {
    for (size_t j = 0; j < b.size(); ++j) {
      for (size_t k = 0; k < b[0].size(); ++k) product[i][k] += a[i][j] * b[j][k];
    }
  }
  return product;
}

// Rows [shared, donor's rows) are wanted; those before are rows of the same tokens.
RowProblem Problem(TokenApproximation how, const Matrix& own, const Matrix& donor, size_t shared) {
  RowProblem problem{.how = how, .own = Source(own), .donor = Source(donor), .name = "x"};
  for (size_t row = 0; row < donor.size(); ++row) {
    const auto id = static_cast<int32_t>(row);
    if (row < shared) {
      problem.shared.emplace_back(id, id);
    } else {
      problem.wanted.push_back(id);
    }
  }
  return problem;
}

std::vector<double> Row(const RowApproximator& approximator, int64_t index, int64_t width) {
  std::vector<double> out(width, 7.0);
  EXPECT_THAT(
      approximator.Row(index, {reinterpret_cast<std::byte*>(out.data()), out.size() * 8}, nullptr),
      IsOk());
  return out;
}

std::vector<double> First(const RowProblem& problem) {
  const auto approximator = RowApproximator::Make(problem);
  EXPECT_THAT(approximator, IsOk());
  return Row(**approximator, 0, problem.own->shape()[1]);
}

TEST(RowApproximatorTest, PursuitFindsTheRowsThatATargetIsMadeOf) {
  Matrix donor = Random(40, 12, 1);
  const Matrix map = Random(12, 9, 2);
  donor.push_back(donor[3]);
  for (size_t i = 0; i < 12; ++i) donor.back()[i] = 2 * donor[3][i] - 0.5 * donor[17][i];
  const Matrix own = Product(donor, map);
  EXPECT_THAT(First(Problem({.k = 4}, own, donor, 40)), Pointwise(DoubleNear(1e-5), own[40]));
}

TEST(RowApproximatorTest, WithAsManyRowsAsTheWidthPursuitIsExact) {
  const Matrix donor = Random(30, 8, 3);
  const Matrix own = Product(donor, Random(8, 5, 4));
  // More rows than the width adds nothing: they are combinations of the others.
  for (int64_t k : {8, 20}) {
    const auto approximator = RowApproximator::Make(Problem({.k = k}, own, donor, 25));
    ASSERT_THAT(approximator, IsOk());
    for (int64_t row = 25; row < 30; ++row) {
      EXPECT_THAT(Row(**approximator, row - 25, 5), Pointwise(DoubleNear(1e-4), own[row]));
    }
  }
}

// What the first steps are, taken by hand.
TEST(RowApproximatorTest, PursuitTakesTheGreatestProductAndFitsAnew) {
  const Matrix donor = {{2, 0}, {1, 1}, {0, 1}, {3, 2}};
  const Matrix own = {{1}, {10}, {100}, {0}};
  // Products with (3, 2): 6, 5, 2. Of the first, 6 / 4 = 1.5. What is left, (0, 2), has products
  // 0, 2, 2: the second, and (3, 2) = 0.5 (2, 0) + 2 (1, 1).
  EXPECT_THAT(First(Problem({.k = 1}, own, donor, 3)), ElementsAre(DoubleNear(1.5, 1e-12)));
  EXPECT_THAT(First(Problem({.k = 2}, own, donor, 3)), ElementsAre(DoubleNear(0.5 + 20, 1e-12)));
}

TEST(RowApproximatorTest, NearestRowsByDistanceAndByAngle) {
  const Matrix donor = {{1, 0}, {0, 3}, {10, 0}, {-5, -5}, {2, 0}};
  const Matrix own = {{1}, {10}, {100}, {1000}, {0}};
  TokenApproximation how{.method = Method::kCommonInterpolation, .k = 2};
  const double second = 1 / std::sqrt(13.0);  // of (0, 3), at 1 / distance; (1, 0) is at 1
  EXPECT_NEAR(First(Problem(how, own, donor, 4))[0], (1 + second * 10) / (1 + second), 1e-12);
  how.cosine = true;  // (1, 0) and (10, 0) have the angle 0
  EXPECT_NEAR(First(Problem(how, own, donor, 4))[0], (1 + 100) / 2.0, 1e-12);
}

TEST(RowApproximatorTest, WeightsThatFit) {
  const Matrix donor = {{1, 1}, {2, 3}, {4, 1}, {90, 90}, {2, 1}};
  const Matrix own = {{1, 0}, {0, 1}, {5, 5}, {0, 0}, {0, 0}};
  TokenApproximation how{.method = Method::kCommonInterpolation,
                         .k = 3,
                         .weights = TokenApproximation::Weights::kBarycentric};
  // Weights that sum to 1: 2/3 (1, 1) + 0 (2, 3) + 1/3 (4, 1).
  EXPECT_THAT(First(Problem(how, own, donor, 4)),
              Pointwise(DoubleNear(1e-9), {2.0 / 3 + 5.0 / 3, 5.0 / 3}));
  how.weights = TokenApproximation::Weights::kLeastSquares;
  how.k = 2;  // a (1, 1) + b (2, 3) = (2, 1): a = 4, b = -1
  EXPECT_THAT(First(Problem(how, own, donor, 4)), Pointwise(DoubleNear(1e-9), {4.0, -1.0}));
  // Of the weights that fit equal rows the shortest are equal.
  const Matrix twice = {{1, 1}, {1, 1}, {90, 90}, {90, 91}, {2, 2}};
  EXPECT_THAT(First(Problem(how, own, twice, 4)), Pointwise(DoubleNear(1e-6), {1.0, 1.0}));
}

TEST(RowApproximatorTest, PrincipalComponentsRecoverARotation) {
  const Matrix donor = Random(60, 6, 11);
  // A rotation of the first two axes, a swap of two, a reflection, and a step aside.
  Matrix own = donor;
  for (auto& row : own) {
    const double a = row[0], b = row[1];
    row[0] = 0.6 * a - 0.8 * b + 1;
    row[1] = 0.8 * a + 0.6 * b - 2;
    std::swap(row[2], row[3]);
    row[4] = -row[4];
  }
  const auto approximator =
      RowApproximator::Make(Problem({.method = Method::kLandmarkPca}, own, donor, 50));
  ASSERT_THAT(approximator, IsOk());
  for (int64_t row = 50; row < 60; ++row) {
    EXPECT_THAT(Row(**approximator, row - 50, 6), Pointwise(DoubleNear(1e-9), own[row]));
  }
}

TEST(RowApproximatorTest, BasesCarryALinearMapOver) {
  const Matrix donor = Random(80, 7, 12);
  for (int64_t width : {7, 5}) {
    const Matrix own = Product(donor, Random(7, width, 13));
    RowProblem problem = Problem({.method = Method::kSparseTokenBasis, .k = 7}, own, donor, 70);
    const auto approximator = RowApproximator::Make(problem);
    ASSERT_THAT(approximator, IsOk());
    double error = 0, size = 0;
    for (int64_t row = 70; row < 80; ++row) {
      const auto made = Row(**approximator, row - 70, width);
      for (int64_t i = 0; i < width; ++i) {
        error += std::pow(made[i] - own[row][i], 2);
        size += std::pow(own[row][i], 2);
      }
    }
    // Exact where the basis spans all of the donor; a projection where it cannot.
    if (width == 7) {
      EXPECT_LT(error, 1e-12 * size);
    } else {
      EXPECT_LT(error, size);
    }
  }
}

TEST(RowApproximatorTest, RotaryPursuitTurnsRows) {
  // One head of size 4: halves (0, 2) and (1, 3) turn by the position, and by a hundredth of it.
  const double c = std::cos(1.0), s = std::sin(1.0), d = std::cos(0.01), e = std::sin(0.01);
  const Matrix donor = {{1, 1, 0, 0}, {0, 0.01, 0, 0}, {2 * c, 2 * d, 2 * s, 2 * e}};
  const Matrix own = {{3, 5, 1, 2}, {0, 0, 0, 0}, {0, 0, 0, 0}};
  RowProblem problem = Problem({.method = Method::kMatchingPursuitRope, .k = 1}, own, donor, 2);
  problem.own_heads = problem.donor_heads = {.heads = 1, .base = 10000};
  EXPECT_THAT(First(problem), Pointwise(DoubleNear(1e-9), {2 * (3 * c - s), 2 * (5 * d - 2 * e),
                                                           2 * (c + 3 * s), 2 * (2 * d + 5 * e)}));
  problem.own_heads.heads = 4;
  EXPECT_THAT(RowApproximator::Make(problem),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("even size")));
}

TEST(RowApproximatorTest, Subwords) {
  const Matrix own = {{1, 2}, {3, 6}, {8, 1}};
  using Subwords = TokenApproximation::Subwords;
  const auto made = [&](Subwords subwords, bool head) {
    RowProblem problem =
        Problem({.method = Method::kSubword, .subwords = subwords}, own, Random(1, 2, 5), 0);
    problem.pieces = {{0, 2, 1}};
    problem.head = head;
    return First(problem);
  };
  EXPECT_THAT(made(Subwords::kMean, false),
              ElementsAre(DoubleNear(4, 1e-12), DoubleNear(3, 1e-12)));
  EXPECT_THAT(made(Subwords::kSum, true), ElementsAre(12, 9));
  EXPECT_THAT(made(Subwords::kWeightedMean, false),
              ElementsAre(DoubleNear(22 / 6.0, 1e-12), DoubleNear(14 / 6.0, 1e-12)));
  EXPECT_THAT(made(Subwords::kWeightedMean, true),
              ElementsAre(DoubleNear(26 / 6.0, 1e-12), DoubleNear(22 / 6.0, 1e-12)));
  EXPECT_THAT(made(Subwords::kFirstLast, false), ElementsAre(3, 6));
  EXPECT_THAT(made(Subwords::kFirstLast, true), ElementsAre(1, 2));
}

TEST(RowApproximatorTest, MeanZerosAndDraws) {
  const Matrix donor = Random(3, 2, 5), own = {{1, 2}, {3, 6}, {8, 1}};
  const auto make = [&](Method method, uint64_t seed, const char* name) {
    RowProblem problem = Problem({.method = method}, own, donor, 0);
    problem.seed = seed;
    problem.name = name;
    return *RowApproximator::Make(problem);
  };
  EXPECT_THAT(Row(*make(Method::kMean, 0, "x"), 2, 2), ElementsAre(4, 3));
  EXPECT_THAT(Row(*make(Method::kZero, 0, "x"), 2, 2), ElementsAre(0, 0));
  const auto draws = Row(*make(Method::kRandn, 1, "x"), 2, 2);
  EXPECT_EQ(draws, Row(*make(Method::kRandn, 1, "x"), 2, 2));
  EXPECT_NE(draws, Row(*make(Method::kRandn, 2, "x"), 2, 2));
  EXPECT_NE(draws, Row(*make(Method::kRandn, 1, "y"), 2, 2));
  EXPECT_NE(draws, Row(*make(Method::kRandn, 1, "x"), 1, 2));
  const auto wide = First(Problem({.method = Method::kRandn}, Random(1, 20'000, 1), donor, 0));
  double sum = 0, squares = 0;
  for (double value : wide) sum += value, squares += value * value;
  EXPECT_NEAR(sum / 20'000, 0, 0.04);
  EXPECT_NEAR(squares / 20'000, 1, 0.05);
}

TEST(RowApproximatorTest, DrawsHaveTheRowsMeanAndCovariance) {
  Matrix own = Random(500, 2, 21);
  for (auto& row : own) {
    row[1] = 3 * row[0] + 0.1 * row[1] - 4;
    row[0] += 1;
  }
  const Matrix donor = Random(3000, 1, 22);
  const auto approximator =
      RowApproximator::Make(Problem({.method = Method::kJohnHewitt}, own, donor, 0));
  ASSERT_THAT(approximator, IsOk());
  const auto moments = [](const auto& row_of, int64_t rows) {
    std::vector<double> m(5);
    for (int64_t i = 0; i < rows; ++i) {
      const std::vector<double> row = row_of(i);
      const double n = static_cast<double>(rows);
      m[0] += row[0] / n, m[1] += row[1] / n;
      m[2] += row[0] * row[0] / n, m[3] += row[0] * row[1] / n, m[4] += row[1] * row[1] / n;
    }
    return std::vector<double>{m[0], m[1], m[2] - m[0] * m[0], m[3] - m[0] * m[1],
                               m[4] - m[1] * m[1]};
  };
  const auto want = moments([&](int64_t i) { return own[i]; }, 500);
  const auto got = moments([&](int64_t i) { return Row(**approximator, i, 2); }, 3000);
  for (size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(got[i], want[i], 0.1 * want[4]) << i;
  EXPECT_NEAR(got[3] / std::sqrt(got[2] * got[4]), want[3] / std::sqrt(want[2] * want[4]), 0.01);
}

TEST(RowApproximatorTest, NoiseAndScale) {
  const Matrix donor = Random(1, 2, 5), own = {{1, 2}, {3, 6}, {8, 1}};
  EXPECT_THAT(First(Problem({.method = Method::kMean, .scale = -2}, own, donor, 0)),
              ElementsAre(-8, -6));
  const auto noisy = First(Problem({.method = Method::kMean, .noise = 0.5}, own, donor, 0));
  const auto noisier = First(Problem({.method = Method::kMean, .noise = 1}, own, donor, 0));
  EXPECT_NE(noisy[0], 4);
  EXPECT_NEAR(noisier[0] - 4, 2 * (noisy[0] - 4), 1e-12);
}

TEST(RowApproximatorTest, RowsDoNotDependOnOrderOrThreads) {
  const Matrix donor = Random(900, 16, 6), own = Random(300, 16, 7);
  for (const Method method :
       {Method::kOmp, Method::kMatchingPursuitRope, Method::kCommonInterpolation,
        Method::kLandmarkPca, Method::kSparseTokenBasis, Method::kJohnHewitt}) {
    const auto make = [&](int threads) {
      RowProblem problem =
          Problem({.method = method, .k = 10, .weights = TokenApproximation::Weights::kBarycentric},
                  own, donor, 300);
      problem.own_heads = problem.donor_heads = {.heads = 2};
      problem.threads = threads;
      return *RowApproximator::Make(problem);
    };
    const auto one = make(1), other = make(3);
    Matrix expected;
    for (int64_t row = 0; row < 600; ++row) expected.push_back(Row(*one, row, 16));
    std::vector<std::thread> threads;
    for (int thread = 0; thread < 4; ++thread) {
      threads.emplace_back([&, thread] {
        for (int64_t row = 599 - thread; row >= 0; row -= 4) {
          EXPECT_EQ(Row(*other, row, 16), expected[row]);
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_GT(one->resident_bytes(), 600 * 16 * 8);
  }
}

TEST(RowApproximatorTest, TooFewSharedRows) {
  const Matrix rows = Random(4, 2, 8);
  EXPECT_THAT(RowApproximator::Make(Problem({.k = 4, .at = {3, 5}}, rows, rows, 3)),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       ::testing::AllOf(HasSubstr("recipe:3:5"), HasSubstr("share 3 tokens"))));
  EXPECT_THAT(RowApproximator::Make(Problem({.method = Method::kLandmarkPca}, rows, rows, 1)),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("landmark_pca needs")));
  EXPECT_THAT(RowApproximator::Make(Problem({.method = Method::kZero, .k = 4}, rows, rows, 0)),
              IsOk());
}

TEST(RowApproximatorTest, ValuesThatAreNotFinite) {
  Matrix donor = Random(5, 2, 9);
  donor[2][1] = std::nan("");
  const auto approximator = RowApproximator::Make(Problem({.k = 2}, Random(5, 2, 10), donor, 4));
  ASSERT_THAT(approximator, IsOk());
  std::vector<double> out(2);
  EXPECT_THAT((*approximator)->Row(0, {reinterpret_cast<std::byte*>(out.data()), 16}, nullptr),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("element 5 is NaN")));
}

}  // namespace
}  // namespace pewter
