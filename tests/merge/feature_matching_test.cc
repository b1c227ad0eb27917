// Pairing features by correlations: against references computed elsewhere (a folder beside the
// checkout), and with permutations that were planted.
#include "merge/align/feature_matching.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "alignment_goldens.h"
#include "merge/align/moments.h"
#include "tests/support/matchers.h"
#include "tests/support/tiny_model.h"

namespace pewter {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using testing::AlignmentGoldenFolder;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using testing::IsOk;
using testing::MatrixOf;
using testing::ReadFile;
using testing::ReadTensors;
using testing::StatusIs;
using testing::TinyTensor;

std::vector<int32_t> IntegersOf(const TinyTensor& tensor) {
  return {tensor.values.begin(), tensor.values.end()};
}
std::vector<int32_t> RandomOrder(int64_t size, int seed) {
  std::vector<int32_t> order(size);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937_64(seed));
  return order;
}

// The whole attention's order: assigned heads, and orders inside them.
std::vector<int32_t> Joined(absl::Span<const int32_t> heads, absl::Span<const int32_t> inside) {
  const size_t dim = inside.size() / heads.size();
  std::vector<int32_t> q;
  for (size_t i = 0; i < inside.size(); ++i) {
    q.push_back(static_cast<int32_t>(heads[i / dim] * dim + inside[i]));
  }
  return q;
}

// Moments of the features of models, [model][row][feature].
SiteMoments MomentsOf(const std::vector<std::vector<std::vector<double>>>& features) {
  SiteMoments moments{.site = "test", .count = static_cast<int64_t>(features[0].size())};
  const size_t models = features.size();
  moments.sums.resize(models);
  moments.squares.resize(models);
  moments.grams.assign(models, std::vector<std::vector<double>>(models));
  for (size_t i = 0; i < models; ++i) {
    const size_t width = features[i][0].size();
    moments.sums[i].resize(width);
    moments.squares[i].resize(width);
    for (const std::vector<double>& row : features[i]) {
      for (size_t f = 0; f < width; ++f) {
        moments.sums[i][f] += row[f];
        moments.squares[i][f] += row[f] * row[f];
      }
    }
    for (size_t j = i; j < models; ++j) {
      const size_t columns = features[j][0].size();
      moments.grams[i][j].resize(width * columns);
      for (size_t r = 0; r < features[i].size(); ++r) {
        for (size_t f = 0; f < width; ++f) {
          for (size_t g = 0; g < columns; ++g) {
            moments.grams[i][j][f * columns + g] += features[i][r][f] * features[j][r][g];
          }
        }
      }
    }
  }
  return moments;
}

std::vector<std::vector<double>> RowsOf(const TinyTensor& tensor) {
  std::vector<std::vector<double>> rows;
  for (int64_t r = 0; r < tensor.shape[0]; ++r) {
    const auto begin = tensor.values.begin() + r * tensor.shape[1];
    rows.emplace_back(begin, begin + tensor.shape[1]);
  }
  return rows;
}

std::vector<std::vector<double>> RandomFeatures(int64_t rows, int64_t width, int seed) {
  std::mt19937_64 engine(seed);
  std::normal_distribution<double> normal;
  std::vector<std::vector<double>> features(rows, std::vector<double>(width));
  for (auto& row : features) {
    for (double& value : row) value = 3 + normal(engine);
  }
  return features;
}

TEST(FeatureMatchingTest, HeadsAreTheReferences) {
  if (!fs::exists(AlignmentGoldenFolder() / "lap/heads.safetensors"))
    GTEST_SKIP() << "no references";
  auto golden = ReadTensors(AlignmentGoldenFolder() / "lap/heads.safetensors");
  const DenseMatrix similarity = MatrixOf(golden.at("corr"));
  for (int threads : {1, 2}) {
    const auto matches = MatchBlocks(similarity, 16, threads);
    ASSERT_THAT(matches, IsOk());
    for (size_t i = 0; i < 36; ++i) {
      EXPECT_NEAR(matches->totals.values[i], golden.at("outer_scores").values[i], 1e-9);
    }
    const auto heads = AssignHeads(matches->totals, HeadMatching::kPermute);
    ASSERT_THAT(heads, IsOk());
    EXPECT_EQ(*heads, IntegersOf(golden.at("head_assign")));
    EXPECT_EQ(Joined(*heads, matches->OrdersOf(*heads)), IntegersOf(golden.at("col_ind")));
    const auto monotonic = AssignHeads(matches->totals, HeadMatching::kMonotonic);
    ASSERT_THAT(monotonic, IsOk());
    EXPECT_EQ(Joined(*monotonic, matches->OrdersOf(*monotonic)),
              IntegersOf(golden.at("col_ind_monotonic")));
    const auto inside = MatchInside(similarity, 16, *heads);
    ASSERT_THAT(inside, IsOk());
    EXPECT_EQ(*inside, matches->OrdersOf(*heads));
  }
  const auto ignored = MatchFeatures(similarity);
  ASSERT_THAT(ignored, IsOk());
  EXPECT_EQ(*ignored, IntegersOf(golden.at("col_ind_ignore_heads")));
}

TEST(FeatureMatchingTest, CorrelationsAndPlantedOrdersOfBertAreTheReferences) {
  if (!fs::exists(AlignmentGoldenFolder() / "bert_mlm/io.safetensors"))
    GTEST_SKIP() << "no references";
  auto golden = ReadTensors(AlignmentGoldenFolder() / "bert_mlm/io.safetensors");
  const json perms = json::parse(ReadFile(AlignmentGoldenFolder() / "bert_mlm/perms.json"));
  for (const std::string site : {"attn.0", "ff.1", "res.emb"}) {
    SCOPED_TRACE(site);
    const SiteMoments moments =
        MomentsOf({RowsOf(golden.at("act_a." + site)), RowsOf(golden.at("act_b." + site))});
    const auto covariance = CovarianceOf(moments, 0, 1);
    ASSERT_THAT(covariance, IsOk());
    const DenseMatrix correlation = CorrelationOf(*covariance);
    const std::vector<double>& want = golden.at("corr." + site).values;
    for (size_t i = 0; i < want.size(); ++i) {
      ASSERT_NEAR(correlation.values[i], want[i], 2e-6) << i;
    }
  }
  const auto planted = [&](const std::string& group) {
    return perms["groups"][group]["recover"].get<std::vector<int32_t>>();
  };
  for (int layer : {0, 1}) {
    const auto ff = MatchFeatures(MatrixOf(golden.at(absl::StrCat("corr.ff.", layer))));
    ASSERT_THAT(ff, IsOk());
    EXPECT_EQ(*ff, planted(absl::StrCat("ff.", layer)));
    const DenseMatrix attention = MatrixOf(golden.at(absl::StrCat("corr.attn.", layer)));
    const int64_t dim =
        attention.rows / static_cast<int64_t>(perms["structure"]["attn.0"]["heads"].size());
    const auto matches = MatchBlocks(attention, dim, 2);
    ASSERT_THAT(matches, IsOk());
    const auto heads = AssignHeads(matches->totals, HeadMatching::kPermute);
    ASSERT_THAT(heads, IsOk());
    EXPECT_EQ(Joined(*heads, matches->OrdersOf(*heads)), planted(absl::StrCat("vo.", layer)));
  }
  for (const char* site : {"emb", "attn.0", "ff.0", "attn.1", "ff.1"}) {
    const auto residual = MatchFeatures(MatrixOf(golden.at(absl::StrCat("corr.res.", site))));
    ASSERT_THAT(residual, IsOk());
    EXPECT_EQ(*residual, planted("res")) << site;
  }
}

TEST(FeatureMatchingTest, FindsTheOrderOfGroupedHeads) {
  // 3 key/value heads, each of 2 query heads, of 4 features.
  Attention attention{.name = "attn.0", .heads = 6, .kv_heads = 3, .head_dim = 4};
  const std::vector<int32_t> kv_heads = {2, 0, 1}, heads = {5, 4, 0, 1, 3, 2};
  std::vector<int32_t> inside;
  for (int g = 0; g < 3; ++g) {
    for (int32_t i : RandomOrder(4, g)) inside.push_back(i);
  }
  const auto values = RandomFeatures(50, 12, 1), contexts = RandomFeatures(50, 24, 2);
  auto values_b = values, contexts_b = contexts;
  for (size_t r = 0; r < 50; ++r) {
    for (int g = 0; g < 3; ++g) {
      for (int i = 0; i < 4; ++i) {
        values_b[r][kv_heads[g] * 4 + inside[g * 4 + i]] = values[r][g * 4 + i];
        for (int u = 0; u < 2; ++u) {
          contexts_b[r][heads[g * 2 + u] * 4 + inside[g * 4 + i]] =
              contexts[r][(g * 2 + u) * 4 + i];
        }
      }
    }
  }
  const auto value = CovarianceOf(MomentsOf({values, values_b}), 0, 1);
  ASSERT_THAT(value, IsOk());
  const auto matches = MatchBlocks(CorrelationOf(*value), 4, 2);
  ASSERT_THAT(matches, IsOk());
  const auto found = AssignHeads(matches->totals, HeadMatching::kPermute);
  ASSERT_THAT(found, IsOk());
  EXPECT_EQ(*found, kv_heads);
  EXPECT_EQ(matches->OrdersOf(*found), inside);
  const auto context = CovarianceOf(MomentsOf({contexts, contexts_b}), 0, 1);
  ASSERT_THAT(context, IsOk());
  const auto of_queries = MatchHeadsOfGroups(CorrelationOf(*context), attention, kv_heads, inside);
  ASSERT_THAT(of_queries, IsOk());
  EXPECT_EQ(*of_queries, heads);
}

TEST(MomentsTest, CorrelationsAreBetweenMinusOneAndOneAndOfTheirOwnOrder) {
  auto a = RandomFeatures(40, 5, 3);
  auto b = a;
  for (auto& row : b) {
    std::reverse(row.begin(), row.end());
    row[1] = -2 * row[1] + 7;  // correlation -1
    row[2] = 4;                // no variance: correlation 0, not infinite
  }
  const SiteMoments moments = MomentsOf({a, b});
  const auto covariance = CovarianceOf(moments, 0, 1);
  ASSERT_THAT(covariance, IsOk());
  const DenseMatrix correlation = CorrelationOf(*covariance);
  EXPECT_NEAR(correlation(4, 0), 1, 1e-12);
  EXPECT_NEAR(correlation(3, 1), -1, 1e-12);
  for (int i = 0; i < 5; ++i) EXPECT_NEAR(correlation(i, 2), 0, 1e-6);
  // The other way round it is the transpose.
  const auto other = CovarianceOf(moments, 1, 0);
  ASSERT_THAT(other, IsOk());
  for (int i = 0; i < 5; ++i) {
    for (int j = 0; j < 5; ++j) EXPECT_DOUBLE_EQ(other->cross(j, i), covariance->cross(i, j));
  }
  EXPECT_DOUBLE_EQ(MeanOfMatched(correlation, std::vector<int32_t>{4, 4, 2, 1, 0}),
                   (correlation(0, 4) + correlation(1, 4) + correlation(2, 2) + correlation(3, 1) +
                    correlation(4, 0)) /
                       5);
}

TEST(MomentsTest, PooledMomentsAreThoseOfAllRows) {
  const auto a = RandomFeatures(20, 3, 4), b = RandomFeatures(20, 3, 5);
  const auto c = RandomFeatures(30, 3, 6), d = RandomFeatures(30, 3, 7);
  auto first = a, second = b;
  first.insert(first.end(), c.begin(), c.end());
  second.insert(second.end(), d.begin(), d.end());
  const auto pooled = Pooled(MomentsOf({a, b}), MomentsOf({c, d}));
  ASSERT_THAT(pooled, IsOk());
  const auto got = CovarianceOf(*pooled, 0, 1),
             want = CovarianceOf(MomentsOf({first, second}), 0, 1);
  ASSERT_THAT(got, IsOk());
  ASSERT_THAT(want, IsOk());
  for (size_t i = 0; i < 9; ++i) EXPECT_NEAR(got->cross.values[i], want->cross.values[i], 1e-12);
  EXPECT_THAT(Pooled(MomentsOf({a, b}), MomentsOf({a})),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("test")));
}

TEST(MomentsTest, WhatWasNotCollectedIsAnError) {
  const auto a = RandomFeatures(20, 3, 4);
  SiteMoments moments = MomentsOf({a, a});
  moments.grams[0][1].clear();
  EXPECT_THAT(CovarianceOf(moments, 0, 1),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("not collected")));
  EXPECT_THAT(CovarianceOf(moments, 0, 2),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("model 2 of 2")));
  EXPECT_THAT(CovarianceOf(moments, 0, 0), IsOk());
  moments.grams[0][0].pop_back();
  EXPECT_THAT(CovarianceOf(moments, 0, 0),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("width")));
  moments.count = 0;
  EXPECT_THAT(CovarianceOf(moments, 0, 0),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("no rows")));
}

}  // namespace
}  // namespace pewter
