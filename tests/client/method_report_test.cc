#include "client/method_report.h"

#include <fstream>
#include <iterator>
#include <string>

#include "absl/strings/str_cat.h"
#include "client/recipe_schema.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "merge/recipe/recipe.h"

namespace pewter::client {
namespace {

using testing::HasSubstr;

TEST(MethodReportTest, ExamplesAreRecipes) {
  for (const MergeMethod* method : Methods()) {
    const std::string example = ExampleRecipe(*method);
    const auto recipe = ParseRecipe(example);
    ASSERT_TRUE(recipe.ok()) << recipe.status() << "\n" << example;
    EXPECT_EQ(recipe->merge_method, method->name);
    EXPECT_THAT(recipe->warnings, testing::IsEmpty()) << example;
    for (const Param& param : method->params) {
      if (std::holds_alternative<NoDefault>(param.fallback)) {
        EXPECT_THAT(example, HasSubstr(std::string(param.name) + ": "));
      }
    }
  }
}

TEST(MethodReportTest, ExamplesOfAdaptersAreRecipes) {
  for (const AdapterMethod* adapter : AdapterMethods()) {
    const std::string example = ExampleRecipe(*adapter);
    const auto recipe = ParseRecipe(example);
    ASSERT_TRUE(recipe.ok()) << recipe.status() << "\n" << example;
    EXPECT_EQ(recipe->merge_method, adapter->method.name);
    EXPECT_EQ(recipe->output_format, OutputFormat::kLora);
    EXPECT_THAT(recipe->warnings, testing::IsEmpty()) << example;
    EXPECT_THAT(MethodToText(*adapter), HasSubstr("LoRA adapters"));
    for (const Param& param : adapter->method.params) {
      EXPECT_THAT(MethodToText(*adapter), HasSubstr(param.name));
    }
    EXPECT_EQ(MethodToJson(*adapter)["output_format"], "lora");
  }
}

TEST(MethodReportTest, TheManualIsUpToDate) {
  const std::string file = PEWTER_SOURCE_DIR "/docs/methods.md";
  std::ifstream stream(file);
  const std::string text{std::istreambuf_iterator<char>(stream), {}};
  EXPECT_EQ(text, MethodsToMarkdown())
      << "the table of methods has changed: pewter methods --markdown > docs/methods.md";
  for (const MergeMethod* method : Methods()) {
    for (const Param& param : method->params) {
      EXPECT_THAT(text, HasSubstr(absl::StrCat("| `", param.name, "` | ")));
    }
  }
}

// Every key that the schema allows is one that the parser knows.
TEST(RecipeSchemaTest, KeysAreOnesOfTheParser) {
  const Json schema = RecipeSchema();
  for (const auto& [key, value] : schema["properties"].items()) {
    if (key == "merge_method" || key == "models") continue;
    const auto recipe =
        ParseRecipe(absl::StrCat("merge_method: linear\nmodels: [{model: a}]\n", key, ": null\n"));
    ASSERT_TRUE(recipe.ok()) << recipe.status();
    EXPECT_THAT(recipe->warnings, testing::IsEmpty());
  }
  for (const MergeMethod* method : Methods()) {
    const Json& own = schema["definitions"][method->name]["properties"];
    EXPECT_EQ(own.size(), method->params.size()) << method->name;
  }
  for (const AdapterMethod* adapter : AdapterMethods()) {
    const Json& own =
        schema["definitions"][absl::StrCat("adapter_", adapter->method.name)]["properties"];
    EXPECT_EQ(own.size(), adapter->method.params.size()) << adapter->method.name;
  }
}

TEST(MethodReportTest, TextExplainsEveryParameter) {
  for (const MergeMethod* method : Methods()) {
    const std::string text = MethodToText(*method);
    EXPECT_THAT(text, HasSubstr(method->reference));
    for (const Param& param : method->params) EXPECT_THAT(text, HasSubstr(param.name));
  }
}

TEST(MethodReportTest, JsonHasTypesAndBounds) {
  const auto ties = FindMethod("ties");
  ASSERT_TRUE(ties.ok());
  const Json json = MethodToJson(**ties);
  EXPECT_EQ(json["base_model"], "required");
  bool found = false;
  for (const Json& param : json["parameters"]) {
    if (param["name"] != "density") continue;
    found = true;
    EXPECT_EQ(param["type"], "float");
    EXPECT_EQ(param["scope"], "model");
    EXPECT_EQ(param["required"], false);
    EXPECT_EQ(param["default"], 1.0);
  }
  EXPECT_TRUE(found);
}

}  // namespace
}  // namespace pewter::client
