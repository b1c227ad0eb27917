#include "merge/checkpoint/architecture.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "merge/checkpoint/architectures/table.h"
#include "tests/support/matchers.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace pewter {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::IsOk;
using testing::StatusIs;

class ArchitectureTest : public ::testing::Test {
 protected:
  // A model with these tensors, F32 [2] each.
  std::shared_ptr<const Checkpoint> Model(const std::string& name, const std::string& config,
                                          const std::vector<std::string>& names) {
    std::vector<testing::TinyTensor> tensors;
    for (const std::string& tensor : names) {
      tensors.push_back(testing::RandomTensor(tensor, DType::kF32, {2}, 1));
    }
    if (!config.empty()) folder_.Write(name + "/config.json", config);
    folder_.Write(name + "/.keep", "");
    testing::WriteSafetensors(folder_ / (name + "/model.safetensors"), tensors);
    auto model = Checkpoint::Open({.path = folder_ / name});
    EXPECT_THAT(model, IsOk());
    return *model;
  }

  std::shared_ptr<const Checkpoint> Known(const std::string& architecture,
                                          const std::string& type) {
    nlohmann::json config = {{"num_hidden_layers", 3}, {"n_layer", 3},        {"n_layers", 3},
                             {"num_layers", 3},        {"encoder_layers", 3}, {"decoder_layers", 3},
                             {"num_decoder_layers", 3}};
    config["text_config"] = {{"num_hidden_layers", 3}};
    config["vision_config"] = {{"num_hidden_layers", 3}, {"depth", 3}};
    config["architectures"] = {architecture};
    config["model_type"] = type;
    return Model(architecture, config.dump(), {"x"});
  }

  void CheckDefinition(const std::string& name, const std::string& type) {
    const auto model = Known(name, type);
    const auto architecture = ResolveArchitecture({model}, false);
    ASSERT_THAT(architecture, IsOk());
    EXPECT_EQ((*architecture)->name(), name);
    std::vector<std::string> names;
    std::vector<std::string> tied;
    for (const auto& module : (*architecture)->modules()) {
      std::vector<ArchTensor> all = module->pre();
      all.insert(all.end(), module->post().begin(), module->post().end());
      for (int64_t layer : {0, 12}) {
        for (const ArchTensor& tensor : module->LayerTensors(layer)) {
          EXPECT_THAT(tensor.name, HasSubstr(absl::StrCat(".", layer, ".")));
          all.push_back(tensor);
        }
      }
      std::map<int, std::string> sets;  // only the first set of each choice: others share tensors
      for (const ArchTensor& tensor : all) {
        if (tensor.choice.id != 0 &&
            sets.emplace(tensor.choice.id, tensor.choice.set).first->second != tensor.choice.set) {
          continue;
        }
        names.push_back(tensor.name);
        names.insert(names.end(), tensor.aliases.begin(), tensor.aliases.end());
        tied.insert(tied.end(), tensor.tied_names.begin(), tensor.tied_names.end());
      }
      EXPECT_EQ(module->LayerCount(*model).value_or(-1), module->LayerTensors(0).empty() ? 0 : 3);
    }
    for (const std::string& tensor : names) EXPECT_THAT(tensor, Not(HasSubstr("{")));
    std::sort(names.begin(), names.end());
    const auto twice = std::adjacent_find(names.begin(), names.end());
    EXPECT_EQ(twice, names.end()) << *twice;
    for (const std::string& tensor : tied) EXPECT_THAT(names, Contains(tensor));
  }

  testing::TempFolder folder_;
};

// Every head of every family can be resolved, and names each tensor once.
TEST_F(ArchitectureTest, AllDefinitionsAreSound) {
  int count = 0;
  for (const ArchitectureFile& file : ArchitectureFiles()) {
    const auto content = nlohmann::json::parse(file.json);
    for (const auto& family : content.value("families", nlohmann::json::array())) {
      std::vector<std::string> names;
      for (const std::string head : family.value("heads", nlohmann::json::array())) {
        names.push_back(
            absl::StrCat(family["name"].get<std::string>(), head.substr(head.find('*') + 1)));
      }
      const auto others = family.value("architectures", nlohmann::json::object());
      for (const auto& [name, head] : others.items()) {
        names.push_back(name);
      }
      EXPECT_TRUE(!names.empty() || family.contains("like")) << family["name"];
      for (const std::string& name : names) {
        SCOPED_TRACE(absl::StrCat(file.name, " ", name));
        CheckDefinition(name, family["model_type"]);
        ++count;
      }
    }
  }
  EXPECT_GT(count, 120);
}

TEST_F(ArchitectureTest, SameDefinitionUnderTwoNames) {
  const auto a = Known("LlamaForCausalLM", "llama");
  const auto b = Known("LLaMaForCausalLM", "llama");
  EXPECT_THAT(ResolveArchitecture({a, b}, false), IsOk());
}

TEST_F(ArchitectureTest, MixturesNeedLeave) {
  const auto a = Known("LlamaForCausalLM", "llama");
  const auto b = Known("Qwen2ForCausalLM", "qwen2");
  EXPECT_THAT(ResolveArchitecture({a, b}, false),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("LlamaForCausalLM"), HasSubstr("Qwen2ForCausalLM"))));
  const auto mixed = ResolveArchitecture({b, a}, true);
  ASSERT_THAT(mixed, IsOk());
  EXPECT_EQ((*mixed)->name(), "Qwen2ForCausalLM");
}

TEST_F(ArchitectureTest, BadConfigurations) {
  const auto refused = [&](const std::string& config, const char* part) {
    const auto architecture = ResolveArchitecture({Model("m", config, {"x"})}, false);
    EXPECT_THAT(architecture.status().message(), HasSubstr(part)) << config;
  };
  refused("[]", "not a JSON object");
  refused("{", "not a JSON object");
  refused("{\"architectures\": [\"a\", \"b\"]}", "a list of one name");
  refused("{\"architectures\": \"a\"}", "a list of one name");
  for (const char* count : {"\"3\"", "-1", "1e9", "null", "2.5"}) {
    const auto model = Model("n",
                             absl::StrCat("{\"architectures\": [\"LlamaForCausalLM\"], ",
                                          "\"num_hidden_layers\": ", count, "}"),
                             {"x"});
    const auto architecture = ResolveArchitecture({model}, false);
    ASSERT_THAT(architecture, IsOk());
    EXPECT_THAT((*architecture)->modules()[0]->LayerCount(*model),
                StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("num_hidden_layers")))
        << count;
  }
}

TEST_F(ArchitectureTest, InfersLayersFromNames) {
  const std::string config = "{\"architectures\": [\"Strange\"], \"num_hidden_layers\": 2}";
  const auto a =
      Model("a", config, {"emb", "net.h.0.w", "net.h.1.w", "net.h.1.extra.0.b", "net.tail"});
  const auto b = Model("b", config, {"emb", "net.h.0.w", "net.h.1.w", "net.tail", "more"});
  const auto architecture = ResolveArchitecture({a, b}, false);
  ASSERT_THAT(architecture, IsOk());
  EXPECT_EQ((*architecture)->name(), "inferred");
  ASSERT_EQ((*architecture)->modules().size(), 1u);
  const ArchModule& module = *(*architecture)->modules()[0];
  EXPECT_EQ(module.name(), "default");
  EXPECT_THAT(module.layer_count_keys(), ElementsAre("num_hidden_layers"));
  EXPECT_EQ(*module.LayerCount(*a), 2);
  std::vector<std::string> loose;
  for (const ArchTensor& tensor : module.pre()) {
    loose.push_back(absl::StrCat(tensor.name, tensor.optional ? "?" : ""));
  }
  EXPECT_THAT(loose, ElementsAre("emb", "more?", "net.tail"));
  std::vector<std::string> layer;
  for (const ArchTensor& tensor : module.LayerTensors(7)) {
    layer.push_back(absl::StrCat(tensor.name, tensor.optional ? "?" : ""));
  }
  EXPECT_THAT(layer, ElementsAre("net.h.7.extra.0.b?", "net.h.7.w"));
  EXPECT_TRUE(module.post().empty());
}

TEST_F(ArchitectureTest, InfersModulesAndTheirCounts) {
  const auto model =
      Model("stacks",
            "{\"architectures\": [\"Strange\"], \"audio\": {\"n_layers\": 2}, \"num_layers\": 1}",
            {"glue", "audio.blocks.0.w", "audio.blocks.1.w", "text.h.0.w"});
  const auto architecture = ResolveArchitecture({model}, false);
  ASSERT_THAT(architecture, IsOk());
  std::vector<std::string> modules;
  for (const auto& module : (*architecture)->modules()) {
    modules.push_back(
        absl::StrCat(module->name(), " ", absl::StrJoin(module->layer_count_keys(), " ")));
  }
  EXPECT_THAT(modules, ElementsAre("default ", "audio.blocks audio.n_layers", "text.h num_layers"));
}

// A stack's count is not guessed when two stacks have the same.
TEST_F(ArchitectureTest, DoesNotGuessCounts) {
  const auto model =
      Model("twins", "{\"architectures\": [\"Strange\"], \"num_layers\": 1}", {"a.0.w", "b.0.w"});
  const auto architecture = ResolveArchitecture({model}, false);
  ASSERT_THAT(architecture, IsOk());
  for (const auto& module : (*architecture)->modules()) {
    EXPECT_TRUE(module->layer_count_keys().empty()) << module->name();
  }
}

// Rows are tokens only where the name says so too: a norm can have as many elements by chance.
TEST_F(ArchitectureTest, InfersVocabularyTensors) {
  const auto model = Model("words", "{\"architectures\": [\"Strange\"], \"vocab_size\": 2}",
                           {"net.token_embedding.w", "net.norm.w", "net.position_embedding.w"});
  const auto architecture = ResolveArchitecture({model}, false);
  ASSERT_THAT(architecture, IsOk());
  std::vector<std::string> words;
  for (const ArchTensor& tensor : (*architecture)->modules()[0]->pre()) {
    if (tensor.vocabulary) words.push_back(tensor.name);
  }
  EXPECT_THAT(words, ElementsAre("net.token_embedding.w"));
}

// A number in a name sets no loop and no allocation.
TEST_F(ArchitectureTest, RefusesAbsurdNumbers) {
  const auto refused = [&](const std::string& config, const std::string& tensor) {
    EXPECT_THAT(ResolveArchitecture({Model("absurd", config, {tensor})}, false),
                StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("absurd")));
  };
  refused("{\"architectures\": [\"Qwen3MoeForCausalLM\"], \"model_type\": \"qwen3_moe\"}",
          "model.layers.0.mlp.experts.4000000000000.up_proj.weight");
  refused("{\"architectures\": [\"Strange\"]}", "h.4000000000000.w");
}

TEST_F(ArchitectureTest, RawNamesMustAgree) {
  const auto a = Model("a", "", {"x", "y"});
  const auto b = Model("b", "", {"x", "z"});
  EXPECT_THAT(ResolveArchitecture({a, b}, false),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("lacks z"), HasSubstr("lacks y"))));
  const auto raw = ResolveArchitecture({a, a}, false);
  ASSERT_THAT(raw, IsOk());
  EXPECT_EQ((*raw)->name(), "raw");
  EXPECT_EQ((*raw)->modules()[0]->pre().size(), 2u);
}

}  // namespace
}  // namespace pewter
