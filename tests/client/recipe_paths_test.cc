#include "client/recipe_paths.h"

#include <unistd.h>

#include <filesystem>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pewter::client {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

class RecipePathsTest : public testing::Test {
 protected:
  RecipePathsTest() {
    folder_ = fs::temp_directory_path() / ("pewter_recipe_paths_" + std::to_string(getpid()));
    fs::create_directories(folder_ / "here");
    fs::create_directories(folder_ / "with space");
    fs::create_directories(folder_ / "a+b" / "here");
  }
  ~RecipePathsTest() override { fs::remove_all(folder_); }

  std::string At(const std::string& path) const { return (folder_ / path).string(); }
  std::string Rewritten(const std::string& text) const {
    const auto recipe = MakePathsAbsolute(text, {}, folder_.string());
    EXPECT_TRUE(recipe.ok()) << recipe.status();
    return recipe.ok() ? recipe->text : "";
  }

  fs::path folder_;
};

TEST_F(RecipePathsTest, ChangesModelsAndFilesOfStatistics) {
  EXPECT_EQ(Rewritten("merge_method: linear\n"
                      "models: [{model: ./here}]\n"
                      "statistics: {./here: ./s.safetensors}\n"),
            "merge_method: linear\n"
            "models: [{model: " +
                At("here") +
                "}]\n"
                "statistics: {" +
                At("here") + ": " + At("s.safetensors") + "}\n");
}

TEST_F(RecipePathsTest, ChangesModelsOfTokens) {
  EXPECT_EQ(Rewritten("merge_method: linear\n"
                      "models: [{model: /a}]\n"
                      "tokenizer:\n"
                      "  source: ./s\n"
                      "  tokens:\n"
                      "    ./x: {source: ./b}\n"
                      "    y: {source: {kind: model_token, model: {model: ./c}, token: ./c}}\n"),
            "merge_method: linear\n"
            "models: [{model: /a}]\n"
            "tokenizer:\n"
            "  source: " +
                At("s") + "\n  tokens:\n    ./x: {source: " + At("b") +
                "}\n    y: {source: {kind: model_token, model: {model: " + At("c") +
                "}, token: ./c}}\n");
}

TEST_F(RecipePathsTest, ChangesPathsAndNothingElse) {
  EXPECT_EQ(Rewritten("# mine\n"
                      "merge_method: task_arithmetic  # here\n"
                      "base_model: here\n"
                      "models:\n"
                      "  - model: ./missing   # not here yet\n"
                      "    parameters: {weight: 0.5}\n"
                      "  - model: \"../up\"\n"
                      "    parameters: {weight: 0.50}\n"
                      "  - model: 'with space'\n"
                      "    parameters: {weight: 1}\n"
                      "  - model: /absolute/one\n"
                      "    parameters: {weight: 1}\n"
                      "  - model: hf://org/name\n"
                      "    parameters: {weight: 1}\n"
                      "  - model: org/name  # of the hub\n"
                      "    parameters: {weight: 1}\n"
                      "  - model: here@main+./lora@v2\n"
                      "    parameters: {weight: 1}\n"
                      "dtype: float32\n"),
            "# mine\n"
            "merge_method: task_arithmetic  # here\n"
            "base_model: " +
                At("here") +
                "\n"
                "models:\n"
                "  - model: " +
                At("missing") +
                "   # not here yet\n"
                "    parameters: {weight: 0.5}\n"
                "  - model: " +
                (folder_.parent_path() / "up").string() +
                "\n"
                "    parameters: {weight: 0.50}\n"
                "  - model: \"" +
                At("with space") +
                "\"\n"
                "    parameters: {weight: 1}\n"
                "  - model: /absolute/one\n"
                "    parameters: {weight: 1}\n"
                "  - model: hf://org/name\n"
                "    parameters: {weight: 1}\n"
                "  - model: hf://org/name  # of the hub\n"
                "    parameters: {weight: 1}\n"
                "  - model: " +
                At("here") + "@main+" + At("lora") +
                "@v2\n"
                "    parameters: {weight: 1}\n"
                "dtype: float32\n");
}

TEST_F(RecipePathsTest, SlicesFlowStyleAnchorsAndMappings) {
  EXPECT_EQ(Rewritten("merge_method: passthrough\n"
                      "slices:\n"
                      "  - sources: [{model: &m ./a, layer_range: [0, 2]}]\n"
                      "  - sources: [{model: *m, layer_range: [1, 3]}]\n"
                      "  - sources:\n"
                      "      - model: {model: {path: ./b}, lora: ./c}\n"
                      "        layer_range: [0, 1]\n"),
            "merge_method: passthrough\n"
            "slices:\n"
            "  - sources: [{model: &m " +
                At("a") +
                ", layer_range: [0, 2]}]\n"
                "  - sources: [{model: *m, layer_range: [1, 3]}]\n"
                "  - sources:\n"
                "      - model: {model: {path: " +
                At("b") + "}, lora: " + At("c") +
                "}\n"
                "        layer_range: [0, 1]\n");
}

TEST_F(RecipePathsTest, Overrides) {
  const auto recipe = MakePathsAbsolute(
      "merge_method: slerp\nmodels: [{model: /x}]\nparameters: {t: 0.5}\nbase_model: /y\n",
      {{"base_model", "./here"}, {"parameters.t", "0.25"}}, folder_.string());
  ASSERT_TRUE(recipe.ok()) << recipe.status();
  EXPECT_THAT(recipe->overrides, testing::ElementsAre(testing::Pair("base_model", At("here")),
                                                      testing::Pair("parameters.t", "0.25")));
  EXPECT_THAT(recipe->text, HasSubstr("base_model: /y"));
}

TEST_F(RecipePathsTest, RefusesWhatAReferenceCannotHold) {
  const auto recipe = MakePathsAbsolute(
      "merge_method: linear\nmodels:\n  - model: ./here\n    parameters: "
      "{weight: 1}\n",
      {}, At("a+b"));
  ASSERT_TRUE(absl::IsInvalidArgument(recipe.status())) << recipe.status();
  EXPECT_THAT(std::string(recipe.status().message()), HasSubstr("recipe:3:12"));
  // The mapping form holds it.
  const auto mapping = MakePathsAbsolute(
      "merge_method: linear\nmodels:\n  - model: {model: {path: ./here}}\n    parameters: "
      "{weight: 1}\n",
      {}, At("a+b"));
  ASSERT_TRUE(mapping.ok()) << mapping.status();
  EXPECT_THAT(mapping->text, HasSubstr(At("a+b/here")));
}

TEST_F(RecipePathsTest, PassesOnWhatTheParserRefuses) {
  const auto recipe = MakePathsAbsolute("merge_method: [linear\n", {}, folder_.string());
  EXPECT_TRUE(absl::IsInvalidArgument(recipe.status())) << recipe.status();
}

TEST_F(RecipePathsTest, Destinations) {
  EXPECT_EQ(AbsoluteDestination("out", "/work"), "/work/out");
  EXPECT_EQ(AbsoluteDestination("./a/../out/", "/work"), "/work/out");
  EXPECT_EQ(AbsoluteDestination("/out", "/work"), "/out");
  EXPECT_EQ(AbsoluteDestination("file:///out", "/work"), "file:///out");
}

TEST_F(RecipePathsTest, WhatIsOnThisMachineCanBePutElsewhere) {
  const auto portable = MakePathsAbsolute(
      "# mine\n"
      "merge_method: linear\n"
      "models:\n"
      "  - model: ./here+./adapter\n"
      "  - model: {model: {path: ./here}, lora: \"./with space\"}\n"
      "  - model: hf://org/name  # stays\n"
      "statistics: {./here: ./s.safetensors}\n",
      {{"base_model", "./here"}}, folder_.string());
  ASSERT_TRUE(portable.ok()) << portable.status();
  const auto paths = LocalPathsOf(*portable);
  ASSERT_TRUE(paths.ok()) << paths.status();
  EXPECT_THAT(*paths, testing::UnorderedElementsAre(At("here"), At("adapter"), At("with space"),
                                                    At("s.safetensors")));
  const auto moved =
      ReplacePaths(*portable, {{At("here"), "artifact://sha256/aa"},
                               {At("adapter"), "artifact://sha256/bb"},
                               {At("with space"), "artifact://sha256/cc"},
                               {At("s.safetensors"), "artifact://sha256/dd/s.safetensors"}});
  ASSERT_TRUE(moved.ok()) << moved.status();
  EXPECT_EQ(moved->text,
            "# mine\n"
            "merge_method: linear\n"
            "models:\n"
            "  - model: artifact://sha256/aa+artifact://sha256/bb\n"
            "  - model: {model: {path: artifact://sha256/aa}, lora: artifact://sha256/cc}\n"
            "  - model: hf://org/name  # stays\n"
            "statistics: {artifact://sha256/aa: artifact://sha256/dd/s.safetensors}\n");
  EXPECT_EQ(moved->overrides.at(0).second, "artifact://sha256/aa");
}

}  // namespace
}  // namespace pewter::client
