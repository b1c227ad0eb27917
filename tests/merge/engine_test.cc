// Whole merges of small raw checkpoints through the public door: invariants of the engine.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <filesystem>
#include <limits>
#include <mutex>
#include <numeric>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/digest.h"
#include "merge/engine/manifest.h"
#include "merge/pewter.h"
#include "nlohmann/json.hpp"
#include "tests/support/tiny_model.h"

namespace pewter {
namespace {

using ::testing::HasSubstr;
using testing::RandomTensor;
using testing::ReadFile;
using testing::ReadTensors;
using testing::TempFolder;
using testing::TinyTensor;
using testing::WriteSafetensors;

struct Options {
  int threads = 2;
  int64_t memory = int64_t{1} << 30;
  int64_t shard_bytes = 1 << 20;
  uint64_t seed = 1;
  RunOptions run;
};

class EngineTest : public ::testing::Test {
 protected:
  void SetUp() override {
    for (int model = 0; model < 3; ++model) {
      std::vector<TinyTensor> tensors = {
          RandomTensor("big", DType::kBF16, {700, 1000}, 10 + model, 0.05),
          RandomTensor("bias", DType::kF32, {17}, 20 + model),
          RandomTensor("empty", DType::kF32, {0, 4}, 0),
          RandomTensor("half", DType::kF16, {300, 129}, 30 + model),
          RandomTensor("wide", DType::kF64, {70000}, 40 + model),
          {"steps", DType::kI64, {3}, {1, 2, 3}},
      };
      // Deltas of real fine-tunes: many zeros and many equal magnitudes.
      if (model > 0) {
        const std::vector<double> base = ReadTensors(folder_ / "m0.safetensors").at("big").values;
        for (size_t i = 0; i < base.size(); ++i) {
          tensors[0].values[i] =
              base[i] + (i % 3 == 0 ? 0 : std::round(tensors[0].values[i] * 40) / 256);
        }
      }
      WriteSafetensors(folder_ / absl::StrCat("m", model, ".safetensors"), tensors);
    }
  }

  std::string Recipe(const std::string& method, const std::string& parameters, bool with_base) {
    const std::string model = "  - model: $/m%.safetensors\n    parameters: {" + parameters + "}\n";
    std::string text =
        "merge_method: " + method + "\nmodels:\n" + absl::StrReplaceAll(model, {{"%", "1"}});
    if (method != "slerp" && method != "passthrough" && method != "arcee_fusion")
      text += absl::StrReplaceAll(model, {{"%", "2"}});
    if (with_base) text += "base_model: $/m0.safetensors\n";
    if (method == "slerp") text += "parameters: {t: 0.3}\n";
    return absl::StrReplaceAll(text, {{"$", folder_.path()}});
  }

  absl::StatusOr<Manifest> Merge(const std::string& recipe, const std::string& out,
                                 Options options = {}) {
    absl::StatusOr<pewter::Recipe> parsed = ParseRecipe(recipe);
    if (!parsed.ok()) return parsed.status();
    absl::StatusOr<Plan> plan = MakePlan(*parsed, {.memory_bytes = options.memory,
                                                   .threads = options.threads,
                                                   .device = "cpu",
                                                   .seed = options.seed,
                                                   .shard_bytes = options.shard_bytes});
    if (!plan.ok()) return plan.status();
    options.run.output = folder_ / out;
    return RunPlan(*plan, options.run);
  }

  // The weights' bytes, file by file.
  std::map<std::string, std::string> Weights(const std::string& out) {
    std::map<std::string, std::string> files;
    for (const auto& entry : std::filesystem::directory_iterator(folder_ / out)) {
      if (entry.path().extension() == ".safetensors")
        files[entry.path().filename()] = ReadFile(entry.path());
    }
    return files;
  }

  TempFolder folder_;
};

struct MethodCase {
  const char* method;
  const char* parameters;
  bool with_base;
};

class EveryMethodTest : public EngineTest, public ::testing::WithParamInterface<MethodCase> {};

TEST_P(EveryMethodTest, SameBytesForAnyThreadsMemoryAndShards) {
  const auto [method, parameters, with_base] = GetParam();
  const std::string recipe = Recipe(method, parameters, with_base);
  ASSERT_TRUE(Merge(recipe, "one", {.threads = 1}).ok()) << Merge(recipe, "again").status();
  ASSERT_TRUE(Merge(recipe, "two", {.threads = 2, .memory = int64_t{16} << 20}).ok());
  ASSERT_TRUE(Merge(recipe, "five", {.threads = 5, .memory = int64_t{4} << 30}).ok());
  EXPECT_EQ(Weights("one"), Weights("two"));
  EXPECT_EQ(Weights("one"), Weights("five"));
  EXPECT_GT(Weights("one").size(), 1u);
  // Another cut into shards moves tensors but not their bits.
  ASSERT_TRUE(Merge(recipe, "whole", {.shard_bytes = int64_t{1} << 40}).ok());
  ASSERT_EQ(Weights("whole").size(), 1u);
  const auto cut = ReadTensors(folder_ / "one"), whole = ReadTensors(folder_ / "whole");
  ASSERT_EQ(cut.size(), whole.size());
  for (const auto& [name, tensor] : cut) {
    EXPECT_EQ(tensor.dtype, whole.at(name).dtype);
    EXPECT_EQ(tensor.values, whole.at(name).values) << name;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Methods, EveryMethodTest,
    ::testing::Values(
        MethodCase{"linear", "weight: 0.3", false}, MethodCase{"passthrough", "scale: 0.5", false},
        MethodCase{"slerp", "", true}, MethodCase{"task_arithmetic", "weight: 0.7", true},
        MethodCase{"ties", "weight: 0.7, density: 0.4", true},
        MethodCase{"dare_linear", "weight: 0.7, density: 0.4", true},
        MethodCase{"dare_ties", "weight: 0.7, density: 0.4", true},
        MethodCase{"breadcrumbs", "weight: 0.7, density: 0.4, gamma: 0.1", true},
        MethodCase{"breadcrumbs_ties", "weight: 0.7, density: 0.9, gamma: 0.3", true},
        MethodCase{"karcher", "", false}, MethodCase{"multislerp", "weight: 0.7", true},
        MethodCase{"model_stock", "filter_wise: true", true},
        MethodCase{"nuslerp", "weight: 0.7, nuslerp_flatten: false, nuslerp_row_wise: true", true},
        MethodCase{"della", "weight: 0.7, density: 0.4", true},
        MethodCase{"della_linear", "weight: 0.7, density: 0.6, epsilon: 0.3", true},
        MethodCase{"sce", "select_topk: 0.3", true}, MethodCase{"arcee_fusion", "", true},
        MethodCase{"ram", "epsilon: 0.01", true}, MethodCase{"ramplus_tl", "epsilon: 0.01", true}),
    [](const auto& info) { return info.param.method; });

// Fine-tunes often leave tensors alone: no length, angle or variance to divide by.
TEST_F(EngineTest, WhatNoModelChangedStaysAsItIs) {
  for (const char* name : {"c1", "c2", "c3"}) {
    std::filesystem::copy(folder_ / "m0.safetensors", folder_ / absl::StrCat(name, ".safetensors"));
  }
  const auto base = ReadTensors(folder_ / "m0.safetensors");
  for (const auto& [method, parameters, copies] : {std::tuple{"nearswap", "t: 0.1", 1},
                                                   {"arcee_fusion", "", 1},
                                                   {"nuslerp", "weight: 0.5", 2},
                                                   {"multislerp", "weight: 0.7", 3},
                                                   {"model_stock", "", 3},
                                                   {"model_stock", "filter_wise: true", 3},
                                                   {"task_arithmetic", "weight: 0.7", 3},
                                                   {"ties", "weight: 0.7, density: 0.4", 3},
                                                   {"dare_ties", "weight: 0.7, density: 0.4", 3},
                                                   {"della", "weight: 0.7, density: 0.4", 3},
                                                   {"breadcrumbs", "weight: 0.7, density: 0.4", 3},
                                                   {"sce", "select_topk: 0.3", 3},
                                                   {"ram", "", 3},
                                                   {"ramplus_tl", "", 3}}) {
    const std::string out = absl::StrCat(method, parameters);
    std::string recipe = absl::StrCat("merge_method: ", method, "\nparameters: {", parameters,
                                      "}\nbase_model: $/m0.safetensors\nmodels:\n");
    for (int i = 1; i <= copies; ++i)
      absl::StrAppend(&recipe, "  - model: $/c", i, ".safetensors\n");
    recipe = absl::StrReplaceAll(recipe, {{"$", folder_.path()}});
    const auto merged = Merge(recipe, out);
    ASSERT_TRUE(merged.ok()) << method << ": " << merged.status();
    for (const auto& [name, tensor] : ReadTensors(folder_ / out)) {
      EXPECT_EQ(tensor.values, base.at(name).values) << method << " " << parameters << ": " << name;
    }
  }
}

// The largest tenth is dropped, the next four tenths are kept: exactly, ties with the lowest index
// first.
TEST_F(EngineTest, BreadcrumbsKeepsExactlyTheBand) {
  ASSERT_TRUE(
      Merge(Recipe("breadcrumbs", "weight: 1.0, density: 0.4, gamma: 0.1", true), "out").ok());
  const auto base = ReadTensors(folder_ / "m0.safetensors"), merged = ReadTensors(folder_ / "out");
  for (const char* name : {"half", "wide"}) {
    const std::vector<double>& b = base.at(name).values;
    std::vector<double> want = b;
    for (const char* model : {"m1", "m2"}) {
      const std::vector<double> x =
          ReadTensors(folder_ / absl::StrCat(model, ".safetensors")).at(name).values;
      std::vector<int64_t> order(b.size());
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
        return std::abs(x[i] - b[i]) > std::abs(x[j] - b[j]);
      });
      const auto n = static_cast<double>(b.size());
      const auto largest = static_cast<int64_t>(0.1 * n), kept = static_cast<int64_t>(0.4 * n);
      for (int64_t rank = largest; rank < largest + kept; ++rank) {
        want[order[rank]] += x[order[rank]] - b[order[rank]];
      }
    }
    int64_t bad = 0;
    for (size_t i = 0; i < b.size(); ++i) {
      bad +=
          std::abs(merged.at(name).values[i] - want[i]) > 2e-3 * std::max(1.0, std::abs(want[i]));
    }
    EXPECT_EQ(bad, 0) << name;
  }
}

TEST_F(EngineTest, TiesKeepsExactlyTheLargestLowestIndexFirst) {
  ASSERT_TRUE(Merge(Recipe("ties", "weight: 1.0, density: 0.2", true), "out").ok());
  const auto base = ReadTensors(folder_ / "m0.safetensors"), merged = ReadTensors(folder_ / "out");
  for (const char* name : {"big", "half", "bias", "wide"}) {
    const std::vector<double>& b = base.at(name).values;
    const size_t n = b.size(),
                 k = std::max<size_t>(1, static_cast<size_t>(0.2 * static_cast<double>(n)));
    std::vector<std::vector<double>> kept;
    for (const char* model : {"m1.safetensors", "m2.safetensors"}) {
      const std::vector<double> x = ReadTensors(folder_ / model).at(name).values;
      const bool f64 = base.at(name).dtype == DType::kF64;
      std::vector<double> delta(n);
      for (size_t i = 0; i < n; ++i) {
        delta[i] = f64 ? x[i] - b[i]
                       : static_cast<double>(static_cast<float>(x[i]) - static_cast<float>(b[i]));
      }
      std::vector<size_t> order(n);
      std::iota(order.begin(), order.end(), size_t{0});
      std::stable_sort(order.begin(), order.end(),
                       [&](size_t i, size_t j) { return std::abs(delta[i]) > std::abs(delta[j]); });
      std::vector<double> sparse(n);
      for (size_t i = 0; i < k; ++i) sparse[order[i]] = delta[order[i]];
      kept.push_back(std::move(sparse));
    }
    double worst = 0;
    for (size_t i = 0; i < n; ++i) {
      const double sum = kept[0][i] + kept[1][i];
      double counted = 0, weights = 0;
      for (const auto& delta : kept) {
        if (delta[i] != 0 && (delta[i] > 0) == (sum >= 0)) {
          counted += delta[i];
          weights += 1;
        }
      }
      const double expected = b[i] + (weights == 0 ? 0 : counted / weights);
      worst = std::max(worst, std::abs(expected - merged.at(name).values[i]) /
                                  std::max(1.0, std::abs(expected)));
    }
    EXPECT_LT(worst, base.at(name).dtype == DType::kF32 || base.at(name).dtype == DType::kF64
                         ? 1e-6
                         : 4e-3)
        << name;
  }
}

TEST_F(EngineTest, DareDependsOnTheSeedAlone) {
  const std::string recipe = Recipe("dare_linear", "weight: 1.0, density: 0.5", true);
  ASSERT_TRUE(Merge(recipe, "a", {.seed = 7}).ok());
  ASSERT_TRUE(Merge(recipe, "b", {.threads = 1, .seed = 7}).ok());
  ASSERT_TRUE(Merge(recipe, "c", {.seed = 8}).ok());
  EXPECT_EQ(Weights("a"), Weights("b"));
  EXPECT_NE(Weights("a"), Weights("c"));
}

// Stops the merge once the first shard is final.
class StopAfterFirstShard : public Observer {
 public:
  explicit StopAfterFirstShard(std::string state_file) : state_file_(std::move(state_file)) {}
  void OnProgress(const Progress& progress) override {
    if (ReadFile(state_file_).find("\"index\"") != std::string::npos) stop.request_stop();
  }
  std::stop_source stop;

 private:
  std::string state_file_;
};

TEST_F(EngineTest, ResumesAtTheFirstUnfinishedShard) {
  // Enough shards that some are still to come when the progress report that stops the merge
  // arrives.
  std::vector<TinyTensor> tensors;
  for (int i = 0; i < 60; ++i)
    tensors.push_back(RandomTensor(absl::StrCat("t", i), DType::kF32, {400000}, i));
  WriteSafetensors(folder_ / "m1.safetensors", tensors);
  WriteSafetensors(folder_ / "m2.safetensors", tensors);
  const std::string recipe = Recipe("linear", "weight: 0.5", false);
  ASSERT_TRUE(Merge(recipe, "whole").ok());

  StopAfterFirstShard observer(folder_ / "out/" + std::string(kStateFile));
  Options stopped;
  stopped.run.observer = &observer;
  stopped.run.stop = observer.stop.get_token();
  const auto interrupted = Merge(recipe, "out", stopped);
  ASSERT_EQ(interrupted.status().code(), absl::StatusCode::kCancelled) << interrupted.status();
  EXPECT_FALSE(std::filesystem::exists(folder_ / "out/" + std::string(kManifestFile)));

  EXPECT_EQ(Merge(recipe, "out").status().code(), absl::StatusCode::kAlreadyExists);
  Options resume;
  resume.run.mode = OutputMode::kResume;
  EXPECT_EQ(Merge(Recipe("linear", "weight: 0.6", false), "out", resume).status().code(),
            absl::StatusCode::kFailedPrecondition);
  const auto finished = Merge(recipe, "out", resume);
  ASSERT_TRUE(finished.ok()) << finished.status();
  EXPECT_GT(finished->shards_reused, 0);
  EXPECT_EQ(Weights("out"), Weights("whole"));
  EXPECT_FALSE(std::filesystem::exists(folder_ / "out/" + std::string(kStateFile)));
  // The manifest of a resumed run tells the same of inputs and files.
  auto resumed_json = nlohmann::json::parse(finished->json);
  auto whole_json =
      nlohmann::json::parse(ReadFile(folder_ / "whole/" + std::string(kManifestFile)));
  EXPECT_EQ(resumed_json["files"], whole_json["files"]);
  EXPECT_EQ(resumed_json["inputs"], whole_json["inputs"]);
}

TEST_F(EngineTest, WhatMayNotBeWrittenIsNot) {
  const std::string recipe = Recipe("linear", "weight: 0.5", false);
  ASSERT_TRUE(Merge(recipe, "whole").ok());
  std::mutex mutex;
  int parts = 0, manifests = 0;
  Options counted;
  counted.run.may_write = [&](WriteKind kind) {
    std::lock_guard lock(mutex);
    ++(kind == WriteKind::kManifest ? manifests : parts);
    return absl::OkStatus();
  };
  ASSERT_TRUE(Merge(recipe, "counted", counted).ok());
  EXPECT_EQ(manifests, 1);
  // Each shard and the state after it, config, index and the like.
  EXPECT_GE(parts, 2 * static_cast<int>(Weights("whole").size()));

  // Whatever is the first that is refused: no model is there, and a later run finishes it.
  for (int allowed = 0; allowed <= parts; ++allowed) {
    const std::string out = absl::StrCat("out", allowed);
    std::atomic<int> left = allowed;
    Options refused;
    refused.run.may_write = [&](WriteKind) {
      return left-- > 0 ? absl::OkStatus() : absl::AbortedError("the lease is lost");
    };
    const auto merged = Merge(recipe, out, refused);
    EXPECT_EQ(merged.status().code(), absl::StatusCode::kAborted) << merged.status();
    EXPECT_FALSE(std::filesystem::exists(folder_ / (out + "/" + std::string(kManifestFile))));
    Options resume;
    resume.run.mode = OutputMode::kResume;
    ASSERT_TRUE(Merge(recipe, out, resume).ok());
    EXPECT_EQ(Weights(out), Weights("whole"));
  }
}

TEST_F(EngineTest, ADamagedFinishedShardIsMergedAgain) {
  const std::string recipe = Recipe("linear", "weight: 0.5", false);
  ASSERT_TRUE(Merge(recipe, "out").ok());
  const auto whole = Weights("out");
  // What a crash before publishing leaves: the state and the shards.
  RunState state{.fingerprint = nlohmann::json::parse(
                     ReadFile(folder_ / "out/" + std::string(kManifestFile)))["fingerprint"]};
  int index = 0;
  for (const auto& [name, bytes] : whole) {
    state.shards[index++] = {.file = {name, static_cast<int64_t>(bytes.size()), Sha256::Of(bytes)}};
  }
  testing::WriteFile(folder_ / "out/" + std::string(kStateFile), state.ToJson());
  std::string damaged = whole.begin()->second;
  damaged.back() ^= 1;
  testing::WriteFile(folder_ / "out/" + whole.begin()->first, damaged);
  Options resume;
  resume.run.mode = OutputMode::kResume;
  const auto finished = Merge(recipe, "out", resume);
  ASSERT_TRUE(finished.ok()) << finished.status();
  EXPECT_EQ(finished->shards_reused, static_cast<int64_t>(whole.size()) - 1);
  EXPECT_EQ(Weights("out"), whole);
}

TEST_F(EngineTest, ManifestIdentifiesInputsAndOutputs) {
  const auto manifest = Merge(Recipe("linear", "weight: 0.5", false), "out");
  ASSERT_TRUE(manifest.ok()) << manifest.status();
  const auto json = nlohmann::json::parse(manifest->json);
  EXPECT_EQ(json, nlohmann::json::parse(ReadFile(folder_ / "out/" + std::string(kManifestFile))));
  for (const auto& file : json["files"]) {
    const std::string bytes = ReadFile(folder_ / "out/" + file["name"].get<std::string>());
    EXPECT_EQ(file["bytes"], bytes.size());
    EXPECT_EQ(file["sha256"], Sha256::Of(bytes));
  }
  ASSERT_EQ(json["inputs"].size(), 2u);
  const std::string input = ReadFile(folder_ / "m1.safetensors");
  const auto& identified = json["inputs"][0]["files"][0];
  EXPECT_EQ(identified["bytes"], input.size());
  const uint32_t crc = Crc32c({reinterpret_cast<const std::byte*>(input.data()), input.size()});
  char hex[16];
  snprintf(hex, sizeof hex, "%08x", crc);
  EXPECT_EQ(identified.value("crc32c", identified.dump()), hex);
}

TEST_F(EngineTest, RefusesANonEmptyOutputAndOverwritesWhenTold) {
  ASSERT_TRUE(Merge(Recipe("linear", "weight: 0.5", false), "out").ok());
  const auto again = Merge(Recipe("linear", "weight: 0.5", false), "out");
  EXPECT_EQ(again.status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(again.status().message(), HasSubstr("--overwrite"));
  testing::WriteFile(folder_ / "out/notes.txt", "mine");
  Options overwrite{.shard_bytes = int64_t{1} << 40};
  overwrite.run.mode = OutputMode::kOverwrite;
  ASSERT_TRUE(Merge(Recipe("linear", "weight: 0.5", false), "out", overwrite).ok());
  EXPECT_EQ(Weights("out").size(), 1u);  // no stale shards
  EXPECT_EQ(ReadFile(folder_ / "out/notes.txt"), "mine");
}

TEST_F(EngineTest, ReportsValuesThatAreNotFinite) {
  std::vector<TinyTensor> tensors;
  for (const auto& [name, tensor] : ReadTensors(folder_ / "m1.safetensors"))
    tensors.push_back(tensor);
  for (TinyTensor& tensor : tensors) {
    if (tensor.name == "big") tensor.values[123456] = std::numeric_limits<double>::quiet_NaN();
  }
  WriteSafetensors(folder_ / "m1.safetensors", tensors);
  const std::string recipe = Recipe("linear", "weight: 0.5", false);
  const auto refused = Merge(recipe, "out");
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(refused.status().message(), HasSubstr("big"));
  EXPECT_THAT(refused.status().message(), HasSubstr("m1.safetensors"));
  EXPECT_THAT(refused.status().message(), HasSubstr("123456"));
  EXPECT_FALSE(std::filesystem::exists(folder_ / "out/" + std::string(kManifestFile)));
  Options allow;
  allow.run.allow_nonfinite = true;
  allow.run.mode = OutputMode::kOverwrite;
  const auto allowed = Merge(recipe, "out", allow);
  ASSERT_TRUE(allowed.ok()) << allowed.status();
  EXPECT_THAT(allowed->warnings, ::testing::Contains(HasSubstr("123456")));
  EXPECT_TRUE(std::isnan(ReadTensors(folder_ / "out").at("big").values[123456]));
}

// With more NaN than are kept the threshold is NaN: nothing of that delta is.
TEST_F(EngineTest, TrimsWhatIsNotFinite) {
  std::vector<TinyTensor> tensors;
  for (const auto& [name, tensor] : ReadTensors(folder_ / "m1.safetensors"))
    tensors.push_back(tensor);
  for (TinyTensor& tensor : tensors) {
    if (tensor.name == "bias") {
      std::fill_n(tensor.values.begin(), 12, std::numeric_limits<double>::quiet_NaN());
    }
  }
  WriteSafetensors(folder_ / "m1.safetensors", tensors);
  Options allow;
  allow.run.allow_nonfinite = true;
  const auto merged = Merge(Recipe("ties", "weight: 1.0, density: 0.5", true), "out", allow);
  ASSERT_TRUE(merged.ok()) << merged.status();
  const auto base = ReadTensors(folder_ / "m0.safetensors").at("bias").values;
  const auto other = ReadTensors(folder_ / "m2.safetensors").at("bias").values;
  const auto out = ReadTensors(folder_ / "out").at("bias").values;
  for (size_t i = 0; i < out.size(); ++i) {
    if (out[i] == base[i]) continue;
    EXPECT_FLOAT_EQ(out[i], other[i]) << i;
  }
  EXPECT_NE(out, base);
}

TEST_F(EngineTest, AnInputThatChangesAfterPlanningIsAnError) {
  const auto recipe = ParseRecipe(Recipe("linear", "weight: 0.5", false));
  ASSERT_TRUE(recipe.ok());
  const auto plan = MakePlan(*recipe, {.memory_bytes = 1 << 28, .threads = 1, .device = "cpu"});
  ASSERT_TRUE(plan.ok()) << plan.status();
  std::filesystem::last_write_time(
      folder_ / "m1.safetensors",
      std::filesystem::file_time_type::clock::now() + std::chrono::seconds(5));
  const auto result = RunPlan(*plan, {.output = folder_ / "out"});
  EXPECT_EQ(result.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(result.status().message(), HasSubstr("changed"));
  std::filesystem::resize_file(folder_ / "m1.safetensors", 5000);
  EXPECT_EQ(RunPlan(*plan, {.output = folder_ / "out2"}).status().code(),
            absl::StatusCode::kDataLoss);
}

TEST_F(EngineTest, AnOutputThatCannotBeWrittenIsAnError) {
  testing::WriteFile(folder_ / "file", "not a folder");
  const auto result = Merge(Recipe("linear", "weight: 0.5", false), "file/out");
  ASSERT_FALSE(result.ok());
  EXPECT_THAT(result.status().message(), HasSubstr("file"));
}

}  // namespace
}  // namespace pewter
