// Merging adapters into an adapter: numbers against PEFT's own (add_weighted_adapter of PEFT
// 0.21.2, run apart) and against the sum of the adapters' products, files as PEFT and Pewter read
// them, and what is refused.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/backend.h"
#include "merge/checkpoint/lora_config.h"
#include "merge/pewter.h"
#include "nlohmann/json.hpp"
#include "tests/support/matchers.h"
#include "tests/support/tiny_model.h"

namespace pewter::testing {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::UnorderedElementsAre;

constexpr char kQ[] = "model.layers.0.self_attn.q_proj";
constexpr char kK[] = "model.layers.1.self_attn.k_proj";
constexpr char kEmbed[] = "model.embed_tokens";
constexpr char kPrefix[] = "base_model.model.";
constexpr absl::StatusCode kFailed = absl::StatusCode::kFailedPrecondition;
constexpr absl::StatusCode kInvalid = absl::StatusCode::kInvalidArgument;

using Tensors = std::map<std::string, TinyTensor>;

// Rational numbers that any language computes alike.
TinyTensor Known(const std::string& name, Shape shape, int64_t seed) {
  TinyTensor tensor{.name = name, .dtype = DType::kF32, .shape = shape};
  for (int64_t i = 0; i < shape.elements(); ++i) {
    tensor.values.push_back(static_cast<double>((seed * 7919 + i * 104729) % 2003 - 1001) / 1001);
  }
  return tensor;
}

std::vector<TinyTensor> Factors(const std::string& module, int64_t out, int64_t in, int64_t rank,
                                int seed, DType dtype = DType::kF32) {
  return {
      RandomTensor(absl::StrCat(kPrefix, module, ".lora_A.weight"), dtype, Shape{rank, in}, seed),
      RandomTensor(absl::StrCat(kPrefix, module, ".lora_B.weight"), dtype, Shape{out, rank},
                   seed + 1)};
}

std::string Config(int64_t rank, double alpha, absl::string_view more = "") {
  return absl::StrCat(R"({"peft_type":"LORA","task_type":"CAUSAL_LM","r":)", rank,
                      R"(,"lora_alpha":)", alpha, more.empty() ? "" : ",", more, "}");
}

class AdapterMerge : public ::testing::Test {
 protected:
  void SetUp() override {
    options_.device = "cpu";
    options_.threads = 2;
  }

  void Write(const std::string& name, const std::string& config,
             const std::vector<TinyTensor>& tensors) {
    folder_.Write(name + "/adapter_config.json", config);
    WriteSafetensors(folder_ / (name + "/adapter_model.safetensors"), tensors);
  }

  // `models` are entries like "a: {weight: 1}".
  std::string RecipeOf(const std::string& method, const std::vector<std::string>& models,
                       absl::string_view parameters = "{}", absl::string_view more = "") const {
    std::string text =
        absl::StrCat("merge_method: ", method, "\noutput: {format: lora}\nmodels:\n");
    for (const std::string& model : models) {
      const size_t colon = model.find(':');
      absl::StrAppend(&text, "  - {model: ", folder_ / model.substr(0, colon),
                      ", parameters: ", model.substr(colon + 1), "}\n");
    }
    return absl::StrCat(text, "parameters: ", parameters, "\n", more);
  }

  absl::StatusOr<Plan> PlanOf(const std::string& text) const {
    const absl::StatusOr<Recipe> recipe = ParseRecipe(text);
    if (!recipe.ok()) return recipe.status();
    return MakePlan(*recipe, options_);
  }

  // The merged tensors; none when it failed.
  Tensors Merge(const std::string& text, const std::string& out = "out") {
    absl::StatusOr<Plan> plan = PlanOf(text);
    EXPECT_THAT(plan, IsOk());
    if (!plan.ok()) return {};
    plan_ = *std::move(plan);
    const auto manifest = RunPlan(plan_, {.output = folder_ / out, .mode = OutputMode::kOverwrite});
    EXPECT_THAT(manifest, IsOk());
    if (!manifest.ok()) return {};
    config_ = json::parse(ReadFile(folder_ / (out + "/adapter_config.json")));
    return ReadTensors(folder_ / (out + "/adapter_model.safetensors"));
  }

  // scale * B A of a module, [out, in], in double.
  static std::vector<double> Product(const Tensors& tensors, const std::string& module,
                                     double scale = 1) {
    const std::string name = absl::StrCat(kPrefix, module);
    const bool embedding = tensors.contains(name + ".lora_embedding_A");
    const TinyTensor& a = tensors.at(name + (embedding ? ".lora_embedding_A" : ".lora_A.weight"));
    const TinyTensor& b = tensors.at(name + (embedding ? ".lora_embedding_B" : ".lora_B.weight"));
    const int64_t rank = a.shape[0], in = a.shape.elements() / rank, out = b.shape[0];
    std::vector<double> product(out * in);
    for (int64_t i = 0; i < out; ++i) {
      for (int64_t k = 0; k < rank; ++k) {
        for (int64_t j = 0; j < in; ++j) {
          product[i * in + j] += scale * b.values[i * rank + k] * a.values[k * in + j];
        }
      }
    }
    return product;
  }
  // weight * scale * B A of an adapter, by its own configuration.
  std::vector<double> Product(const std::string& adapter, const std::string& module,
                              double weight) const {
    const auto config = LoraConfig::Parse(ReadFile(folder_ / (adapter + "/adapter_config.json")));
    EXPECT_THAT(config, IsOk());
    return Product(ReadTensors(folder_ / (adapter + "/adapter_model.safetensors")), module,
                   weight * config->Scale(module));
  }

  static std::vector<double> Sum(std::vector<double> a, const std::vector<double>& b) {
    for (size_t i = 0; i < a.size(); ++i) a[i] += b[i];
    return a;
  }
  static void ExpectNear(const std::vector<double>& got, const std::vector<double>& want,
                         double tolerance) {
    ASSERT_EQ(got.size(), want.size());
    for (size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], want[i], tolerance) << i;
  }

  TempFolder folder_;
  PlanOptions options_;
  Plan plan_;
  json config_;
};

// --- numbers
// --------------------------------------------------------------------------------------

struct PeftCase {
  const char* method;
  const char* other;  // merged with a
  const char* parameters;
  int64_t rank;
  std::vector<double> product;  // of the merged factors, [4, 5]
};

const PeftCase kPeftCases[] = {
    {"cat", "c", "{}", 5, {0.754711,  -0.534523, -1.04455, 0.73968,  -0.3931,   -0.326596, 0.193043,
                           0.226958,  -0.308442, 0.291956, 0.963278, -0.759683, -0.562971, 0.938921,
                           -0.778976, -0.347781, 0.271998, 0.478783, -0.338952, 0.210195}},
    {"linear", "b", "{}", 2, {0.97814,  -0.824584, -0.934524, 0.967319, -0.835404,
                              1.00563,  -0.949944, -0.348726, 1.00147,  -0.954099,
                              0.870635, -0.911975, 0.234456,  0.873145, -0.909465,
                              0.898123, -1.03734,  0.820254,  0.907298, -1.02816}},
    {"svd", "c", "{}", 3, {0.750324, -0.538839, -1.0469,  0.734576, -0.398756, -0.327059, 0.192588,
                           0.22671,  -0.30898,  0.29136,  0.962809, -0.760144, -0.563222, 0.938376,
                           -0.77958, -0.35782,  0.262124, 0.473406, -0.35063,  0.197253}},
    {"svd", "c", "{svd_rank: 1}", 1, {0.807969,  -0.604421, -0.756185, 0.787645,  -0.562104,
                                      -0.306785, 0.229498,  0.287122,  -0.299068, 0.21343,
                                      0.908483,  -0.679613, -0.850256, 0.88563,   -0.632032,
                                      -0.381412, 0.285325,  0.356966,  -0.371818, 0.265348}},
    {"magnitude_prune", "b", "{density: 0.6}", 2, {0.421451,  -0.0533812, -1.42618, 0.800138,
                                                   -0.510751, 1.38376,    -1.29748, -0.111239,
                                                   1.36515,   -1.33692,   1.33583,  -1.28686,
                                                   0.0324724, 1.27925,    -1.28021, 0.527593,
                                                   -0.84163,  1.37085,    0.130351, -0.404608}},
    {"ties", "b", "{density: 0.6}", 2, {0.421451, -0.328806, -1.42618,  0.26699,  -0.510751,
                                        1.38376,  -0.923444, -0.111239, 0.932961, -1.33692,
                                        1.33583,  -0.886678, 0.0324724, 0.902367, -1.28021,
                                        0.527593, -0.303815, 1.37085,   0.373133, -0.404608}},
    {"ties",
     "b",
     "{density: 0.6, majority_sign_method: frequency}",
     2,
     {0.421451,  -0.328806, -1.42618,  0.26699, -0.510751, 1.38376,   -0.923444,
      -0.111239, 0.932961,  -1.33692,  1.33583, -0.886678, 0.0324724, 0.902367,
      -1.28021,  0.527593,  -0.303815, 1.37085, 0.373133,  -0.404608}},
    {"magnitude_prune_svd",
     "c",
     "{density: 0.35}",
     3,
     {0.66296,   -0.000425418, -1.04524,    0.822808,   -0.000436157, 0.110351,    -0.0061734,
      0.0862289, -0.01644,     -0.00633017, 0.963186,   -0.759561,    0.000197072, 0.857275,
      -0.778851, -0.114968,    -0.00735893, -0.0119071, -0.0195975,   -0.00754583}},
    {"ties_svd", "c", "{density: 0.7}", 3, {0.671166,  -0.587402, -0.917281,  0.359346,
                                            -0.444717, -0.170829, -0.0960906, 0.0936564,
                                            -0.347736, 0.155942,  0.861447,   -0.654599,
                                            -0.2836,   0.864604,  -0.651736,  -0.104731,
                                            0.0135738, 0.428653,  -0.0194176, 0.0579007}},
    {"ties_svd",
     "c",
     "{density: 0.7, majority_sign_method: frequency, svd_rank: 4}",
     4,
     {0.662639,  -0.594737, -0.124368,    0.36984,  -0.433436,   -0.163298, -0.0896113,
      0.0962174, -0.357005, 0.145978,     0.867664, -0.110434,   -0.281486, 0.856951,
      -0.119012, -0.120508, -7.07805e-08, 0.423288, 3.53903e-08, 0.0787745}},
    {"dare_linear", "b", "{density: 1.0}", 2, {0.97814,  -0.824584, -0.934524, 0.967319, -0.835404,
                                               1.00563,  -0.949944, -0.348726, 1.00147,  -0.954099,
                                               0.870635, -0.911975, 0.234456,  0.873145, -0.909465,
                                               0.898123, -1.03734,  0.820254,  0.907298, -1.02816}},
    {"dare_ties", "b", "{density: 1.0}", 2, {0.421451, -0.328806, -1.42618,  0.26699,  -0.510751,
                                             1.38376,  -0.923444, -0.111239, 0.932961, -1.33692,
                                             1.33583,  -0.886678, 0.0324724, 0.902367, -1.28021,
                                             1.39509,  -0.91137,  0.462589,  0.94768,  -1.30511}},
    {"dare_linear_svd", "c", "{density: 1.0}", 3, {0.750324,  -0.538839, -1.0469,  0.734576,
                                                   -0.398756, -0.327059, 0.192588, 0.22671,
                                                   -0.30898,  0.29136,   0.962809, -0.760144,
                                                   -0.563222, 0.938376,  -0.77958, -0.35782,
                                                   0.262124,  0.473406,  -0.35063, 0.197253}},
    {"dare_ties_svd", "c", "{density: 1.0}", 3, {0.661423,  -0.266059, -0.920814, 0.370262,
                                                 -0.198492, -0.179117, 0.112159,  0.0879811,
                                                 -0.14874,  0.120738,  0.865022,  -0.646637,
                                                 -0.282862, 0.857867,  -0.664179, -0.2284,
                                                 0.229256,  0.422701,  -0.323605, 0.0769767}},
};

TEST_F(AdapterMerge, NumbersAreThoseOfPeft) {
  const auto write = [&](const char* name, int64_t rank, const std::string& config, int64_t seed) {
    const std::string module = absl::StrCat(kPrefix, "q_proj");
    Write(name, config,
          {Known(module + ".lora_A.weight", Shape{rank, 5}, seed),
           Known(module + ".lora_B.weight", Shape{4, rank}, seed + 5)});
  };
  write("a", 2, Config(2, 3), 1);
  write("b", 2, Config(2, 4, R"("use_rslora":true)"), 11);
  write("c", 3, Config(3, 1), 21);
  for (const PeftCase& peft : kPeftCases) {
    SCOPED_TRACE(absl::StrCat(peft.method, " ", peft.parameters));
    const Tensors merged = Merge(
        RecipeOf(peft.method, {"a: {weight: 0.7}", absl::StrCat(peft.other, ": {weight: -0.4}")},
                 peft.parameters));
    ASSERT_THAT(merged, Not(IsEmpty()));
    EXPECT_EQ(config_["r"], peft.rank);
    EXPECT_EQ(config_["lora_alpha"], peft.rank);
    EXPECT_EQ(config_["use_rslora"], false);
    EXPECT_EQ(merged.at("base_model.model.q_proj.lora_A.weight").shape, (Shape{peft.rank, 5}));
    EXPECT_EQ(merged.at("base_model.model.q_proj.lora_B.weight").shape, (Shape{4, peft.rank}));
    ExpectNear(Product(merged, "q_proj"), peft.product, 5e-6);
  }
}

// B = U S, A = V^T: rows of A are orthonormal, columns of B orthogonal, longest first.
TEST_F(AdapterMerge, SvdGivesSingularVectors) {
  Write("a", Config(8, 16), Factors(kQ, 40, 24, 8, 1));
  Write("b", Config(4, 4), Factors(kQ, 40, 24, 4, 3));
  for (const char* method : {"svd", "ties_svd", "magnitude_prune_svd"}) {
    SCOPED_TRACE(method);
    const Tensors merged = Merge(RecipeOf(method, {"a: {weight: 1}", "b: {weight: 0.5}"},
                                          method == std::string("svd") ? "{}" : "{density: 0.5}"));
    const std::string name = absl::StrCat(kPrefix, kQ);
    const TinyTensor& a = merged.at(name + ".lora_A.weight");
    const TinyTensor& b = merged.at(name + ".lora_B.weight");
    ASSERT_EQ(a.shape, (Shape{8, 24}));
    double last = 1e9;
    for (int64_t k = 0; k < 8; ++k) {
      double largest = 0;
      for (int64_t i = 0; i < 40; ++i) {
        const double value = b.values[i * 8 + k];
        if (std::abs(value) > std::abs(largest)) largest = value;
      }
      EXPECT_GT(largest, 0) << k;
      for (int64_t l = 0; l <= k; ++l) {
        double of_a = 0, of_b = 0;
        for (int64_t j = 0; j < 24; ++j) of_a += a.values[k * 24 + j] * a.values[l * 24 + j];
        for (int64_t i = 0; i < 40; ++i) of_b += b.values[i * 8 + k] * b.values[i * 8 + l];
        EXPECT_NEAR(of_a, k == l ? 1 : 0, 1e-6);
        if (k != l) {
          EXPECT_NEAR(of_b, 0, 1e-3);
          continue;
        }
        EXPECT_LE(of_b, last * (1 + 1e-6));
        last = of_b;
      }
    }
  }
}

TEST_F(AdapterMerge, CatAndSvdOfFullRankAreTheSum) {
  // Ranks that differ by adapter and module; their sum is above the shorter side for k_proj.
  std::vector<TinyTensor> a = Factors(kQ, 40, 24, 4, 1), b = Factors(kQ, 40, 24, 7, 5);
  for (const TinyTensor& one : Factors(kK, 6, 30, 5, 9)) a.push_back(one);
  for (const TinyTensor& one : Factors(kK, 6, 30, 7, 12)) b.push_back(one);
  Write("a", Config(4, 8, R"("rank_pattern":{"k_proj":5},"alpha_pattern":{"k_proj":1})"), a);
  Write("b", Config(7, 3, R"("use_rslora":true)"), b);
  const std::vector<std::string> models = {"a: {weight: 0.5}", "b: {weight: -2}"};
  const auto check = [&](const Tensors& merged) {
    for (const char* module : {kQ, kK}) {
      ExpectNear(Product(merged, module), Sum(Product("a", module, 0.5), Product("b", module, -2)),
                 2e-5);
    }
  };
  check(Merge(RecipeOf("cat", models)));
  EXPECT_EQ(config_["r"], 12);
  EXPECT_EQ(config_["rank_pattern"], (json{{kQ, 11}}));
  EXPECT_EQ(config_["alpha_pattern"], (json{{kQ, 11}}));
  check(Merge(RecipeOf("svd", models, "{svd_rank: 100}")));
  EXPECT_EQ(config_["r"], 11);
  EXPECT_EQ(config_["rank_pattern"], (json{{kK, 6}}));
  // The same through a dense product, as another adapter is pruned, that counts nothing.
  Write("c", Config(2, 2), Factors(kQ, 40, 24, 2, 30));
  check(Merge(RecipeOf("magnitude_prune_svd",
                       {"a: {weight: 0.5}", "b: {weight: -2}", "c: {weight: 0, density: 0.5}"},
                       "{svd_rank: 100, density: 1}")));
  EXPECT_EQ(config_["r"], 24);
  EXPECT_EQ(config_["rank_pattern"], (json{{kK, 6}}));
}

// The rank is the least that keeps the energy: a rank less would not.
TEST_F(AdapterMerge, RankFollowsFromEnergy) {
  std::vector<TinyTensor> a = Factors(kQ, 40, 24, 4, 1), b = Factors(kQ, 40, 24, 7, 5);
  for (const TinyTensor& one : Factors(kK, 6, 30, 4, 9)) a.push_back(one);
  for (const TinyTensor& one : Factors(kK, 6, 30, 7, 12)) b.push_back(one);
  Write("a", Config(4, 8), a);
  Write("b", Config(7, 3), b);
  const std::vector<std::string> models = {"a: {weight: 1}", "b: {weight: 2}"};
  const auto square = [](const std::vector<double>& values) {
    double sum = 0;
    for (double value : values) sum += value * value;
    return sum;
  };
  const auto rank_of = [](const Tensors& merged, const char* module) {
    return merged.at(absl::StrCat(kPrefix, module, ".lora_A.weight")).shape[0];
  };
  for (const char* method : {"svd", "ties_svd", "drm"}) {
    SCOPED_TRACE(method);
    const std::string more = method == std::string("svd") ? "" : "density: 0.5, ";
    const auto merge = [&](absl::string_view rank) {
      return Merge(RecipeOf(method, models, absl::StrCat("{", more, rank, "}")));
    };
    const Tensors whole = merge("svd_rank: 100"), some = merge("svd_energy: 0.9");
    for (const char* module : {kQ, kK}) {
      const double all = square(Product(whole, module));
      const int64_t rank = rank_of(some, module);
      EXPECT_GE(square(Product(some, module)), 0.9 * all);
      ASSERT_GT(rank, 1);
      ASSERT_LT(rank, rank_of(whole, module));
      const Tensors less = merge(absl::StrCat("svd_rank: ", rank - 1));
      EXPECT_LT(square(Product(less, module)), 0.9 * all);
    }
    EXPECT_EQ(rank_of(merge("svd_energy: 0.9, svd_rank: 1"), kQ), 1);
    EXPECT_EQ(config_["r"], 1);
  }
  options_.memory_bytes = 4096;
  EXPECT_THAT(PlanOf(RecipeOf("svd", models, "{svd_energy: 0.9}")),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("raise --memory")));
}

TEST_F(AdapterMerge, CatCopiesFactorsWhenNothingScales) {
  Write("a", Config(4, 4), Factors(kQ, 10, 12, 4, 1));
  Write("b", Config(2, 4), Factors(kQ, 10, 12, 2, 3));
  const Tensors merged = Merge(RecipeOf("cat", {"a: {weight: 1}", "b: {weight: 0.25}"}));
  const auto a = ReadTensors(folder_ / "a/adapter_model.safetensors");
  const auto b = ReadTensors(folder_ / "b/adapter_model.safetensors");
  const std::string name = absl::StrCat(kPrefix, kQ);
  std::vector<double> rows = a.at(name + ".lora_A.weight").values;
  for (double value : b.at(name + ".lora_A.weight").values) rows.push_back(0.5 * value);
  EXPECT_EQ(merged.at(name + ".lora_A.weight").values, rows);
  for (int64_t i = 0; i < 10; ++i) {
    for (int64_t k = 0; k < 6; ++k) {
      EXPECT_EQ(merged.at(name + ".lora_B.weight").values[i * 6 + k],
                k < 4 ? a.at(name + ".lora_B.weight").values[i * 4 + k]
                      : b.at(name + ".lora_B.weight").values[i * 2 + k - 4]);
    }
  }
}

TEST_F(AdapterMerge, TheOrderOfAdaptersDoesNotMatter) {
  Write("a", Config(4, 8), Factors(kQ, 20, 12, 4, 1));
  Write("b", Config(4, 2), Factors(kQ, 20, 12, 4, 3));
  Write("c", Config(4, 4), Factors(kQ, 20, 12, 4, 5));
  for (const auto& [method, parameters] : std::vector<std::pair<const char*, const char*>>{
           {"cat", "{}"},
           {"linear", "{}"},
           {"svd", "{}"},
           {"ties", "{density: 0.5}"},
           {"ties_svd", "{density: 0.5, majority_sign_method: frequency}"},
           {"magnitude_prune_svd", "{density: 0.3, svd_rank: 2}"}}) {
    SCOPED_TRACE(method);
    const Tensors one = Merge(
        RecipeOf(method, {"a: {weight: 0.5}", "b: {weight: 1}", "c: {weight: -0.3}"}, parameters));
    const Tensors other = Merge(
        RecipeOf(method, {"c: {weight: -0.3}", "a: {weight: 0.5}", "b: {weight: 1}"}, parameters));
    ExpectNear(Product(one, kQ), Product(other, kQ), 1e-5);
    if (method == std::string("cat")) continue;
    for (const auto& [name, tensor] : one) ExpectNear(tensor.values, other.at(name).values, 1e-4);
  }
}

TEST_F(AdapterMerge, DensityZeroAndOne) {
  Write("a", Config(4, 8), Factors(kQ, 20, 12, 4, 1));
  Write("b", Config(4, 2), Factors(kQ, 20, 12, 4, 3));
  const auto merge = [&](const char* method, const char* density) {
    return Product(Merge(RecipeOf(method, {"a: {weight: 0.5}", "b: {weight: 1}"},
                                  absl::StrCat("{density: ", density, "}"))),
                   kQ);
  };
  const std::vector<double> sum = Sum(Product("a", kQ, 0.5), Product("b", kQ, 1));
  const std::vector<double> linear =
      Product(Merge(RecipeOf("linear", {"a: {weight: 0.5}", "b: {weight: 1}"})), kQ);
  for (const char* method : {"magnitude_prune", "dare_linear"}) {
    ExpectNear(merge(method, "1"), linear, 1e-12);
    ExpectNear(merge(method, "0"), std::vector<double>(240), 0);
    // A density for each adapter: the other one is left as it is.
    const std::vector<double> one = Product(
        Merge(RecipeOf(method, {"a: {weight: 0.5, density: 0}", "b: {weight: 1, density: 1}"})),
        kQ);
    ExpectNear(one, Product("b", kQ, 1), 1e-5);
  }
  for (const char* method : {"ties", "ties_svd", "dare_ties", "dare_ties_svd", "dare_linear_svd"}) {
    ExpectNear(merge(method, "0"), std::vector<double>(240), 0);
  }
}

TEST_F(AdapterMerge, DareDropsAtRandomAndRescales) {
  Write("a", Config(4, 4), Factors(kQ, 300, 200, 4, 1));
  const auto merge = [&](uint64_t seed) {
    options_.seed = seed;
    return Merge(RecipeOf("dare_linear", {"a: {weight: 1}"}, "{density: 0.25}"))
        .at(absl::StrCat(kPrefix, kQ, ".lora_B.weight"))
        .values;
  };
  const std::vector<double> before = ReadTensors(folder_ / "a/adapter_model.safetensors")
                                         .at(absl::StrCat(kPrefix, kQ, ".lora_B.weight"))
                                         .values;
  const std::vector<double> drawn = merge(7);
  double kept = 0;
  for (size_t i = 0; i < drawn.size(); ++i) {
    if (drawn[i] == 0) continue;
    ++kept;
    ASSERT_EQ(drawn[i], before[i] * 4);
  }
  EXPECT_NEAR(kept / static_cast<double>(drawn.size()), 0.25, 0.05);
  EXPECT_EQ(merge(7), drawn);
  EXPECT_NE(merge(8), drawn);
}

TEST_F(AdapterMerge, ClampingIsAQuantileOfAllEntries) {
  Write("a", Config(4, 8), Factors(kQ, 9, 12, 4, 1));
  const std::vector<std::string> models = {"a: {weight: 1}"};
  const Tensors whole = Merge(RecipeOf("svd", models));
  std::vector<double> entries;
  for (const auto& [name, tensor] : whole) {
    entries.insert(entries.end(), tensor.values.begin(), tensor.values.end());
  }
  std::sort(entries.begin(), entries.end());
  const double place = 0.9 * static_cast<double>(entries.size() - 1);
  const auto below = static_cast<size_t>(place);
  const double limit =
      entries[below] + (entries[below + 1] - entries[below]) * (place - static_cast<double>(below));
  const Tensors clamped = Merge(RecipeOf("svd", models, "{svd_clamp: 0.9}"));
  int changed = 0;
  for (const auto& [name, tensor] : whole) {
    for (size_t i = 0; i < tensor.values.size(); ++i) {
      const double want = std::min(std::max(tensor.values[i], -limit), limit);
      EXPECT_NEAR(clamped.at(name).values[i], want, 1e-6);
      changed += want != tensor.values[i];
    }
  }
  EXPECT_GT(changed, 10);
}

// --- kinds of modules
// -----------------------------------------------------------------------------

// The merged adapter on a model is the model with the weighted adapters added, whatever the module.
TEST_F(AdapterMerge, TheOutputIsAnAdapterThatPewterReads) {
  const std::string name_q = absl::StrCat(kPrefix, kQ), embed = absl::StrCat(kPrefix, kEmbed);
  const auto tensors = [&](int64_t rank, int seed) {
    std::vector<TinyTensor> all = Factors(kQ, 8, 6, rank, seed);
    all.push_back(RandomTensor(name_q + ".lora_B.bias", DType::kF32, Shape{8}, seed + 9));
    all.push_back(
        RandomTensor(embed + ".lora_embedding_A", DType::kF32, Shape{rank, 10}, seed + 2));
    all.push_back(RandomTensor(embed + ".lora_embedding_B", DType::kF32, Shape{6, rank}, seed + 3));
    all.push_back(RandomTensor(absl::StrCat(kPrefix, "conv.lora_A.weight"), DType::kF32,
                               Shape{rank, 3, 2, 2}, seed + 4));
    all.push_back(RandomTensor(absl::StrCat(kPrefix, "conv.lora_B.weight"), DType::kF32,
                               Shape{5, rank, 1, 1}, seed + 5));
    return all;
  };
  Write("a", Config(3, 6, R"("lora_bias":true,"target_modules":["q_proj","embed_tokens","conv"])"),
        tensors(3, 1));
  Write("b", Config(2, 1, R"("lora_bias":true,"target_modules":["q_proj","embed_tokens","conv"])"),
        tensors(2, 20));
  folder_.Write("model/config.json", "{}");
  const std::vector<TinyTensor> model = {
      RandomTensor(absl::StrCat(kQ, ".weight"), DType::kF32, Shape{8, 6}, 100),
      RandomTensor(absl::StrCat(kQ, ".bias"), DType::kF32, Shape{8}, 101),
      RandomTensor(absl::StrCat(kEmbed, ".weight"), DType::kF32, Shape{10, 6}, 102),
      RandomTensor("conv.weight", DType::kF32, Shape{5, 3, 2, 2}, 103)};
  WriteSafetensors(folder_ / "model/model.safetensors", model);
  const auto applied = [&](const std::string& adapter) {
    std::map<std::string, std::vector<double>> values;
    const auto opened = Checkpoint::Open({.path = folder_ / "model", .adapter = folder_ / adapter});
    EXPECT_THAT(opened, IsOk());
    for (const std::string& name : (*opened)->tensor_names()) {
      const auto source = (*opened)->OpenTensor(name, 0).value();
      std::vector<float> read(source->shape().elements());
      EXPECT_THAT(source->Read(0, static_cast<int64_t>(read.size()),
                               absl::MakeSpan(reinterpret_cast<std::byte*>(read.data()),
                                              read.size() * sizeof(float)),
                               nullptr),
                  IsOk());
      values[name].assign(read.begin(), read.end());
    }
    return values;
  };
  const auto with_a = applied("a"), with_b = applied("b");
  const auto stored = ReadTensors(folder_ / "model/model.safetensors");
  for (const char* method : {"cat", "svd", "dare_linear_svd"}) {
    SCOPED_TRACE(method);
    Merge(RecipeOf(method, {"a: {weight: 0.5}", "b: {weight: 3}"},
                   method == std::string("cat")   ? "{}"
                   : method == std::string("svd") ? "{svd_rank: 50}"
                                                  : "{svd_rank: 50, density: 1}"));
    EXPECT_EQ(config_["lora_bias"], true);
    EXPECT_THAT(plan_.warnings, ElementsAre(HasSubstr("which PEFT does not load together")));
    EXPECT_THAT(config_["target_modules"], UnorderedElementsAre("q_proj", "embed_tokens", "conv"));
    for (const auto& [name, values] : applied("out")) {
      SCOPED_TRACE(name);
      for (size_t i = 0; i < values.size(); ++i) {
        const double w = stored.at(name).values[i];
        ASSERT_NEAR(values[i], w + 0.5 * (with_a.at(name)[i] - w) + 3 * (with_b.at(name)[i] - w),
                    2e-5);
      }
    }
  }
}

TEST_F(AdapterMerge, ModulesOfSomeAdaptersAreMergedFromThose) {
  std::vector<TinyTensor> a = Factors(kQ, 8, 6, 3, 1), b = Factors(kQ, 8, 6, 3, 5);
  for (const TinyTensor& one : Factors(kK, 4, 6, 3, 9)) b.push_back(one);
  Write("a", Config(3, 3, R"("target_modules":["q_proj"],"base_model_name_or_path":"one")"), a);
  Write("b",
        Config(3, 6, R"("target_modules":["k_proj","q_proj"],"base_model_name_or_path":"two")"), b);
  const Tensors merged = Merge(RecipeOf("cat", {"a: {weight: 1}", "b: {weight: 0.5}"}));
  ExpectNear(Product(merged, kK), Product("b", kK, 0.5), 1e-6);
  EXPECT_EQ(config_["rank_pattern"], (json{{kK, 3}}));
  EXPECT_EQ(config_["base_model_name_or_path"], "one");
  EXPECT_EQ(config_["task_type"], "CAUSAL_LM");
  EXPECT_THAT(config_["target_modules"], UnorderedElementsAre("q_proj", "k_proj"));
  EXPECT_THAT(plan_.warnings,
              UnorderedElementsAre(
                  AllOf(HasSubstr("not in all adapters"), HasSubstr(kK)),
                  AllOf(HasSubstr("base_model_name_or_path"), HasSubstr("one"), HasSubstr("two"))));
  for (const PlanTensor& tensor : plan_.tensors) {
    EXPECT_THAT(tensor.notes, Contains(AllOf(HasSubstr("rank 3"), HasSubstr("scale"))));
  }
}

// A short name would reach modules that only some layers have.
TEST_F(AdapterMerge, TargetModulesAreFullNamesWhereShortOnesMayReachMore) {
  Write("a", Config(3, 3, R"("target_modules":["q_proj"],"layers_to_transform":[0])"),
        Factors(kQ, 8, 6, 3, 1));
  Write("b", Config(3, 3, R"("target_modules":"all-linear")"), Factors(kQ, 8, 6, 3, 1));
  Write("c", Config(3, 3, R"("target_modules":["q_proj"])"), Factors(kQ, 8, 6, 3, 1));
  for (const char* name : {"a", "b"}) {
    Merge(RecipeOf("cat", {absl::StrCat(name, ": {weight: 1}"), "c: {weight: 1}"}));
    EXPECT_THAT(config_["target_modules"], ElementsAre(kQ));
  }
  Merge(RecipeOf("cat", {"c: {weight: 1}"}));
  EXPECT_THAT(config_["target_modules"], ElementsAre("q_proj"));
}

TEST_F(AdapterMerge, WhatIsSavedWholeIsCopied) {
  const auto with = [](std::vector<TinyTensor> tensors, const std::vector<TinyTensor>& more) {
    tensors.insert(tensors.end(), more.begin(), more.end());
    return tensors;
  };
  const TinyTensor score =
      RandomTensor("base_model.model.score.weight", DType::kBF16, Shape{2, 6}, 7);
  const std::string saves = R"("modules_to_save":["score"],"target_modules":["q_proj"])";
  Write("a", Config(3, 3, saves), with(Factors(kQ, 8, 6, 3, 1), {score}));
  Write("b", Config(3, 3, saves), with(Factors(kQ, 8, 6, 3, 5), {score}));
  Write("c", Config(3, 3), Factors(kQ, 8, 6, 3, 9));
  Tensors merged = Merge(RecipeOf("linear", {"a: {weight: 1}", "b: {weight: 1}"}));
  EXPECT_EQ(merged.at(score.name).dtype, DType::kBF16);
  EXPECT_EQ(merged.at(score.name).values,
            ReadTensors(folder_ / "a/adapter_model.safetensors").at(score.name).values);
  EXPECT_THAT(config_["modules_to_save"], ElementsAre("score"));
  EXPECT_THAT(plan_.warnings, IsEmpty());
  merged = Merge(RecipeOf("linear", {"c: {weight: 1}", "b: {weight: 1}"}));
  EXPECT_TRUE(merged.contains(score.name));
  EXPECT_THAT(plan_.warnings, Contains(AllOf(HasSubstr("saved whole"), HasSubstr("score.weight"))));

  TinyTensor other = score;
  other.values[3] += 1;
  Write("b", Config(3, 3, saves), with(Factors(kQ, 8, 6, 3, 5), {other}));
  EXPECT_THAT(PlanOf(RecipeOf("linear", {"a: {weight: 1}", "b: {weight: 1}"})),
              StatusIs(kFailed, AllOf(HasSubstr("score.weight"), HasSubstr("differ"),
                                      HasSubstr("BASE+ADAPTER"))));
  Write("b", Config(3, 3), Factors("score", 2, 6, 3, 5));
  EXPECT_THAT(PlanOf(RecipeOf("linear", {"a: {weight: 1}", "b: {weight: 1}"})),
              StatusIs(kFailed, AllOf(HasSubstr("score"), HasSubstr("factors"))));
}

TEST_F(AdapterMerge, FiltersAndGradientsSeeModules) {
  std::vector<TinyTensor> tensors = Factors(kQ, 8, 6, 3, 1);
  for (const TinyTensor& one : Factors(kK, 4, 6, 3, 9)) tensors.push_back(one);
  Write("a", Config(3, 3), tensors);
  Tensors merged =
      Merge(RecipeOf("cat", {"a: {weight: [{filter: q_proj, value: 2}, {value: 4}]}"}));
  ExpectNear(Product(merged, kQ), Product("a", kQ, 2), 1e-6);
  ExpectNear(Product(merged, kK), Product("a", kK, 4), 1e-6);
  merged = Merge(RecipeOf("cat", {"a: {weight: [1, 3]}"}));  // layers 0 and 1
  ExpectNear(Product(merged, kQ), Product("a", kQ, 1), 1e-6);
  ExpectNear(Product(merged, kK), Product("a", kK, 3), 1e-6);
}

TEST_F(AdapterMerge, Dtypes) {
  Write("a", Config(3, 3), Factors(kQ, 8, 6, 3, 1, DType::kBF16));
  Write("b", Config(3, 3), Factors(kQ, 8, 6, 3, 5, DType::kF16));
  Write("d", Config(3, 3), Factors(kQ, 8, 6, 3, 7, DType::kF64));
  const auto dtype = [&](const std::vector<std::string>& models, absl::string_view more = "") {
    return Merge(RecipeOf("cat", models, "{}", more)).begin()->second.dtype;
  };
  EXPECT_EQ(dtype({"a: {weight: 1}"}), DType::kBF16);
  EXPECT_EQ(dtype({"a: {weight: 1}", "b: {weight: 1}"}), DType::kF32);
  EXPECT_EQ(dtype({"a: {weight: 1}", "b: {weight: 1}"}, "dtype: float16\n"), DType::kF16);
  EXPECT_EQ(dtype({"a: {weight: 1}"}, "dtype: float32\nout_dtype: bfloat16\n"), DType::kBF16);
  EXPECT_EQ(dtype({"d: {weight: 1}"}), DType::kF64);
  EXPECT_THAT(plan_.warnings, Contains(HasSubstr("float64")));
}

// --- refusals
// -------------------------------------------------------------------------------------

TEST_F(AdapterMerge, WhatDoesNotGoTogetherIsRefusedWhilePlanning) {
  Write("a", Config(4, 4), Factors(kQ, 8, 6, 4, 1));
  Write("b", Config(2, 4), Factors(kQ, 8, 6, 2, 3));
  Write("wide", Config(4, 4), Factors(kQ, 8, 7, 4, 5));
  Write("fan", Config(4, 4, R"("fan_in_fan_out":true)"), Factors(kQ, 8, 6, 4, 5));
  Write("half", Config(4, 4), {Factors(kQ, 8, 6, 4, 5)[0]});
  Write("other_rank", Config(3, 4), Factors(kQ, 8, 6, 4, 5));
  Write("dora", Config(4, 4, R"("use_dora":true)"), Factors(kQ, 8, 6, 4, 5));
  Write("loha", R"({"peft_type":"LOHA","r":4,"alpha":4})", Factors(kQ, 8, 6, 4, 5));
  Write("lokr", R"({"peft_type":"LOKR","r":4,"alpha":4})", Factors(kQ, 8, 6, 4, 5));
  TinyTensor magnitude =
      RandomTensor(absl::StrCat(kPrefix, kQ, ".lora_magnitude_vector"), DType::kF32, Shape{8}, 5);
  Write("magnitude", Config(4, 4), {magnitude});
  folder_.Write("model/config.json", "{}");
  WriteSafetensors(folder_ / "model/model.safetensors",
                   {RandomTensor("w", DType::kF32, Shape{2, 2}, 1)});

  const auto planned = [&](const std::string& method, const std::string& other,
                           absl::string_view parameters = "{density: 0.5}") {
    return PlanOf(RecipeOf(method, {"a: {weight: 1}", other + ": {weight: 1}"}, parameters));
  };
  for (const char* method : {"linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"}) {
    EXPECT_THAT(planned(method, "b"),
                StatusIs(kFailed, AllOf(HasSubstr(kQ), HasSubstr("has 4"), HasSubstr("has 2"),
                                        HasSubstr("cat and svd"))))
        << method;
  }
  EXPECT_THAT(planned("cat", "wide"),
              StatusIs(kFailed, AllOf(HasSubstr(kQ), HasSubstr("[4, 6]"), HasSubstr("[4, 7]"))));
  EXPECT_THAT(planned("cat", "fan"), StatusIs(kFailed, HasSubstr("fan_in_fan_out")));
  EXPECT_THAT(planned("cat", "half"), StatusIs(kFailed, AllOf(HasSubstr(kQ), HasSubstr("lora_B"))));
  EXPECT_THAT(planned("cat", "other_rank"), StatusIs(kFailed, HasSubstr("rank 3")));
  EXPECT_THAT(planned("cat", "dora"), StatusIs(kFailed, HasSubstr("use_dora")));
  EXPECT_THAT(planned("cat", "magnitude"), StatusIs(kFailed, HasSubstr("DoRA")));
  EXPECT_THAT(planned("cat", "loha"), StatusIs(kFailed, HasSubstr("LOHA")));
  EXPECT_THAT(planned("cat", "lokr"), StatusIs(kFailed, HasSubstr("LOKR")));
  EXPECT_THAT(planned("cat", "model"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("adapter_config.json")));
  EXPECT_THAT(planned("cat", "absent"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("absent")));
  EXPECT_THAT(planned("cat", "a"), StatusIs(kInvalid, HasSubstr("listed twice")));

  EXPECT_THAT(planned("slerp", "b"),
              StatusIs(kInvalid, AllOf(HasSubstr("recipe:1:"), HasSubstr("slerp"),
                                       HasSubstr("merges models"), HasSubstr("ties_svd"))));
  EXPECT_THAT(planned("ties_svdd", "b"),
              StatusIs(kInvalid, AllOf(HasSubstr("unknown"), HasSubstr("ties_svd"))));
  EXPECT_THAT(planned("ties_svd", "b", "{}"), StatusIs(kInvalid, HasSubstr("density")));
  EXPECT_THAT(planned("ties_svd", "b", "{density: -0.1}"),
              StatusIs(kInvalid, HasSubstr("density")));
  EXPECT_THAT(planned("svd", "b", "{svd_rank: 0}"), StatusIs(kInvalid, HasSubstr("svd_rank")));
  EXPECT_THAT(planned("svd", "b", "{svd_clamp: 1.5}"), StatusIs(kInvalid, HasSubstr("svd_clamp")));
  EXPECT_THAT(planned("ties_svd", "b", "{density: 1, majority_sign_method: most}"),
              StatusIs(kInvalid, HasSubstr("total, frequency")));
  const auto plan = planned("svd", "b", "{svd_full_matrices: false, lambda: 2}");
  ASSERT_THAT(plan, IsOk());
  EXPECT_THAT(plan->warnings, UnorderedElementsAre(HasSubstr("svd_full_matrices"),
                                                   HasSubstr("`lambda` is ignored")));
}

TEST_F(AdapterMerge, WhatIsTooLargeToBeDecomposedIsRefusedWhilePlanning) {
  Write("a", Config(1, 1), Factors("head", 33'000, 33'000, 1, 1));
  const std::vector<std::string> models = {"a: {weight: 1}"};
  options_.memory_bytes = int64_t{1} << 40;
  EXPECT_THAT(PlanOf(RecipeOf("ties_svd", models, "{density: 0.5}")),
              StatusIs(kFailed, AllOf(HasSubstr("head"), HasSubstr("too large"))));
  // By its factors it is small.
  options_.memory_bytes = int64_t{64} << 20;
  const Tensors merged = Merge(RecipeOf("svd", models));
  const auto of = [](const Tensors& tensors, const char* factor) {
    return tensors.at(absl::StrCat(kPrefix, "head.lora_", factor, ".weight")).values;
  };
  const Tensors before = ReadTensors(folder_ / "a/adapter_model.safetensors");
  for (const int64_t i : {0, 7, 32'999}) {
    EXPECT_NEAR(of(merged, "B")[i] * of(merged, "A")[i], of(before, "B")[i] * of(before, "A")[i],
                1e-5);
  }
}

// Adapters that are merged like models, for want of the setting.
TEST_F(AdapterMerge, FactorsMergedNameByNameAreWarnedOf) {
  Write("a", Config(4, 4), Factors(kQ, 8, 6, 4, 1));
  Write("b", Config(4, 4), Factors(kQ, 8, 6, 4, 3));
  const auto plan = PlanOf(absl::StrCat(
      "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: ", folder_ / "a",
      "}, {model: ", folder_ / "b", "}]\n"));
  ASSERT_THAT(plan, IsOk());
  EXPECT_THAT(plan->warnings, Contains(HasSubstr("`output: {format: lora}` merges adapters")));
}

TEST_F(AdapterMerge, KeysThatMeanNothingForAdaptersAreRefused) {
  Write("a", Config(4, 4), Factors(kQ, 8, 6, 4, 1));
  const std::string models =
      absl::StrCat("models: [{model: ", folder_ / "a", ", parameters: {weight: 1}}]\n");
  const std::string head = "merge_method: cat\noutput: {format: lora}\n";
  EXPECT_THAT(PlanOf(head + models), IsOk());
  EXPECT_THAT(PlanOf("merge_method: cat\n" + models),
              StatusIs(kInvalid, AllOf(HasSubstr("recipe:1:"), HasSubstr("format: lora"))));
  for (const auto& [more, message] : std::vector<std::pair<std::string, std::string>>{
           {"base_model: x\n", "base_model"},
           {"tokenizer_source: union\n", "no tokenizer"},
           {"chat_template: auto\n", "no chat template"}}) {
    EXPECT_THAT(PlanOf(head + models + more), StatusIs(kInvalid, HasSubstr(message))) << more;
  }
  EXPECT_THAT(PlanOf(head + "models: [{model: x+y}]\n"),
              StatusIs(kInvalid, AllOf(HasSubstr("recipe:3:"), HasSubstr("write y"))));
  EXPECT_THAT(PlanOf(head + "slices: [{sources: [{model: x, layer_range: [0, 1]}]}]\n"),
              StatusIs(kInvalid, HasSubstr("`models`")));
  EXPECT_THAT(PlanOf("name: s\nmerge_method: linear\nmodels: [{model: x}]\n---\n" + head +
                     "models: [{model: s}]\n"),
              StatusIs(kInvalid, HasSubstr("one document")));
}

TEST_F(AdapterMerge, ValuesThatAreNotFiniteAreRefused) {
  std::vector<TinyTensor> bad = Factors(kQ, 8, 6, 4, 1);
  bad[1].values[5] = std::nan("");
  Write("a", Config(4, 4), bad);
  for (const char* method : {"cat", "linear", "svd", "ties", "ties_svd", "dare_ties"}) {
    const auto plan = PlanOf(RecipeOf(method, {"a: {weight: 1}"}, "{density: 0.5}"));
    ASSERT_THAT(plan, IsOk());
    EXPECT_THAT(RunPlan(*plan, {.output = folder_ / method}),
                StatusIs(kFailed, AllOf(HasSubstr("lora_B.weight"), HasSubstr("element 5"),
                                        HasSubstr("NaN"))));
    // Nothing hangs or crashes when it is asked to go on.
    const auto status = RunPlan(*plan, {.output = folder_ / method,
                                        .mode = OutputMode::kOverwrite,
                                        .allow_nonfinite = true})
                            .status();
    EXPECT_TRUE(status.ok() || status.code() == kFailed) << status;
  }
}

// --- the engine
// -----------------------------------------------------------------------------------

TEST_F(AdapterMerge, BytesDependOnNeitherThreadsNorMemory) {
  std::vector<TinyTensor> tensors;
  for (int i = 0; i < 6; ++i) {
    for (const TinyTensor& one :
         Factors(absl::StrCat("model.layers.", i, ".self_attn.q_proj"), 96, 300, 8, 10 * i)) {
      tensors.push_back(one);
    }
  }
  Write("a", Config(8, 16), tensors);
  for (TinyTensor& tensor : tensors) std::reverse(tensor.values.begin(), tensor.values.end());
  Write("b", Config(8, 4), tensors);
  for (const char* method : {"cat", "svd", "dare_ties", "ties_svd", "dare_linear_svd"}) {
    const std::string recipe =
        RecipeOf(method, {"a: {weight: 0.5}", "b: {weight: 1}"}, "{density: 0.5}");
    options_.threads = 1;
    options_.memory_bytes = int64_t{48} << 20;
    Merge(recipe, "one");
    EXPECT_LE(plan_.peak_bytes, options_.memory_bytes);
    options_.threads = 4;
    options_.memory_bytes = int64_t{2} << 30;
    Merge(recipe, "other");
    EXPECT_EQ(ReadFile(folder_ / "one/adapter_model.safetensors"),
              ReadFile(folder_ / "other/adapter_model.safetensors"))
        << method;
  }
  options_.memory_bytes = int64_t{1} << 20;
  EXPECT_THAT(PlanOf(RecipeOf("ties_svd", {"a: {weight: 0.5}"}, "{density: 0.5}")),
              StatusIs(absl::StatusCode::kResourceExhausted,
                       AllOf(HasSubstr("q_proj"), HasSubstr("raise --memory"))));
}

class StopAtOnce : public Observer {
 public:
  void OnProgress(const Progress& progress) override { stop.request_stop(); }
  std::stop_source stop;
};

TEST_F(AdapterMerge, AnInterruptedMergeGoesOn) {
  std::vector<TinyTensor> tensors;
  for (int i = 0; i < 40; ++i) {
    for (const TinyTensor& one :
         Factors(absl::StrCat("model.layers.", i, ".self_attn.q_proj"), 128, 256, 8, 10 * i)) {
      tensors.push_back(one);
    }
  }
  Write("a", Config(8, 16), tensors);
  const std::string recipe = RecipeOf("svd", {"a: {weight: 0.5}"}, "{svd_rank: 4}");
  Merge(recipe, "whole");
  options_.threads = 1;
  const auto plan = PlanOf(recipe);
  ASSERT_THAT(plan, IsOk());
  StopAtOnce observer;
  const auto stopped = RunPlan(
      *plan, {.output = folder_ / "out", .observer = &observer, .stop = observer.stop.get_token()});
  ASSERT_TRUE(absl::IsCancelled(stopped.status())) << stopped.status();
  EXPECT_FALSE(fs::exists(folder_ / "out/adapter_config.json"));
  // A configuration that says something else is another merge.
  const std::string config = ReadFile(folder_ / "a/adapter_config.json");
  const auto written = fs::last_write_time(folder_ / "a/adapter_config.json");
  folder_.Write("a/adapter_config.json", Config(8, 17));
  const auto changed = PlanOf(recipe);
  ASSERT_THAT(changed, IsOk());
  EXPECT_NE(changed->fingerprint, plan->fingerprint);
  EXPECT_THAT(RunPlan(*changed, {.output = folder_ / "out", .mode = OutputMode::kResume}),
              Not(IsOk()));
  folder_.Write("a/adapter_config.json", config);
  fs::last_write_time(folder_ / "a/adapter_config.json", written);
  const auto same = PlanOf(recipe);
  ASSERT_THAT(same, IsOk());
  ASSERT_THAT(RunPlan(*same, {.output = folder_ / "out", .mode = OutputMode::kResume}), IsOk());
  EXPECT_EQ(ReadFile(folder_ / "out/adapter_model.safetensors"),
            ReadFile(folder_ / "whole/adapter_model.safetensors"));
  EXPECT_TRUE(fs::exists(folder_ / "out/pewter_manifest.json"));
}

}  // namespace
}  // namespace pewter::testing
