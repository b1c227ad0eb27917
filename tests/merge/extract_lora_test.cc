// Extraction of LoRA adapters: the adapter, applied to its base by the reader of adapters, gives
// back the fine-tuned model or the best approximation of its rank.
#include "merge/plan/extract_lora.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "kernels/backend.h"
#include "merge/pewter.h"
#include "nlohmann/json.hpp"
#include "tests/support/matchers.h"
#include "tests/support/tiny_model.h"

namespace pewter {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::IsOk;
using ::testing::Not;
using testing::RandomTensor;
using testing::ReadFile;
using testing::ReadTensors;
using testing::TempFolder;
using testing::TinyTensor;
using ::testing::UnorderedElementsAre;

constexpr char kQ[] = "model.layers.0.self_attn.q_proj";
constexpr char kDown[] = "model.layers.0.mlp.down_proj";
constexpr char kEmbed[] = "model.embed_tokens.weight";
constexpr char kNorm[] = "model.norm.weight";

std::string Weight(absl::string_view module) { return absl::StrCat(module, ".weight"); }

// u_0 v_0^T * values[0] + ..., with orthonormal u and v of +-1 / sqrt(n): singular values known.
TinyTensor KnownSpectrum(const std::string& name, int64_t rows, int64_t columns,
                         const std::vector<double>& values) {
  // Rows of a Hadamard matrix; both extents are powers of two.
  const auto sign = [](uint64_t i, uint64_t j) {
    return __builtin_popcountll(i & j) % 2 == 0 ? 1.0 : -1.0;
  };
  TinyTensor tensor{.name = name, .dtype = DType::kF64, .shape = Shape{rows, columns}};
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      double sum = 0;
      for (size_t k = 0; k < values.size(); ++k) sum += values[k] * sign(i, k) * sign(j, k + 1);
      tensor.values.push_back(sum / std::sqrt(static_cast<double>(rows * columns)));
    }
  }
  return tensor;
}

class ExtractLora : public ::testing::Test {
 protected:
  void SetUp() override {
    base_ = {RandomTensor(Weight(kQ), DType::kF32, Shape{32, 16}, 1),
             RandomTensor(Weight(kDown), DType::kF32, Shape{16, 64}, 2),
             RandomTensor(kEmbed, DType::kF32, Shape{40, 16}, 3),
             RandomTensor(kNorm, DType::kF32, Shape{16}, 4)};
    tuned_ = base_;
    for (size_t i = 0; i < tuned_.size(); ++i) {
      Change(tuned_[i], RandomTensor("", DType::kF32, tuned_[i].shape, 10 + i, 0.1).values);
    }
    extract_.max_rank = 4;
    options_.device = "cpu";
    options_.threads = 2;
  }

  static void Change(TinyTensor& tensor, const std::vector<double>& by) {
    for (size_t i = 0; i < by.size(); ++i) {
      tensor.values[i] = static_cast<float>(tensor.values[i] + by[i]);
    }
  }

  void WriteModel(const std::string& name, const std::vector<TinyTensor>& tensors) {
    folder_.Write(name + "/config.json", config_);
    testing::WriteSafetensors(folder_ / (name + "/model.safetensors"), tensors);
  }

  absl::StatusOr<Plan> MakeOne() {
    WriteModel("base", base_);
    WriteModel("tuned", tuned_);
    extract_.model.path = folder_ / "tuned";
    extract_.base.path = folder_ / "base";
    return MakeExtractLoraPlan(extract_, options_);
  }

  void Extract(const std::string& out = "lora") {
    absl::StatusOr<Plan> plan = MakeOne();
    ASSERT_THAT(plan, IsOk());
    plan_ = *std::move(plan);
    const absl::StatusOr<Manifest> manifest = RunPlan(plan_, {.output = folder_ / out});
    ASSERT_THAT(manifest, IsOk());
    config_of_adapter_ = json::parse(ReadFile(folder_ / (out + "/adapter_config.json")));
    EXPECT_TRUE(fs::exists(folder_ / (out + "/pewter_manifest.json")));
    EXPECT_FALSE(fs::exists(folder_ / (out + "/config.json")));
  }

  // A tensor of base + adapter.
  std::vector<double> Applied(const std::string& tensor) {
    const auto model = Checkpoint::Open({.path = folder_ / "base", .adapter = folder_ / "lora"});
    EXPECT_THAT(model, IsOk());
    if (!model.ok()) return {};
    const auto source = (*model)->OpenTensor(tensor, 0);
    EXPECT_THAT(source, IsOk());
    const int64_t elements = (*source)->shape().elements();
    std::vector<std::byte> stored(elements * ByteWidth((*source)->dtype()));
    EXPECT_THAT((*source)->Read(0, elements, absl::MakeSpan(stored), nullptr), IsOk());
    std::vector<double> values(elements);
    kernels::Convert({stored.data(), (*source)->dtype(), elements},
                     {values.data(), DType::kF64, elements});
    return values;
  }

  // Of base + adapter from an F32 tensor.
  double Distance(const TinyTensor& tensor) {
    const std::vector<double> applied = Applied(tensor.name);
    double sum = 0;
    for (size_t i = 0; i < applied.size(); ++i) {
      sum += std::pow(applied[i] - static_cast<float>(tensor.values[i]), 2);
    }
    return std::sqrt(sum);
  }

  std::vector<std::string> Names(const std::string& out = "lora") {
    std::vector<std::string> names;
    for (const auto& [name, tensor] : ReadTensors(folder_ / (out + "/adapter_model.safetensors"))) {
      names.push_back(name);
    }
    return names;
  }

  std::string config_ = R"({"architectures":["StrangeForCausalLM"],"vocab_size":40,
                            "tie_word_embeddings":false})";
  std::vector<TinyTensor> base_, tuned_;
  ExtractLoraOptions extract_;
  PlanOptions options_;
  TempFolder folder_;
  Plan plan_;
  json config_of_adapter_;
};

TEST_F(ExtractLora, FullRankGivesBackTheModel) {
  extract_.max_rank = 1000;
  Extract();
  for (const TinyTensor& tensor : tuned_) EXPECT_LE(Distance(tensor), 1e-5) << tensor.name;
  EXPECT_EQ(config_of_adapter_["r"], 16);
  EXPECT_EQ(config_of_adapter_["lora_alpha"], 16);
  EXPECT_EQ(config_of_adapter_["task_type"], "CAUSAL_LM");
  EXPECT_THAT(config_of_adapter_["target_modules"], UnorderedElementsAre("q_proj", "down_proj"));
  EXPECT_THAT(config_of_adapter_["modules_to_save"], UnorderedElementsAre("embed_tokens", "norm"));
  EXPECT_EQ(config_of_adapter_["base_model_name_or_path"], folder_ / "base");
  EXPECT_THAT(Names(), ElementsAre("base_model.model.model.embed_tokens.weight",
                                   "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight",
                                   "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight",
                                   "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
                                   "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
                                   "base_model.model.model.norm.weight"));
}

TEST_F(ExtractLora, ALowerRankIsTheBestApproximation) {
  for (const bool distribute : {true, false}) {
    SetUp();
    for (const int which : {0, 1}) {
      tuned_[which] = base_[which];
      Change(tuned_[which],
             KnownSpectrum("", base_[which].shape[0], base_[which].shape[1], {4, 3, 2, 1}).values);
    }
    extract_.max_rank = 2;
    extract_.distribute_scale = distribute;
    fs::remove_all(folder_ / "lora");
    Extract();
    for (const int which : {0, 1}) {
      EXPECT_NEAR(Distance(tuned_[which]), std::sqrt(4 + 1), 1e-5) << which << distribute;
    }
    const auto tensors = ReadTensors(folder_ / "lora/adapter_model.safetensors");
    double norm_of_b = 0;
    for (double value :
         tensors.at(absl::StrCat("base_model.model.", kQ, ".lora_B.weight")).values) {
      norm_of_b += value * value;
    }
    EXPECT_NEAR(norm_of_b, distribute ? 4 + 3 : 2, 1e-4);
  }
}

TEST_F(ExtractLora, RanksFollowTheSingularValues) {
  const auto set = [&](int which, const std::vector<double>& values) {
    tuned_[which] = base_[which];
    Change(tuned_[which],
           KnownSpectrum("", base_[which].shape[0], base_[which].shape[1], values).values);
  };
  set(0, {4, 3, 2, 1});
  set(1, {10, 1});
  extract_.energy = 0.8;  // 16 + 9 of 30; 100 of 101
  ASSERT_NO_FATAL_FAILURE(Extract());
  EXPECT_EQ(config_of_adapter_["r"], 2);
  EXPECT_EQ(config_of_adapter_["rank_pattern"], json({{kDown, 1}}));
  EXPECT_EQ(config_of_adapter_["alpha_pattern"], json({{kDown, 1}}));
  EXPECT_NEAR(Distance(tuned_[0]), std::sqrt(5), 1e-5);
  EXPECT_NEAR(Distance(tuned_[1]), 1, 1e-5);

  extract_.energy = 0;
  extract_.sv_epsilon = 2.5;
  ASSERT_NO_FATAL_FAILURE(Extract("epsilon"));
  EXPECT_EQ(config_of_adapter_["rank_pattern"], json({{kDown, 1}}));

  // A module that did not change is left out.
  tuned_[0] = base_[0];
  ASSERT_NO_FATAL_FAILURE(Extract("unchanged"));
  EXPECT_THAT(config_of_adapter_["target_modules"], ElementsAre("down_proj"));
  EXPECT_THAT(plan_.warnings, Contains(HasSubstr("q_proj")));

  extract_.sv_epsilon = 1e9;
  extract_.skip_undecomposable = true;
  EXPECT_EQ(MakeOne().status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(ExtractLora, AnUnchangedModuleOfFixedRankIsZero) {
  tuned_[0] = base_[0];
  Extract();
  EXPECT_EQ(Distance(base_[0]), 0);
}

TEST_F(ExtractLora, RankOfAndSelectionsGoByName) {
  extract_.rank_of = {{"mlp\\.", 7}, {"down", 3}};
  extract_.exclude = {"norm"};
  Extract();
  EXPECT_EQ(config_of_adapter_["r"], 7);
  EXPECT_EQ(config_of_adapter_["rank_pattern"], json({{kQ, 4}}));
  EXPECT_THAT(config_of_adapter_["modules_to_save"], ElementsAre("embed_tokens"));
  EXPECT_EQ(plan_.tensors.size(), 3u);

  extract_.include = {"self_attn"};
  extract_.save_modules = {"q_proj"};
  ASSERT_NO_FATAL_FAILURE(Extract("saved"));
  EXPECT_THAT(Names("saved"),
              ElementsAre("base_model.model.model.layers.0.self_attn.q_proj.weight"));

  extract_.save_modules = {"qproj"};
  EXPECT_THAT(MakeOne().status().message(), HasSubstr("no such module"));
  extract_.save_modules = {};
  extract_.include = {"("};
  EXPECT_THAT(MakeOne().status().message(), HasSubstr("not a regular expression"));
  extract_.include = {"nothing"};
  EXPECT_THAT(MakeOne().status().message(), HasSubstr("nothing is extracted"));
}

TEST_F(ExtractLora, ShortNamesReachNoOtherModules) {
  base_.push_back(
      RandomTensor("model.layers.1.self_attn.q_proj.weight", DType::kF32, Shape{32, 16}, 7));
  tuned_.push_back(base_.back());
  extract_.exclude = {"layers\\.1\\."};
  Extract();
  EXPECT_THAT(config_of_adapter_["target_modules"], UnorderedElementsAre(kQ, "down_proj"));
}

TEST_F(ExtractLora, EmbeddingsAsFactors) {
  extract_.embed_lora = true;
  extract_.skip_undecomposable = true;
  extract_.max_rank = 1000;
  Extract();
  EXPECT_LE(Distance(tuned_[2]), 1e-5);
  EXPECT_THAT(Names(), Contains("base_model.model.model.embed_tokens.lora_embedding_A"));
  EXPECT_TRUE(config_of_adapter_["modules_to_save"].is_null());
  EXPECT_THAT(plan_.warnings, Contains(HasSubstr("--skip-undecomposable")));
}

TEST_F(ExtractLora, ATiedHeadIsSavedWithTheEmbeddings) {
  config_ = R"({"architectures":["StrangeForCausalLM"],"vocab_size":40})";
  Extract();
  EXPECT_THAT(config_of_adapter_["modules_to_save"],
              UnorderedElementsAre("embed_tokens", "norm", "lm_head"));
  const auto tensors = ReadTensors(folder_ / "lora/adapter_model.safetensors");
  EXPECT_EQ(tensors.at("base_model.model.lm_head.weight").values,
            tensors.at("base_model.model.model.embed_tokens.weight").values);
  // The base has no such tensor, and needs none.
  EXPECT_EQ(Distance(tuned_[2]), 0);
  // One that is not the embeddings is refused.
  std::vector<TinyTensor> changed;
  for (const auto& [name, tensor] : tensors) changed.push_back(tensor);
  for (TinyTensor& tensor : changed) {
    if (tensor.name == "base_model.model.lm_head.weight") tensor.values[0] += 1;
  }
  testing::WriteSafetensors(folder_ / "lora/adapter_model.safetensors", changed);
  EXPECT_THAT(
      Checkpoint::Open({.path = folder_ / "base", .adapter = folder_ / "lora"}).status().message(),
      HasSubstr("lm_head"));

  extract_.embed_lora = true;
  ASSERT_NO_FATAL_FAILURE(Extract("factors"));
  EXPECT_THAT(plan_.warnings, Contains(HasSubstr("tied")));
}

TEST_F(ExtractLora, AGrownVocabularyIsSavedWhole) {
  tuned_[2] = RandomTensor(kEmbed, DType::kF32, Shape{44, 16}, 3);
  for (const bool embed_lora : {false, true}) {
    extract_.embed_lora = embed_lora;
    fs::remove_all(folder_ / "lora");
    Extract();
    EXPECT_THAT(plan_.warnings, Contains(HasSubstr("resize the base to 44 tokens")));
    const auto tensors = ReadTensors(folder_ / "lora/adapter_model.safetensors");
    EXPECT_EQ(tensors.at("base_model.model.model.embed_tokens.weight").values,
              ReadTensors(folder_ / "tuned").at(kEmbed).values);
    // What reads it onto the base as it is says what is wrong.
    const auto model = Checkpoint::Open({.path = folder_ / "base", .adapter = folder_ / "lora"});
    EXPECT_THAT(model.status().message(), HasSubstr("[44, 16]"));
  }
}

TEST_F(ExtractLora, OtherShapesAndMissingTensorsAreErrors) {
  tuned_[0] = RandomTensor(Weight(kQ), DType::kF32, Shape{32, 8}, 1);
  const absl::Status status = MakeOne().status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(status.message(), HasSubstr(Weight(kQ)));
  EXPECT_THAT(status.message(), HasSubstr("[32, 8]"));
}

TEST_F(ExtractLora, BiasesThatChangeAreAdded) {
  for (std::vector<TinyTensor>* model : {&base_, &tuned_}) {
    model->push_back(RandomTensor(absl::StrCat(kQ, ".bias"), DType::kF32, Shape{32}, 8));
    model->push_back(RandomTensor(absl::StrCat(kDown, ".bias"), DType::kF32, Shape{16}, 9));
  }
  Change(tuned_[4], RandomTensor("", DType::kF32, Shape{32}, 20).values);
  Extract();
  EXPECT_EQ(config_of_adapter_["lora_bias"], true);
  EXPECT_LE(Distance(tuned_[4]), 1e-5);
  EXPECT_EQ(Distance(tuned_[5]), 0);
  EXPECT_THAT(Names(), Contains(absl::StrCat("base_model.model.", kQ, ".lora_B.bias")));
  EXPECT_THAT(Names(), Not(Contains(absl::StrCat("base_model.model.", kDown, ".lora_B.bias"))));
  EXPECT_THAT(plan_.warnings, Not(Contains(HasSubstr("PEFT does not load"))));
  extract_.embed_lora = true;
  const auto plan = MakeOne();
  ASSERT_THAT(plan, IsOk());
  EXPECT_THAT(plan->warnings, Contains(HasSubstr("PEFT does not load")));
}

TEST_F(ExtractLora, WeightsStoredInOut) {
  config_ = R"({"architectures":["OddLMHeadModel"],"model_type":"gpt2","vocab_size":40})";
  // Square: the shape alone does not say.
  base_[0] = RandomTensor(Weight(kQ), DType::kF32, Shape{16, 16}, 1);
  tuned_[0] = base_[0];
  Change(tuned_[0], RandomTensor("", DType::kF32, Shape{16, 16}, 2).values);
  options_.allow_mixed = true;
  extract_.max_rank = 1000;
  Extract();
  EXPECT_EQ(config_of_adapter_["fan_in_fan_out"], true);
  EXPECT_LE(Distance(tuned_[0]), 1e-5);
  EXPECT_LE(Distance(tuned_[1]), 1e-5);
}

TEST_F(ExtractLora, ModelsMayUseOtherNamesOfATensor) {
  // As GPT-2 is stored with and without its head's prefix.
  config_ = R"({"architectures":["GPT2LMHeadModel"],"model_type":"gpt2","n_layer":1})";
  const auto model = [](absl::string_view prefix, int seed) {
    const auto name = [&](absl::string_view rest) { return absl::StrCat(prefix, rest); };
    std::vector<TinyTensor> tensors = {
        RandomTensor(name("wte.weight"), DType::kF32, Shape{40, 16}, seed),
        RandomTensor(name("wpe.weight"), DType::kF32, Shape{8, 16}, seed + 1)};
    for (const auto& [module, out] :
         {std::pair{"attn.c_attn", 48}, {"attn.c_proj", 16}, {"mlp.c_fc", 64}}) {
      tensors.push_back(RandomTensor(name(absl::StrCat("h.0.", module, ".weight")), DType::kF32,
                                     Shape{16, out}, ++seed));
      tensors.push_back(
          RandomTensor(name(absl::StrCat("h.0.", module, ".bias")), DType::kF32, Shape{out}, 7));
    }
    tensors.push_back(
        RandomTensor(name("h.0.mlp.c_proj.weight"), DType::kF32, Shape{64, 16}, ++seed));
    tensors.push_back(RandomTensor(name("h.0.mlp.c_proj.bias"), DType::kF32, Shape{16}, 7));
    for (const char* norm : {"h.0.ln_1", "h.0.ln_2", "ln_f"}) {
      for (const char* part : {".weight", ".bias"}) {
        tensors.push_back(
            RandomTensor(name(absl::StrCat(norm, part)), DType::kF32, Shape{16}, ++seed));
      }
    }
    return tensors;
  };
  base_ = model("transformer.", 1);
  tuned_ = model("", 100);
  extract_.max_rank = 1000;
  Extract();
  EXPECT_THAT(plan_.warnings, ::testing::IsEmpty());
  // The head is tied to the embeddings, and saved with them for PEFT.
  EXPECT_THAT(Names(), Contains("base_model.model.lm_head.weight"));
  EXPECT_THAT(config_of_adapter_["modules_to_save"], Contains("lm_head"));
  EXPECT_THAT(Names(), Contains("base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"));
  for (size_t i = 0; i < tuned_.size(); ++i) {
    TinyTensor want = tuned_[i];
    want.name = base_[i].name;
    EXPECT_LE(Distance(want), 2e-5) << want.name;
  }
  // And nothing at all in common.
  for (TinyTensor& tensor : tuned_) tensor.name = "other." + tensor.name;
  config_ = R"({"architectures":["StrangeForCausalLM"]})";
  EXPECT_THAT(MakeOne().status().message(), HasSubstr("no tensor of one name"));
}

TEST_F(ExtractLora, ConvolutionsHaveKernels) {
  base_.push_back(RandomTensor("vision.patch.weight", DType::kF32, Shape{8, 3, 4, 4}, 1));
  tuned_.push_back(base_.back());
  Change(tuned_.back(), RandomTensor("", DType::kF32, tuned_.back().shape, 2).values);
  extract_.max_rank = 1000;
  Extract();
  const auto tensors = ReadTensors(folder_ / "lora/adapter_model.safetensors");
  EXPECT_EQ(tensors.at("base_model.model.vision.patch.lora_A.weight").shape, (Shape{8, 3, 4, 4}));
  EXPECT_EQ(tensors.at("base_model.model.vision.patch.lora_B.weight").shape, (Shape{8, 8, 1, 1}));
  EXPECT_LE(Distance(tuned_.back()), 1e-5);
}

TEST_F(ExtractLora, NarrowAndMixedTypes) {
  for (TinyTensor& tensor : base_) tensor.dtype = DType::kBF16;
  WriteModel("base", base_);
  const auto stored = ReadTensors(folder_ / "base");
  for (size_t i = 0; i < tuned_.size(); ++i) {
    tuned_[i] = stored.at(base_[i].name);
    Change(tuned_[i], std::vector<double>(tuned_[i].values.size(), 0.25));
    tuned_[i].dtype = i == 0 ? DType::kF32 : DType::kBF16;
  }
  WriteModel("tuned", tuned_);
  const auto rounded = ReadTensors(folder_ / "tuned");
  extract_.max_rank = 1000;
  Extract();
  // The adapter is applied in float32 and rounded to the base's bfloat16.
  for (size_t i = 0; i < tuned_.size(); ++i) {
    const std::vector<double> applied = Applied(tuned_[i].name);
    const std::vector<double>& want = rounded.at(tuned_[i].name).values;
    for (size_t j = 0; j < want.size(); ++j) {
      EXPECT_NEAR(applied[j], want[j], 1e-2 * (0.1 + std::abs(want[j]))) << tuned_[i].name;
    }
  }
}

TEST_F(ExtractLora, TheSameBytesWhateverTheThreadsAndMemory) {
  ASSERT_NO_FATAL_FAILURE(Extract());
  options_.threads = 1;
  options_.memory_bytes = plan_.peak_bytes;
  ASSERT_NO_FATAL_FAILURE(Extract("again"));
  EXPECT_EQ(ReadFile(folder_ / "lora/adapter_model.safetensors"),
            ReadFile(folder_ / "again/adapter_model.safetensors"));
  EXPECT_LE(plan_.peak_bytes, options_.memory_bytes);
}

TEST_F(ExtractLora, MemoryIsCheckedWhilePlanning) {
  options_.memory_bytes = 1 << 20;
  const absl::Status status = MakeOne().status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(status.message(), HasSubstr("--memory"));
}

TEST_F(ExtractLora, AFinishedFileIsKeptByAResume) {
  absl::StatusOr<Plan> plan = MakeOne();
  ASSERT_THAT(plan, IsOk());
  std::stop_source stop;
  stop.request_stop();
  EXPECT_EQ(RunPlan(*plan, {.output = folder_ / "lora", .stop = stop.get_token()}).status().code(),
            absl::StatusCode::kCancelled);
  EXPECT_FALSE(fs::exists(folder_ / "lora/adapter_config.json"));
  ASSERT_THAT(RunPlan(*plan, {.output = folder_ / "lora", .mode = OutputMode::kResume}), IsOk());
  EXPECT_TRUE(fs::exists(folder_ / "lora/adapter_config.json"));
}

}  // namespace
}  // namespace pewter
