// What holds for every plan: layout, fingerprint, model card.
#include "merge/plan/plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <map>
#include <set>
#include <string>

#include "merge/checkpoint/safetensors.h"
#include "merge/recipe/recipe.h"
#include "nlohmann/json.hpp"
#include "plan_zoo.h"
#include "tests/support/matchers.h"
#include "tests/support/temp_folder.h"

namespace pewter {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::IsOk;
using ::testing::StartsWith;

constexpr char kLinear[] =
    "merge_method: linear\n"
    "models:\n"
    "  - {model: ./llama_a, parameters: {weight: 0.5}}\n"
    "  - {model: ./llama_b, parameters: {weight: 0.5}}\n";

class PlanTest : public ::testing::Test {
 protected:
  static PlanOptions Options() { return {.memory_bytes = int64_t{1} << 30, .device = "cpu"}; }

  static absl::StatusOr<Plan> Make(
      absl::string_view text, const PlanOptions& options = Options(),
      const std::vector<std::pair<std::string, std::string>>& set = {}) {
    const auto recipe = ParseRecipe(text, set);
    if (!recipe.ok()) return recipe.status();
    return MakePlan(*recipe, options);
  }

  static std::string Text(const Plan& plan, const std::string& name) {
    for (const PlanFile& file : plan.aux_files) {
      if (file.name == name) return file.text;
    }
    ADD_FAILURE() << "no " << name;
    return "";
  }

  testing::PlanZoo zoo_;
};

TEST_F(PlanTest, ShardsHoldEveryTensorOnceWithoutHoles) {
  for (int64_t shard_bytes : {1, 100, 400, 5000}) {
    PlanOptions options = Options();
    options.shard_bytes = shard_bytes;
    const auto plan = Make(kLinear, options);
    ASSERT_THAT(plan, IsOk());
    std::set<std::string> names;
    int64_t written = 0;
    int64_t data = 0;
    for (size_t s = 0; s < plan->shards.size(); ++s) {
      const PlanShard& shard = plan->shards[s];
      const auto header =
          ParseSafetensorsHeader(absl::string_view(shard.header).substr(8),
                                 static_cast<int64_t>(shard.header.size()), shard.bytes);
      ASSERT_THAT(header, IsOk());
      EXPECT_EQ(header->metadata.at("format"), "pt");
      ASSERT_EQ(header->tensors.size(), shard.tensors.size());
      for (size_t i = 0; i < shard.tensors.size(); ++i) {
        const PlanTensor& tensor = plan->tensors[shard.tensors[i]];
        EXPECT_EQ(header->tensors[i].name, tensor.name);
        EXPECT_EQ(header->tensors[i].offset, tensor.offset);
        EXPECT_EQ(header->tensors[i].bytes, tensor.bytes);
        EXPECT_EQ(tensor.shard, static_cast<int>(s));
        EXPECT_TRUE(names.insert(tensor.name).second);
        data += tensor.bytes;
      }
      const int64_t in_shard = shard.bytes - static_cast<int64_t>(shard.header.size());
      EXPECT_TRUE(in_shard <= shard_bytes || shard.tensors.size() == 1);
      written += shard.bytes;
    }
    EXPECT_EQ(names.size(), plan->tensors.size());
    EXPECT_EQ(written, plan->write_bytes);
    EXPECT_EQ(plan->read_bytes, 2 * data);
    EXPECT_EQ(plan->index_json.empty(), plan->shards.size() == 1);
    if (plan->index_json.empty()) continue;
    const auto index = nlohmann::json::parse(plan->index_json);
    EXPECT_EQ(index["metadata"]["total_size"], data);
    for (const PlanTensor& tensor : plan->tensors) {
      EXPECT_EQ(index["weight_map"][tensor.name], plan->shards[tensor.shard].file);
    }
  }
}

TEST_F(PlanTest, FingerprintIsThatOfWhatDecidesTheBytes) {
  const auto fingerprint = [](const absl::StatusOr<Plan>& plan) {
    EXPECT_THAT(plan, IsOk());
    EXPECT_EQ(plan->fingerprint.size(), 64u);
    return plan->fingerprint;
  };
  const std::string first = fingerprint(Make(kLinear));
  PlanOptions same = Options();
  same.memory_bytes *= 2;
  same.threads = 7;
  same.strict = true;
  EXPECT_EQ(fingerprint(Make(kLinear, same)), first);

  std::set<std::string> all = {first};
  PlanOptions options = Options();
  options.seed = 1;
  EXPECT_TRUE(all.insert(fingerprint(Make(kLinear, options))).second);
  options = Options();
  options.shard_bytes = 100;
  EXPECT_TRUE(all.insert(fingerprint(Make(kLinear, options))).second);
  options = Options();
  options.write_model_card = false;
  EXPECT_TRUE(all.insert(fingerprint(Make(kLinear, options))).second);
  EXPECT_TRUE(all.insert(fingerprint(Make(std::string(kLinear) + "# more\n"))).second);
  EXPECT_TRUE(all.insert(fingerprint(Make(kLinear, Options(), {{"dtype", "float32"}}))).second);
  testing::WriteFile("llama_a/tokenizer_config.json", "{\"changed\": 1}");
  EXPECT_TRUE(all.insert(fingerprint(Make(kLinear))).second);
  namespace fs = std::filesystem;
  fs::last_write_time("llama_b/model.safetensors",
                      fs::last_write_time("llama_b/model.safetensors") + std::chrono::seconds(1));
  EXPECT_TRUE(all.insert(fingerprint(Make(kLinear))).second);
}

TEST_F(PlanTest, ModelCardTellsHowTheModelWasMade) {
  const std::string recipe =
      "merge_method: slerp\nbase_model: ./llama_base\nmodels: [{model: ./llama_a}]\n"
      "parameters: {t: 0.5}\n# ``` a fence\n";
  const auto plan = Make(recipe, Options(), {{"dtype", "float16"}});
  ASSERT_THAT(plan, IsOk());
  const std::string config = recipe + "# set on the command line: dtype=float16\n";
  EXPECT_EQ(Text(*plan, "mergekit_config.yml"), config);
  const std::string card = Text(*plan, "README.md");
  EXPECT_THAT(card,
              AllOf(StartsWith("---\nlibrary_name: transformers\ntags:\n- mergekit\n- merge\n"
                               "- pewter\n---\n"),
                    HasSubstr("[SLERP](https://"), HasSubstr("base model is `./llama_base`"),
                    HasSubstr("- `./llama_a`\n"), HasSubstr("````yaml\n" + config + "````\n")));
}

TEST_F(PlanTest, ConfigurationChangesNothingElse) {
  testing::WriteFile("llama_a/config.json",
                     "{\"zeta\": 1, \"architectures\": [\"LlamaForCausalLM\"], \"model_type\": "
                     "\"llama\", \"num_hidden_layers\": 2, \"eps\": 1e-12, \"nested\": {\"b\": "
                     "[1], \"a\": null}, \"vocab_size\": 6}");
  const auto plan = Make(kLinear, Options(), {{"dtype", "bfloat16"}});
  ASSERT_THAT(plan, IsOk());
  EXPECT_EQ(nlohmann::ordered_json::parse(plan->config_json).dump(),
            "{\"zeta\":1,\"architectures\":[\"LlamaForCausalLM\"],\"model_type\":\"llama\","
            "\"num_hidden_layers\":2,\"eps\":1e-12,\"nested\":{\"b\":[1],\"a\":null},"
            "\"vocab_size\":6}");
}

TEST_F(PlanTest, ResolvesOptions) {
  const auto plan = Make(kLinear, {.device = "cpu"});
  ASSERT_THAT(plan, IsOk());
  EXPECT_GT(plan->options.memory_bytes, 0);
  EXPECT_LE(plan->options.memory_bytes, int64_t{4} << 30);
  EXPECT_GT(plan->options.threads, 0);
  EXPECT_EQ(plan->options.device, "cpu");
  EXPECT_GT(plan->peak_bytes, 0);
  EXPECT_LE(plan->peak_bytes, plan->options.memory_bytes);
  EXPECT_FALSE(Make(kLinear, {.memory_bytes = -1, .device = "cpu"}).ok());
  EXPECT_FALSE(Make(kLinear, {.device = "tpu"}).ok());
  EXPECT_FALSE(Make(kLinear, {.device = "cpu", .shard_bytes = 0}).ok());
}

}  // namespace
}  // namespace pewter
