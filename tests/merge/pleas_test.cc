// PLeaS: against references computed elsewhere in float64 (a folder beside the checkout), and by
// what must hold of least squares and budgets whatever the numbers.
#include "merge/align/pleas.h"

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
using testing::TinyTensor;

fs::path Goldens() { return testing::AlignmentGoldenFolder() / "cca_pleas"; }
double Apart(const std::vector<double>& got, const std::vector<double>& want) {
  EXPECT_EQ(got.size(), want.size());
  double largest = 0, scale = 0;
  for (size_t i = 0; i < std::min(got.size(), want.size()); ++i) {
    const double difference = std::abs(got[i] - want[i]);
    if (!(difference <= largest)) largest = difference;
    scale = std::max(scale, std::abs(want[i]));
  }
  return largest / scale;
}
DenseMatrix Random(int64_t rows, int64_t columns, int seed) {
  DenseMatrix m(rows, columns);
  std::mt19937_64 engine(seed);
  std::normal_distribution<double> normal;
  for (double& value : m.values) value = normal(engine);
  return m;
}

class PleasTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto backend = kernels::OpenBackend({}, 1);
    ASSERT_THAT(backend, IsOk());
    backend_ = *std::move(backend);
    auto algebra = backend_->linear_algebra();
    ASSERT_THAT(algebra, IsOk());
    algebra_ = *algebra;
  }
  JointInputs MomentsOf(const DenseMatrix& a, const DenseMatrix& b) {
    JointInputs moments{.rows = static_cast<double>(a.rows)};
    const auto sums = [](const DenseMatrix& x) {
      std::vector<double> sum(x.columns);
      for (int64_t r = 0; r < x.rows; ++r) {
        for (int64_t j = 0; j < x.columns; ++j) sum[j] += x(r, j);
      }
      return sum;
    };
    moments.first_sum = sums(a);
    moments.second_sum = sums(b);
    moments.first = *Product(*algebra_, Transpose::kYes, a, Transpose::kNo, a);
    moments.cross = *Product(*algebra_, Transpose::kYes, a, Transpose::kNo, b);
    moments.second = *Product(*algebra_, Transpose::kYes, b, Transpose::kNo, b);
    return moments;
  }

  std::unique_ptr<kernels::Backend> backend_;
  kernels::LinearAlgebra* algebra_ = nullptr;
};

TEST_F(PleasTest, LayersAreTheReferences) {
  if (!fs::exists(Goldens() / "cca_pleas.safetensors")) GTEST_SKIP() << "no references";
  auto golden = ReadTensors(Goldens() / "cca_pleas.safetensors");
  const json facts = json::parse(ReadFile(Goldens() / "cca_pleas.json"));
  for (const char* id : {"pleas_full", "pleas_full_ridge", "pleas_part", "pleas_part_ridge"}) {
    SCOPED_TRACE(id);
    const json& one = facts[id];
    const auto of = [&](const char* name) -> const TinyTensor& {
      return golden.at(absl::StrCat(id, ".", name));
    };
    const auto match = [&](const char* side) {
      const auto q = one[absl::StrCat("perm_", side)].get<std::vector<int32_t>>();
      const DenseMatrix c = MatrixOf(of(side == std::string("in") ? "Ci" : "Co"));
      std::vector<double> similarity;
      for (size_t i = 0; i < q.size(); ++i) {
        similarity.push_back(c(static_cast<int64_t>(i), q[i]));
      }
      const PartialMatch found =
          MatchAbove(q, similarity, one[absl::StrCat("sep_", side)].get<double>());
      const auto blocks =
          one[absl::StrCat("blocks_", side)].get<std::vector<std::vector<int32_t>>>();
      EXPECT_EQ(found.first, blocks[0]);
      EXPECT_EQ(found.second, blocks[1]);
      EXPECT_EQ(found.first_alone, blocks[2]);
      EXPECT_EQ(found.second_alone, blocks[3]);
      return found;
    };
    const PartialMatch inputs = match("in"), outputs = match("out");
    const LinearLayer a{MatrixOf(of("Wa")), of("ba").values},
        b{MatrixOf(of("Wb")), of("bb").values};
    const LinearLayer average = AverageLayers(a, b, outputs, inputs);
    EXPECT_LE(Apart(average.weight.values, of("W_init").values), 1e-12);
    EXPECT_LE(Apart(average.bias, of("b_init").values), 1e-12);
    const auto fitted = FitLayer(
        *algebra_, a, b, outputs, inputs, MomentsOf(MatrixOf(of("xa")), MatrixOf(of("xb"))),
        {.strength = one["ridge"].get<double>(), .relative = false, .towards_zero = true});
    ASSERT_THAT(fitted, IsOk());
    EXPECT_LE(Apart(fitted->weight.values, of("W").values), 1e-6);
    EXPECT_LE(Apart(fitted->bias, of("b").values), 1e-6);
  }
}

TEST(PartialMatchTest, TheLeastSimilarStayApartWhateverTies) {
  const std::vector<int32_t> q = {3, 2, 1, 0};
  const PartialMatch match = MatchAllBut(2, q, std::vector<double>{0.5, 0.1, 0.5, 0.5});
  EXPECT_EQ(match.first, (std::vector<int32_t>{2, 3}));
  EXPECT_EQ(match.second, (std::vector<int32_t>{1, 0}));
  EXPECT_EQ(match.first_alone, (std::vector<int32_t>{0, 1}));
  EXPECT_EQ(match.second_alone, (std::vector<int32_t>{3, 2}));
  EXPECT_EQ(match.width(), 6);
  EXPECT_EQ(MatchAllBut(0, q, std::vector<double>(4)).width(), 4);
  EXPECT_EQ(MatchAllBut(4, q, std::vector<double>(4)).width(), 8);
}

TEST_F(PleasTest, OneModelMergedWithItselfIsItself) {
  const LinearLayer layer{Random(4, 6, 1), {1, 2, 3, 4}};
  const DenseMatrix x = Random(60, 6, 2);
  const PartialMatch inputs = WholeMatch(std::vector<int32_t>{0, 1, 2, 3, 4, 5});
  const PartialMatch outputs = WholeMatch(std::vector<int32_t>{0, 1, 2, 3});
  const auto fitted = FitLayer(*algebra_, layer, layer, outputs, inputs, MomentsOf(x, x), {});
  ASSERT_THAT(fitted, IsOk());
  EXPECT_LE(Apart(fitted->weight.values, layer.weight.values), 1e-12);
  EXPECT_LE(Apart(fitted->bias, layer.bias), 1e-12);
}

TEST_F(PleasTest, ModelsKeptApartStayAsTheyWere) {
  const LinearLayer a{Random(3, 4, 1), {1, 2, 3}}, b{Random(3, 4, 2), {4, 5, 6}};
  const std::vector<int32_t> q_in = {2, 0, 3, 1}, q_out = {1, 2, 0};
  const PartialMatch inputs = MatchAbove(q_in, std::vector<double>(4, 0.5), 1);
  const PartialMatch outputs = MatchAbove(q_out, std::vector<double>(3, 0.5), 1);
  ASSERT_EQ(inputs.width(), 8);
  const auto fitted =
      FitLayer(*algebra_, a, b, outputs, inputs, MomentsOf(Random(50, 4, 3), Random(50, 4, 4)), {});
  ASSERT_THAT(fitted, IsOk());
  for (int64_t o = 0; o < 3; ++o) {
    EXPECT_NEAR(fitted->bias[o], a.bias[o], 1e-12);
    EXPECT_NEAR(fitted->bias[3 + o], b.bias[q_out[o]], 1e-12);
    for (int64_t i = 0; i < 4; ++i) {
      EXPECT_NEAR(fitted->weight(o, i), a.weight(o, i), 1e-12);
      EXPECT_EQ(fitted->weight(o, 4 + i), 0);
      EXPECT_EQ(fitted->weight(3 + o, i), 0);
      EXPECT_NEAR(fitted->weight(3 + o, 4 + i), b.weight(q_out[o], q_in[i]), 1e-12);
    }
  }
}

TEST_F(PleasTest, InputsThatDependOnEachOtherNeedARidge) {
  const LinearLayer a{Random(3, 4, 1), {}}, b{Random(3, 4, 2), {}};
  DenseMatrix x = Random(50, 4, 3);
  for (int64_t r = 0; r < 50; ++r) x(r, 3) = 0;
  const PartialMatch inputs = WholeMatch(std::vector<int32_t>{0, 1, 2, 3});
  const PartialMatch outputs = WholeMatch(std::vector<int32_t>{0, 1, 2});
  EXPECT_THAT(FitLayer(*algebra_, a, b, outputs, inputs, MomentsOf(x, x), {}),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("ridge")));
  const auto fitted =
      FitLayer(*algebra_, a, b, outputs, inputs, MomentsOf(x, x), {.strength = 1e-3});
  ASSERT_THAT(fitted, IsOk());
  EXPECT_TRUE(fitted->bias.empty());
  // Nothing is known of the dead input: it keeps the average.
  for (int64_t o = 0; o < 3; ++o) {
    EXPECT_NEAR(fitted->weight(o, 3), (a.weight(o, 3) + b.weight(o, 3)) / 2, 1e-14);
  }
}

TEST(PleasBudgetTest, RatiosAreAtLeastAsGoodAsTheReferences) {
  if (!fs::exists(Goldens() / "cca_pleas.json")) GTEST_SKIP() << "no references";
  const json table = json::parse(ReadFile(Goldens() / "cca_pleas.json"))["pleas_budget"];
  BudgetProblem problem{.sizes = table["sizes"].get<std::vector<double>>(),
                        .weights = table["weights"].get<std::vector<double>>()};
  for (const json& term : table["terms"]) {
    problem.terms.push_back({term[0].get<double>(), term[1].get<std::vector<int>>()});
  }
  const double base = BudgetCost(problem, std::vector<double>(3));
  EXPECT_DOUBLE_EQ(base, table["base_flops"].get<double>());
  for (const auto& [text, want] : table["solutions"].items()) {
    SCOPED_TRACE(text);
    const double budget = std::stod(text);
    // The references are the best points of a grid of steps of 0.01.
    const auto listed = want["ratios"].get<std::vector<double>>();
    EXPECT_NEAR(BudgetCost(problem, listed) / base, want["rel_flops"].get<double>(), 1e-9);
    const auto ratios = SolveBudget(problem, budget);
    ASSERT_THAT(ratios, IsOk());
    double worth = 0;
    for (size_t i = 0; i < 3; ++i) {
      EXPECT_GE((*ratios)[i], 0);
      EXPECT_LE((*ratios)[i], 1);
      worth += problem.weights[i] * (*ratios)[i];
    }
    EXPECT_LE(BudgetCost(problem, *ratios), budget * base * (1 + 1e-12));
    EXPECT_GE(worth, want["objective"].get<double>() - 1e-9);
    // And no better than one step of the grid allows.
    EXPECT_LE(worth, want["objective"].get<double>() + 0.05);
  }
}

TEST(PleasBudgetTest, LayersOfFixedWidthCostWhatTheyCost) {
  const BudgetProblem problem{.sizes = {10}, .weights = {1}, .terms = {{60, {}}, {4, {0}}}};
  EXPECT_DOUBLE_EQ(BudgetCost(problem, std::vector<double>{0.5}), 120);
  const auto ratios = SolveBudget(problem, 1.2);
  ASSERT_THAT(ratios, IsOk());
  EXPECT_NEAR((*ratios)[0], 0.5, 1e-12);
}

TEST(PleasBudgetTest, LayersBetweenManyGroupsAreRefused) {
  BudgetProblem problem{.sizes = std::vector<double>(8, 4), .weights = std::vector<double>(8, 1)};
  for (int i = 0; i < 8; i += 2) problem.terms.push_back({1, {i, i + 1}});
  EXPECT_THAT(SolveBudget(problem, 1.5),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("three groups")));
  EXPECT_THAT(SolveBudget(problem, 0.5),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("0.5")));
}

}  // namespace
}  // namespace pewter
