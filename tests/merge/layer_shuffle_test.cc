#include "merge/recipe/layer_shuffle.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <set>

#include "merge/recipe/recipe.h"
#include "tests/support/matchers.h"

namespace pewter {
namespace {

using ::testing::HasSubstr;
using testing::IsOk;
using testing::StatusIs;

// Model and layer of each layer of the output.
std::vector<std::pair<std::string, int64_t>> Layers(const std::string& text) {
  const auto recipe = ParseRecipe(text);
  EXPECT_THAT(recipe, IsOk()) << text;
  std::vector<std::pair<std::string, int64_t>> layers;
  for (const RecipeSlice& slice : recipe->modules[0].slices) {
    const RecipeSource& source = slice.sources[0];
    for (int64_t i = source.layer_range->first; i < source.layer_range->second; ++i) {
      layers.emplace_back(source.model.path, i);
    }
  }
  return layers;
}

std::string Shuffle(double a, double b, ShuffleOrder order, uint64_t seed, int64_t layers = 400) {
  const auto text = ShuffleLayers({{"./a", a, layers}, {"./it's b", b, layers}}, order, seed, "");
  EXPECT_THAT(text, IsOk());
  return text.value_or("");
}

TEST(LayerShuffleTest, KeepsTheOrderAndTheShares) {
  const auto layers = Layers(Shuffle(3, 1, ShuffleOrder::kKept, 1));
  ASSERT_EQ(layers.size(), 400u);
  int from_a = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    EXPECT_EQ(layers[i].second, static_cast<int64_t>(i));
    from_a += layers[i].first == "./a";
  }
  EXPECT_NEAR(from_a, 300, 5 * 8.7);  // five standard deviations
}

TEST(LayerShuffleTest, FullTakesAnyLayersInAnyOrder) {
  const auto layers = Layers(Shuffle(0.5, 0.25, ShuffleOrder::kFull, 1));
  std::map<std::string, int> counts;
  std::map<std::string, std::set<int64_t>> different;
  for (const auto& [model, layer] : layers) {
    ++counts[model];
    different[model].insert(layer);
    EXPECT_LT(layer, 400);
  }
  EXPECT_EQ(counts["./a"], 200);
  EXPECT_EQ(counts["./it's b"], 100);
  EXPECT_GT(*different["./a"].rbegin(), 300);  // of all its layers, not of the first half
  EXPECT_GT(different["./a"].size(), 130u);    // 157 are expected
  int changes = 0;
  for (size_t i = 1; i < layers.size(); ++i) changes += layers[i].first != layers[i - 1].first;
  EXPECT_GT(changes, 80);  // 133 are expected
}

TEST(LayerShuffleTest, TheSeedDecides) {
  for (const ShuffleOrder order : {ShuffleOrder::kKept, ShuffleOrder::kFull}) {
    EXPECT_EQ(Shuffle(1, 1, order, 5), Shuffle(1, 1, order, 5));
    EXPECT_NE(Shuffle(1, 1, order, 5), Shuffle(1, 1, order, 6));
  }
  EXPECT_EQ(Layers(Shuffle(0, 1, ShuffleOrder::kKept, 5, 3)),
            (std::vector<std::pair<std::string, int64_t>>{
                {"./it's b", 0}, {"./it's b", 1}, {"./it's b", 2}}));
}

TEST(LayerShuffleTest, WrongArguments) {
  const auto fails = [](std::vector<ShuffleModel> models, ShuffleOrder order, const char* part) {
    EXPECT_THAT(ShuffleLayers(models, order, 0, ""),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(part)));
  };
  fails({}, ShuffleOrder::kKept, "no model");
  fails({{"a", -1, 2}}, ShuffleOrder::kKept, "0 or more");
  fails({{"a", 0, 2}}, ShuffleOrder::kKept, "all 0");
  fails({{"a", 1, 4}, {"b", 1, 3}}, ShuffleOrder::kKept, "fewer than the first");
  fails({{"a", 0.1, 4}}, ShuffleOrder::kFull, "no layer is left");
  fails({{"a", 1e9, 4}}, ShuffleOrder::kFull, "ask for");
}

}  // namespace
}  // namespace pewter
