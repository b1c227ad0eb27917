// Values of parameters against an independent evaluator, on random recipes.
#include "merge/plan/parameters.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "tests/support/matchers.h"

namespace pewter {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::IsOk;
using testing::StatusIs;

const MergeMethod kMethod = {
    .name = "test",
    .params = {{.name = "weight", .scope = ParamScopeKind::kModel, .fallback = 100.0},
               {.name = "t", .fallback = 200.0},
               {.name = "seed", .scope = ParamScopeKind::kJob, .fallback = 300.0}}};

// mergekit's rules written again, over plain numbers: a level is a list of (filter, gradient).
struct PlainCase {
  std::string filter;
  std::vector<double> values;
};
using PlainLevel = std::optional<std::vector<PlainCase>>;

std::optional<double> PlainValue(const PlainLevel& level, const std::string& tensor, double t) {
  if (!level) return std::nullopt;
  for (const PlainCase& c : *level) {
    if (c.filter != "*" && tensor.find(c.filter) == std::string::npos) continue;
    if (c.values.empty()) return std::nullopt;
    // np.interp over equally spaced points.
    const double step = 1.0 / std::max<double>(1, static_cast<double>(c.values.size()) - 1);
    for (size_t i = 0; i + 1 < c.values.size(); ++i) {
      const double left = static_cast<double>(i) * step;
      if (t <= left + step + 1e-12) {
        return c.values[i] + (c.values[i + 1] - c.values[i]) * (t - left) / step;
      }
    }
    return c.values.back();
  }
  return std::nullopt;
}

double PlainLookup(const std::vector<const PlainLevel*>& levels, const std::string& tensor,
                   double t, double fallback) {
  for (const PlainLevel* level : levels) {
    if (const auto value = PlainValue(*level, tensor, t)) return *value;
  }
  return fallback;
}

class RandomScopes {
 public:
  explicit RandomScopes(int seed) : engine_(seed) {}

  PlainLevel Level() {
    if (Pick(3) == 0) return std::nullopt;
    std::vector<PlainCase> cases;
    const int count = 1 + Pick(3);
    for (int i = 0; i < count; ++i) {
      PlainCase c{.filter = kFilters[Pick(std::size(kFilters))]};
      const int values = Pick(6);
      for (int j = 0; j < values; ++j) c.values.push_back(std::round(Uniform() * 1000) / 100);
      cases.push_back(std::move(c));
    }
    return cases;
  }
  std::string Tensor() { return kTensors[Pick(std::size(kTensors))]; }
  double Uniform() { return std::uniform_real_distribution<double>(0, 1)(engine_); }
  int Pick(int n) { return std::uniform_int_distribution<int>(0, n - 1)(engine_); }

 private:
  static constexpr const char* kFilters[] = {"*", "mlp", "layers.1.", "attn", "norm"};
  static constexpr const char* kTensors[] = {"layers.1.mlp.up", "layers.11.mlp.up",
                                             "layers.0.attn.q", "norm", "lm_head"};
  std::mt19937 engine_;
};

ParamScope ToScope(const char* name, const PlainLevel& level) {
  ParamScope scope;
  if (!level) return scope;
  ParamSetting& setting = scope[name];
  for (const PlainCase& c : *level) {
    ParamCase& to = setting.cases.emplace_back();
    to.filter = c.filter == "*" ? "" : c.filter;
    to.gradient = c.values.size() != 1;
    for (double value : c.values) to.values.emplace_back(value);
  }
  return scope;
}

TEST(ParametersTest, AgreeWithAnIndependentEvaluator) {
  for (int seed = 0; seed < 2000; ++seed) {
    RandomScopes random(seed);
    const PlainLevel own = random.Level(), slice = random.Level(), module = random.Level(),
                     recipe = random.Level();
    const std::string tensor = random.Tensor();
    const double t = random.Pick(4) == 0 ? random.Pick(2) : random.Uniform();
    const auto place = [&](const ParamScope& a, const ParamScope& b, const ParamScope& c) {
      return ParamPlace{.slice = &a, .module = &b, .recipe = &c, .t = t};
    };

    const ParamScope own_scope = ToScope("weight", own);
    const ParamScope slice_w = ToScope("weight", slice), module_w = ToScope("weight", module),
                     recipe_w = ToScope("weight", recipe);
    const auto weight =
        ModelParameters(kMethod, place(slice_w, module_w, recipe_w), &own_scope, "m", tensor);
    ASSERT_THAT(weight, IsOk());
    EXPECT_NEAR(std::get<double>(weight->values.at("weight")),
                PlainLookup({&own, &slice, &module, &recipe}, tensor, t, 100), 1e-9)
        << seed;

    for (const char* name : {"t", "seed"}) {
      const ParamScope s = ToScope(name, slice), m = ToScope(name, module),
                       r = ToScope(name, recipe);
      const auto shared = TensorParameters(kMethod, place(s, m, r), tensor);
      ASSERT_THAT(shared, IsOk());
      const bool job = std::string(name) == "seed";
      EXPECT_NEAR(std::get<double>(shared->values.at(name)),
                  job ? PlainLookup({&recipe}, tensor, t, 300)
                      : PlainLookup({&slice, &module, &recipe}, tensor, t, 200),
                  1e-9)
          << seed;
    }
  }
}

// One parameter and one value for it.
absl::StatusOr<ParamValues> Value(Param param, std::vector<ParamScalar> values, double t = 0) {
  param.name = "p";
  const MergeMethod method = {.name = "test", .params = {param}};
  ParamScope scope;
  scope["p"].cases.push_back({.values = std::move(values), .at = {.line = 3, .column = 5}});
  Recipe recipe;
  recipe.parameters = scope;
  std::vector<std::string> warnings;
  if (auto status = CheckParameters(recipe, method, warnings); !status.ok()) return status;
  auto params = TensorParameters(method, {.recipe = &scope, .t = t}, "x");
  if (!params.ok()) return params.status();
  return std::move(params->values);
}

auto Fails(const char* part) {
  return StatusIs(absl::StatusCode::kInvalidArgument,
                  AllOf(HasSubstr("recipe:3:5: parameter `p` must be "), HasSubstr(part)));
}

TEST(ParametersTest, TypesAndRanges) {
  const Param number = {.min = 0, .max = 1};
  EXPECT_EQ(std::get<double>(Value(number, {int64_t{1}})->at("p")), 1);
  EXPECT_EQ(std::get<double>(Value(number, {true})->at("p")), 1);
  EXPECT_EQ(std::get<double>(Value(number, {std::string("5e-1")})->at("p")), 0.5);
  EXPECT_THAT(Value(number, {1.5}), Fails("from 0 to 1, not 1.5"));
  EXPECT_THAT(Value(number, {0.5, 2.0}), Fails("from 0 to 1, not 2"));
  EXPECT_THAT(Value(number, {std::string("nan")}), Fails("a number"));
  EXPECT_THAT(Value({.min = 0}, {-1.0}), Fails("at least 0, not -1"));

  const Param whole = {.type = ParamType::kInt};
  EXPECT_EQ(std::get<int64_t>(Value(whole, {3.0})->at("p")), 3);
  EXPECT_THAT(Value(whole, {3.5}), Fails("a whole number"));
  EXPECT_EQ(std::get<int64_t>(Value(whole, {int64_t{1}, int64_t{3}}, 0.5)->at("p")), 2);
  EXPECT_THAT(Value(whole, {int64_t{1}, int64_t{2}}, 0.5), Fails("a whole number"));

  const Param flag = {.type = ParamType::kBool};
  EXPECT_TRUE(std::get<bool>(Value(flag, {std::string("Yes")})->at("p")));
  EXPECT_FALSE(std::get<bool>(Value(flag, {int64_t{0}})->at("p")));
  EXPECT_TRUE(std::get<bool>(Value(flag, {false, false, true}, 1)->at("p")));
  EXPECT_FALSE(std::get<bool>(Value(flag, {false, false, true}, 0.9)->at("p")));
  EXPECT_THAT(Value(flag, {0.5}), Fails("true or false"));

  const Param word = {.type = ParamType::kString, .choices = {"one", "two"}};
  EXPECT_EQ(std::get<std::string>(Value(word, {std::string("two")})->at("p")), "two");
  EXPECT_THAT(Value(word, {std::string("three")}), Fails("one of one, two"));
}

TEST(ParametersTest, UnsetIsAbsent) {
  const MergeMethod method = {.name = "test", .params = {{.name = "p", .fallback = Unset{}}}};
  const auto values = TensorParameters(method, {}, "x");
  ASSERT_THAT(values, IsOk());
  EXPECT_TRUE(values->values.empty());
}

}  // namespace
}  // namespace pewter
