// Cases of planning as data: tests/recipes/*.yaml (tests/recipes/README.md).
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/dtype_names.h"
#include "merge/plan/plan.h"
#include "merge/recipe/recipe.h"
#include "merge/recipe/yaml.h"
#include "nlohmann/json.hpp"
#include "plan_zoo.h"
#include "tests/support/temp_folder.h"

namespace pewter {
namespace {

namespace fs = std::filesystem;
using ::testing::Contains;
using ::testing::HasSubstr;

struct Case {
  std::string name;
  std::shared_ptr<const YamlDocument> document;
  const YamlNode* node;
  friend void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }
};

std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (const auto& entry : fs::directory_iterator(fs::path(PEWTER_SOURCE_DIR) / "tests/recipes")) {
    if (entry.path().extension() != ".yaml") continue;
    auto document = YamlDocument::Parse(testing::ReadFile(entry.path()));
    if (!document.ok()) {
      ADD_FAILURE() << entry.path() << ": " << document.status();
      continue;
    }
    const auto shared = std::make_shared<const YamlDocument>(*std::move(document));
    for (const YamlNode* node : shared->root().items) {
      std::string name = absl::StrCat(entry.path().stem().string(), "_", node->Find("name")->text);
      std::replace_if(
          name.begin(), name.end(), [](char c) { return !std::isalnum(c); }, '_');
      cases.push_back({std::move(name), shared, node});
    }
  }
  std::sort(cases.begin(), cases.end(),
            [](const Case& a, const Case& b) { return a.name < b.name; });
  return cases;
}

// The texts of a list, or of one scalar.
std::vector<std::string> Texts(const YamlNode* node) {
  std::vector<std::string> texts;
  if (node == nullptr) return texts;
  if (node->kind == YamlNode::Kind::kScalar) texts.push_back(node->text);
  for (const YamlNode* item : node->items) texts.push_back(item->text);
  return texts;
}

std::string Describe(const ParamValue& value) {
  if (const bool* flag = std::get_if<bool>(&value)) return *flag ? "true" : "false";
  if (const int64_t* number = std::get_if<int64_t>(&value)) return absl::StrCat(*number);
  if (const double* number = std::get_if<double>(&value)) return absl::StrCat(*number);
  return std::get<std::string>(value);
}

std::string Describe(const ParamValues& values) {
  std::vector<std::string> parts;
  for (const auto& [name, value] : values)
    parts.push_back(absl::StrCat(name, "=", Describe(value)));
  return absl::StrJoin(parts, " ");
}

// "NAME F32 [4, 4] METHOD PARAMS | base ./m:tensor | ./a:tensor PARAMS | ..."
std::string Describe(const Plan& plan, const PlanTensor& tensor) {
  std::string text =
      absl::StrCat(tensor.name, " ", SafetensorsName(tensor.dtype), " ", tensor.shape.ToString(),
                   " ", tensor.method == nullptr ? "copy" : tensor.method->name);
  const auto append = [&](absl::string_view part) {
    if (!part.empty()) absl::StrAppend(&text, " ", part);
  };
  append(Describe(tensor.params));
  const auto operand = [&](const PlanInput& input) {
    return absl::StrCat(plan.models[input.model].ref, ":", input.tensor);
  };
  if (tensor.base) append(absl::StrCat("| base ", operand(*tensor.base)));
  for (const PlanInput& input : tensor.inputs) {
    append(absl::StrCat("| ", operand(input)));
    append(Describe(input.params));
  }
  return text;
}

// One line a fact: "TENSOR: NOTE", "TENSOR: layer 3", "TENSOR t: ORIGIN", "TENSOR ./a weight:
// ORIGIN", "TENSOR ./a: VIEW", "TENSOR ./a: layer 7".
std::vector<std::string> Explanations(const Plan& plan) {
  std::vector<std::string> facts;
  const auto add = [&](const std::string& whose, const ParamOrigins& origins,
                       const std::vector<std::string>& rest, int64_t layer) {
    for (const auto& [name, origin] : origins) {
      facts.push_back(absl::StrCat(whose, " ", name, ": ", origin.ToString()));
    }
    for (const std::string& fact : rest) facts.push_back(absl::StrCat(whose, ": ", fact));
    if (layer >= 0) facts.push_back(absl::StrCat(whose, ": layer ", layer));
  };
  for (const PlanTensor& tensor : plan.tensors) {
    add(tensor.name, tensor.origins, tensor.notes, tensor.layer);
    const auto add_input = [&](const PlanInput& input) {
      add(absl::StrCat(tensor.name, " ", plan.models[input.model].ref), input.origins, input.views,
          input.layer);
    };
    if (tensor.base) add_input(*tensor.base);
    for (const PlanInput& input : tensor.inputs) add_input(input);
  }
  return facts;
}

class PlanCaseTest : public ::testing::TestWithParam<Case> {
 protected:
  static void SetUpTestSuite() { zoo_ = new testing::PlanZoo; }
  static void TearDownTestSuite() {
    delete zoo_;
    zoo_ = nullptr;
  }
  static testing::PlanZoo* zoo_;
};

testing::PlanZoo* PlanCaseTest::zoo_ = nullptr;

TEST_P(PlanCaseTest, IsAsStated) {
  const YamlNode& node = *GetParam().node;
  for (const YamlNode::Entry& entry : node.entries) {
    EXPECT_THAT((std::vector<std::string>{"name", "recipe", "set", "options", "error", "warnings",
                                          "no_warnings", "count", "tensors", "absent", "order",
                                          "config", "files", "no_files", "shards", "unused",
                                          "explained", "absent_optional"}),
                Contains(entry.key->text));
  }
  PlanOptions options{.memory_bytes = int64_t{1} << 30, .device = "cpu"};
  if (const YamlNode* given = node.Find("options")) {
    for (const YamlNode::Entry& entry : given->entries) {
      if (entry.key->text == "strict") options.strict = *YamlBool(*entry.value);
      if (entry.key->text == "allow_mixed") options.allow_mixed = *YamlBool(*entry.value);
      if (entry.key->text == "truncate") options.truncate_vocabularies = *YamlBool(*entry.value);
      if (entry.key->text == "shard_bytes") options.shard_bytes = *YamlInt(*entry.value);
      if (entry.key->text == "memory") options.memory_bytes = *YamlInt(*entry.value);
      if (entry.key->text == "model_card") options.write_model_card = *YamlBool(*entry.value);
      if (entry.key->text == "tokenizer") options.copy_tokenizer = *YamlBool(*entry.value);
    }
  }
  std::vector<std::pair<std::string, std::string>> overrides;
  if (const YamlNode* set = node.Find("set")) {
    for (const YamlNode::Entry& e : set->entries)
      overrides.emplace_back(e.key->text, e.value->text);
  }

  const auto recipe = ParseRecipe(node.Find("recipe")->text, overrides);
  const auto plan =
      recipe.ok() ? MakePlan(*recipe, options) : absl::StatusOr<Plan>(recipe.status());
  if (const YamlNode* error = node.Find("error")) {
    ASSERT_FALSE(plan.ok()) << "it was to fail with: " << absl::StrJoin(Texts(error), " ... ");
    for (const std::string& part : Texts(error)) {
      EXPECT_THAT(std::string(plan.status().message()), HasSubstr(part));
    }
    return;
  }
  ASSERT_TRUE(plan.ok()) << plan.status();

  for (const std::string& part : Texts(node.Find("warnings"))) {
    EXPECT_THAT(plan->warnings, Contains(HasSubstr(part)));
  }
  if (node.Find("no_warnings") != nullptr) {
    EXPECT_THAT(plan->warnings, ::testing::IsEmpty());
  }
  std::vector<std::string> tensors;
  std::vector<std::string> names;
  for (const PlanTensor& tensor : plan->tensors) {
    tensors.push_back(Describe(*plan, tensor));
    names.push_back(tensor.name);
  }
  for (const std::string& part : Texts(node.Find("explained"))) {
    EXPECT_THAT(Explanations(*plan), Contains(part));
  }
  if (const YamlNode* absent = node.Find("absent_optional")) {
    EXPECT_THAT(plan->absent_tensors, ::testing::IsSupersetOf(Texts(absent)));
  }
  if (const YamlNode* count = node.Find("count")) {
    EXPECT_EQ(static_cast<int64_t>(tensors.size()), *YamlInt(*count)) << absl::StrJoin(names, "\n");
  }
  for (const std::string& tensor : Texts(node.Find("tensors"))) {
    EXPECT_THAT(tensors, Contains(tensor));
  }
  for (const std::string& name : Texts(node.Find("absent"))) {
    EXPECT_THAT(names, ::testing::Not(Contains(name)));
  }
  if (const YamlNode* order = node.Find("order")) {
    EXPECT_EQ(names, Texts(order));
  }
  if (const YamlNode* config = node.Find("config")) {
    const auto json = nlohmann::json::parse(plan->config_json);
    for (const YamlNode::Entry& entry : config->entries) {
      ASSERT_TRUE(json.contains(entry.key->text)) << entry.key->text;
      EXPECT_EQ(json[entry.key->text].dump(), entry.value->text) << entry.key->text;
    }
  }
  std::vector<std::string> files;
  for (const PlanFile& file : plan->aux_files) {
    files.push_back(file.model < 0
                        ? file.name
                        : absl::StrCat(file.name, " from ", plan->models[file.model].ref));
  }
  for (const std::string& file : Texts(node.Find("files"))) EXPECT_THAT(files, Contains(file));
  for (const std::string& file : Texts(node.Find("no_files"))) {
    EXPECT_THAT(files, ::testing::Not(Contains(HasSubstr(file))));
  }
  if (const YamlNode* shards = node.Find("shards")) {
    std::vector<std::string> given;
    for (const PlanShard& shard : plan->shards) {
      given.push_back(absl::StrCat(shard.file, " ", shard.tensors.size()));
    }
    EXPECT_EQ(given, Texts(shards));
  }
  if (const YamlNode* unused = node.Find("unused")) {
    for (const YamlNode::Entry& entry : unused->entries) {
      ASSERT_TRUE(plan->unused_tensors.contains(entry.key->text)) << entry.key->text;
      EXPECT_EQ(plan->unused_tensors.at(entry.key->text), Texts(entry.value));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Recipes, PlanCaseTest, ::testing::ValuesIn(Cases()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace pewter
