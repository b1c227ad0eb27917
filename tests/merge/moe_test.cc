// Mixtures of experts from tiny dense models, run and read back.
#include "merge/plan/moe.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "merge/pewter.h"
#include "tests/support/matchers.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace pewter {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::IsOk;
using ::testing::Not;
using testing::StatusIs;
using testing::TinyTensor;
using Tensors = std::map<std::string, TinyTensor>;

constexpr int64_t kTokens = 6, kHidden = 32, kWidth = 48;

struct DenseOptions {
  DType dtype = DType::kF32;
  int64_t width = kWidth;
  json config = {{"torch_dtype", "float32"}};  // more of it
  bool nan = false;                            // in the last layer's up_proj
};

class MoeTest : public ::testing::Test {
 protected:
  MoeTest() {
    Dense("base", "Llama", "llama", 1);
    Dense("one", "Llama", "llama", 1000);
    Dense("two", "Llama", "llama", 2000);
    Dense("three", "Qwen3", "qwen3", 3000);
    Dense("four", "Qwen3", "qwen3", 4000);
  }

  // Two layers.
  void Dense(const std::string& name, const std::string& family, const std::string& type, int seed,
             const DenseOptions& options = {}) {
    std::vector<TinyTensor> tensors;
    const auto add = [&](const std::string& tensor, Shape shape) {
      tensors.push_back(testing::RandomTensor(tensor + ".weight", options.dtype, shape, ++seed));
    };
    const int64_t width = options.width;
    add("model.embed_tokens", {kTokens, kHidden});
    for (int i = 0; i < 2; ++i) {
      const std::string layer = absl::StrCat("model.layers.", i, ".");
      for (const char* norm : {"input_layernorm", "post_attention_layernorm"}) {
        add(layer + norm, {kHidden});
      }
      for (const char* matrix : {"q_proj", "k_proj", "v_proj", "o_proj"}) {
        add(layer + "self_attn." + matrix, {kHidden, kHidden});
      }
      if (type == "qwen3") {
        for (const char* norm : {"q_norm", "k_norm"}) add(layer + "self_attn." + norm, {8});
      }
      add(layer + "mlp.gate_proj", {width, kHidden});
      add(layer + "mlp.down_proj", {kHidden, width});
      add(layer + "mlp.up_proj", {width, kHidden});
    }
    if (options.nan) tensors.back().values[7] = NAN;
    add("model.norm", {kHidden});
    add("lm_head", {kTokens, kHidden});
    json config = {{"architectures", {family + "ForCausalLM"}},
                   {"model_type", type},
                   {"num_hidden_layers", 2},
                   {"intermediate_size", width},
                   {"vocab_size", kTokens}};
    config.update(options.config);
    folder_.Write(name + "/config.json", config.dump());
    testing::WriteSafetensors(folder_ / (name + "/model.safetensors"), tensors);
  }

  absl::StatusOr<Plan> MakePlanOf(std::string recipe, MoeOptions moe = {}, uint64_t seed = 0) {
    recipe = absl::StrReplaceAll(recipe, {{"$", folder_ / ""}});
    const absl::StatusOr<MoeRecipe> parsed = ParseMoeRecipe(recipe);
    if (!parsed.ok()) return parsed.status();
    return MakeMoePlan(*parsed, {.device = "cpu", .seed = seed}, moe);
  }

  // The mixture, from a run with so little memory and so many threads.
  Tensors Make(const std::string& recipe, MoeOptions moe = {}, uint64_t seed = 0) {
    const absl::StatusOr<Plan> plan = MakePlanOf(recipe, moe, seed);
    EXPECT_THAT(plan, IsOk());
    if (!plan.ok()) return {};
    output_ = folder_ / absl::StrCat("out", ++outputs_);
    const absl::StatusOr<Manifest> manifest = RunPlan(*plan, {.output = output_});
    EXPECT_THAT(manifest, IsOk());
    config_ = json::parse(testing::ReadFile(output_ + "/config.json"));
    return testing::ReadTensors(output_);
  }

  // The tables know every tensor of the mixture, and need no other.
  void ExpectKnown() {
    const auto recipe =
        ParseRecipe("merge_method: passthrough\nmodels: [{model: " + output_ + "}]");
    ASSERT_THAT(recipe, IsOk());
    const auto plan = MakePlan(*recipe, {.device = "cpu"});
    ASSERT_THAT(plan, IsOk());
    EXPECT_NE(plan->architecture, "inferred");
    EXPECT_THAT(plan->unused_tensors, IsEmpty());
  }

  Tensors Of(const std::string& model) { return testing::ReadTensors(folder_ / model); }

  testing::TempFolder folder_;
  std::string output_;
  int outputs_ = 0;
  json config_;
};

const char kPrompts[] = R"(
base_model: $base
gate_mode: cheap_embed
experts:
  - {source_model: $one, positive_prompt_ids: [[1, 2], [2]]}
  - {source_model: $two, positive_prompt_ids: [[3]], negative_prompt_ids: [[4, 5]]}
)";

// What token embeddings say: the sum at unit length, less that of the negative ones.
std::vector<double> Direction(const TinyTensor& embedding, const std::vector<int>& positive,
                              const std::vector<int>& negative) {
  const auto unit = [&](std::vector<double> v) {
    double square = 0;
    for (double x : v) square += x * x;
    for (double& x : v) x /= std::sqrt(square);
    return v;
  };
  const auto sum = [&](const std::vector<int>& ids) {
    std::vector<double> v(kHidden, 0.0);
    for (int id : ids) {
      for (int64_t i = 0; i < kHidden; ++i) v[i] += embedding.values[id * kHidden + i];
    }
    return unit(v);
  };
  std::vector<double> v = sum(positive);
  if (negative.empty()) return v;
  const std::vector<double> other = sum(negative);
  for (int64_t i = 0; i < kHidden; ++i) v[i] -= other[i];
  return unit(v);
}

TEST_F(MoeTest, MixtralFused) {
  const Tensors made = Make(kPrompts);
  const Tensors base = Of("base"), one = Of("one"), two = Of("two");
  EXPECT_EQ(made.size(), 3u + 2 * (2 + 4 + 3));
  EXPECT_EQ(made.at("model.layers.1.self_attn.q_proj.weight").values,
            base.at("model.layers.1.self_attn.q_proj.weight").values);
  std::vector<double> gate_up, down;
  for (const Tensors* expert : {&one, &two}) {
    for (const char* part : {"gate_proj", "up_proj", "down_proj"}) {
      const auto& values = expert->at(absl::StrCat("model.layers.1.mlp.", part, ".weight")).values;
      auto& target = part == std::string("down_proj") ? down : gate_up;
      target.insert(target.end(), values.begin(), values.end());
    }
  }
  const TinyTensor& fused = made.at("model.layers.1.mlp.experts.gate_up_proj");
  EXPECT_EQ(fused.shape, (Shape{2, 2 * kWidth, kHidden}));
  EXPECT_EQ(fused.values, gate_up);
  EXPECT_EQ(made.at("model.layers.1.mlp.experts.down_proj").shape, (Shape{2, kHidden, kWidth}));
  EXPECT_EQ(made.at("model.layers.1.mlp.experts.down_proj").values, down);
  std::vector<double> router = Direction(base.at("model.embed_tokens.weight"), {1, 2, 2}, {});
  for (double x : Direction(base.at("model.embed_tokens.weight"), {3}, {4, 5})) {
    router.push_back(x);
  }
  for (int layer : {0, 1}) {
    const TinyTensor& gate = made.at(absl::StrCat("model.layers.", layer, ".mlp.gate.weight"));
    ASSERT_EQ(gate.shape, (Shape{2, kHidden}));
    EXPECT_THAT(gate.values, ::testing::Pointwise(::testing::DoubleNear(1e-6), router));
  }
  EXPECT_EQ(config_["architectures"], json({"MixtralForCausalLM"}));
  EXPECT_EQ(config_["num_local_experts"], 2);
  EXPECT_EQ(config_["num_experts_per_tok"], 2);
  ExpectKnown();
}

TEST_F(MoeTest, MixtralOneByOne) {
  const Tensors made = Make(kPrompts, {.separate_experts = true});
  const Tensors two = Of("two");
  EXPECT_EQ(made.size(), 3u + 2 * (2 + 4 + 1 + 6));
  for (const auto& [part, name] : std::map<std::string, std::string>{
           {"gate_proj", "w1"}, {"down_proj", "w2"}, {"up_proj", "w3"}}) {
    EXPECT_EQ(made.at("model.layers.0.block_sparse_moe.experts.1." + name + ".weight").values,
              two.at("model.layers.0.mlp." + part + ".weight").values);
  }
  EXPECT_TRUE(made.contains("model.layers.0.block_sparse_moe.gate.weight"));
  ExpectKnown();
}

TEST_F(MoeTest, NoiseAndResidualScale) {
  const char recipe[] = R"(
base_model: $base
gate_mode: random
experts:
  - {source_model: $one, noise_scale: 0.25}
  - {source_model: $two, residual_scale: 0.5}
)";
  const Tensors made = Make(recipe, {.separate_experts = true});
  const Tensors one = Of("one"), two = Of("two");
  const auto name = [](int expert, const char* part) {
    return absl::StrCat("model.layers.0.block_sparse_moe.experts.", expert, ".", part, ".weight");
  };
  EXPECT_EQ(made.at(name(1, "w1")).values, two.at("model.layers.0.mlp.gate_proj.weight").values);
  const auto& down = two.at("model.layers.0.mlp.down_proj.weight").values;
  for (size_t i = 0; i < down.size(); ++i) {
    ASSERT_EQ(made.at(name(1, "w2")).values[i], 0.5 * down[i]);
  }
  // 1536 draws: mean and variance within five standard errors.
  const auto& before = one.at("model.layers.0.mlp.gate_proj.weight").values;
  const auto& after = made.at(name(0, "w1")).values;
  double sum = 0, square = 0;
  for (size_t i = 0; i < before.size(); ++i) {
    const double noise = (after[i] - before[i]) / 0.25;
    sum += noise;
    square += noise * noise;
  }
  const auto n = static_cast<double>(before.size());
  EXPECT_NEAR(sum / n, 0, 5 / std::sqrt(n));
  EXPECT_NEAR(square / n, 1, 5 * std::sqrt(2 / n));
  // Draws follow the seed and nothing else: fused experts have the same.
  const auto fused = Make(recipe).at("model.layers.0.mlp.experts.gate_up_proj").values;
  EXPECT_EQ(std::vector<double>(fused.begin(), fused.begin() + after.size()), after);
  EXPECT_NE(Make(recipe, {.separate_experts = true}, 1).at(name(0, "w1")).values, after);
}

TEST_F(MoeTest, RandomRouters) {
  const auto recipe = [](const char* mode) {
    return absl::StrCat("base_model: $base\ngate_mode: ", mode,
                        "\nexperts: [{source_model: $one}, {source_model: $two}]\n");
  };
  const Tensors normal = Make(recipe("random")), uniform = Make(recipe("uniform_random"));
  const double bound = std::sqrt(1.0 / kHidden);
  double largest_normal = 0, largest = 0;
  for (int layer : {0, 1}) {
    const std::string name = absl::StrCat("model.layers.", layer, ".mlp.gate.weight");
    for (double x : normal.at(name).values) largest_normal = std::max(largest_normal, std::abs(x));
    for (double x : uniform.at(name).values) largest = std::max(largest, std::abs(x));
  }
  EXPECT_GT(largest_normal, 1.5);
  EXPECT_LE(largest, bound);
  EXPECT_GT(largest, 0.9 * bound);
  EXPECT_NE(uniform.at("model.layers.0.mlp.gate.weight").values,
            uniform.at("model.layers.1.mlp.gate.weight").values);
  // The draws are the same in the other layout.
  EXPECT_EQ(Make(recipe("random"), {.separate_experts = true})
                .at("model.layers.1.block_sparse_moe.gate.weight")
                .values,
            normal.at("model.layers.1.mlp.gate.weight").values);
}

TEST_F(MoeTest, DeepseekWithASharedExpert) {
  const Tensors made = Make(R"(
base_model: $base
gate_mode: random
architecture: deepseek
experts: [{source_model: $one}, {source_model: $two}]
shared_experts: [{source_model: $base, residual_scale: 0.5}]
)");
  EXPECT_EQ(made.at("model.layers.0.mlp.experts.1.up_proj.weight").values,
            Of("two").at("model.layers.0.mlp.up_proj.weight").values);
  EXPECT_EQ(made.at("model.layers.0.mlp.shared_experts.up_proj.weight").values,
            Of("base").at("model.layers.0.mlp.up_proj.weight").values);
  EXPECT_EQ(config_["n_routed_experts"], 2);
  EXPECT_EQ(config_["n_shared_experts"], 1);
  EXPECT_EQ(config_["moe_intermediate_size"], kWidth);
  ExpectKnown();
}

TEST_F(MoeTest, QwenWithAGatedSharedExpert) {
  const Tensors made = Make(absl::StrCat(kPrompts, R"(
architecture: qwen moe
shared_experts: [{source_model: $base, positive_prompt_ids: [[0]]}]
)"));
  EXPECT_EQ(made.at("model.layers.1.mlp.shared_expert.down_proj.weight").values,
            Of("base").at("model.layers.1.mlp.down_proj.weight").values);
  EXPECT_EQ(made.at("model.layers.1.mlp.shared_expert_gate.weight").shape, (Shape{1, kHidden}));
  EXPECT_THAT(made.at("model.layers.1.self_attn.k_proj.bias").values,
              ::testing::AllOf(::testing::SizeIs(kHidden), ::testing::Each(0.0)));
  // One by one, as mergekit has them for Qwen2.
  EXPECT_EQ(made.at("model.layers.1.mlp.experts.1.up_proj.weight").values,
            Of("two").at("model.layers.1.mlp.up_proj.weight").values);
  EXPECT_EQ(config_["num_experts"], 2);
  EXPECT_EQ(config_["shared_expert_intermediate_size"], kWidth);
  ExpectKnown();
}

TEST_F(MoeTest, Qwen3) {
  const Tensors made = Make(R"(
base_model: $three
gate_mode: random
experts_per_token: 1
experts: [{source_model: $three}, {source_model: $four}]
)");
  EXPECT_EQ(made.at("model.layers.0.mlp.experts.gate_up_proj").shape,
            (Shape{2, 2 * kWidth, kHidden}));
  EXPECT_EQ(config_["architectures"], json({"Qwen3MoeForCausalLM"}));
  EXPECT_EQ(config_["num_experts_per_tok"], 1);
  ExpectKnown();
}

TEST_F(MoeTest, Dtypes) {
  auto plan = MakePlanOf(absl::StrCat(kPrompts, "dtype: bfloat16\n"));
  ASSERT_THAT(plan, IsOk());
  for (const PlanTensor& tensor : plan->tensors) EXPECT_EQ(tensor.dtype, DType::kBF16);
  EXPECT_THAT(plan->config_json, HasSubstr("\"torch_dtype\": \"bfloat16\""));
  EXPECT_THAT(plan->warnings, Not(Contains(HasSubstr("rounded"))));

  // The base's configuration decides where the recipe does not, and rounds with a warning.
  Dense("base", "Llama", "llama", 1, {.config = {{"dtype", "float16"}}});
  plan = MakePlanOf(kPrompts);
  ASSERT_THAT(plan, IsOk());
  for (const PlanTensor& tensor : plan->tensors) EXPECT_EQ(tensor.dtype, DType::kF16);
  EXPECT_THAT(plan->config_json, HasSubstr("\"dtype\": \"float16\""));
  EXPECT_THAT(plan->warnings, Contains(HasSubstr("are rounded from float32 to float16")));

  // Neither does: tensors keep theirs, and those that are stacked take one that holds all.
  Dense("base", "Llama", "llama", 1, {.dtype = DType::kBF16, .config = json::object()});
  Dense("one", "Llama", "llama", 1000, {.dtype = DType::kBF16});
  plan = MakePlanOf(kPrompts);
  ASSERT_THAT(plan, IsOk());
  EXPECT_THAT(plan->warnings, Not(Contains(HasSubstr("rounded"))));
  for (const PlanTensor& tensor : plan->tensors) {
    const bool of_base = tensor.inputs.size() == 1 && !tensor.inputs[0].tensor.empty();
    EXPECT_EQ(tensor.dtype, of_base ? DType::kBF16 : DType::kF32) << tensor.name;
  }
  const Tensors made = Make(kPrompts);
  const std::vector<double> one = Of("one").at("model.layers.0.mlp.down_proj.weight").values;
  const auto& stacked = made.at("model.layers.0.mlp.experts.down_proj").values;
  EXPECT_EQ(std::vector<double>(stacked.begin(), stacked.begin() + one.size()), one);
}

TEST_F(MoeTest, WhatIsNotUsed) {
  const auto plan = MakePlanOf(kPrompts);
  ASSERT_THAT(plan, IsOk());
  // Not silent: what the experts' models have besides MLPs.
  EXPECT_THAT(plan->unused_tensors.at(folder_ / "one"), Contains("lm_head.weight"));
}

TEST_F(MoeTest, Warnings) {
  const auto plan = MakePlanOf(R"(
base_model: $base
gate_mode: cheap_embed
surprise: 1
experts:
  - {source_model: $one, positive_prompt_ids: [[1, 1]]}
  - {source_model: $two, positive_prompt_ids: [[1]]}
  - {source_model: $base, positive_prompt_ids: [[2]]}
)");
  ASSERT_THAT(plan, IsOk());
  EXPECT_THAT(plan->warnings, Contains(HasSubstr("\"surprise\"")));
  EXPECT_THAT(plan->warnings, Contains(HasSubstr("experts 0 and 1 are nearly the same")));
  EXPECT_THAT(plan->warnings, Contains(HasSubstr("3 experts are not a power of two")));
}

// Settings that the base leaves to its class are not left to the mixture's, which has others.
TEST_F(MoeTest, DefaultsOfTheBasesClass) {
  Make(kPrompts);
  EXPECT_EQ(config_["rms_norm_eps"], 1e-6);
  EXPECT_EQ(config_["rope_theta"], 10000.0);
  EXPECT_EQ(config_["num_key_value_heads"], 32);
  EXPECT_EQ(config_["max_position_embeddings"], 2048);
  Dense("base", "Llama", "llama", 1,
        {.config = {{"rms_norm_eps", 1e-5},
                    {"num_attention_heads", 4},
                    {"rope_parameters", {{"rope_type", "default"}}}}});
  Make(kPrompts);
  EXPECT_EQ(config_["rms_norm_eps"], 1e-5);
  EXPECT_FALSE(config_.contains("rope_theta"));
  EXPECT_EQ(config_["rope_parameters"]["rope_theta"], 10000.0);
  EXPECT_EQ(config_["num_key_value_heads"], 4);
}

TEST_F(MoeTest, SlidingWindowsAreDropped) {
  for (const char* name : {"m1", "m2"}) Dense(name, "Mistral", "mistral", name[1]);
  const std::string recipe =
      "base_model: $m1\ngate_mode: random\nexperts: [{source_model: $m1}, {source_model: $m2}]\n";
  auto plan = MakePlanOf(recipe);
  ASSERT_THAT(plan, IsOk());
  EXPECT_THAT(plan->warnings, Contains(HasSubstr("sliding window")));
  EXPECT_THAT(plan->config_json, HasSubstr("\"sliding_window\": null"));
  Dense("m1", "Mistral", "mistral", 1, {.config = {{"sliding_window", nullptr}}});
  plan = MakePlanOf(recipe);
  ASSERT_THAT(plan, IsOk());
  EXPECT_THAT(plan->warnings, Not(Contains(HasSubstr("sliding window"))));
}

TEST_F(MoeTest, TheWidthIsTheExperts) {
  Dense("wide1", "Llama", "llama", 5000, {.width = 80});
  Dense("wide2", "Llama", "llama", 6000, {.width = 80});
  const std::string recipe =
      absl::StrReplaceAll(kPrompts, {{"$one", "$wide1"}, {"$two", "$wide2"}});
  const Tensors made = Make(recipe);
  EXPECT_EQ(made.at("model.layers.1.mlp.experts.gate_up_proj").shape, (Shape{2, 160, kHidden}));
  EXPECT_EQ(config_["intermediate_size"], 80);
  // A shared expert of another width has a setting of its own in Qwen's mixtures alone.
  const std::string shared = "shared_experts: [{source_model: $base";
  Make(absl::StrCat(recipe, "architecture: qwen\n", shared, ", positive_prompt_ids: [[0]]}]\n"));
  EXPECT_EQ(config_["moe_intermediate_size"], 80);
  EXPECT_EQ(config_["shared_expert_intermediate_size"], kWidth);
  EXPECT_THAT(MakePlanOf(absl::StrCat(recipe, "architecture: deepseek\n", shared, "}]\n")).status(),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("recipe:8:18"), HasSubstr("48 where others have 80"))));
}

// What the base makes of the prompts on the way: layer 0 reads the embedding, and a later layer
// something else.
TEST_F(MoeTest, RoutersOfHiddenStates) {
  Dense("base", "Llama", "llama", 1,
        {.config = {{"torch_dtype", "float32"},
                    {"hidden_size", kHidden},
                    {"num_attention_heads", 4},
                    {"rms_norm_eps", 1e-6},
                    {"hidden_act", "silu"},
                    {"rope_theta", 10000.0},
                    {"max_position_embeddings", 64}}});
  const TinyTensor embedding = Of("base").at("model.embed_tokens.weight");
  const auto unit = [&](const std::map<int, double>& shares) {
    std::vector<double> v(kHidden, 0.0);
    double square = 0;
    for (int64_t i = 0; i < kHidden; ++i) {
      for (const auto& [id, share] : shares) v[i] += share * embedding.values[id * kHidden + i];
      square += v[i] * v[i];
    }
    for (double& x : v) x /= std::sqrt(square);
    return v;
  };
  const auto routers = [&](const std::string& mode) {
    return Make(absl::StrReplaceAll(kPrompts, {{"cheap_embed", mode}}));
  };
  for (const std::string mode : {"hidden", "hidden_last", "hidden_avg"}) {
    SCOPED_TRACE(mode);
    const Tensors made = routers(mode);
    std::vector<double> first;
    if (mode == "hidden_avg") {
      first = unit({{1, 0.25}, {2, 0.75}});
      absl::c_copy(unit({{3, 1}, {4, -0.5}, {5, -0.5}}), std::back_inserter(first));
    } else {
      first = unit({{2, 1}});
      absl::c_copy(unit({{3, 1}, {5, -1}}), std::back_inserter(first));
    }
    EXPECT_THAT(made.at("model.layers.0.mlp.gate.weight").values,
                ::testing::Pointwise(::testing::DoubleNear(1e-6), first));
    const std::vector<double>& second = made.at("model.layers.1.mlp.gate.weight").values;
    EXPECT_THAT(second, Not(::testing::Pointwise(::testing::DoubleNear(1e-3), first)));
    for (int expert : {0, 1}) {
      double square = 0;
      for (int64_t i = 0; i < kHidden; ++i) square += std::pow(second[expert * kHidden + i], 2);
      EXPECT_NEAR(square, 1, 1e-6);
    }
  }
}

// A tensor of stacked experts is read from several models, and each is named when it is to blame.
TEST_F(MoeTest, NamesTheExpertThatIsNotFinite) {
  Dense("two", "Llama", "llama", 2000, {.nan = true});
  const auto plan = MakePlanOf(kPrompts);
  ASSERT_THAT(plan, IsOk());
  EXPECT_THAT(RunPlan(*plan, {.output = folder_ / "out"}).status(),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr(folder_ / "two"),
                             HasSubstr("model.layers.1.mlp.up_proj.weight: element 7 is NaN"))));
}

TEST_F(MoeTest, Refusals) {
  const auto refused = [&](const std::string& recipe, const char* part) {
    const auto plan = MakePlanOf(recipe);
    EXPECT_FALSE(plan.ok()) << recipe;
    EXPECT_THAT(std::string(plan.status().message()), HasSubstr(part)) << recipe;
  };
  const std::string two = "experts: [{source_model: $one}, {source_model: $two}]\n";
  const std::string random = "base_model: $base\ngate_mode: random\n" + two;
  refused("base_model: $base\n" + two, "has no `positive_prompts`");
  refused("base_model: $base\ngate_mode: hidden_avg\n" + two, "has no `positive_prompts`");
  const std::string asked =
      "base_model: $base\nexperts:\n  - {source_model: $one, positive_prompt_ids: [[1]]}\n"
      "  - {source_model: $two, positive_prompt_ids: [[7]]}\n";
  refused(asked, "recipe:4:5: token id 7 is beyond the 6 rows of model.embed_tokens.weight");
  refused(absl::StrReplaceAll(asked, {{"7", "5"}}), "config.json");  // says nothing of its heads
  refused("base_model: $base\ngate_mode: magic\n" + two, "cheap_embed, random or uniform_random");
  refused("base_model: $base\ngate_mode: cheap_embed\n" + two, "has no `positive_prompts`");
  refused("gate_mode: random\n" + two, "`base_model` is missing");
  refused("base_model: $base\ngate_mode: random\n", "there are 0 `experts`");
  refused(random + "experts_per_token: 3\n", "3 are used for each token");
  refused(random + "experts_per_token: 0\n", "a whole number of at least 1");
  refused(random + "architecture: banana\n", "recipe:4:15: no mixture is called \"banana\"");
  refused(random + "architecture: qwen3\n",
          "recipe:4:15: no kind of mixture can be made of these models. Qwen3 MoE: it is made of "
          "models of type qwen3, not llama");
  refused("base_model: $three\ngate_mode: random\n" + two, "recipe:3:26: architectures differ");
  refused(random + "dtype: float17\n", "`dtype` must be float64");
  refused(
      "base_model: $base\ngate_mode: random\nexperts: [{source_model: $one}, {source_model: "
      "$nowhere}]\n",
      "recipe:3:");
  refused(
      "base_model: $base\ngate_mode: cheap_embed\nexperts: [{source_model: $one, "
      "positive_prompts: [12]}]\n",
      "a prompt must be text");
  refused(
      "base_model: $base\ngate_mode: cheap_embed\nexperts: [{source_model: $one, "
      "positive_prompts: hello}]\n",
      "`positive_prompts` must be a list");
  refused(random + "shared_experts: [{source_model: $one}, {source_model: $two}]\n",
          "DeepSeek MoE: it has at most one of `shared_experts`, not 2");
  refused(
      "base_model: $base\ngate_mode: cheap_embed\nexperts:\n"
      "  - {source_model: $one, positive_prompt_ids: [[1]]}\n"
      "  - {source_model: $one, positive_prompt_ids: [[2]]}\n",
      "recipe:4:5: all experts are from the same model");
  refused(
      "base_model: $base\ngate_mode: random\nexperts: [{source_model: $one}, {source_model: "
      "$three}]\n",
      "architectures differ");
  refused(
      "base_model: $base\ngate_mode: cheap_embed\nexperts:\n"
      "  - {source_model: $one, positive_prompt_ids: [[1]]}\n"
      "  - {source_model: $two, positive_prompt_ids: [[1]]}\n",
      "all experts have the same prompts");
  refused(
      "base_model: $base\ngate_mode: cheap_embed\nexperts:\n"
      "  - {source_model: $one, positive_prompt_ids: [[6]]}\n"
      "  - {source_model: $two, positive_prompt_ids: [[1]]}\n",
      "token id 6 is beyond the 6 rows");
  refused(
      "base_model: $base\ngate_mode: cheap_embed\nexperts:\n"
      "  - {source_model: $one, positive_prompts: [hello]}\n"
      "  - {source_model: $two, positive_prompts: [bye]}\n",
      "has no tokenizer.json");
}

TEST_F(MoeTest, SameModelWhenMeant) {
  // Random routers are to be trained.
  const auto random = MakePlanOf(
      "base_model: $base\ngate_mode: random\nexperts: [{source_model: $one, noise_scale: 0.1}, "
      "{source_model: $one}]\n");
  ASSERT_THAT(random, IsOk());
  EXPECT_THAT(random->warnings, Contains(HasSubstr("until it is trained")));
  const std::string recipe = absl::StrReplaceAll(kPrompts, {{"$two", "$one"}});
  EXPECT_FALSE(MakePlanOf(recipe).ok());
  EXPECT_THAT(MakePlanOf(recipe, {.allow_all_same = true}), IsOk());
}

// A run with one thread and little memory gives the same bytes.
TEST_F(MoeTest, SameBytesWhateverTheThreads) {
  const auto plan = MakePlanOf(kPrompts);
  ASSERT_THAT(plan, IsOk());
  std::string recipe = plan->recipe_text;
  const auto parsed = ParseMoeRecipe(recipe);
  ASSERT_THAT(parsed, IsOk());
  const auto narrow = MakeMoePlan(
      *parsed, {.memory_bytes = 64 << 20, .threads = 1, .device = "cpu", .shard_bytes = 20'000},
      {});
  const auto wide = MakeMoePlan(
      *parsed, {.memory_bytes = 1 << 30, .threads = 4, .device = "cpu", .shard_bytes = 20'000}, {});
  ASSERT_THAT(narrow, IsOk());
  ASSERT_THAT(wide, IsOk());
  EXPECT_EQ(narrow->fingerprint, wide->fingerprint);
  ASSERT_THAT(RunPlan(*narrow, {.output = folder_ / "narrow"}), IsOk());
  ASSERT_THAT(RunPlan(*wide, {.output = folder_ / "wide"}), IsOk());
  ASSERT_GT(wide->shards.size(), 2u);
  for (const PlanShard& shard : wide->shards) {
    EXPECT_EQ(testing::ReadFile(folder_ / ("narrow/" + shard.file)),
              testing::ReadFile(folder_ / ("wide/" + shard.file)));
  }
}

}  // namespace
}  // namespace pewter
