#include "merge/align/symmetry.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/support/matchers.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace pewter {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::IsOk;
using testing::StatusIs;

using Models = std::vector<std::shared_ptr<const Checkpoint>>;

absl::StatusOr<Symmetry> SymmetryOf(const Models& models) {
  auto architecture = ResolveArchitecture(models, false);
  if (architecture.ok()) architecture = WithAllTensors(*architecture, models);
  if (!architecture.ok()) return architecture.status();
  return Symmetry::Make(**architecture, models);
}

// The axes of all tensors, as the goldens write them.
json AxisMap(const Symmetry& symmetry) {
  json map = json::object();
  for (const SymmetricTensor& tensor : symmetry.tensors()) {
    for (size_t axis = 0; axis < tensor.axes.size(); ++axis) {
      std::vector<std::string> names;
      for (const AxisSegment& segment : tensor.axes[axis]) {
        names.push_back(symmetry.groups()[segment.group].name);
      }
      if (names.empty()) continue;
      map[tensor.tensor.name][absl::StrCat(axis)] =
          names.size() == 1 ? json(names[0]) : json(names);
    }
  }
  return map;
}

TEST(SymmetryTest, AxisMapsAreThoseOfTheReference) {
  const fs::path goldens = fs::path(PEWTER_SOURCE_DIR) / "../shared/goldens/alignment";
  if (!fs::exists(goldens)) GTEST_SKIP() << "no " << goldens;
  int compared = 0;
  for (const auto& entry : fs::directory_iterator(goldens)) {
    if (!fs::exists(entry.path() / "perms.json")) continue;
    SCOPED_TRACE(entry.path().filename());
    const json golden = json::parse(std::ifstream(entry.path() / "perms.json"));
    Models models;
    for (const char* name : {"a", "b"}) {
      auto model = Checkpoint::Open({.path = entry.path() / name});
      ASSERT_THAT(model, IsOk());
      models.push_back(*model);
    }
    const auto symmetry = SymmetryOf(models);
    ASSERT_THAT(symmetry, IsOk());
    EXPECT_EQ(AxisMap(*symmetry), golden.at("axis_map"));
    std::map<std::string, size_t> widths, golden_widths;
    for (const SymmetryGroup& group : symmetry->groups()) widths[group.name] = group.width;
    for (const auto& [name, group] : golden.at("groups").items()) {
      golden_widths[name] = group.at("applied").size();
    }
    EXPECT_EQ(widths, golden_widths);
    ++compared;
  }
  EXPECT_GE(compared, 7);
}

class SmallModelsTest : public ::testing::Test {
 protected:
  using Shapes = std::vector<std::pair<std::string, std::vector<int64_t>>>;

  std::shared_ptr<const Checkpoint> Model(const std::string& name, const json& config,
                                          const Shapes& shapes) {
    std::vector<testing::TinyTensor> tensors;
    for (const auto& [tensor, shape] : shapes) {
      tensors.push_back(testing::RandomTensor(tensor, DType::kF32, *Shape::Make(shape), 1));
    }
    folder_.Write(name + "/config.json", config.dump());
    testing::WriteSafetensors(folder_ / (name + "/model.safetensors"), tensors);
    auto model = Checkpoint::Open({.path = folder_ / name});
    EXPECT_THAT(model, IsOk());
    return *model;
  }

  static json LlamaConfig(int heads, int kv_heads) {
    return {{"architectures", json::array({"LlamaForCausalLM"})},
            {"model_type", "llama"},
            {"num_hidden_layers", 1},
            {"num_attention_heads", heads},
            {"num_key_value_heads", kv_heads},
            {"hidden_size", 8}};
  }
  static Shapes LlamaShapes(int64_t queries = 8, int64_t keys = 4) {
    const std::string layer = "model.layers.0.";
    return {{"model.embed_tokens.weight", {5, 8}},
            {layer + "input_layernorm.weight", {8}},
            {layer + "post_attention_layernorm.weight", {8}},
            {layer + "self_attn.q_proj.weight", {queries, 8}},
            {layer + "self_attn.k_proj.weight", {keys, 8}},
            {layer + "self_attn.v_proj.weight", {keys, 8}},
            {layer + "self_attn.o_proj.weight", {8, queries}},
            {layer + "mlp.gate_proj.weight", {6, 8}},
            {layer + "mlp.up_proj.weight", {6, 8}},
            {layer + "mlp.down_proj.weight", {8, 6}},
            {"model.norm.weight", {8}}};
  }
  static json BertConfig() {
    return {{"architectures", json::array({"BertForMaskedLM"})},
            {"model_type", "bert"},
            {"num_hidden_layers", 0},
            {"num_attention_heads", 2},
            {"hidden_size", 4},
            {"tie_word_embeddings", false}};
  }
  static Shapes BertShapes(bool decoder) {
    Shapes shapes = {{"bert.embeddings.word_embeddings.weight", {5, 4}},
                     {"cls.predictions.bias", {5}},
                     {"cls.predictions.transform.dense.weight", {4, 4}},
                     {"cls.predictions.transform.dense.bias", {4}}};
    if (decoder) shapes.push_back({"cls.predictions.decoder.weight", {5, 4}});
    return shapes;
  }

  testing::TempFolder folder_;
};

TEST_F(SmallModelsTest, HeadCountsThatDiffer) {
  const auto result = SymmetryOf(
      {Model("a", LlamaConfig(4, 2), LlamaShapes()), Model("b", LlamaConfig(2, 1), LlamaShapes())});
  EXPECT_THAT(result,
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("attention heads differ"),
                             HasSubstr("/a has 4 heads (2 of keys and values) of 2 features"),
                             HasSubstr("/b has 2 heads (1 of keys and values) of 4 features"))));
}

TEST_F(SmallModelsTest, HeadsThatDoNotFitTheTensors) {
  EXPECT_THAT(SymmetryOf({Model("a", LlamaConfig(4, 1), LlamaShapes())}),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("k_proj.weight [4, 8]"), HasSubstr("axis 0 has 4 features"),
                             HasSubstr("k.0 has 2"))));
  EXPECT_THAT(SymmetryOf({Model("b", LlamaConfig(4, 3), LlamaShapes())}),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       HasSubstr("4 heads cannot share 3 key/value heads")));
  EXPECT_THAT(
      SymmetryOf({Model("c", LlamaConfig(3, 3), LlamaShapes())}),
      StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("do not divide 8 features")));
  json config = LlamaConfig(4, 2);
  config["num_attention_heads"] = int64_t{1} << 40;
  EXPECT_THAT(
      SymmetryOf({Model("d", config, LlamaShapes())}),
      StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("\"num_attention_heads\"")));
}

TEST_F(SmallModelsTest, WidthsThatDiffer) {
  Shapes wider = LlamaShapes();
  for (auto& [name, shape] : wider) {
    for (int64_t& extent : shape) extent = extent == 6 ? 7 : extent;
  }
  EXPECT_THAT(SymmetryOf({Model("a", LlamaConfig(4, 2), LlamaShapes()),
                          Model("b", LlamaConfig(4, 2), wider)}),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("/b, tensor model.layers.0.mlp.gate_proj.weight [7, 8]"),
                             HasSubstr("ff.0 has 6"))));
}

TEST_F(SmallModelsTest, LayersThatDiffer) {
  json config = LlamaConfig(4, 2);
  config["num_hidden_layers"] = 2;
  EXPECT_THAT(
      SymmetryOf({Model("a", LlamaConfig(4, 2), LlamaShapes()), Model("b", config, LlamaShapes())}),
      StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("layers differ")));
}

TEST_F(SmallModelsTest, UnknownTensorsAndFamiliesAreRefused) {
  Shapes shapes = LlamaShapes();
  shapes.push_back({"model.layers.0.self_attn.slopes", {4}});
  EXPECT_THAT(SymmetryOf({Model("a", LlamaConfig(4, 2), shapes)}),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("tensor model.layers.0.self_attn.slopes"),
                             HasSubstr("do not say how it is aligned"))));
  json config = LlamaConfig(4, 2);
  config["model_type"] = "gemma";
  config["architectures"] = json::array({"GemmaForCausalLM"});
  EXPECT_THAT(SymmetryOf({Model("b", config, LlamaShapes())}),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("model type gemma"), HasSubstr("can be aligned of: bert"))));
}

// The output head's own order is free only where no model ties it to the embeddings.
TEST_F(SmallModelsTest, TiedHeads) {
  const auto untied = Model("untied", BertConfig(), BertShapes(true));
  const auto tied = Model("tied", BertConfig(), BertShapes(false));
  const auto free = SymmetryOf({untied, untied});
  ASSERT_THAT(free, IsOk());
  EXPECT_EQ(AxisMap(*free)["cls.predictions.transform.dense.weight"],
            (json{{"0", "head"}, {"1", "res"}}));
  EXPECT_EQ(AxisMap(*free)["cls.predictions.decoder.weight"], (json{{"1", "head"}}));
  for (const auto& models : {Models{untied, tied}, Models{tied, untied}}) {
    const auto symmetry = SymmetryOf(models);
    ASSERT_THAT(symmetry, IsOk());
    EXPECT_EQ(AxisMap(*symmetry)["cls.predictions.transform.dense.weight"],
              (json{{"0", "res"}, {"1", "res"}}));
    EXPECT_EQ(AxisMap(*symmetry)["cls.predictions.decoder.weight"], (json{{"1", "res"}}));
    EXPECT_EQ(symmetry->tied().at("head"), "res");
  }
}

TEST_F(SmallModelsTest, KeysWithoutRopeHaveRedundantBiases) {
  json config = BertConfig();
  config["num_hidden_layers"] = 1;
  Shapes shapes = BertShapes(true);
  for (const char* name : {"query", "key", "value"}) {
    const std::string prefix = absl::StrCat("bert.encoder.layer.0.attention.self.", name);
    shapes.push_back({prefix + ".weight", {4, 4}});
    shapes.push_back({prefix + ".bias", {4}});
  }
  const auto symmetry = SymmetryOf({Model("a", config, shapes)});
  ASSERT_THAT(symmetry, IsOk());
  std::vector<std::string> redundant;
  for (const SymmetricTensor& tensor : symmetry->tensors()) {
    for (const auto& axis : tensor.axes) {
      for (const AxisSegment& segment : axis) {
        if (segment.redundant) redundant.push_back(tensor.tensor.name);
      }
    }
  }
  EXPECT_THAT(redundant, ElementsAre("bert.encoder.layer.0.attention.self.key.bias"));
}

// --- Orders of an attention
// -----------------------------------------------------------------------

Attention Grouped(bool rotary) {
  return {.name = "attn.3", .heads = 4, .kv_heads = 2, .head_dim = 2, .rotary = rotary};
}

TEST(AttentionOrderTest, ExpandsAndComesBack) {
  AttentionOrder order = IdentityOrder(Grouped(true));
  order.kv_heads = {1, 0};
  order.heads = {3, 2, 0, 1};
  order.value_output = {1, 0, 0, 1};
  const AttentionPermutations permutations = Expand(Grouped(true), order);
  EXPECT_THAT(permutations.query, ElementsAre(6, 7, 4, 5, 0, 1, 2, 3));
  EXPECT_THAT(permutations.key, ElementsAre(2, 3, 0, 1));
  EXPECT_THAT(permutations.value, ElementsAre(3, 2, 0, 1));
  EXPECT_THAT(permutations.output, ElementsAre(7, 6, 5, 4, 0, 1, 2, 3));
  const auto back = ToOrder(Grouped(true), permutations);
  ASSERT_THAT(back, IsOk());
  EXPECT_EQ(back->heads, order.heads);
  EXPECT_EQ(back->kv_heads, order.kv_heads);
  EXPECT_EQ(back->query_key, order.query_key);
  EXPECT_EQ(back->value_output, order.value_output);
}

TEST(AttentionOrderTest, WhatIsNotAllowedIsRefused) {
  const AttentionPermutations identity = Expand(Grouped(true), IdentityOrder(Grouped(true)));
  const auto refused = [](const AttentionPermutations& permutations, absl::string_view message) {
    EXPECT_THAT(ToOrder(Grouped(true), permutations),
                StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr(message)));
  };
  auto changed = identity;
  changed.query = {0, 0, 2, 3, 4, 5, 6, 7};
  refused(changed, "attn.3: not a permutation of 8 features");
  changed = identity;
  changed.value = {0, 2, 1, 3};
  refused(changed, "features leave their head");
  changed = identity;
  changed.query = {4, 5, 2, 3, 0, 1, 6, 7};
  changed.output = changed.query;
  refused(changed, "query heads leave the keys and values");
  changed = identity;
  changed.output = {2, 3, 0, 1, 4, 5, 6, 7};
  refused(changed, "orders of their own");
  changed = identity;
  changed.value = {1, 0, 2, 3};
  refused(changed, "orders of their own inside");
  AttentionOrder turned = IdentityOrder(Grouped(true));
  turned.query_key = {1, 0, 0, 1};
  refused(Expand(Grouped(true), turned), "fixed: RoPE");
  EXPECT_THAT(ToOrder(Grouped(false), Expand(Grouped(false), turned)), IsOk());
}

}  // namespace
}  // namespace pewter
