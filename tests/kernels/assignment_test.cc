#include "kernels/assignment.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/assignment_loops.h"
#include "tests/support/matchers.h"

namespace pewter::kernels {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::IsOk;
using testing::StatusIs;

template <class T>
AssignmentProblem Problem(const std::vector<T>& costs, int64_t size, bool maximize = false) {
  return {.costs = {.data = costs.data(),
                    .dtype = sizeof(T) == 4 ? DType::kF32 : DType::kF64,
                    .rows = size,
                    .columns = size,
                    .stride = size},
          .maximize = maximize};
}

template <class T = double>
std::vector<T> Random(int64_t size, int seed) {
  std::mt19937_64 engine(seed);
  std::normal_distribution<double> normal;
  std::vector<T> costs(size * size);
  for (T& cost : costs) cost = static_cast<T>(normal(engine));
  return costs;
}

template <class T>
double Sum(const std::vector<T>& costs, const std::vector<int32_t>& columns) {
  double sum = 0;
  for (size_t i = 0; i < columns.size(); ++i) sum += costs[i * columns.size() + columns[i]];
  return sum;
}

void ExpectPermutation(std::vector<int32_t> columns, int64_t size) {
  std::sort(columns.begin(), columns.end());
  std::vector<int32_t> all(size);
  std::iota(all.begin(), all.end(), 0);
  EXPECT_EQ(columns, all);
}

// The prices prove the optimum: no column is cheaper for a row than its own (linear programming
// duality), so that the test does not depend on another solver.
template <class T>
void ExpectOptimal(const std::vector<T>& costs, int64_t size, bool maximize,
                   const Assignment& assignment) {
  ExpectPermutation(assignment.columns, size);
  EXPECT_NEAR(assignment.total, Sum(costs, assignment.columns), 1e-12 * size);
  const double sign = maximize ? -1 : 1;
  double worst = 0;
  for (int64_t i = 0; i < size; ++i) {
    const auto reduced = [&](int64_t j) {
      return sign * (costs[i * size + j] - assignment.prices[j]);
    };
    for (int64_t j = 0; j < size; ++j) {
      worst = std::max(worst, reduced(assignment.columns[i]) - reduced(j));
    }
  }
  EXPECT_LE(worst, 1e-11);
}

TEST(AssignmentTest, EqualsAllPermutations) {
  for (int64_t size = 1; size <= 7; ++size) {
    for (int seed = 0; seed < 20; ++seed) {
      const std::vector<double> costs = Random(size, seed);
      std::vector<int32_t> columns(size);
      std::iota(columns.begin(), columns.end(), 0);
      double least = Sum(costs, columns), greatest = least;
      do {
        least = std::min(least, Sum(costs, columns));
        greatest = std::max(greatest, Sum(costs, columns));
      } while (std::next_permutation(columns.begin(), columns.end()));
      EXPECT_NEAR(SolveAssignment(Problem(costs, size))->total, least, 1e-12);
      EXPECT_NEAR(SolveAssignment(Problem(costs, size, true))->total, greatest, 1e-12);
    }
  }
}

TEST(AssignmentTest, PricesProveTheOptimum) {
  for (const int64_t size : {2, 15, 16, 17, 33, 100, 255, 256, 257, 300}) {
    for (const bool maximize : {false, true}) {
      const auto wide = Random<double>(size, 1);
      ExpectOptimal(wide, size, maximize, *SolveAssignment(Problem(wide, size, maximize)));
      const auto narrow = Random<float>(size, 2);
      ExpectOptimal(narrow, size, maximize, *SolveAssignment(Problem(narrow, size, maximize)));
      // Few values: many equal ones.
      std::vector<float> ties = Random<float>(size, 3);
      for (float& cost : ties) cost = std::round(cost);
      ExpectOptimal(ties, size, maximize, *SolveAssignment(Problem(ties, size, maximize)));
    }
  }
  const std::vector<float> equal(64 * 64, 0.25f);
  ExpectOptimal(equal, 64, true, *SolveAssignment(Problem(equal, 64, true)));
  // Costs that rows and columns share in full: every assignment is optimal.
  std::vector<double> rank_one(64 * 64);
  for (int i = 0; i < 64; ++i) {
    for (int j = 0; j < 64; ++j) rank_one[i * 64 + j] = std::ldexp(1.0, i % 30) + 3 * j;
  }
  const auto result = SolveAssignment(Problem(rank_one, 64));
  ASSERT_THAT(result, IsOk());
  ExpectPermutation(result->columns, 64);
}

TEST(AssignmentTest, StartsFromPrices) {
  const int64_t size = 200;
  const std::vector<double> costs = Random(size, 5);
  for (const bool maximize : {false, true}) {
    const auto first = SolveAssignment(Problem(costs, size, maximize));
    std::vector<double> moved = costs;
    const std::vector<double> noise = Random(size, 6);
    for (size_t i = 0; i < moved.size(); ++i) moved[i] += 0.05 * noise[i];
    AssignmentProblem problem = Problem(moved, size, maximize);
    const auto cold = SolveAssignment(problem);
    problem.prices = first->prices;
    const auto warm = SolveAssignment(problem);
    EXPECT_EQ(warm->columns, cold->columns);
    ExpectOptimal(moved, size, maximize, *warm);
    // Prices that say nothing true.
    std::vector<double> wrong(size);
    for (int64_t j = 0; j < size; ++j) wrong[j] = (j * 7919) % 13 * 1e3;
    problem.prices = wrong;
    const auto from_wrong = SolveAssignment(problem);
    EXPECT_EQ(from_wrong->columns, cold->columns);
  }
}

TEST(AssignmentTest, RowsMayLieApart) {
  const int64_t size = 20, stride = 33;
  const std::vector<float> costs = Random<float>(size, 8);
  std::vector<float> apart(size * stride, std::numeric_limits<float>::quiet_NaN());
  for (int64_t i = 0; i < size; ++i) {
    std::copy_n(&costs[i * size], size, &apart[i * stride]);
  }
  AssignmentProblem problem = Problem(apart, size);
  problem.costs.stride = stride;
  const auto result = SolveAssignment(problem);
  ASSERT_THAT(result, IsOk());
  EXPECT_EQ(result->columns, SolveAssignment(Problem(costs, size))->columns);
}

TEST(AssignmentTest, ManyAtOnceAreTheSame) {
  std::vector<std::vector<double>> costs;
  std::vector<AssignmentProblem> problems;
  for (int k = 0; k < 40; ++k) costs.push_back(Random(1 + k % 9 * 8, 20 + k));
  for (int k = 0; k < 40; ++k) problems.push_back(Problem(costs[k], 1 + k % 9 * 8, k % 2 == 0));
  for (const int threads : {1, 3, 64}) {
    const auto results = SolveAssignments(problems, threads);
    ASSERT_THAT(results, IsOk());
    ASSERT_EQ(results->size(), problems.size());
    for (size_t k = 0; k < problems.size(); ++k) {
      const auto alone = SolveAssignment(problems[k]);
      EXPECT_EQ((*results)[k].columns, alone->columns);
      EXPECT_EQ((*results)[k].prices, alone->prices);
    }
  }
  EXPECT_TRUE(SolveAssignments({}, 2)->empty());
  EXPECT_TRUE(SolveAssignment(Problem(std::vector<double>(), 0))->columns.empty());
}

// Every instruction set that this machine has gives the bits of plain code.
TEST(AssignmentTest, InstructionSetsAgree) {
  std::vector<const cpu::AssignmentLoops*> all;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) all.push_back(&cpu::avx2::kAssignmentLoops);
  if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    all.push_back(&cpu::avx512::kAssignmentLoops);
  }
#endif
  if (all.empty()) GTEST_SKIP() << "one instruction set only";
  const int64_t size = 300;
  const std::vector<float> costs = Random<float>(size, 9);
  const std::vector<double> prices = Random<double>(size, 10);
  const auto run = [&](const cpu::AssignmentLoops& loops, int64_t count) {
    std::vector<double> values(size, 1e3), least(2);
    std::vector<int32_t> rows(size, -1);
    for (int i = 0; i < 3; ++i) {
      values.push_back(loops.f32.relax(&costs[i * size], count, -1, prices.data(), 0.1 * i, i,
                                       values.data(), rows.data(), least.data()));
    }
    const cpu::LeastTwo two = loops.f32.least_two(costs.data(), count, -1, prices.data());
    values.insert(values.end(), {two.first, two.second});
    values.insert(values.end(), least.begin(), least.end());
    rows.insert(rows.end(), {two.first_column, two.second_column});
    loops.f32.column_minima(costs.data(), count, 1, 7, values.data(), rows.data());
    values.insert(values.end(), rows.begin(), rows.end());
    return values;
  };
  for (const auto* loops : all) {
    for (const int64_t count : {1, 15, 16, 17, 255, 256, 257, 300}) {
      EXPECT_EQ(run(*loops, count), run(cpu::baseline::kAssignmentLoops, count));
    }
  }
}

TEST(AssignmentTest, WhatIsNotFiniteIsRefused) {
  for (const double bad :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
        -std::numeric_limits<double>::infinity(), 1e308}) {
    std::vector<double> costs = Random(9, 1);
    costs[3 * 9 + 5] = bad;
    EXPECT_THAT(SolveAssignment(Problem(costs, 9)),
                StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("row 3 and column 5")));
    AssignmentProblem problem = Problem(costs, 0);
    const std::vector<double> prices = {bad};
    const std::vector<double> good = {1};
    problem = Problem(good, 1);
    problem.prices = prices;
    EXPECT_THAT(SolveAssignment(problem),
                StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("price")));
  }
  std::vector<float> costs = Random<float>(4, 1);
  costs[15] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THAT(SolveAssignment(Problem(costs, 4)),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("row 3 and column 3")));
  const std::vector<float> good = Random<float>(4, 1);
  EXPECT_THAT(SolveAssignments({Problem(good, 4), Problem(costs, 4)}, 2),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("column 3")));
}

TEST(AssignmentTest, ShapesThatDoNotFit) {
  const std::vector<double> costs = Random(4, 1);
  AssignmentProblem problem = Problem(costs, 4);
  problem.costs.columns = 3;
  EXPECT_THAT(SolveAssignment(problem), StatusIs(absl::StatusCode::kInternal, HasSubstr("[4, 3]")));
  problem = Problem(costs, 4);
  problem.costs.stride = 3;
  EXPECT_THAT(SolveAssignment(problem), StatusIs(absl::StatusCode::kInternal, HasSubstr("stride")));
  problem = Problem(costs, 4);
  problem.costs.dtype = DType::kBF16;
  EXPECT_THAT(SolveAssignment(problem), StatusIs(absl::StatusCode::kInternal, HasSubstr("F32")));
  problem = Problem(costs, 4);
  const std::vector<double> prices(3);
  problem.prices = prices;
  EXPECT_THAT(SolveAssignment(problem),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("3 prices for 4")));
}

}  // namespace
}  // namespace pewter::kernels
