// mergekit's recipes against mergekit's outputs. Cases are folders (tests/goldens/README.md); a
// larger set beside the checkout is run too where there is one.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "merge/pewter.h"
#include "merge/plan/extract_lora.h"
#include "nlohmann/json.hpp"
#include "tests/support/tiny_model.h"

namespace pewter {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using testing::ReadFile;
using testing::ReadTensors;
using testing::TinyTensor;

struct Case {
  std::string root;
  std::string id;
  friend void PrintTo(const Case& c, std::ostream* out) { *out << c.root << "/cases/" << c.id; }
};

// Cases in which mergekit fails and Pewter does better on purpose (adapters need no cache). Those
// that mergekit itself takes for mistakes of its own are marked in their meta.json.
const std::set<std::string>& NotOurs() {
  static const auto* const ids = new std::set<std::string>{"err_lora_without_cache"};
  return *ids;
}

std::vector<Case> Cases() {
  std::vector<Case> cases;
  const fs::path source = PEWTER_SOURCE_DIR;
  for (const fs::path& root : {source / "tests/goldens", source / "../shared/goldens/mergekit"}) {
    if (!fs::is_directory(root / "cases")) continue;
    for (const auto& entry : fs::directory_iterator(root / "cases")) {
      const std::string id = entry.path().filename();
      const json meta = json::parse(ReadFile(entry.path() / "meta.json"));
      const std::set<std::string> of_their_own = {"mergekit-extract-lora", "mergekit-moe",
                                                  "mergekit-tokensurgeon"};
      if (of_their_own.contains(meta["tool"].get<std::string>())) {
        cases.push_back({fs::weakly_canonical(root).string(), id});
        continue;
      }
      if (NotOurs().contains(id) || !fs::exists(entry.path() / "recipe.yml")) continue;
      const std::set<std::string> tools = {"mergekit-yaml", "mergekit-multi", "mergekit-pytorch"};
      if (!tools.contains(meta["tool"].get<std::string>())) continue;
      const absl::StatusOr<Recipe> recipe = ParseRecipe(ReadFile(entry.path() / "recipe.yml"));
      const bool is_error = meta["compare"]["mode"] == "error";
      if (!is_error && recipe.ok() && !FindMethod(recipe->merge_method).ok()) continue;
      cases.push_back({fs::weakly_canonical(root).string(), id});
    }
  }
  std::sort(cases.begin(), cases.end(), [](const Case& a, const Case& b) {
    return std::tie(a.root, a.id) < std::tie(b.root, b.id);
  });
  return cases;
}

class GoldenTest : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    fs::current_path(GetParam().root);
    folder_ = GetParam().root + "/cases/" + GetParam().id;
    meta_ = json::parse(ReadFile(folder_ + "/meta.json"));
    const std::vector<std::string> args = meta_["args"];
    for (size_t i = 0; i < args.size(); ++i) {
      if (args[i] == "--out-shard-size") options_.shard_bytes = args[i + 1] == "60K" ? 60'000 : 0;
      if (args[i] == "--allow-crimes") options_.allow_mixed = true;
      if (args[i] == "--unsafe-truncate-embeddings") options_.truncate_vocabularies = true;
      if (args[i] == "--tensor-intersection" || args[i] == "-i") {
        options_.raw_names = RawNames::kIntersection;
      }
      if (args[i] == "--tensor-union" || args[i] == "-u") options_.raw_names = RawNames::kUnion;
      if (args[i] == "--random-seed") options_.seed = std::stoul(args[i + 1]);
      if (args[i] == "--no-write-model-card") options_.write_model_card = false;
      if (args[i] == "--no-copy-tokenizer") options_.copy_tokenizer = false;
    }
    options_.device = "cpu";
  }

  // mergekit-extract-lora's command line.
  absl::StatusOr<Plan> MakeExtractPlan() {
    ExtractLoraOptions extract;
    const std::vector<std::string> args = meta_["args"];
    for (size_t i = 0; i < args.size(); ++i) {
      if (args[i] == "--model")
        extract.model.path = args[++i];
      else if (args[i] == "--base-model")
        extract.base.path = args[++i];
      else if (args[i] == "--out-path")
        ++i;
      else if (args[i] == "--max-rank")
        extract.max_rank = std::stol(args[++i]);
      else if (args[i] == "--no-distribute-scale")
        extract.distribute_scale = false;
      else if (args[i] == "--sv-epsilon")
        extract.sv_epsilon = std::stod(args[++i]);
      else if (args[i] == "--embed-lora")
        extract.embed_lora = true;
      else if (args[i] == "--skip-undecomposable")
        extract.skip_undecomposable = true;
      else if (args[i] == "--save-module")
        extract.save_modules.push_back(args[++i]);
      else if (args[i] == "-i" || args[i] == "--include-regex")
        extract.include.push_back(args[++i]);
      else if (args[i] == "-e" || args[i] == "--exclude-regex")
        extract.exclude.push_back(args[++i]);
      else
        EXPECT_EQ(args[i], "--no-lazy-unpickle") << "an option that this test does not know";
    }
    return MakeExtractLoraPlan(extract, options_);
  }

  // mergekit-tokensurgeon MODEL DONOR OUT [options].
  absl::StatusOr<Plan> MakeTransplantPlan() {
    const std::map<std::string, std::string> keys = {{"-a", "method"},
                                                     {"--approximation-method", "method"},
                                                     {"-k", "k"},
                                                     {"--k", "k"},
                                                     {"-w", "weight_scheme"},
                                                     {"--weight-scheme", "weight_scheme"},
                                                     {"-s", "subword_method"},
                                                     {"--subword-method", "subword_method"},
                                                     {"-pm", "prefix_match"},
                                                     {"--prefix-match", "prefix_match"},
                                                     {"-bm", "byte_match"},
                                                     {"--byte-match", "byte_match"},
                                                     {"-nvn", "new_vocab_noise"},
                                                     {"--new-vocab-noise", "new_vocab_noise"},
                                                     {"-nvs", "new_vocab_scale"},
                                                     {"--new-vocab-scale", "new_vocab_scale"}};
    const std::vector<std::string> args = meta_["args"];
    json approximate;
    approximate["method"] = "omp";
    for (size_t i = 3; i < args.size(); ++i) {
      if (keys.contains(args[i])) {
        // Numbers as numbers, words as words.
        const std::string& key = keys.at(args[i]);
        const json value = json::parse(args[++i], nullptr, false);
        approximate[key] = value.is_number() ? value : json(args[i]);
        // mergekit has these two the wrong way round.
        if (key.ends_with("_match") && (args[i] == "lm_head" || args[i] == "embed")) {
          approximate[key] = args[i] == "embed" ? "lm_head" : "embed";
        }
      } else if (args[i] == "-c" || args[i] == "--cosine-similarity") {
        approximate["cosine_similarity"] = true;
      } else if (args[i] == "--magikarp") {
        approximate["magikarp"] = true;
      } else if (args[i] == "--batch-size") {
        ++i;
      } else {
        EXPECT_TRUE(args[i] == "-nc" || args[i].starts_with("--no-"))
            << args[i] << ": an option that this test does not know";
      }
    }
    json recipe;
    recipe["merge_method"] = "passthrough";
    recipe["models"][0]["model"] = args[0];
    recipe["tokenizer"]["source"] = args[1];
    recipe["tokenizer"]["approximate"] = approximate;
    const absl::StatusOr<Recipe> parsed = ParseRecipe(recipe.dump());
    if (!parsed.ok()) return parsed.status();
    return MakePlan(*parsed, options_);
  }

  // Products of the factors, as their signs and bases are free; everything else as it is.
  void CompareAdapters(const json& compare, const std::map<std::string, TinyTensor>& expected,
                       const std::map<std::string, TinyTensor>& got) {
    const auto product = [](const TinyTensor& b, const TinyTensor& a) {
      const int64_t rank = b.shape[1], columns = a.shape[1];
      std::vector<double> values(b.shape[0] * columns);
      for (int64_t i = 0; i < b.shape[0]; ++i) {
        for (int64_t k = 0; k < rank; ++k) {
          for (int64_t j = 0; j < columns; ++j) {
            values[i * columns + j] += b.values[i * rank + k] * a.values[k * columns + j];
          }
        }
      }
      return values;
    };
    const double atol = compare["atol"];
    for (const auto& [name, want] : expected) {
      ASSERT_TRUE(got.contains(name)) << name;
      ASSERT_EQ(got.at(name).shape, want.shape) << name;
      const bool a = name.find("lora_A") != std::string::npos ||
                     name.find("lora_embedding_A") != std::string::npos;
      const bool b = name.find("lora_B") != std::string::npos ||
                     name.find("lora_embedding_B") != std::string::npos;
      if (b) continue;
      std::vector<double> of_want = want.values, of_got = got.at(name).values;
      if (a) {
        std::string partner = name;
        partner[partner.rfind("_A") + 1] = 'B';
        of_want = product(expected.at(partner), want);
        of_got = product(got.at(partner), got.at(name));
      }
      double worst = 0;
      for (size_t i = 0; i < of_want.size(); ++i) {
        worst = std::max(worst, std::abs(of_want[i] - of_got[i]));
      }
      EXPECT_LE(worst, atol) << name;
    }
    EXPECT_EQ(got.size(), expected.size());
    const json want = json::parse(ReadFile(folder_ + "/expected/adapter_config.json"));
    const json made = json::parse(ReadFile(out_ / "model/adapter_config.json"));
    for (const char* key : {"r", "lora_alpha", "task_type", "peft_type", "rank_pattern",
                            "alpha_pattern", "fan_in_fan_out", "use_rslora"}) {
      EXPECT_EQ(made[key], want[key]) << key;
    }
    for (const char* key : {"target_modules", "modules_to_save"}) {
      EXPECT_EQ(made[key].get<std::set<std::string>>(), want[key].get<std::set<std::string>>())
          << key;
    }
  }

  absl::StatusOr<Plan> MakeMoeGoldenPlan() {
    const absl::StatusOr<MoeRecipe> recipe = ParseMoeRecipe(ReadFile(folder_ + "/recipe.yml"));
    if (!recipe.ok()) return recipe.status();
    const std::vector<std::string> args = meta_["args"];
    const bool same = std::find(args.begin(), args.end(),
                                "--i-understand-this-is-not-useful-without-training") != args.end();
    return MakeMoePlan(*recipe, options_, {.allow_all_same = same});
  }

  absl::StatusOr<Plan> MakeGoldenPlan() {
    if (meta_["tool"] == "mergekit-extract-lora") return MakeExtractPlan();
    if (meta_["tool"] == "mergekit-moe") return MakeMoeGoldenPlan();
    if (meta_["tool"] == "mergekit-tokensurgeon") return MakeTransplantPlan();
    const absl::StatusOr<Recipe> recipe = ParseRecipe(ReadFile(folder_ + "/recipe.yml"));
    if (!recipe.ok()) return recipe.status();
    return MakePlan(*recipe, options_);
  }

  void CompareClose(const json& compare, const std::map<std::string, TinyTensor>& expected,
                    const std::map<std::string, TinyTensor>& merged) {
    const double rtol = compare["rtol"], atol = compare["atol"];
    // mergekit rounds to bfloat16 after every step; where two task vectors nearly cancel, the sign
    // that it elects can be the other one (docs/mergekit-differences.md). Its own case for the
    // model card states no share for that.
    const double allowed =
        GetParam().id == "model_card" ? 1e-3 : compare.value("max_mismatch_frac", 0.0);
    for (const auto& [name, want] : expected) {
      const TinyTensor& got = merged.at(name);
      int64_t bad = 0;
      double worst = 0;
      for (size_t i = 0; i < want.values.size(); ++i) {
        const double difference = std::abs(want.values[i] - got.values[i]);
        worst = std::max(worst, difference);
        if (!(difference <= atol + rtol * std::abs(want.values[i]))) ++bad;
      }
      EXPECT_LE(static_cast<double>(bad), allowed * static_cast<double>(want.values.size()))
          << name << ": largest difference " << worst;
    }
  }

  // Token to id of a model with a tokenizer.json.
  static std::map<std::string, int64_t> VocabularyOf(const std::string& folder) {
    const json tokenizer = json::parse(ReadFile(folder + "/tokenizer.json"));
    std::map<std::string, int64_t> ids = tokenizer["model"]["vocab"];
    for (const json& added : tokenizer["added_tokens"]) ids[added["content"]] = added["id"];
    return ids;
  }

  // mergekit gives new tokens other ids on every run: puts the rows of `merged` in the order of
  // `expected`, by token.
  void AlignRows(const std::string& expected, const std::string& merged,
                 std::map<std::string, TinyTensor>& tensors) {
    const auto want = VocabularyOf(expected), got = VocabularyOf(merged);
    for (auto& [name, tensor] : tensors) {
      if (name.find("embed_tokens") == name.npos && name.find("lm_head") == name.npos) continue;
      const std::vector<double> values = tensor.values;
      const int64_t width = tensor.shape[1];
      for (const auto& [token, id] : want) {
        ASSERT_TRUE(got.contains(token)) << token;
        std::copy_n(values.begin() + got.at(token) * width, width,
                    tensor.values.begin() + id * width);
      }
    }
    EXPECT_EQ(want.size(), got.size());
  }

  // Norm of the difference as a share of the norm, tensor by tensor.
  void CompareNorms(const json& compare, const std::map<std::string, TinyTensor>& expected,
                    const std::map<std::string, TinyTensor>& merged) {
    for (const auto& [name, want] : expected) {
      double difference = 0, norm = 0;
      for (size_t i = 0; i < want.values.size(); ++i) {
        difference += std::pow(want.values[i] - merged.at(name).values[i], 2);
        norm += std::pow(want.values[i], 2);
      }
      EXPECT_LE(std::sqrt(difference), compare["max"].get<double>() * std::sqrt(norm)) << name;
    }
  }

  // Probabilities with which DELLA keeps the elements of a delta: by their rank in their row.
  static std::vector<double> RankedProbabilities(const std::vector<double>& delta, int64_t row,
                                                 double density, double epsilon) {
    std::vector<double> probabilities(delta.size(), density);
    if (row < 2) return probabilities;
    std::vector<int64_t> order(row);
    for (size_t first = 0; first < delta.size(); first += row) {
      std::iota(order.begin(), order.end(), static_cast<int64_t>(first));
      std::sort(order.begin(), order.end(),
                [&](int64_t a, int64_t b) { return std::abs(delta[a]) < std::abs(delta[b]); });
      for (int64_t rank = 0; rank < row; ++rank) {
        probabilities[order[rank]] =
            density - epsilon +
            2 * epsilon * static_cast<double>(rank) / static_cast<double>(row - 1);
      }
    }
    return probabilities;
  }

  // DARE or DELLA of one fine-tune: which elements stay is ours to draw, how many and with which
  // value is not.
  void CompareRandom(const json& compare, const std::map<std::string, TinyTensor>& merged) {
    const auto base = ReadTensors("models/" + compare["base"].get<std::string>());
    const auto tuned = ReadTensors("models/" + compare["ft"].get<std::string>());
    for (const auto& [name, got] : merged) {
      const std::vector<double>&b = base.at(name).values, &x = tuned.at(name).values;
      double all = 0, kept = 0, expected = 0;
      // Of the half of the nonzero elements that are kept with the larger probabilities.
      int64_t nonzero = 0, kept_count = 0, likely = 0, likely_kept = 0;
      std::vector<double> delta(b.size());
      for (size_t i = 0; i < b.size(); ++i) {
        delta[i] = static_cast<float>(x[i]) - static_cast<float>(b[i]);
      }
      const double density = compare["density"];
      const Shape& shape = base.at(name).shape;
      const std::vector<double> probability =
          RankedProbabilities(delta, shape.rank() == 0 ? 1 : shape[shape.rank() - 1], density,
                              compare.value("epsilon", 0.0));
      for (size_t i = 0; i < b.size(); ++i) {
        const bool stays = got.values[i] != b[i];
        if (delta[i] == 0) {
          EXPECT_EQ(got.values[i], b[i]) << name;
        } else {
          ++nonzero;
          expected += probability[i];
          all += std::abs(delta[i]);
          if (stays) kept += std::abs(delta[i]), ++kept_count;
          if (probability[i] > density) ++likely, likely_kept += stays;
        }
      }
      if (nonzero < 400) continue;
      const double n = static_cast<double>(nonzero);
      EXPECT_NEAR(static_cast<double>(kept_count) / n, expected / n,
                  6 * std::sqrt(density * (1 - density) / n) + 1e-3)
          << name;
      if (compare.contains("epsilon") && nonzero > 3000) {
        EXPECT_GT(likely_kept * (nonzero - likely), (kept_count - likely_kept) * likely) << name;
      }
      // Normalised, the weight of the only model makes no difference.
      const double weight = compare.value("normalize", false) ? 1 : compare["weight"].get<double>();
      const double scale = (compare["rescale"].get<bool>() ? all / kept : 1.0) * weight;
      for (size_t i = 0; i < b.size(); ++i) {
        if (got.values[i] != b[i]) {
          ASSERT_NEAR(got.values[i], b[i] + scale * delta[i], 5e-6) << name << " " << i;
        }
      }
    }
  }

  std::string folder_;
  json meta_;
  PlanOptions options_;
  testing::TempFolder out_;
};

TEST_P(GoldenTest, Agrees) {
  const json& compare = meta_["compare"];
  const absl::StatusOr<Plan> plan = MakeGoldenPlan();
  if (compare.value("quirk", false)) {
    ASSERT_TRUE(plan.ok()) << plan.status();
    testing::TempFolder out;
    EXPECT_TRUE(RunPlan(*plan, {.output = out / "model"}).ok());
    return;
  }
  if (compare["mode"] == "error") {
    ASSERT_FALSE(plan.ok()) << "mergekit fails with: " << meta_["error"]["message"];
    EXPECT_NE(plan.status().code(), absl::StatusCode::kInternal);
    EXPECT_THAT(std::string(plan.status().message()), ::testing::SizeIs(::testing::Gt(15u)));
    RecordProperty("message", std::string(plan.status().message()));
    return;
  }
  ASSERT_TRUE(plan.ok()) << plan.status();
  const absl::StatusOr<Manifest> manifest = RunPlan(*plan, {.output = out_ / "model"});
  ASSERT_TRUE(manifest.ok()) << manifest.status();

  auto merged = ReadTensors(out_ / "model");
  if (compare["mode"] == "random") {
    EXPECT_EQ(merged.size(), meta_["n_tensors"].get<size_t>());
    CompareRandom(compare, merged);
    return;
  }
  const auto expected = ReadTensors(folder_ + "/expected");
  if (compare["mode"] == "lora_product") {
    CompareAdapters(compare, expected, merged);
    return;
  }
  for (const auto& [name, want] : expected) {
    ASSERT_TRUE(merged.contains(name)) << name;
    EXPECT_EQ(merged.at(name).dtype, want.dtype) << name;
    ASSERT_EQ(merged.at(name).shape, want.shape) << name;
  }
  EXPECT_EQ(merged.size(), expected.size());
  if (compare.value("vocab_align", false)) {
    AlignRows(folder_ + "/expected", out_ / "model", merged);
  }
  if (compare["mode"] == "relnorm") {
    CompareNorms(compare, expected, merged);
  } else {
    CompareClose(compare, expected, merged);
  }

  if (meta_["tool"] == "mergekit-pytorch") {
    EXPECT_TRUE(fs::exists(out_ / "model/model.safetensors"));
    EXPECT_FALSE(fs::exists(out_ / "model/config.json"));
    return;
  }
  const json want = json::parse(ReadFile(folder_ + "/expected/config.json"));
  const json got = json::parse(ReadFile(out_ / "model/config.json"));
  // Of mixtures all that tells one from the dense models, too.
  for (const char* key :
       {"num_hidden_layers", "n_layer", "vocab_size", "architectures", "num_local_experts",
        "num_experts", "num_experts_per_tok", "n_routed_experts", "n_shared_experts",
        "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size",
        "sliding_window", "norm_topk_prob"}) {
    if (!want.contains(key)) continue;
    // mergekit leaves the size of a vocabulary that it cuts as it was.
    if (options_.truncate_vocabularies && key == std::string("vocab_size")) continue;
    EXPECT_EQ(got.value(key, json()), want[key]) << key;
  }
  const std::string chat_template = folder_ + "/expected/chat_template.jinja";
  if (fs::exists(chat_template)) {
    EXPECT_EQ(ReadFile(out_ / "model/chat_template.jinja"), ReadFile(chat_template));
  }
}

INSTANTIATE_TEST_SUITE_P(Mergekit, GoldenTest, ::testing::ValuesIn(Cases()), [](const auto& info) {
  return info.param.id + (info.param.root.ends_with("tests/goldens") ? "" : "_more");
});

}  // namespace
}  // namespace pewter
