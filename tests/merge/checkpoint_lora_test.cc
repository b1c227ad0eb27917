// LoRA adapters as views: numbers against a float64 reference, bits against a scalar one, and what
// is refused.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <random>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/backend.h"
#include "merge/checkpoint/checkpoint.h"
#include "tests/support/matchers.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace pewter::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr char kQ[] = "model.layers.0.self_attn.q_proj";
constexpr char kDown[] = "model.layers.0.mlp.down_proj";

template <typename T>
absl::Span<std::byte> Writable(absl::Span<T> values) {
  return {reinterpret_cast<std::byte*>(values.data()), values.size() * sizeof(T)};
}

std::string Config(absl::string_view more = "") {
  return absl::StrCat(R"({"peft_type":"LORA","r":4,"lora_alpha":6,"bias":"none")",
                      more.empty() ? "" : ",", more, "}");
}

std::vector<double> ReadDoubles(const TensorSource& source, int64_t first, int64_t count,
                                ReadObserver* observer = nullptr) {
  std::vector<std::byte> stored(count * ByteWidth(source.dtype()));
  EXPECT_THAT(source.Read(first, count, absl::MakeSpan(stored), observer), IsOk());
  std::vector<double> values(count);
  kernels::Convert({stored.data(), source.dtype(), count}, {values.data(), DType::kF64, count});
  return values;
}

// A model with a q_proj [40, 70] and a down_proj [70, 24], and an adapter folder.
class Lora : public ::testing::Test {
 protected:
  void WriteModel(DType dtype) {
    folder_.Write("model/config.json", "{}");
    q_ = RandomTensor(absl::StrCat(kQ, ".weight"), dtype, Shape{40, 70}, 1);
    down_ = RandomTensor(absl::StrCat(kDown, ".weight"), dtype, Shape{70, 24}, 2);
    WriteSafetensors(folder_ / "model/model.safetensors",
                     {q_, down_, RandomTensor("model.norm.weight", dtype, Shape{70}, 3)});
    // As they are stored, rounded.
    q_ = ReadTensors(folder_ / "model/model.safetensors").at(q_.name);
    down_ = ReadTensors(folder_ / "model/model.safetensors").at(down_.name);
  }
  static TinyTensor A(const std::string& module, int64_t rank, int64_t in, int seed = 10) {
    return RandomTensor(absl::StrCat("base_model.model.", module, ".lora_A.weight"), DType::kF32,
                        Shape{rank, in}, seed);
  }
  static TinyTensor B(const std::string& module, int64_t out, int64_t rank, int seed = 11) {
    return RandomTensor(absl::StrCat("base_model.model.", module, ".lora_B.weight"), DType::kF32,
                        Shape{out, rank}, seed);
  }
  void WriteAdapter(const std::string& config, std::vector<TinyTensor> tensors) {
    folder_.Write("adapter/adapter_config.json", config);
    WriteSafetensors(folder_ / "adapter/adapter_model.safetensors", tensors);
    adapter_tensors_ = ReadTensors(folder_ / "adapter/adapter_model.safetensors");
  }
  absl::StatusOr<std::shared_ptr<const Checkpoint>> Open() {
    return Checkpoint::Open(ModelRef{.path = folder_ / "model", .adapter = folder_ / "adapter"});
  }
  std::shared_ptr<const TensorSource> OpenTensor(const std::string& name) {
    const auto checkpoint = Open();
    EXPECT_THAT(checkpoint, IsOk());
    return (*checkpoint)->OpenTensor(name, 0).value();
  }
  absl::Status Refused(const std::string& config, std::vector<TinyTensor> tensors) {
    WriteAdapter(config, std::move(tensors));
    return Open().status();
  }

  // W + scale * B A, or transposed, in float64.
  static std::vector<double> Reference(const TinyTensor& w, const TinyTensor& a,
                                       const TinyTensor& b, double scale, bool transposed = false) {
    std::vector<double> result = w.values;
    const int64_t rank = a.shape[0], in = a.shape[1], out = b.shape[0];
    for (int64_t o = 0; o < out; ++o) {
      for (int64_t i = 0; i < in; ++i) {
        double sum = 0;
        for (int64_t k = 0; k < rank; ++k) sum += b.values[o * rank + k] * a.values[k * in + i];
        result[transposed ? i * out + o : o * in + i] += scale * sum;
      }
    }
    return result;
  }
  // `relative` to the value, or to the size of the terms where they cancel.
  static void ExpectNear(const std::vector<double>& got, const std::vector<double>& expected,
                         double relative) {
    ASSERT_EQ(got.size(), expected.size());
    for (size_t i = 0; i < got.size(); ++i) {
      ASSERT_NEAR(got[i], expected[i], relative * std::max(4.0, std::abs(expected[i]))) << i;
    }
  }

  TempFolder folder_;
  TinyTensor q_, down_;
  std::map<std::string, TinyTensor> adapter_tensors_;
};

TEST_F(Lora, AddsTheScaledProduct) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kF64}) {
    WriteModel(dtype);
    WriteAdapter(Config(), {A(kQ, 4, 70), B(kQ, 40, 4)});
    const auto checkpoint = Open();
    ASSERT_THAT(checkpoint, IsOk());
    EXPECT_TRUE((*checkpoint)->Adapted(q_.name));
    EXPECT_FALSE((*checkpoint)->Adapted(down_.name));
    EXPECT_FALSE((*checkpoint)->Adapted("nothing"));
    EXPECT_EQ((*checkpoint)->files().back().Describe(),
              folder_ / "adapter/adapter_model.safetensors");
    EXPECT_EQ((*checkpoint)->tensor_names().size(), 3u);
    const auto source = (*checkpoint)->OpenTensor(q_.name, 0).value();
    EXPECT_EQ(source->dtype(), dtype);
    EXPECT_GE(source->resident_bytes(), (40 + 70) * 4 * 4);
    const TinyTensor& a = adapter_tensors_.at(A(kQ, 4, 70).name);
    const TinyTensor& b = adapter_tensors_.at(B(kQ, 40, 4).name);
    const double relative = dtype == DType::kBF16 ? 0x1p-8 : dtype == DType::kF16 ? 0x1p-11 : 1e-6;
    ExpectNear(ReadDoubles(*source, 0, 40 * 70), Reference(q_, a, b, 1.5), relative);
    // The model's other tensors are as stored.
    EXPECT_EQ(ReadDoubles(*(*checkpoint)->OpenTensor(down_.name, 0).value(), 0, 70 * 24),
              down_.values);
  }
}

// Bit for bit: float32, products and sums in the order of k, one rounding to the stored dtype.
TEST_F(Lora, BitsAreThoseOfAScalarLoop) {
  WriteModel(DType::kF32);
  WriteAdapter(Config(), {A(kQ, 4, 70), B(kQ, 40, 4)});
  const std::vector<double> a = adapter_tensors_.at(A(kQ, 4, 70).name).values;
  const std::vector<double> b = adapter_tensors_.at(B(kQ, 40, 4).name).values;
  const std::vector<double> got = ReadDoubles(*OpenTensor(q_.name), 0, 40 * 70);
  for (int64_t o = 0; o < 40; ++o) {
    for (int64_t i = 0; i < 70; ++i) {
      float sum = 0;
      for (int64_t k = 0; k < 4; ++k) {
        sum += static_cast<float>(b[o * 4 + k]) * static_cast<float>(a[k * 70 + i]);
      }
      const float expected = static_cast<float>(q_.values[o * 70 + i]) + sum * 1.5f;
      ASSERT_EQ(got[o * 70 + i], expected) << o << ' ' << i;
    }
  }
}

TEST_F(Lora, RankStabilisedScale) {
  WriteModel(DType::kF32);
  WriteAdapter(Config(R"("use_rslora":true)"), {A(kQ, 4, 70), B(kQ, 40, 4)});
  ExpectNear(ReadDoubles(*OpenTensor(q_.name), 0, 40 * 70),
             Reference(q_, A(kQ, 4, 70), B(kQ, 40, 4), 6 / std::sqrt(4.0)), 1e-6);
}

TEST_F(Lora, PatternsChooseRankAndAlpha) {
  WriteModel(DType::kF32);
  struct Case {
    std::string patterns;
    int64_t rank;
    double alpha;
  };
  const Case cases[] = {
      {R"("rank_pattern":{"q_proj":2})", 2, 6},
      {R"("rank_pattern":{"model.layers.0.self_attn.q_proj":2})", 2, 6},
      {R"("rank_pattern":{"layers\\.[0-9]+\\..*q_proj":3},"alpha_pattern":{"q_proj":9})", 3, 9},
      {R"("rank_pattern":{"^model.layers.0.self_attn.q_proj":2})", 2, 6},
      {R"("alpha_pattern":{"self_attn.q_proj":1.5})", 4, 1.5},
      // Whole parts of the name only.
      {R"("rank_pattern":{"proj":2,"q_pro":2,"self_attn":2,"down_proj":2})", 4, 6},
      // The first in the file's order counts.
      {R"("rank_pattern":{"z|q_proj":2,"self_attn.q_proj":3})", 2, 6},
  };
  for (const Case& c : cases) {
    WriteAdapter(Config(c.patterns), {A(kQ, c.rank, 70), B(kQ, 40, c.rank)});
    ASSERT_THAT(Open(), IsOk()) << c.patterns;
    ExpectNear(ReadDoubles(*OpenTensor(q_.name), 0, 40 * 70),
               Reference(q_, A(kQ, c.rank, 70), B(kQ, 40, c.rank), c.alpha / c.rank), 1e-6);
  }
}

TEST_F(Lora, FanInFanOutIsTransposed) {
  // GPT-2 stores [in, out].
  folder_.Write("model/config.json", "{}");
  const TinyTensor wide =
      RandomTensor("transformer.h.0.c_attn.weight", DType::kF32, Shape{20, 60}, 1);
  const TinyTensor square =
      RandomTensor("transformer.h.0.c_proj.weight", DType::kF32, Shape{20, 20}, 2);
  WriteSafetensors(folder_ / "model/model.safetensors", {wide, square});
  const std::string attn = "transformer.h.0.c_attn", proj = "transformer.h.0.c_proj";
  const std::vector<TinyTensor> factors = {A(attn, 4, 20, 1), B(attn, 60, 4, 2), A(proj, 4, 20, 3),
                                           B(proj, 20, 4, 4)};
  WriteAdapter(Config(R"("fan_in_fan_out":true)"), factors);
  const auto stored = ReadTensors(folder_ / "model/model.safetensors");
  ExpectNear(ReadDoubles(*OpenTensor(wide.name), 0, 1200),
             Reference(stored.at(wide.name), factors[0], factors[1], 1.5, true), 1e-6);
  ExpectNear(ReadDoubles(*OpenTensor(square.name), 0, 400),
             Reference(stored.at(square.name), factors[2], factors[3], 1.5, true), 1e-6);
  // Without the flag a square matrix is taken as [out, in]; the other fits one way only.
  WriteAdapter(Config(R"("fan_in_fan_out":false)"), factors);
  ExpectNear(ReadDoubles(*OpenTensor(wide.name), 0, 1200),
             Reference(stored.at(wide.name), factors[0], factors[1], 1.5, true), 1e-6);
  ExpectNear(ReadDoubles(*OpenTensor(square.name), 0, 400),
             Reference(stored.at(square.name), factors[2], factors[3], 1.5, false), 1e-6);
}

TEST_F(Lora, Embeddings) {
  folder_.Write("model/config.json", "{}");
  const TinyTensor table = RandomTensor("model.embed_tokens.weight", DType::kF32, Shape{50, 16}, 1);
  WriteSafetensors(folder_ / "model/model.safetensors", {table});
  TinyTensor a = RandomTensor("base_model.model.model.embed_tokens.lora_embedding_A", DType::kF32,
                              Shape{4, 50}, 2);
  TinyTensor b = RandomTensor("base_model.model.model.embed_tokens.lora_embedding_B", DType::kF32,
                              Shape{16, 4}, 3);
  WriteAdapter(Config(), {a, b});
  ExpectNear(ReadDoubles(*OpenTensor(table.name), 0, 800), Reference(table, a, b, 1.5, true), 1e-6);
}

TEST_F(Lora, ConvolutionsByTheirFlattenedKernel) {
  folder_.Write("model/config.json", "{}");
  const TinyTensor kernel = RandomTensor("conv.weight", DType::kF32, Shape{8, 3, 2, 2}, 1);
  WriteSafetensors(folder_ / "model/model.safetensors", {kernel});
  TinyTensor a =
      RandomTensor("base_model.model.conv.lora_A.weight", DType::kF32, Shape{4, 3, 2, 2}, 2);
  TinyTensor b =
      RandomTensor("base_model.model.conv.lora_B.weight", DType::kF32, Shape{8, 4, 1, 1}, 3);
  WriteAdapter(Config(), {a, b});
  a.shape = Shape{4, 12};
  b.shape = Shape{8, 4};
  ExpectNear(ReadDoubles(*OpenTensor(kernel.name), 0, 96), Reference(kernel, a, b, 1.5), 1e-6);
}

TEST_F(Lora, ModulesToSaveAndBiasesReplace) {
  WriteModel(DType::kBF16);
  TinyTensor norm = RandomTensor("base_model.model.model.norm.weight", DType::kF32, Shape{70}, 9);
  TinyTensor q =
      RandomTensor(absl::StrCat("base_model.model.", kQ, ".modules_to_save.default.weight"),
                   DType::kBF16, Shape{40, 70}, 8);
  WriteAdapter(Config(R"("modules_to_save":["norm"])"),
               {norm, q, A(kDown, 4, 24), B(kDown, 70, 4)});
  const auto checkpoint = Open();
  ASSERT_THAT(checkpoint, IsOk());
  EXPECT_TRUE((*checkpoint)->Adapted("model.norm.weight"));
  const auto source = (*checkpoint)->OpenTensor("model.norm.weight", 0).value();
  EXPECT_EQ(source->dtype(), DType::kBF16) << "as the model stores it";
  const std::vector<double> got = ReadDoubles(*source, 0, 70);
  for (int i = 0; i < 70; ++i) {
    EXPECT_NEAR(got[i], norm.values[i], std::abs(norm.values[i]) * 0x1p-8);
  }
  EXPECT_EQ(ReadDoubles(*OpenTensor(q_.name), 0, 2800), adapter_tensors_.at(q.name).values);
}

TEST_F(Lora, ModuleNamesMatchWithAndWithoutTheModelsPrefix) {
  for (const auto& [stored, module] : std::vector<std::pair<std::string, std::string>>{
           {"encoder.layer.0.query", "bert.encoder.layer.0.query"},
           {"bert.encoder.layer.0.query", "encoder.layer.0.query"},
           {"h.0.c_attn", "transformer.h.0.c_attn"},
           {"model.layers.0.q_proj", "layers.0.q_proj"},
           {"layers.0.q_proj", "model.layers.0.q_proj"}}) {
    folder_.Write("model/config.json", "{}");
    const TinyTensor w = RandomTensor(absl::StrCat(stored, ".weight"), DType::kF32, Shape{8, 6}, 1);
    WriteSafetensors(folder_ / "model/model.safetensors", {w});
    TinyTensor a = A(module, 4, 6), b = B(module, 8, 4);
    a.name = absl::StrCat("base_model.model.", module, ".lora_A.default.weight");
    b.name = absl::StrCat("base_model.model.", module, ".lora_B.default.weight");
    WriteAdapter(Config(), {a, b});
    ASSERT_THAT(Open(), IsOk()) << module;
    ExpectNear(ReadDoubles(*OpenTensor(w.name), 0, 48), Reference(w, a, b, 1.5), 1e-6);
  }
}

TEST_F(Lora, BitsDependOnNeitherRangesNorThreads) {
  for (DType dtype : {DType::kBF16, DType::kF32}) {
    folder_.Write("model/config.json", "{}");
    constexpr int64_t kRows = 70, kCols = 5000;
    const TinyTensor w = RandomTensor("w.weight", dtype, Shape{kRows, kCols}, 1);
    WriteSafetensors(folder_ / "model/model.safetensors", {w});
    WriteAdapter(Config(), {A("w", 4, kCols), B("w", kRows, 4)});
    const auto source = OpenTensor("w.weight");
    const std::vector<double> whole = ReadDoubles(*source, 0, kRows * kCols);
    std::mt19937 engine(7);
    for (int round = 0; round < 200; ++round) {
      const int64_t first = engine() % (kRows * kCols);
      const int64_t count = engine() % (kRows * kCols - first) % (round % 2 ? 40'000 : 100) + 1;
      const std::vector<double> part = ReadDoubles(*source, first, count);
      ASSERT_TRUE(std::equal(part.begin(), part.end(), whole.begin() + first))
          << first << ' ' << count;
    }
    std::vector<std::thread> threads;
    std::vector<int> wrong(4);
    const auto fresh = OpenTensor("w.weight");
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&, t] {
        const int64_t first = t * 12'345, count = 200'000;
        const std::vector<double> part = ReadDoubles(*fresh, first, count);
        wrong[t] = !std::equal(part.begin(), part.end(), whole.begin() + first);
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(wrong, std::vector<int>(4));
  }
}

class Recorder final : public ReadObserver {
 public:
  void OnRead(int file, int64_t offset, absl::Span<const std::byte> bytes) override {
    by_file[file] += static_cast<int64_t>(bytes.size());
  }
  std::map<int, int64_t> by_file;
};

TEST_F(Lora, FactorsAreReadOnceForTheTilesOfATensorAndObserved) {
  WriteModel(DType::kF32);
  WriteAdapter(Config(), {A(kQ, 4, 70), B(kQ, 40, 4)});
  const auto source = Open().value()->OpenTensor(q_.name, 5).value();
  Recorder recorder;
  for (int64_t first = 0; first < 2800; first += 400) ReadDoubles(*source, first, 400, &recorder);
  EXPECT_EQ(recorder.by_file, (std::map<int, int64_t>{{5, 2800 * 4}, {7, (70 + 40) * 4 * 4}}));
}

TEST_F(Lora, WhatDoesNotFitIsRefusedAndNamed) {
  WriteModel(DType::kF32);
  constexpr auto kFailed = absl::StatusCode::kFailedPrecondition;
  EXPECT_THAT(Refused(Config(), {A(kQ, 4, 70)}),
              StatusIs(kFailed, AllOf(HasSubstr(kQ), HasSubstr("no lora_B"))));
  EXPECT_THAT(Refused(Config(), {B(kQ, 40, 4)}),
              StatusIs(kFailed, AllOf(HasSubstr(kQ), HasSubstr("no lora_A"))));
  EXPECT_THAT(
      Refused(Config(), {A("model.layers.9.q_proj", 4, 70), B("model.layers.9.q_proj", 40, 4)}),
      StatusIs(kFailed, AllOf(HasSubstr("\"model.layers.9.q_proj\""), HasSubstr("base model"))));
  EXPECT_THAT(Refused(Config(), {A(kQ, 3, 70), B(kQ, 40, 3)}),
              StatusIs(kFailed, AllOf(HasSubstr(kQ), HasSubstr("rank"), HasSubstr("[3, 70]"))));
  EXPECT_THAT(Refused(Config(), {A(kQ, 4, 70), B(kQ, 40, 3)}),
              StatusIs(kFailed, AllOf(HasSubstr(kQ), HasSubstr("rank"), HasSubstr("[40, 3]"))));
  EXPECT_THAT(Refused(Config(), {A(kQ, 4, 69), B(kQ, 40, 4)}),
              StatusIs(kFailed, AllOf(HasSubstr("[40, 70]"), HasSubstr("[4, 69]"))));
  EXPECT_THAT(Refused(Config(), {A("model.norm", 4, 70), B("model.norm", 70, 4)}),
              StatusIs(kFailed, AllOf(HasSubstr("model.norm"), HasSubstr("matrices"))));
  EXPECT_THAT(Refused(Config(), {RandomTensor("base_model.model.model.norm.weight", DType::kF32,
                                              Shape{71}, 1)}),
              StatusIs(kFailed, AllOf(HasSubstr("[70]"), HasSubstr("[71]"))));
  EXPECT_THAT(
      Refused(Config(), {RandomTensor("base_model.model.head.weight", DType::kF32, Shape{2}, 1)}),
      StatusIs(kFailed, HasSubstr("no tensor \"head.weight\"")));
  EXPECT_THAT(Refused(Config(), {RandomTensor("base_model.model.model.norm.weight", DType::kI32,
                                              Shape{70}, 1)}),
              StatusIs(kFailed, HasSubstr("I32")));
  EXPECT_THAT(Refused(Config(), {}), StatusIs(kFailed, HasSubstr("no tensors")));
  TinyTensor twice = A(kQ, 4, 70);
  twice.name = absl::StrCat("base_model.model.", kQ, ".lora_A.other.weight");
  EXPECT_THAT(Refused(Config(), {A(kQ, 4, 70), twice, B(kQ, 40, 4)}),
              StatusIs(kFailed, AllOf(HasSubstr(kQ), HasSubstr("twice"))));
  // Two spellings of one module.
  const std::string bare = "layers.0.self_attn.q_proj";
  EXPECT_THAT(Refused(Config(), {A(kQ, 4, 70), B(kQ, 40, 4), A(bare, 4, 70), B(bare, 40, 4)}),
              StatusIs(kFailed, HasSubstr("another module")));
}

TEST_F(Lora, UnsupportedFeaturesAreNamed) {
  WriteModel(DType::kF32);
  const std::vector<TinyTensor> factors = {A(kQ, 4, 70), B(kQ, 40, 4)};
  constexpr auto kFailed = absl::StatusCode::kFailedPrecondition;
  const std::pair<std::string, std::string> cases[] = {
      {R"({"peft_type":"IA3","r":4,"lora_alpha":6})", "IA3"},
      {R"({"r":4,"lora_alpha":6})", "peft_type"},
      {R"({"peft_type":"LORA","lora_alpha":6})", "no number r"},
      {R"({"peft_type":"LORA","r":0,"lora_alpha":6})", "r must be"},
      {R"({"peft_type":"LORA","r":-4,"lora_alpha":6})", "r must be"},
      {R"({"peft_type":"LORA","r":1.5,"lora_alpha":6})", "r must be"},
      {R"({"peft_type":"LORA","r":1e300,"lora_alpha":6})", "r must be"},
      {Config(R"("use_dora":true)"), "use_dora"},
      {Config(R"("target_parameters":["experts.w1"])"), "target_parameters"},
      {Config(R"("layer_replication":[[0,4]])"), "layer_replication"},
      {Config(R"("init_lora_weights":"pissa_niter_4")"), "pissa"},
      {Config(R"("use_rslora":"yes")"), "use_rslora"},
      {Config(R"("rank_pattern":{"q_proj":"4"})"), "rank_pattern"},
      {Config(R"("rank_pattern":{"q_proj":0})"), "rank_pattern"},
      {Config(R"("rank_pattern":{"q_(":4})"), "regular expression"},
      {Config(R"("rank_pattern":[4])"), "rank_pattern"},
  };
  for (const auto& [config, message] : cases) {
    EXPECT_THAT(Refused(config, factors),
                StatusIs(kFailed, AllOf(HasSubstr("adapter_config.json"), HasSubstr(message))))
        << config;
  }
  EXPECT_THAT(Refused("{", factors),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("adapter_config.json")));
  EXPECT_THAT(Refused(Config(R"("use_dora":false,"layer_replication":null,"target_parameters":[],)"
                             R"("init_lora_weights":true)"),
                      factors),
              IsOk());
  TinyTensor magnitude = factors[0];
  magnitude.name = absl::StrCat("base_model.model.", kQ, ".lora_magnitude_vector");
  EXPECT_THAT(Refused(Config(), {factors[0], factors[1], magnitude}),
              StatusIs(kFailed, HasSubstr("DoRA")));
}

TEST_F(Lora, MissingFilesAreNamed) {
  WriteModel(DType::kF32);
  EXPECT_THAT(Open(), StatusIs(absl::StatusCode::kNotFound, HasSubstr(folder_ / "adapter")));
  folder_.Write("adapter/x", "");
  EXPECT_THAT(Open(), StatusIs(absl::StatusCode::kNotFound, HasSubstr("adapter_config.json")));
  folder_.Write("adapter/adapter_config.json", Config());
  EXPECT_THAT(Open(),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("adapter_model.safetensors")));
  folder_.Write("adapter/adapter_model.bin", "");
  EXPECT_THAT(Open(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("adapter_model.bin")));
  folder_.Write("adapter/adapter_model.safetensors", "");
  EXPECT_THAT(Open(),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("adapter_model.safetensors")));
}

// Adapters as the peft library wrote them.
TEST(LoraGolden, AdaptersOfTheGoldenSetOpen) {
  const std::filesystem::path root =
      std::filesystem::path(PEWTER_SOURCE_DIR) / "../shared/goldens/mergekit";
  if (!std::filesystem::is_directory(root)) GTEST_SKIP() << root << " is not there";
  for (const char* adapter : {"lora_qv_r4", "lora_all_r8_rs"}) {
    const auto checkpoint =
        Checkpoint::Open(ModelRef{.path = (root / "models/llama_base").string(),
                                  .adapter = (root / "loras" / adapter).string()});
    ASSERT_THAT(checkpoint, IsOk());
    int adapted = 0;
    for (const std::string& name : (*checkpoint)->tensor_names())
      adapted += (*checkpoint)->Adapted(name);
    const size_t factors =
        ReadTensors((root / "loras" / adapter / "adapter_model.safetensors").string()).size();
    EXPECT_EQ(adapted, static_cast<int>(factors / 2));
  }
}

}  // namespace
}  // namespace pewter::testing
