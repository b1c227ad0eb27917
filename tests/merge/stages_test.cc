// Recipes of several documents: planned as a whole, merged one after the other.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <stop_token>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "merge/engine/manifest.h"
#include "merge/pewter.h"
#include "nlohmann/json.hpp"
#include "plan_zoo.h"
#include "tests/support/matchers.h"

namespace pewter {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::IsOk;
using testing::ReadFile;
using testing::ReadTensors;
using ::testing::StartsWith;
using testing::StatusIs;
using testing::WriteFile;

constexpr char kTwo[] =
    "name: half\n"
    "merge_method: linear\n"
    "models:\n"
    "  - {model: ./llama_a, parameters: {weight: 1}}\n"
    "  - {model: ./llama_b, parameters: {weight: 3}}\n"
    "---\n"
    "merge_method: task_arithmetic\n"
    "base_model: ./llama_base\n"
    "models:\n"
    "  - {model: half, parameters: {weight: 0.5}}\n";

class Watcher : public Observer {
 public:
  void OnProgress(const Progress& progress) override {
    const std::string stage = absl::StrCat(progress.stage, "/", progress.stages, " ",
                                           progress.stage_name, " ", PhaseName(progress.phase));
    if (stages.empty() || stages.back() != stage) stages.push_back(stage);
    if (stop_at == stage) stop.request_stop();
  }
  std::vector<std::string> stages;
  std::string stop_at;
  std::stop_source stop;
};

class StagesTest : public ::testing::Test {
 protected:
  static absl::StatusOr<Plan> MakePlanOf(const std::string& text, PlanOptions options = {}) {
    options.memory_bytes = int64_t{1} << 30;
    options.device = "cpu";
    const auto recipe = ParseRecipe(text);
    if (!recipe.ok()) return recipe.status();
    return MakePlan(*recipe, options);
  }
  static absl::StatusOr<Manifest> Merge(const std::string& text, RunOptions options = {}) {
    const auto plan = MakePlanOf(text);
    if (!plan.ok()) return plan.status();
    if (options.output.empty()) options.output = "out";
    return RunPlan(*plan, options);
  }

  testing::PlanZoo zoo_;
};

TEST_F(StagesTest, GivesWhatTwoMergesGive) {
  std::string first = kTwo;
  first = first.substr(0, first.find("---"));
  ASSERT_THAT(Merge(first, {.output = "half_alone"}), IsOk());
  std::string second = kTwo;
  second = absl::StrReplaceAll(second.substr(second.find("---")),
                               {{"model: half", "model: ./half_alone"}});
  ASSERT_THAT(Merge(second, {.output = "alone"}), IsOk());

  Watcher watcher;
  ASSERT_THAT(Merge(kTwo, {.keep_stages = true, .observer = &watcher}), IsOk());
  EXPECT_EQ(ReadFile("out/model.safetensors"), ReadFile("alone/model.safetensors"));
  EXPECT_EQ(ReadFile("out.stages/half/model.safetensors"),
            ReadFile("half_alone/model.safetensors"));
  EXPECT_EQ(ReadFile("out/config.json"), ReadFile("alone/config.json"));
  EXPECT_EQ(ReadFile("out/mergekit_config.yml"), kTwo);
  EXPECT_THAT(watcher.stages, Contains("1/2 half merging"));
  EXPECT_THAT(watcher.stages.back(), "2/2  done");

  const json manifest = json::parse(ReadFile("out/pewter_manifest.json"));
  ASSERT_EQ(manifest["stages"].size(), 1u);
  EXPECT_EQ(manifest["stages"][0]["name"], "half");
  EXPECT_EQ(manifest["stages"][0]["inputs"][1]["model"], "./llama_b");
  EXPECT_EQ(manifest["inputs"][0]["files"][0]["etag"], manifest["stages"][0]["fingerprint"]);
}

TEST_F(StagesTest, AreRemovedUnlessWanted) {
  ASSERT_THAT(Merge(kTwo), IsOk());
  EXPECT_FALSE(fs::exists("out.stages"));
  ASSERT_THAT(Merge(kTwo, {.output = "more", .stages = "between"}), IsOk());
  EXPECT_TRUE(fs::exists("between/half/pewter_manifest.json"));
  EXPECT_FALSE(fs::exists("more.stages"));
  // What nothing depends on was asked for by name only.
  const std::string unused =
      "\n---\nname: extra\nmerge_method: linear\nmodels: [{model: ./llama_a, parameters: {weight: "
      "1}}]\n";
  const auto manifest = Merge(kTwo + unused, {.output = "other"});
  ASSERT_THAT(manifest, IsOk());
  EXPECT_THAT(manifest->warnings, Contains(HasSubstr("nothing depends on \"extra\"")));
  EXPECT_TRUE(fs::exists("other.stages/extra/model.safetensors"));
  EXPECT_FALSE(fs::exists("other.stages/half"));
}

TEST_F(StagesTest, AreReusedWhileNothingChanges) {
  const RunOptions keep{.mode = OutputMode::kOverwrite, .keep_stages = true};
  ASSERT_THAT(Merge(kTwo, keep), IsOk());
  const std::string file = "out.stages/half/model.safetensors";
  const auto written = fs::last_write_time(file);
  // Another output of the same stage.
  ASSERT_THAT(Merge(absl::StrReplaceAll(kTwo, {{"0.5", "0.25"}}), keep), IsOk());
  EXPECT_EQ(fs::last_write_time(file), written);
  // A damaged file is not used.
  const std::string good = ReadFile(file);
  std::string bad = good;
  bad.back() ^= 1;
  WriteFile(file, bad);
  ASSERT_THAT(Merge(kTwo, keep), IsOk());
  EXPECT_EQ(ReadFile(file), good);
  // Another stage under the same name is made anew only when asked.
  const std::string changed = absl::StrReplaceAll(kTwo, {{"weight: 3", "weight: 4"}});
  fs::remove_all("out");
  EXPECT_THAT(Merge(changed, {.keep_stages = true}),
              StatusIs(absl::StatusCode::kAlreadyExists, StartsWith("stage half: ")));
  ASSERT_THAT(Merge(changed, keep), IsOk());
  EXPECT_NE(ReadFile(file), good);
}

TEST_F(StagesTest, ResumeWhereTheyStopped) {
  ASSERT_THAT(Merge(kTwo, {.output = "whole"}), IsOk());
  for (const char* at : {"1/2 half merging", "2/2  publishing"}) {
    Watcher watcher;
    watcher.stop_at = at;
    const auto stopped = Merge(kTwo, {.observer = &watcher, .stop = watcher.stop.get_token()});
    if (absl::IsCancelled(stopped.status())) {
      EXPECT_FALSE(fs::exists("out/config.json"));
      EXPECT_THAT(Merge(kTwo), StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("--resume")));
    } else {
      EXPECT_STREQ(at, "1/2 half merging") << "a tiny stage may end before it hears of the stop";
      ASSERT_THAT(stopped, IsOk());
      fs::remove_all("out");
    }
    ASSERT_THAT(Merge(kTwo, {.mode = OutputMode::kResume}), IsOk());
    EXPECT_EQ(ReadFile("out/model.safetensors"), ReadFile("whole/model.safetensors"));
    EXPECT_FALSE(fs::exists("out.stages"));
    fs::remove_all("out");
  }
}

// Position ids are not floating: planning compares the stage's with the other model's.
TEST_F(StagesTest, PlanReadsWhatAStageOnlyCopies) {
  const std::string recipe =
      "name: berts\nmerge_method: linear\nmodels: [{model: ./bert_a, parameters: {weight: "
      "1}}]\n---\n"
      "merge_method: linear\nmodels:\n"
      "  - {model: berts, parameters: {weight: 1}}\n"
      "  - {model: ./bert_a, parameters: {weight: 1}}\n";
  ASSERT_THAT(Merge(recipe), IsOk());
  EXPECT_EQ(ReadTensors("out").at("bert.embeddings.position_ids").values,
            ReadTensors("bert_a").at("bert.embeddings.position_ids").values);
  EXPECT_THAT(
      MakePlanOf(absl::StrReplaceAll(recipe, {{"  - {model: ./bert_a", "  - {model: ./bert_ids"}})),
      StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("must be equal")));
}

TEST_F(StagesTest, EverythingIsPlannedBeforeTheFirstIsMerged) {
  const auto plan = MakePlanOf(kTwo);
  ASSERT_THAT(plan, IsOk());
  ASSERT_EQ(plan->stages.size(), 1u);
  EXPECT_EQ(plan->stages[0].name, "half");
  EXPECT_EQ(plan->stages[0].plan->tensors.size(), plan->tensors.size());
  EXPECT_EQ(plan->models[0].ref, "half");

  const auto fails = [](const std::string& text, absl::string_view part) {
    EXPECT_THAT(MakePlanOf(text).status().message(), HasSubstr(std::string(part)));
  };
  // The stage has another width, other layers, another architecture, a missing parameter.
  fails(
      absl::StrReplaceAll(kTwo, {{"./llama_a", "./llama_wide"}, {"./llama_b", "./llama_wide+./x"}}),
      "x");
  const auto of_one = [](absl::string_view model) {
    return absl::StrReplaceAll(
        kTwo, {{"./llama_a", model}, {"  - {model: ./llama_b, parameters: {weight: 3}}\n", ""}});
  };
  fails(of_one("./llama_wide"), "shapes differ");
  fails(of_one("./llama_3"), "the same number of layers; model half has 3");
  fails(of_one("./mistral_a"), "MistralForCausalLM");
  fails(absl::StrReplaceAll(kTwo, {{", parameters: {weight: 3}", ""}}),
        "stage half: parameter `weight`");
  fails(absl::StrReplaceAll(kTwo, {{"./llama_b", "./nowhere"}}), "recipe:5:13");
  // Layers of a stage count as they will be.
  const std::string franken =
      "name: tall\nmerge_method: passthrough\nslices:\n"
      "  - sources: [{model: ./llama_a, layer_range: [0, 2]}]\n"
      "  - sources: [{model: ./llama_b, layer_range: [0, 2]}]\n---\n"
      "merge_method: passthrough\nslices:\n"
      "  - sources: [{model: tall, layer_range: [3, 4]}]\n";
  ASSERT_THAT(Merge(franken), IsOk());
  EXPECT_EQ(ReadTensors("out").at("model.layers.0.mlp.up_proj.weight").values,
            ReadTensors("llama_b").at("model.layers.1.mlp.up_proj.weight").values);
  fails(absl::StrReplaceAll(franken, {{"[3, 4]", "[3, 5]"}}),
        "beyond model tall, which has 4 layers");
}

TEST_F(StagesTest, StagesKeepTheTokenizerForWhatFollows) {
  const std::string text = absl::StrReplaceAll(
      kTwo, {{"base_model: ./llama_base", "base_model: ./llama_base\ntokenizer_source: half"}});
  const auto plan = MakePlanOf(text, {.copy_tokenizer = false});
  ASSERT_THAT(plan, IsOk());
  for (const PlanFile& file : plan->aux_files) EXPECT_NE(file.name, "tokenizer.json");
  ASSERT_THAT(Merge(text), IsOk());
  EXPECT_EQ(ReadFile("out/tokenizer.json"), ReadFile("llama_a/tokenizer.json"));
}

TEST_F(StagesTest, WarningsAndStrict) {
  const std::string text = absl::StrReplaceAll(kTwo, {{"weight: 1}}", "weight: 1, density: 1}}"}});
  const auto plan = MakePlanOf(text);
  ASSERT_THAT(plan, IsOk());
  EXPECT_THAT(plan->warnings, ElementsAre(HasSubstr("recipe:4:")));
  EXPECT_THAT(MakePlanOf(text, {.strict = true}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("density")));
}

TEST_F(StagesTest, AStageThatChangesMeanwhileIsAnError) {
  const auto plan = MakePlanOf(kTwo);
  ASSERT_THAT(plan, IsOk());
  class Changer : public Observer {
   public:
    void OnProgress(const Progress& progress) override {
      if (progress.stage != 2 || changed) return;
      changed = true;
      fs::last_write_time("out.stages/half/model.safetensors", fs::file_time_type::clock::now());
    }
    bool changed = false;
  } changer;
  EXPECT_THAT(RunPlan(*plan, {.output = "out", .observer = &changer}),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("changed since")));
  // The plan can be run again.
  EXPECT_THAT(RunPlan(*plan, {.output = "again"}), IsOk());
}

}  // namespace
}  // namespace pewter
