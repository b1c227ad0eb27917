// Methods that read statistics files beside the models (regmean, fisher), through the public door:
// against references computed elsewhere in float64 (a folder beside the checkout), by what must
// hold of their definitions, and with statistics that do not fit.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/backends.h"
#include "merge/forward/collect.h"
#include "merge/pewter.h"
#include "store/file_store.h"
#include "tests/support/matchers.h"
#include "tests/support/tiny_model.h"

namespace pewter {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::HasSubstr;
using testing::IsOk;
using testing::RandomTensor;
using testing::ReadTensors;
using testing::StatusIs;
using testing::TempFolder;
using testing::TinyTensor;
using testing::WriteSafetensors;

using Tensors = std::vector<TinyTensor>;
using Result = std::map<std::string, TinyTensor>;

struct Job {
  std::vector<Tensors> models, statistics;  // a file of statistics for each model, or fewer
  std::string method, parameters;
  std::vector<double> weights;
  std::string dtype = "float64";
  std::string more;  // of the recipe
};

class StatisticsTest : public ::testing::Test {
 protected:
  std::string Model(size_t i) const { return folder_ / absl::StrCat("m", i); }
  std::string File(size_t i) const { return folder_ / absl::StrCat("s", i, ".safetensors"); }

  absl::StatusOr<Plan> MakePlanOf(const Job& job) {
    std::string recipe = absl::StrCat("merge_method: ", job.method, "\nmodels:\n");
    std::vector<std::string> files;
    for (size_t i = 0; i < job.models.size(); ++i) {
      fs::create_directory(Model(i));
      WriteSafetensors(Model(i) + "/model.safetensors", job.models[i]);
      absl::StrAppend(&recipe, "  - model: ", Model(i), "\n");
      if (!job.weights.empty()) {
        absl::StrAppend(&recipe, "    parameters: {weight: ", job.weights[i], "}\n");
      }
      if (i >= job.statistics.size()) continue;
      WriteSafetensors(File(i), job.statistics[i]);
      files.push_back(absl::StrCat(Model(i), ": ", File(i)));
    }
    absl::StrAppend(&recipe, "parameters: {", job.parameters, "}\ndtype: ", job.dtype, "\n");
    if (!files.empty()) {
      absl::StrAppend(&recipe, "statistics: {", absl::StrJoin(files, ", "), "}\n");
    }
    absl::StrAppend(&recipe, job.more);
    const absl::StatusOr<Recipe> parsed = ParseRecipe(recipe);
    if (!parsed.ok()) return parsed.status();
    PlanOptions options;
    options.device = "cpu";
    return MakePlan(*parsed, options);
  }

  absl::StatusOr<Result> Merge(const Job& job) {
    const absl::StatusOr<Plan> plan = MakePlanOf(job);
    if (!plan.ok()) return plan.status();
    const std::string out = folder_ / absl::StrCat("out", runs_++);
    const absl::StatusOr<Manifest> manifest = RunPlan(*plan, {.output = out});
    if (!manifest.ok()) return manifest.status();
    manifest_ = manifest->json;
    return ReadTensors(out);
  }

  const TempFolder folder_;
  std::string manifest_;
  int runs_ = 0;
};

TinyTensor Renamed(TinyTensor tensor, const std::string& name) {
  tensor.name = name;
  return tensor;
}

// Statistics of one layer, of one model.
Tensors LayerStatistics(const std::string& layer, TinyTensor gram, double rows) {
  return {Renamed(std::move(gram), layer + ".gram.0.0"),
          {layer + ".count", DType::kI64, {}, {rows}}};
}

// The largest difference relative to the largest value.
double Apart(const std::vector<double>& got, const std::vector<double>& want) {
  EXPECT_EQ(got.size(), want.size());
  double largest = 0, scale = 0;
  for (size_t i = 0; i < std::min(got.size(), want.size()); ++i) {
    const double difference = std::abs(got[i] - want[i]);
    if (!(difference <= largest)) largest = difference;  // NaN shows
    scale = std::max(scale, std::abs(want[i]));
  }
  return largest / scale;
}

fs::path GoldenFolder() { return fs::path(PEWTER_SOURCE_DIR) / "../shared/goldens/others"; }

// --- RegMean ----------------------------------------------------------------------------------

TEST_F(StatisticsTest, RegMeanIsTheReferences) {
  if (!fs::exists(GoldenFolder() / "regmean.safetensors")) GTEST_SKIP() << "no references";
  const Result golden = ReadTensors(GoldenFolder() / "regmean.safetensors");
  struct Case {
    const char* want;
    const char* gram;
    const char* alpha;
    bool weighted, transposed;
  };
  for (const Case& one :
       {Case{"W.a0.1", "G", "0.1", false, false}, Case{"W.a0.9", "G", "0.9", false, false},
        Case{"W.a1", "G", "1", false, false}, Case{"W.diag", "G", "0", false, false},
        Case{"W.coef_a0.9", "G", "0.9", true, false},
        Case{"W.conv1d_a0.9", "G", "0.9", false, true},
        Case{"W.rankdef_a0.9", "Gdef", "0.9", false, false}}) {
    SCOPED_TRACE(one.want);
    Job job{.method = "regmean", .parameters = absl::StrCat("alpha: ", one.alpha)};
    for (int i = 0; i < 3; ++i) {
      TinyTensor weight = Renamed(golden.at(absl::StrCat("in.W", i)), "fc.weight");
      if (one.transposed) {
        TinyTensor turned{"fc.weight", weight.dtype, {weight.shape[1], weight.shape[0]}, {}};
        for (int64_t j = 0; j < weight.shape[1]; ++j) {
          for (int64_t o = 0; o < weight.shape[0]; ++o) {
            turned.values.push_back(weight.values[o * weight.shape[1] + j]);
          }
        }
        weight = std::move(turned);
      }
      job.models.push_back({std::move(weight),
                            Renamed(golden.at(absl::StrCat("in.b", i)), "fc.bias"),
                            Renamed(golden.at(absl::StrCat("in.emb", i)), "embed.weight")});
      // The references are of means over rows.
      job.statistics.push_back(
          LayerStatistics("fc", golden.at(absl::StrCat("in.", one.gram, i)), 1));
    }
    if (one.weighted) job.weights = {0.5, 0.3, 0.2};
    const auto merged = Merge(job);
    ASSERT_THAT(merged, IsOk());
    EXPECT_LE(
        Apart(merged->at("fc.weight").values, golden.at(absl::StrCat("out.", one.want)).values),
        1e-6);
    EXPECT_LE(Apart(merged->at("fc.bias").values,
                    golden.at(one.weighted ? "out.b.coef" : "out.b").values),
              1e-6);
    if (!one.weighted) {
      EXPECT_LE(Apart(merged->at("embed.weight").values, golden.at("out.emb").values), 1e-6);
    }
  }
}

// X^T X of `rows` rows of inputs, of which those in `dead` are always 0.
TinyTensor RandomGram(int64_t width, int64_t rows, int seed,
                      const std::vector<int64_t>& dead = {}) {
  TinyTensor x = RandomTensor("x", DType::kF64, {rows, width}, seed);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j : dead) x.values[r * width + j] = 0;
  }
  TinyTensor gram{"gram", DType::kF64, {width, width}, std::vector<double>(width * width)};
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < width; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        gram.values[i * width + j] += x.values[r * width + i] * x.values[r * width + j];
      }
    }
  }
  return gram;
}

// Of layers of 6 inputs and 4 outputs.
Job RegMeanJob(int models, const std::vector<int64_t>& dead = {}) {
  Job job{.method = "regmean", .parameters = "alpha: 0.9"};
  for (int i = 0; i < models; ++i) {
    job.models.push_back({RandomTensor("fc.weight", DType::kF64, {4, 6}, 10 + i),
                          RandomTensor("fc.bias", DType::kF64, {4}, 20 + i)});
    job.statistics.push_back(LayerStatistics("fc", RandomGram(6, 30, 30 + i, dead), 30));
  }
  return job;
}

std::vector<double> MeanOfModels(const Job& job, size_t tensor) {
  std::vector<double> mean(job.models[0][tensor].values.size());
  for (const Tensors& model : job.models) {
    for (size_t e = 0; e < mean.size(); ++e) {
      mean[e] += model[tensor].values[e] / static_cast<double>(job.models.size());
    }
  }
  return mean;
}

TEST_F(StatisticsTest, RegMeanOfModelsWithOneGramMatrixIsTheirMean) {
  Job job = RegMeanJob(3);
  for (Tensors& statistics : job.statistics) statistics = job.statistics[0];
  const auto merged = Merge(job);
  ASSERT_THAT(merged, IsOk());
  EXPECT_LE(Apart(merged->at("fc.weight").values, MeanOfModels(job, 0)), 1e-14);
  EXPECT_LE(Apart(merged->at("fc.bias").values, MeanOfModels(job, 1)), 1e-14);
}

TEST_F(StatisticsTest, RegMeanLeavesTheMeanWhereAnInputIsAlwaysZero) {
  const Job job = RegMeanJob(2, {2, 5});
  const auto merged = Merge(job);
  ASSERT_THAT(merged, IsOk());
  const std::vector<double> mean = MeanOfModels(job, 0);
  int others = 0;
  for (int64_t o = 0; o < 4; ++o) {
    for (int64_t j = 0; j < 6; ++j) {
      const double got = merged->at("fc.weight").values[o * 6 + j];
      if (j == 2 || j == 5) {
        EXPECT_EQ(got, mean[o * 6 + j]);
      } else {
        others += std::abs(got - mean[o * 6 + j]) > 1e-3;
      }
    }
  }
  EXPECT_GT(others, 8);
}

TEST_F(StatisticsTest, RegMeanSolvesTheNormalEquations) {
  Job job = RegMeanJob(2);
  job.parameters = "alpha: 1, gram_normalize: sum";
  const auto merged = Merge(job);
  ASSERT_THAT(merged, IsOk());
  // The gradient: sum_i G_i (W - W_i)^T.
  for (int64_t o = 0; o < 4; ++o) {
    for (int64_t j = 0; j < 6; ++j) {
      double gradient = 0;
      for (size_t i = 0; i < 2; ++i) {
        for (int64_t k = 0; k < 6; ++k) {
          gradient +=
              job.statistics[i][0].values[j * 6 + k] *
              (merged->at("fc.weight").values[o * 6 + k] - job.models[i][0].values[o * 6 + k]);
        }
      }
      EXPECT_NEAR(gradient, 0, 1e-6);
    }
  }
}

TEST_F(StatisticsTest, RegMeanCountsModelsAlikeUnlessToldToSum) {
  // The same rows, seen a thousand times over by one model.
  Job job = RegMeanJob(2);
  const auto before = Merge(job);
  ASSERT_THAT(before, IsOk());
  for (double& value : job.statistics[1][0].values) value *= 1000;
  job.statistics[1][1].values = {30 * 1000};
  const auto mean = Merge(job);
  ASSERT_THAT(mean, IsOk());
  EXPECT_LE(Apart(mean->at("fc.weight").values, before->at("fc.weight").values), 1e-12);
  job.parameters = "alpha: 0.9, gram_normalize: sum";
  const auto sum = Merge(job);
  ASSERT_THAT(sum, IsOk());
  EXPECT_LE(Apart(sum->at("fc.weight").values, job.models[1][0].values), 0.05);
  EXPECT_GT(Apart(sum->at("fc.weight").values, before->at("fc.weight").values), 0.1);
}

TEST_F(StatisticsTest, RegMeanIsToldWhichSquareWeightsAreStoredInputsFirst) {
  Job job{.method = "regmean", .parameters = "alpha: 0.9"};
  Job turned = job;
  turned.parameters += ", inputs_first: fc";
  for (int i = 0; i < 2; ++i) {
    const TinyTensor weight = RandomTensor("fc.weight", DType::kF64, {5, 5}, 40 + i);
    TinyTensor transposed = weight;
    for (int r = 0; r < 5; ++r) {
      for (int c = 0; c < 5; ++c) transposed.values[r * 5 + c] = weight.values[c * 5 + r];
    }
    job.models.push_back({weight});
    turned.models.push_back({transposed});
    job.statistics.push_back(LayerStatistics("fc", RandomGram(5, 30, 50 + i), 30));
    turned.statistics.push_back(job.statistics.back());
  }
  const auto merged = Merge(job), other = Merge(turned);
  ASSERT_THAT(merged, IsOk());
  ASSERT_THAT(other, IsOk());
  std::vector<double> back(25);
  for (int r = 0; r < 5; ++r) {
    for (int c = 0; c < 5; ++c) back[r * 5 + c] = other->at("fc.weight").values[c * 5 + r];
  }
  EXPECT_LE(Apart(back, merged->at("fc.weight").values), 1e-13);
}

TEST_F(StatisticsTest, PlansTellOfLayersWithoutStatisticsAndManifestsOfTheirFiles) {
  Job job = RegMeanJob(2);
  for (Tensors& model : job.models) {
    model.push_back(RandomTensor("other.weight", DType::kF64, {3, 3}, 7));
  }
  const auto plan = MakePlanOf(job);
  ASSERT_THAT(plan, IsOk());
  bool told = false;
  for (const PlanTensor& tensor : plan->tensors) {
    if (tensor.name == "fc.weight") {
      EXPECT_EQ(tensor.statistics.size(), 2);
    }
    if (tensor.name != "other.weight") continue;
    told = true;
    EXPECT_THAT(tensor.notes, Contains(HasSubstr("the statistics do not have")));
  }
  EXPECT_TRUE(told);
  ASSERT_THAT(Merge(job), IsOk());
  EXPECT_THAT(manifest_, HasSubstr(File(1)));
}

TEST_F(StatisticsTest, StatisticsThatDoNotFitAreErrorsOfThePlan) {
  const auto plan = [&](const Job& job) { return MakePlanOf(job).status(); };
  Job job = RegMeanJob(2);
  job.statistics.pop_back();
  EXPECT_THAT(plan(job), StatusIs(absl::StatusCode::kInvalidArgument,
                                  AllOf(HasSubstr(Model(1)), HasSubstr("statistics"))));

  job = RegMeanJob(2);
  job.more = absl::StrCat("base_model: ", Model(0), "\n");
  EXPECT_THAT(plan(job), IsOk());

  job = RegMeanJob(2);
  job.statistics[1] = LayerStatistics("fc", RandomGram(5, 30, 1), 30);
  EXPECT_THAT(plan(job), StatusIs(absl::StatusCode::kFailedPrecondition,
                                  AllOf(HasSubstr("fc.weight"), HasSubstr("of 5"))));
  job.statistics[0] = job.statistics[1];
  EXPECT_THAT(plan(job), StatusIs(absl::StatusCode::kFailedPrecondition,
                                  AllOf(HasSubstr("6 inputs"), HasSubstr("of 5"))));

  job = RegMeanJob(2);
  job.statistics[1].pop_back();
  EXPECT_THAT(plan(job), StatusIs(absl::StatusCode::kFailedPrecondition,
                                  AllOf(HasSubstr("fc.count"), HasSubstr(File(1)))));
  job = RegMeanJob(2);
  job.statistics[1][1].values = {0};
  EXPECT_THAT(plan(job), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("is 0")));

  job = RegMeanJob(2);
  job.statistics[1] = LayerStatistics("fc2", RandomGram(6, 30, 1), 30);
  EXPECT_THAT(plan(job), StatusIs(absl::StatusCode::kFailedPrecondition,
                                  AllOf(HasSubstr(Model(1)), HasSubstr(File(0)))));
  job.statistics[0] = job.statistics[1];
  EXPECT_THAT(plan(job),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("nothing for any tensor")));

  job = RegMeanJob(2);
  job.weights = {1, -1};
  EXPECT_THAT(plan(job), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("sum to 0")));

  job = RegMeanJob(2);
  job.statistics.clear();
  job.more = absl::StrCat("statistics: {", Model(0), ": ", folder_ / "no.safetensors", "}\n");
  EXPECT_THAT(plan(job), StatusIs(absl::StatusCode::kNotFound,
                                  AllOf(HasSubstr("recipe:"), HasSubstr("no.safetensors"))));
  job.more = absl::StrCat("statistics: {./unknown: ", File(0), "}\n");
  EXPECT_THAT(plan(job), StatusIs(absl::StatusCode::kInvalidArgument,
                                  AllOf(HasSubstr("recipe:"), HasSubstr("./unknown"))));
}

TEST_F(StatisticsTest, OtherMethodsWarnOfStatistics) {
  Job job = RegMeanJob(2);
  job.method = "linear";
  job.parameters = "weight: 1";
  const auto plan = MakePlanOf(job);
  ASSERT_THAT(plan, IsOk());
  EXPECT_THAT(plan->warnings, Contains(AllOf(HasSubstr("statistics"), HasSubstr("no effect"))));
}

TEST_F(StatisticsTest, GramMatricesWithInfinitiesAreRefused) {
  Job job = RegMeanJob(2);
  job.statistics[1][0].values[3] = std::numeric_limits<double>::infinity();
  EXPECT_THAT(Merge(job), StatusIs(absl::StatusCode::kFailedPrecondition,
                                   AllOf(HasSubstr(File(1)), HasSubstr("infinite"))));
}

// A model's own statistics file, by a forward pass.
void Collect(const std::string& model, const std::string& data, const TempFolder& folder,
             const std::string& key) {
  const auto backend = kernels::OpenBackend({}, 1);
  ASSERT_THAT(backend, IsOk());
  const auto checkpoint = Checkpoint::Open({.path = model});
  ASSERT_THAT(checkpoint, IsOk());
  const auto forward = MakeForwardModel(*checkpoint);
  const auto opened = ForwardData::Open(data);
  ASSERT_THAT(forward, IsOk());
  ASSERT_THAT(opened, IsOk());
  StatisticsOptions options;
  options.forward.backend = backend->get();
  options.choose = [](absl::string_view) { return Grams::kOwn; };
  const ForwardModel models[] = {*forward};
  ASSERT_THAT(
      CollectStatistics(models, *opened, options, std::make_shared<FileStore>(folder.path()), key),
      IsOk());
}

TEST_F(StatisticsTest, RegMeanReadsWhatForwardPassesCollect) {
  const fs::path goldens = fs::path(PEWTER_SOURCE_DIR) / "../shared/goldens/alignment";
  if (!fs::exists(goldens / "gpt2")) GTEST_SKIP() << "no models";
  struct Case {
    const char* model;
    const char* weight;
    const char* site;
    bool inputs_first;
  };
  for (const Case& one :
       {Case{"bert_mlm", "bert.encoder.layer.1.attention.self.key.weight", "attention_input.1",
             false},
        Case{"bert_mlm", "bert.encoder.layer.0.output.dense.weight", "ffn.0", false},
        Case{"gpt2", "transformer.h.0.attn.c_proj.weight", "attention.0", true}}) {
    SCOPED_TRACE(absl::StrCat(one.model, " ", one.weight));
    const fs::path pair = goldens / one.model;
    std::string recipe = "merge_method: regmean\nparameters: {alpha: 0.8}\nmodels:\n";
    std::string files;
    for (const char* name : {"a", "b"}) {
      const std::string key = absl::StrCat(one.model, name, ".safetensors");
      const std::string model = (pair / name).string();
      if (!fs::exists(folder_ / key)) {
        Collect(model, (pair / "io.safetensors").string(), folder_, key);
      }
      absl::StrAppend(&recipe, "  - model: ", model, "\n");
      absl::StrAppend(&files, "  ", model, ": ", folder_ / key, "\n");
    }
    const auto parsed = ParseRecipe(absl::StrCat(recipe, "statistics:\n", files));
    ASSERT_THAT(parsed, IsOk());
    PlanOptions options;
    options.device = "cpu";
    const auto plan = MakePlan(*parsed, options);
    ASSERT_THAT(plan, IsOk());
    const std::string out = folder_ / absl::StrCat("out", runs_++);
    ASSERT_THAT(RunPlan(*plan, {.output = out}), IsOk());
    // The gradient of the least squares is small beside its terms.
    const TinyTensor merged = ReadTensors(out).at(one.weight);
    const int64_t width = merged.shape[one.inputs_first ? 0 : 1];
    const int64_t outputs = merged.shape.elements() / width;
    std::vector<double> gradient(width * outputs), terms(width * outputs);
    for (const char* name : {"a", "b"}) {
      const TinyTensor own = ReadTensors((pair / name).string()).at(one.weight);
      const Result statistics =
          ReadTensors(folder_ / absl::StrCat(one.model, name, ".safetensors"));
      const auto& gram = statistics.at(absl::StrCat(one.site, ".gram.0.0")).values;
      const double rows = statistics.at(absl::StrCat(one.site, ".count")).values[0];
      for (int64_t j = 0; j < width; ++j) {
        for (int64_t k = 0; k < width; ++k) {
          const double h = gram[j * width + k] / rows * (j == k ? 1 : 0.8);
          for (int64_t o = 0; o < outputs; ++o) {
            const int64_t at = one.inputs_first ? k * outputs + o : o * width + k;
            const double term = h * (merged.values[at] - own.values[at]);
            gradient[j * outputs + o] += term;
            terms[j * outputs + o] += std::abs(term);
          }
        }
      }
    }
    for (size_t i = 0; i < gradient.size(); ++i) {
      ASSERT_LE(std::abs(gradient[i]), 1e-5 * terms[i]) << i;
    }
  }
}

// --- Fisher -----------------------------------------------------------------------------------

constexpr const char* kFisherTensors[] = {"embed.weight", "layers.0.attn.bias",
                                          "layers.0.attn.weight", "layers.0.mlp.weight",
                                          "norm.weight"};

TEST_F(StatisticsTest, FisherIsTheReferences) {
  if (!fs::exists(GoldenFolder() / "fisher.safetensors")) GTEST_SKIP() << "no references";
  const Result golden = ReadTensors(GoldenFolder() / "fisher.safetensors");
  struct Case {
    const char* want;
    const char* parameters;
    bool weighted;
  };
  for (const Case& one :
       {Case{"plain", "normalize: false", false}, Case{"norm", "normalize: true", false},
        Case{"norm_w", "normalize: true", true},
        Case{"bloomberg", "normalize: false, epsilon: 1e-10", false}}) {
    SCOPED_TRACE(one.want);
    Job job{.method = "fisher", .parameters = one.parameters};
    if (one.weighted) job.weights = {0.6, 0.3, 0.1};
    for (int i = 0; i < 3; ++i) {
      job.models.emplace_back();
      job.statistics.emplace_back();
      for (const char* name : kFisherTensors) {
        job.models.back().push_back(
            Renamed(golden.at(absl::StrCat("in.model", i, ".", name)), name));
        job.statistics.back().push_back(
            Renamed(golden.at(absl::StrCat("in.fisher", i, ".", name)), name));
      }
    }
    const auto merged = Merge(job);
    ASSERT_THAT(merged, IsOk());
    for (const char* name : kFisherTensors) {
      EXPECT_LE(Apart(merged->at(name).values,
                      golden.at(absl::StrCat("out.", one.want, ".", name)).values),
                1e-6)
          << name;
    }
  }
}

Job FisherJob() {
  Job job{.method = "fisher", .parameters = "normalize: false"};
  for (int i = 0; i < 2; ++i) {
    job.models.push_back({RandomTensor("w", DType::kF32, {6, 5}, 60 + i)});
    TinyTensor fisher = RandomTensor("w", DType::kF32, {6, 5}, 70 + i);
    for (double& value : fisher.values) value *= value;
    job.statistics.push_back({std::move(fisher)});
  }
  return job;
}

TEST_F(StatisticsTest, FisherTakesAnElementFromTheModelThatAloneKnowsOfIt) {
  Job job = FisherJob();
  job.parameters = "normalize: false, epsilon: 0";
  job.statistics[0][0].values[7] = 0;
  job.statistics[1][0].values[8] = 0;
  job.statistics[0][0].values[9] = job.statistics[1][0].values[9] = 0;
  const auto merged = Merge(job);
  ASSERT_THAT(merged, IsOk());
  const std::vector<double>& got = merged->at("w").values;
  const std::vector<double> a = job.models[0][0].values, b = job.models[1][0].values;
  const auto stored = [](double value) { return static_cast<double>(static_cast<float>(value)); };
  EXPECT_EQ(got[7], stored(b[7]));
  EXPECT_EQ(got[8], stored(a[8]));
  EXPECT_DOUBLE_EQ(got[9], (stored(a[9]) + stored(b[9])) / 2);
}

TEST_F(StatisticsTest, FisherNormsMakeTheScaleOfAFileNoMatter) {
  Job job = FisherJob();
  job.parameters = "normalize: true, epsilon: 0";
  const auto before = Merge(job);
  for (double& value : job.statistics[1][0].values) value *= 0x1p20;
  const auto after = Merge(job);
  ASSERT_THAT(before, IsOk());
  ASSERT_THAT(after, IsOk());
  EXPECT_LE(Apart(after->at("w").values, before->at("w").values), 1e-14);
}

TEST_F(StatisticsTest, FisherFilesThatDoNotFitAreRefused) {
  Job job = FisherJob();
  job.statistics[1][0].shape = {5, 6};
  EXPECT_THAT(MakePlanOf(job).status(), StatusIs(absl::StatusCode::kFailedPrecondition,
                                                 AllOf(HasSubstr(File(1)), HasSubstr("[5, 6]"))));
  job = FisherJob();
  job.statistics[1][0].values[3] = -0.25;
  EXPECT_THAT(Merge(job), StatusIs(absl::StatusCode::kFailedPrecondition,
                                   AllOf(HasSubstr("tensor w"), HasSubstr("below 0"))));
  job = FisherJob();
  for (double& value : job.statistics[1][0].values) value = 0;
  job.parameters = "normalize: true, epsilon: 0";
  EXPECT_THAT(Merge(job), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("epsilon")));
}

}  // namespace
}  // namespace pewter
