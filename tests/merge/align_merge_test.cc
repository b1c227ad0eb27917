// Recipes with `align`: what is planned and refused, and that every merge is one of aligned models.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "alignment_goldens.h"
#include "base/digest.h"
#include "merge/align/aligner.h"
#include "merge/engine/manifest.h"
#include "merge/pewter.h"
#include "nlohmann/json.hpp"
#include "plan_zoo.h"
#include "store/object_store.h"
#include "tests/support/matchers.h"

namespace pewter {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using testing::AlignmentGolden;
using testing::AlignmentGoldens;
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::HasSubstr;
using testing::IsOk;
using testing::ReadFile;
using testing::ReadTensors;
using testing::StatusIs;
using testing::WriteFile;

absl::StatusOr<Plan> MakePlanOf(const std::string& text, PlanOptions options = {}) {
  if (options.memory_bytes == 0) options.memory_bytes = int64_t{1} << 30;
  options.device = "cpu";
  const auto recipe = ParseRecipe(text);
  if (!recipe.ok()) return recipe.status();
  return MakePlan(*recipe, options);
}
absl::StatusOr<Manifest> Merge(const std::string& text, RunOptions run, PlanOptions options = {}) {
  const auto plan = MakePlanOf(text, options);
  if (!plan.ok()) return plan.status();
  return RunPlan(*plan, run);
}

std::string AlignOnly(const AlignmentGolden& golden, absl::string_view more = "") {
  return absl::StrCat("merge_method: passthrough\nmodels: [{model: ", golden.folder,
                      "/b}]\nalign: {reference: ", golden.folder, "/a", more, "}\n");
}

// Groups of all kinds that the golden has.
std::string AllGroups(const AlignmentGolden& golden) {
  std::string groups = ", groups: [ffn, heads, residual";
  if (golden.symmetry.FindGroup("pool") >= 0) absl::StrAppend(&groups, ", pooler");
  return absl::StrCat(groups, "]");
}

double Distance(const std::vector<double>& a, const std::vector<double>& b) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    error += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return std::sqrt(error / std::max(norm, 1e-30));
}

class AlignMergeTest : public ::testing::Test {
 protected:
  void SetUp() override {
    goldens_ = AlignmentGoldens();
    if (goldens_.empty()) GTEST_SKIP() << "no goldens";
  }
  const AlignmentGolden& Golden(absl::string_view name) const {
    for (const AlignmentGolden& golden : goldens_) {
      if (golden.name == name) return golden;
    }
    ADD_FAILURE() << "no golden " << name;
    return goldens_.front();
  }
  // Planted order applied to b, by the view.
  static std::vector<double> Planted(const AlignmentGolden& golden, const std::string& name) {
    const SymmetricTensor* tensor = golden.symmetry.Find(name);
    const auto stored = golden.b->OpenTensor(name, 0);
    EXPECT_THAT(stored, IsOk());
    const auto view = AlignSource(golden.symmetry, *tensor, golden.planted, *stored);
    EXPECT_THAT(view, IsOk());
    std::vector<float> values((*view)->shape().elements());
    EXPECT_THAT(
        (*view)->Read(0, values.size(),
                      {reinterpret_cast<std::byte*>(values.data()), values.size() * 4}, nullptr),
        IsOk());
    return {values.begin(), values.end()};
  }

  std::vector<AlignmentGolden> goldens_;
  testing::TempFolder folder_;
};

TEST_F(AlignMergeTest, AnAlignedModelAlone) {
  for (const AlignmentGolden& golden : goldens_) {
    SCOPED_TRACE(golden.name);
    const std::string out = folder_ / golden.name;
    const auto plan = MakePlanOf(AlignOnly(golden, AllGroups(golden)));
    ASSERT_THAT(plan, IsOk());
    ASSERT_EQ(plan->alignments.size(), 1u);
    EXPECT_THAT(plan->unused_tensors, ::testing::IsEmpty());
    const auto manifest = RunPlan(*plan, {.output = out});
    ASSERT_THAT(manifest, IsOk());
    const auto tensors = ReadTensors(out + "/model.safetensors");
    EXPECT_EQ(tensors.size(), golden.b->tensor_names().size());
    for (const auto& [name, tensor] : tensors) {
      EXPECT_EQ(tensor.values, Planted(golden, name)) << name;
    }
    const auto alignment = ReadAlignment(**OpenStore(out), "alignment.safetensors");
    ASSERT_THAT(alignment, IsOk());
    EXPECT_EQ(alignment->reference, golden.folder + "/a");
    EXPECT_EQ(alignment->model_fingerprint, AlignmentFingerprint(golden.symmetry, *golden.b));
    for (const auto& [name, group] : golden.planted.groups) {
      EXPECT_EQ(alignment->groups.at(name).permutation, group.permutation) << name;
    }
    const json written = json::parse(manifest->json);
    const json& report = written.at("alignments").at(0).at("report");
    EXPECT_LT(report.at("squared_distance_after"), report.at("squared_distance_before"));
    bool listed = false;
    for (const json& file : written.at("files")) {
      listed = listed || file.at("name") == "alignment.safetensors";
    }
    EXPECT_TRUE(listed);
  }
}

TEST_F(AlignMergeTest, MergesAreOfAlignedModels) {
  for (const AlignmentGolden& golden : goldens_) {
    SCOPED_TRACE(golden.name);
    for (const std::string& method :
         {std::string("merge_method: linear\nparameters: {weight: 0.5}\n"),
          absl::StrCat("merge_method: task_arithmetic\nbase_model: ", golden.folder,
                       "/a\nparameters: {weight: 1.0}\n")}) {
      const std::string out = folder_ / "out";
      const auto manifest = Merge(
          absl::StrCat(method, "models: [{model: ", golden.folder, "/a}, {model: ", golden.folder,
                       "/b}]\nalign: {reference: ", golden.folder, "/a", AllGroups(golden), "}\n"),
          {.output = out, .mode = OutputMode::kOverwrite});
      ASSERT_THAT(manifest, IsOk());
      const auto a = ReadTensors(golden.folder + "/a");
      for (const auto& [name, tensor] : ReadTensors(out + "/model.safetensors")) {
        std::vector<double> expected = Planted(golden, name);
        if (absl::StrContains(method, "linear")) {
          for (size_t i = 0; i < expected.size(); ++i) {
            expected[i] = (expected[i] + a.at(name).values[i]) / 2;
          }
        }
        EXPECT_LT(Distance(tensor.values, expected), 1e-6) << name;
      }
    }
  }
}

TEST_F(AlignMergeTest, SeveralModelsAndWhateverTheThreads) {
  const AlignmentGolden& golden = Golden("gpt2");
  // Another model, in another order: a in the order that undoes b's.
  fs::copy(golden.folder + "/b", folder_ / "c", fs::copy_options::recursive);
  const std::string recipe = absl::StrCat(
      "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: ", golden.folder,
      "/b}, {model: ", golden.folder, "/a}, {model: ", folder_ / "c",
      "}]\nalign: {reference: ", golden.folder, "/a}\n");
  std::map<int, std::string> bytes;
  for (const int threads : {1, 4}) {
    const std::string out = folder_ / absl::StrCat("out", threads);
    ASSERT_THAT(Merge(recipe, {.output = out}, {.threads = threads}), IsOk());
    bytes[threads] = ReadFile(out + "/model.safetensors");
    const auto store = *OpenStore(out);
    const auto first = ReadAlignment(*store, "alignment-1-of-2.safetensors");
    const auto second = ReadAlignment(*store, "alignment-2-of-2.safetensors");
    ASSERT_THAT(first, IsOk());
    ASSERT_THAT(second, IsOk());
    EXPECT_NE(first->model, second->model);
    EXPECT_EQ(first->groups.at("res").permutation, second->groups.at("res").permutation);
  }
  EXPECT_EQ(bytes[1], bytes[4]);
  const auto a = ReadTensors(golden.folder + "/a");
  for (const auto& [name, tensor] : ReadTensors(folder_ / "out1/model.safetensors")) {
    EXPECT_LT(Distance(tensor.values, a.at(name).values), 0.01) << name;
  }
}

TEST_F(AlignMergeTest, AResumedRunTakesTheAlignmentThatIsThere) {
  const AlignmentGolden& golden = Golden("bert_mlm");
  const auto plan = MakePlanOf(AlignOnly(golden));
  ASSERT_THAT(plan, IsOk());
  ASSERT_THAT(RunPlan(*plan, {.output = folder_ / "whole"}), IsOk());
  const std::string whole = ReadFile(folder_ / "whole/model.safetensors");
  // One that says that nothing moves, as if the interrupted run had found it.
  const std::string identity = *SerializeAlignment({.family = golden.symmetry.family()});
  const auto resume = [&](const std::string& out, const std::string& digest) {
    folder_.Write(out + "/alignment.safetensors", identity);
    folder_.Write(out + "/" + kStateFile,
                  RunState{plan->fingerprint, {}, {{"alignment.safetensors", digest}}}.ToJson());
    EXPECT_THAT(RunPlan(*plan, {.output = folder_ / out, .mode = OutputMode::kResume}), IsOk());
    return ReadFile(folder_ / (out + "/model.safetensors"));
  };
  EXPECT_NE(resume("there", Sha256::Of(identity)), whole);
  EXPECT_EQ(ReadTensors(folder_ / "there/model.safetensors")
                .at("bert.embeddings.word_embeddings.weight")
                .values,
            ReadTensors(golden.folder + "/b").at("bert.embeddings.word_embeddings.weight").values);
  // Damaged since: found again.
  EXPECT_EQ(resume("damaged", Sha256::Of("another")), whole);
}

TEST_F(AlignMergeTest, IsStoppedWhileItAligns) {
  struct Stopper : Observer {
    void OnProgress(const Progress& progress) override {
      if (absl::StartsWith(progress.current, "alignment of ")) stop.request_stop();
    }
    std::stop_source stop;
  } stopper;
  const auto plan = MakePlanOf(AlignOnly(Golden("gpt2")));
  ASSERT_THAT(plan, IsOk());
  const std::string out = folder_ / "out";
  EXPECT_THAT(
      RunPlan(*plan, {.output = out, .observer = &stopper, .stop = stopper.stop.get_token()}),
      StatusIs(absl::StatusCode::kCancelled, HasSubstr("stopped")));
  EXPECT_THAT(RunPlan(*plan, {.output = out, .mode = OutputMode::kResume}), IsOk());
  ASSERT_THAT(RunPlan(*plan, {.output = folder_ / "whole"}), IsOk());
  EXPECT_EQ(ReadFile(out + "/model.safetensors"), ReadFile(folder_ / "whole/model.safetensors"));
}

// Tokens of a golden's vocabulary, every fourth of them to be predicted.
void WriteTokens(const std::string& path, int first = 11) {
  testing::TinyTensor ids = {.name = "input_ids", .dtype = DType::kI64, .shape = {6, 16}};
  testing::TinyTensor labels = {.name = "labels", .dtype = DType::kI64, .shape = {6, 16}};
  for (int i = 0; i < 96; ++i) {
    ids.values.push_back((i * 37 + first) % 96);
    labels.values.push_back(i % 4 == 0 ? (i * 53) % 96 : -100);
  }
  testing::WriteSafetensors(path, {ids, labels});
}

TEST_F(AlignMergeTest, IsVerifiedOnData) {
  const AlignmentGolden& golden = Golden("bert_mlm");
  const std::string data = folder_ / "data.safetensors";
  WriteTokens(data);
  const auto plan = MakePlanOf(AlignOnly(golden, ", verify: " + data));
  ASSERT_THAT(plan, IsOk());
  const auto manifest = RunPlan(*plan, {.output = folder_ / "out"});
  ASSERT_THAT(manifest, IsOk());
  const json verified =
      json::parse(manifest->json).at("alignments").at(0).at("report").at("verified");
  EXPECT_EQ(verified.at("predictions"), 24);
  const double loss = verified.at("loss");
  EXPECT_GT(loss, 1);
  EXPECT_NEAR(verified.at("loss_aligned"), loss, 1e-5 * loss);
  // Linear maps of feed-forward units are allowed by the tensors and not by what is between them.
  const int64_t width = golden.symmetry.groups()[golden.symmetry.FindGroup("ff.0")].width;
  Alignment turned = {.family = "bert"};
  BlockTransform& turn = turned.groups["ff.0"].transform;
  turn = {.blocks = width / 2, .dim = 2};
  for (int64_t block = 0; block < width / 2; ++block) {
    turn.forward.insert(turn.forward.end(), {0.6, -0.8, 0.8, 0.6});
    turn.inverse.insert(turn.inverse.end(), {0.6, 0.8, -0.8, 0.6});
  }
  const std::string file = *SerializeAlignment(turned);
  folder_.Write("bad/alignment.safetensors", file);
  folder_.Write(
      absl::StrCat("bad/", kStateFile),
      RunState{plan->fingerprint, {}, {{"alignment.safetensors", Sha256::Of(file)}}}.ToJson());
  EXPECT_THAT(RunPlan(*plan, {.output = folder_ / "bad", .mode = OutputMode::kResume}),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       HasSubstr("the aligned model does not compute what the model does")));
  EXPECT_FALSE(fs::exists(folder_ / "bad/model.safetensors"));

  // A run is not resumed once the data is another.
  WriteTokens(data, 12);
  const auto other = MakePlanOf(AlignOnly(golden, ", verify: " + data));
  ASSERT_THAT(other, IsOk());
  EXPECT_NE(other->fingerprint, plan->fingerprint);

  EXPECT_THAT(MakePlanOf(AlignOnly(golden, ", verify: " + data + "x")),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("recipe:3:")));
  EXPECT_THAT(MakePlanOf(AlignOnly(Golden("llama_gqa"), ", verify: nowhere+adapter")),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("has no adapter")));
}

TEST_F(AlignMergeTest, LinearMapsOfHeadsKeepTheFunctionAndOthersSaySo) {
  const AlignmentGolden& golden = Golden("bert_mlm");
  const std::string data = folder_ / "data.safetensors";
  WriteTokens(data);
  // Two models, both to the reference.
  fs::copy(golden.folder + "/b", folder_ / "c", fs::copy_options::recursive);
  const auto recipe = [&](absl::string_view more) {
    return absl::StrCat(
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: ", golden.folder,
        "/a}, {model: ", golden.folder, "/b}, {model: ", folder_ / "c",
        "}]\nalign: {reference: ", golden.folder,
        "/a, method: cca, gamma: 0.001, calibration: ", data, ", verify: ", data, more, "}\n");
  };
  for (const bool exact : {true, false}) {
    SCOPED_TRACE(exact);
    const auto plan = MakePlanOf(recipe(exact ? "" : ", mapped: [heads, ffn, residual]"));
    ASSERT_THAT(plan, IsOk());
    ASSERT_EQ(plan->alignments.size(), 2u);
    const std::string out = folder_ / absl::StrCat("out", exact);
    const auto manifest = RunPlan(*plan, {.output = out});
    ASSERT_THAT(manifest, IsOk());
    const bool warned = absl::c_any_of(plan->warnings, [](const std::string& warning) {
      return absl::StartsWith(warning, "recipe:4:") &&
             absl::StrContains(warning, "do not compute what they did");
    });
    EXPECT_EQ(warned, !exact);
    const json written = json::parse(manifest->json);
    for (const json& one : written.at("alignments")) {
      EXPECT_EQ(one.at("keeps_function"), exact);
      const json& verified = one.at("report").at("verified");
      EXPECT_EQ(verified.at("keeps_function"), exact);
      const double loss = verified.at("loss"), aligned = verified.at("loss_aligned");
      if (exact) {
        EXPECT_NEAR(aligned, loss, 1e-4 * loss);
      } else {
        EXPECT_GT(std::abs(aligned - loss), 1e-3 * loss);
      }
      const auto file = ReadAlignment(**OpenStore(out), one.at("file").get<std::string>());
      ASSERT_THAT(file, IsOk());
      EXPECT_EQ(file->keeps_function(), exact);
      EXPECT_EQ(absl::c_linear_search(file->inexact, "ff.0"), !exact);
      EXPECT_EQ(absl::c_linear_search(file->inexact, "res"), !exact);
      EXPECT_EQ(file->groups.at("vo.0").transform.blocks, 4);
      EXPECT_EQ(file->groups.at("ff.0").transform.blocks, exact ? 0 : 1);
      EXPECT_EQ(file->groups.at("ff.0").permutation.empty(), !exact);
    }
  }
}

TEST_F(AlignMergeTest, CurvesAreOfBothWays) {
  const AlignmentGolden& golden = Golden("bert_mlm");
  const std::string data = folder_ / "data.safetensors";
  WriteTokens(data);
  const auto manifest =
      Merge(absl::StrCat(
                "merge_method: linear\nparameters: {weight: 0.5}\nmodels: [{model: ", golden.folder,
                "/a}, {model: ", golden.folder, "/b}]\nalign: {reference: ", golden.folder,
                "/a}\nevaluate: {data: ", data, ", barrier_points: 5}\n"),
            {.output = folder_ / "out"});
  ASSERT_THAT(manifest, IsOk());
  const json report = json::parse(ReadFile(folder_ / "out/evaluation.json"));
  const json& curves = report.at("lines").at(0).at("curves");
  ASSERT_EQ(curves.size(), 2u);
  EXPECT_EQ(curves[0].at("label"), "not aligned");
  EXPECT_EQ(curves[1].at("label"), "aligned");
  const auto& plain = curves[0].at("points");
  const auto& aligned = curves[1].at("points");
  // The ends are the models; between them, aligned ones are nearly the same model.
  const auto loss = [](const json& points, size_t i) {
    return points.at(i).at("loss").get<double>();
  };
  EXPECT_NEAR(loss(plain, 0), loss(aligned, 0), 1e-4);
  EXPECT_NEAR(loss(plain, 4), loss(aligned, 4), 1e-4);
  EXPECT_LT(std::abs(loss(aligned, 2) - loss(aligned, 0)), 0.1);
  EXPECT_GT(std::abs(loss(plain, 2) - loss(plain, 0)), 0.1);
}

// One model and its own reordered copy: whatever stays apart, the merge computes what they do.
TEST_F(AlignMergeTest, FittedLayersAndUnitsApartKeepAModelMergedWithItself) {
  for (const char* name : {"bert_mlm", "gpt2", "llama_gqa"}) {
    const AlignmentGolden& golden = Golden(name);
    const std::string width_key = name == std::string("gpt2") ? "n_inner" : "intermediate_size";
    for (const double budget : {1.0, 1.2, 4.0}) {
      SCOPED_TRACE(absl::StrCat(name, ", budget ", budget));
      const auto recipe = absl::StrCat(
          "merge_method: pleas\nmodels: [{model: ", golden.folder, "/b}, {model: ", golden.folder,
          "/a}]\nparameters: {budget: ", budget, "}\nalign: {reference: ", golden.folder,
          "/a, calibration: ", golden.folder, "/io.safetensors}\nevaluate: {data: ", golden.folder,
          "/io.safetensors, metric: clm_loss, barrier_points: 3}\n");
      const std::string text =
          name == std::string("bert_mlm")
              ? absl::StrReplaceAll(
                    recipe, {{absl::StrCat("evaluate: {data: ", golden.folder,
                                           "/io.safetensors, metric: clm_loss"),
                              absl::StrCat("evaluate: {data: ", folder_ / "data.safetensors")}})
              : recipe;
      WriteTokens(folder_ / "data.safetensors");
      const std::string out = folder_ / "out";
      const auto manifest = Merge(text, {.output = out, .mode = OutputMode::kOverwrite});
      ASSERT_THAT(manifest, IsOk());
      const json report = json::parse(ReadFile(out + "/evaluation.json"));
      const double of_a = report.at("lines").at(0).at("curves").at(0).at("points").at(2).at("loss");
      EXPECT_NEAR(report.at("loss"), of_a, 0.01 * of_a);
      const auto tensors = ReadTensors(out + "/model.safetensors");
      EXPECT_EQ(json::parse(manifest->json).at("tensors"), tensors.size());
      const json config = json::parse(ReadFile(out + "/config.json"));
      const int64_t own = golden.symmetry.groups()[golden.symmetry.FindGroup("ff.0")].width;
      const int64_t width = budget == 1 ? own : config.at(width_key).get<int64_t>();
      EXPECT_TRUE(budget == 1 ? width == own : width > own);
      if (budget == 4) {
        EXPECT_EQ(width, 2 * own);
      }
      for (const SymmetricTensor& tensor : golden.symmetry.tensors()) {
        const auto found = tensors.find(tensor.tensor.name);
        if (found == tensors.end()) continue;
        for (size_t axis = 0; axis < tensor.axes.size(); ++axis) {
          const bool units =
              tensor.axes[axis].size() == 1 &&
              golden.symmetry.groups()[tensor.axes[axis][0].group].kind == GroupKind::kFfn;
          if (units) {
            EXPECT_EQ(found->second.shape[static_cast<int>(axis)], width) << found->first;
          }
        }
      }
    }
  }
}

TEST_F(AlignMergeTest, ABudgetNeedsFittedFeedForwardBlocks) {
  const AlignmentGolden& golden = Golden("t5");
  const auto plan = MakePlanOf(absl::StrCat(
      "merge_method: pleas\nmodels: [{model: ", golden.folder, "/b}, {model: ", golden.folder,
      "/a}]\nparameters: {budget: 1.2}\nalign: {reference: ", golden.folder,
      "/a, calibration: ", golden.folder, "/io.safetensors}\n"));
  EXPECT_THAT(plan, StatusIs(absl::StatusCode::kFailedPrecondition,
                             AllOf(HasSubstr("recipe:1:15: "), HasSubstr("decoder.block.0"),
                                   HasSubstr("only 1 is possible"))));
}

TEST_F(AlignMergeTest, NeedsItsMemory) {
  EXPECT_THAT(MakePlanOf(AlignOnly(Golden("gpt2")), {.memory_bytes = 100'000}),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("raise --memory")));
}

TEST_F(AlignMergeTest, HeadCountsThatDifferAreNamed) {
  const AlignmentGolden& golden = Golden("gpt2");
  fs::copy(golden.folder + "/b", folder_ / "c", fs::copy_options::recursive);
  fs::permissions(folder_ / "c/config.json", fs::perms::owner_all);
  json config = json::parse(ReadFile(folder_ / "c/config.json"));
  config["n_head"] = 8;
  WriteFile(folder_ / "c/config.json", config.dump());
  EXPECT_THAT(MakePlanOf(absl::StrCat("merge_method: passthrough\nmodels: [{model: ", folder_ / "c",
                                      "}]\nalign: {reference: ", golden.folder, "/a}\n")),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("recipe:3:8: "), HasSubstr("attention heads differ"),
                             HasSubstr("4 heads"), HasSubstr("8 heads"))));
}

// --- What is refused while planning
// ---------------------------------------------------------------

class AlignRefusedTest : public ::testing::Test {
 protected:
  // The zoo's models have no heads.
  void SetUp() override {
    for (const auto& folder : fs::directory_iterator(".")) {
      const std::string path = folder.path() / "config.json";
      if (!fs::exists(path)) continue;
      json config = json::parse(ReadFile(path));
      config["num_attention_heads"] = 2;
      WriteFile(path, config.dump());
    }
  }
  void Refused(const std::string& recipe, absl::StatusCode code,
               const ::testing::Matcher<const std::string&>& message) {
    EXPECT_THAT(MakePlanOf(recipe), StatusIs(code, message)) << recipe;
  }
  static std::string With(absl::string_view align) {
    return absl::StrCat(
        "merge_method: linear\nmodels: [{model: ./llama_a}, {model: ./llama_b}]\n"
        "parameters: {weight: 1}\nalign: {",
        align, "}\n");
  }

  testing::PlanZoo zoo_;
};

TEST_F(AlignRefusedTest, WordsOfTheRecipe) {
  const auto invalid = [&](absl::string_view align, absl::string_view at, absl::string_view what) {
    Refused(With(align), absl::StatusCode::kInvalidArgument, AllOf(HasSubstr(at), HasSubstr(what)));
  };
  invalid("groups: [ffn]", "recipe:4:8", "`align` has no `reference`");
  invalid("reference: ./llama_a, method: guess", "recipe:4:39", "one of permutation, staged, cca");
  invalid("reference: ./llama_a, evidence: hearsay", "recipe:4:41", "one of activations, weights");
  invalid("reference: ./llama_a, heads: none", "recipe:4:38", "one of permutation, orthogonal");
  invalid("reference: ./llama_a, groups: [ffn, tails]", "recipe:4:45",
          "one of ffn, heads, residual, pooler, output_head");
  invalid("reference: ./llama_a, restarts: 0", "recipe:4:41", "from 1 to 1000");
  Refused("merge_method: linear\nmodels: [{model: a}]\nalign: ./llama_a\n",
          absl::StatusCode::kInvalidArgument, HasSubstr("a mapping with `reference`"));
}

TEST_F(AlignRefusedTest, WhatNeedsDataIsNamed) {
  const auto refused = [&](absl::string_view align, absl::string_view at, absl::string_view what) {
    Refused(With(absl::StrCat("reference: ./llama_a, ", align)), absl::StatusCode::kInvalidArgument,
            AllOf(HasSubstr(at), HasSubstr(what)));
  };
  refused("method: cca", "recipe:4:39", "`calibration: FILE`");
  refused("method: staged", "recipe:4:39", "`calibration: FILE`");
  refused("heads: orthogonal", "recipe:4:38", "`calibration: FILE`");
  refused("evidence: activations", "recipe:4:41", "`calibration: FILE`");
  Refused(With("reference: ./llama_a, calibration: x.safetensors"), absl::StatusCode::kNotFound,
          AllOf(HasSubstr("recipe:4:44"), HasSubstr("x.safetensors")));
}

TEST_F(AlignRefusedTest, KeysThatDoNotFitTogether) {
  const auto refused = [&](absl::string_view align, absl::string_view what) {
    Refused(With(absl::StrCat("reference: ./llama_a, ", align)), absl::StatusCode::kInvalidArgument,
            AllOf(HasSubstr("recipe:4:"), HasSubstr(what)));
  };
  refused("query_key: shared", "rotary positions fix the order");
  refused("query_key: shared, method: staged", "is for `method: permutation`");
  refused("query_key: other", "one of own, shared");
  refused("last_stage: weights", "is for `method: staged` alone");
  refused("last_stage: weights, method: staged, heads: orthogonal", "leave one out");
  refused("last_stage: last", "one of weights, residual");
  refused("gamma: 0.5", "`gamma` is for `method: cca` alone");
  refused("gamma: -1, method: cca", "not negative");
  refused("mapped: [ffn]", "`mapped` is for `method: cca` alone");
  refused("method: cca, heads: orthogonal", "leave one out");
  refused("method: cca, groups: [ffn]", "group `heads` is mapped");
  refused("method: cca, mapped: []", "without a group that is mapped");
  refused("method: cca, mapped: [pooler]", "reordered, not mapped");
  Refused(With("reference: ./llama_a, objective: x.safetensors"), absl::StatusCode::kNotFound,
          HasSubstr("recipe:4:"));
}

TEST_F(AlignRefusedTest, LayersAreFittedToModelsThatAreAlignedByData) {
  const auto refused = [&](absl::string_view align, absl::string_view what) {
    Refused(absl::StrCat("merge_method: pleas\nmodels: [{model: ./llama_a}, {model: ./llama_b}]\n",
                         align),
            absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("recipe:"), HasSubstr(what)));
  };
  refused("", "it needs `align: {reference: MODEL, calibration: FILE}`");
  refused("align: {reference: ./llama_a}\n", "`align` needs `calibration: FILE`");
  refused("parameters: {budget: 0.5}\n", "budget");
}

TEST_F(AlignRefusedTest, GroupsThatTheModelsDoNotHave) {
  Refused(With("reference: ./llama_a, groups: [pooler]"), absl::StatusCode::kInvalidArgument,
          AllOf(HasSubstr("recipe:4:39"), HasSubstr("no group `pooler`")));
  Refused(
      "merge_method: passthrough\nmodels: [{model: ./bert_a}]\n"
      "align: {reference: ./bert_old, groups: [output_head]}\n",
      absl::StatusCode::kInvalidArgument,
      AllOf(HasSubstr("no group `output_head`"), HasSubstr("tied to the embeddings")));
}

TEST_F(AlignRefusedTest, ModelsThatDoNotFit) {
  Refused(
      "merge_method: linear\nmodels: [{model: ./llama_a}]\nparameters: {weight: 1}\n"
      "align: {reference: ./mistral_a}\n",
      absl::StatusCode::kFailedPrecondition,
      AllOf(HasSubstr("architectures differ"), HasSubstr("LlamaForCausalLM"),
            HasSubstr("MistralForCausalLM")));
  Refused(
      "merge_method: linear\nmodels: [{model: ./llama_a}]\nparameters: {weight: 1}\n"
      "align: {reference: ./llama_a}\n",
      absl::StatusCode::kInvalidArgument, HasSubstr("the reference is the only model"));
  Refused(
      "merge_method: linear\nmodels: [{model: ./strange_a}]\nparameters: {weight: 1}\n"
      "align: {reference: ./strange_b}\n",
      absl::StatusCode::kFailedPrecondition, HasSubstr("are not known; models can be aligned"));
  Refused(
      "merge_method: linear\nmodels: [{model: ./raw_a.safetensors}]\nparameters: {weight: 1}\n"
      "align: {reference: ./raw_b.safetensors}\n",
      absl::StatusCode::kFailedPrecondition, HasSubstr("no config.json"));
  Refused(
      "merge_method: linear\nmodels: [{model: ./llama_a}]\nparameters: {weight: 1}\n"
      "align: {reference: ./nowhere}\n",
      absl::StatusCode::kNotFound, HasSubstr("recipe:4:20"));
  Refused(
      "merge_method: linear\nmodels: [{model: ./llama_a}]\nparameters: {weight: 1}\n"
      "align: {reference: ./llama_3}\n",
      absl::StatusCode::kFailedPrecondition, HasSubstr("layers differ"));
  Refused(
      "merge_method: linear\nmodels: [{model: ./llama_a}]\nparameters: {weight: 1}\n"
      "align: {reference: ./llama_wide}\n",
      absl::StatusCode::kFailedPrecondition, HasSubstr("./llama_a"));
}

TEST_F(AlignRefusedTest, FormsOfMerging) {
  Refused(
      "merge_method: passthrough\n"
      "slices: [{sources: [{model: ./llama_a, layer_range: [0, 2]}]}]\n"
      "align: {reference: ./llama_b}\n",
      absl::StatusCode::kInvalidArgument, HasSubstr("list them in `models`"));
  Refused(
      "merge_method: linear\nmodels: [{model: ./llama_a}]\nparameters: {weight: 1}\n"
      "tokenizer: {source: ./llama_b, approximate: mean}\n"
      "align: {reference: ./llama_b}\n",
      absl::StatusCode::kInvalidArgument, HasSubstr("a stage of their own"));
}

TEST_F(AlignRefusedTest, NumbersThatAreNone) {
  auto tensors = ReadTensors("./llama_b/model.safetensors");
  std::vector<testing::TinyTensor> damaged;
  for (auto& [name, tensor] : tensors) {
    if (name == "model.layers.1.mlp.up_proj.weight") {
      tensor.values[3] = std::numeric_limits<double>::quiet_NaN();
    }
    damaged.push_back(tensor);
  }
  testing::WriteSafetensors("./llama_b/model.safetensors", damaged);
  EXPECT_THAT(Merge(With("reference: ./llama_a, groups: [ffn]"), {.output = "out"}),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("alignment of ./llama_b with ./llama_a"), HasSubstr("ff.1"),
                             HasSubstr("not a finite number"))));
}

// Stages may be aligned, and may be what others are aligned to.
TEST_F(AlignRefusedTest, Stages) {
  ASSERT_THAT(Merge("name: moved\nmerge_method: passthrough\nmodels: [{model: ./llama_b}]\n"
                    "align: {reference: ./llama_a}\n---\n"
                    "merge_method: linear\nmodels: [{model: moved}, {model: ./llama_base}]\n"
                    "parameters: {weight: 1}\nalign: {reference: moved}\n",
                    {.output = "out"}),
              IsOk());
  EXPECT_TRUE(fs::exists("out/alignment.safetensors"));
}

}  // namespace
}  // namespace pewter
