#include "merge/checkpoint/architecture.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
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
    return Model(
        architecture,
        absl::StrCat("{\"architectures\": [\"", architecture, "\"], \"model_type\": \"", type,
                     "\", \"num_hidden_layers\": 3, \"n_layer\": 4, \"n_layers\": ", "5}"),
        {"x"});
  }

  testing::TempFolder folder_;
};

// Every definition of every file can be resolved, names its tensors once and fills in layers.
TEST_F(ArchitectureTest, AllDefinitionsAreSound) {
  int count = 0;
  for (const ArchitectureFile& file : ArchitectureFiles()) {
    const auto family = nlohmann::json::parse(file.json);
    for (const auto& [name, head] : family["architectures"].items()) {
      SCOPED_TRACE(absl::StrCat(file.name, " ", name));
      const auto model = Known(name, family["model_type"]);
      const auto architecture = ResolveArchitecture({model}, false);
      ASSERT_THAT(architecture, IsOk());
      EXPECT_NE((*architecture)->name(), "inferred");
      ASSERT_EQ((*architecture)->modules().size(), 1u);
      const ArchModule& module = *(*architecture)->modules()[0];
      std::vector<std::string> names;
      std::vector<ArchTensor> all = module.pre();
      for (int64_t layer : {0, 12}) {
        for (const ArchTensor& tensor : module.LayerTensors(layer)) {
          EXPECT_THAT(tensor.name, HasSubstr(absl::StrCat(".", layer, ".")));
          all.push_back(tensor);
        }
      }
      all.insert(all.end(), module.post().begin(), module.post().end());
      for (const ArchTensor& tensor : all) {
        names.push_back(tensor.name);
        names.insert(names.end(), tensor.aliases.begin(), tensor.aliases.end());
        for (const std::string& tied : tensor.tied_names) {
          EXPECT_TRUE(std::any_of(all.begin(), all.end(), [&](const ArchTensor& other) {
            return other.name == tied;
          })) << tied;
        }
      }
      for (const std::string& tensor : names) EXPECT_THAT(tensor, Not(HasSubstr("{")));
      std::sort(names.begin(), names.end());
      EXPECT_EQ(std::adjacent_find(names.begin(), names.end()), names.end());
      EXPECT_TRUE(std::any_of(all.begin(), all.end(),
                              [](const ArchTensor& tensor) { return tensor.vocabulary; }));
      EXPECT_GE(module.LayerCount(*model).value_or(-1), 3);
      ++count;
    }
  }
  EXPECT_GT(count, 40);
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
  EXPECT_EQ(module.layer_count_key(), "num_hidden_layers");
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
