// The statistics pass: moments against features that PyTorch gave, by what must hold of them, and
// what is left when a pass is killed.
#include "merge/forward/statistics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>

#include "kernels/backends.h"
#include "merge/forward/collect.h"
#include "merge/forward/hidden_states.h"
#include "store/file_store.h"
#include "tests/kernels/under_test.h"
#include "tests/support/faulty_store.h"
#include "tests/support/matchers.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace pewter {
namespace {

using pewter::testing::FaultyStore;
using pewter::testing::IsOk;
using pewter::testing::ReadFile;
using pewter::testing::ReadTensors;
using pewter::testing::StatusIs;
using pewter::testing::TempFolder;
using pewter::testing::TinyTensor;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

const std::string kShared = std::string(PEWTER_SOURCE_DIR) + "/../shared/";
const std::string kModels = std::string(PEWTER_SOURCE_DIR) + "/tests/merge/forward/";
constexpr char kKey[] = "statistics.safetensors";

ForwardModel OpenModel(const std::string& path) {
  auto checkpoint = Checkpoint::Open({.path = path});
  EXPECT_THAT(checkpoint, IsOk());
  return *MakeForwardModel(*checkpoint);
}
std::shared_ptr<const ForwardData> OpenData(const std::string& path) {
  auto data = ForwardData::Open(path);
  EXPECT_THAT(data, IsOk());
  return data.ok() ? *data : nullptr;
}

class StatisticsTest : public kernels::BackendTest {
 protected:
  StatisticsOptions Options(Grams grams) {
    return {.forward = {.backend = &backend()},
            .choose = [grams](absl::string_view) { return grams; }};
  }
  // The artefact of some models.
  std::shared_ptr<const StatisticsReader> Collect(const std::vector<ForwardModel>& models,
                                                  std::shared_ptr<const ForwardData> data,
                                                  const StatisticsOptions& options) {
    auto store = std::make_shared<FileStore>(folder_.path());
    auto result = CollectStatistics(models, std::move(data), options, store, kKey);
    EXPECT_THAT(result, IsOk());
    auto reader = StatisticsReader::Open(folder_ / kKey);
    EXPECT_THAT(reader, IsOk());
    return *reader;
  }
  const TempFolder folder_;
};
INSTANTIATE_ON_BACKENDS(StatisticsTest);

// Largest difference as a share of the largest value.
double Difference(const std::vector<double>& a, const std::vector<double>& b) {
  EXPECT_EQ(a.size(), b.size());
  double difference = 0, largest = 0;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    difference = std::max(difference, std::abs(a[i] - b[i]));
    largest = std::max(largest, std::abs(b[i]));
  }
  return difference / largest;
}

// a^T b of row-major [rows, columns] matrices.
std::vector<double> Product(const TinyTensor& a, const TinyTensor& b) {
  const int64_t rows = a.shape[0], m = a.shape[1], n = b.shape[1];
  std::vector<double> product(m * n);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        product[i * n + j] += a.values[row * m + i] * b.values[row * n + j];
      }
    }
  }
  return product;
}
std::vector<double> Sums(const TinyTensor& a) {
  std::vector<double> sums(a.shape[1]);
  for (size_t i = 0; i < a.values.size(); ++i) sums[i % sums.size()] += a.values[i];
  return sums;
}

// Correlations between models 0 and 1.
std::vector<double> Correlations(const SiteMoments& moments) {
  const auto n = static_cast<double>(moments.count);
  const size_t rows = moments.sums[0].size(), columns = moments.sums[1].size();
  const auto deviation = [&](int model, size_t i) {
    const double mean = moments.sums[model][i] / n;
    return std::sqrt(moments.squares[model][i] / n - mean * mean);
  };
  std::vector<double> correlations;
  for (size_t i = 0; i < rows; ++i) {
    for (size_t j = 0; j < columns; ++j) {
      const double covariance = moments.grams[0][1][i * columns + j] / n -
                                moments.sums[0][i] / n * moments.sums[1][j] / n;
      correlations.push_back(covariance / std::max(deviation(0, i) * deviation(1, j), 1e-7));
    }
  }
  return correlations;
}

TEST_P(StatisticsTest, AgreesWithGoldenFeatures) {
  const std::string golden = kShared + "goldens/alignment/bert_cls_splitqk/";
  if (!std::filesystem::exists(golden)) GTEST_SKIP() << "there is no " << golden;
  auto tensors = ReadTensors(golden + "io.safetensors");
  const auto reader = Collect({OpenModel(golden + "a"), OpenModel(golden + "b")},
                              OpenData(golden + "io.safetensors"), Options(Grams::kAll));
  ASSERT_NE(reader, nullptr);
  struct Case {
    std::string site, golden;
    bool features;  // are there, beside the correlations
  };
  for (const Case& c :
       {Case{"attention.0", "attn.0", true}, Case{"ffn.1", "ff.1", true},
        Case{"residual.0", "res.emb", true}, Case{"attention.1", "attn.1", false},
        Case{"ffn.0", "ff.0", false}, Case{"query.0", "q.0", false}, Case{"query.1", "q.1", false},
        Case{"key.0", "k.0", false}, Case{"key.1", "k.1", false},
        Case{"residual.1", "res.attn.0", false}, Case{"residual.2", "res.ff.0", false},
        Case{"residual.3", "res.attn.1", false}, Case{"residual.4", "res.ff.1", false}}) {
    SCOPED_TRACE(c.site);
    auto moments = reader->Read(c.site);
    ASSERT_THAT(moments, IsOk());
    EXPECT_EQ(moments->count, 237);
    EXPECT_LT(Difference(Correlations(*moments), tensors["corr." + c.golden].values), 1e-5);
    if (!c.features) continue;
    const TinyTensor &a = tensors["act_a." + c.golden], &b = tensors["act_b." + c.golden];
    EXPECT_LT(Difference(moments->sums[0], Sums(a)), 1e-5);
    EXPECT_LT(Difference(moments->sums[1], Sums(b)), 1e-5);
    EXPECT_LT(Difference(moments->grams[0][0], Product(a, a)), 1e-5);
    EXPECT_LT(Difference(moments->grams[0][1], Product(a, b)), 1e-5);
    EXPECT_LT(Difference(moments->grams[1][1], Product(b, b)), 1e-5);
  }
}

// A causal model's state of a last token is what the sum over all tokens has more than the sum
// without it. Memory for a few rows at a time changes nothing.
TEST_P(StatisticsTest, HiddenStatesAreWhatSumsSay) {
  const ForwardModel model = OpenModel(kModels + "qwen3");
  const std::vector<std::vector<int32_t>> rows = {{3, 1, 4, 1, 5}, {9, 2}, {6, 5, 3, 5}};
  const auto sum = [&](std::vector<int32_t> row, int layer) {
    std::filesystem::remove(folder_ / kKey);
    const auto reader = Collect({model}, ForwardData::OfTokens("a row", {std::move(row)}),
                                Options(Grams::kDiagonals));
    return reader->Read(absl::StrCat("residual.", 2 * layer))->sums[0];
  };
  for (RowState state : {RowState::kLast, RowState::kMean}) {
    for (int64_t batch_tokens : {4096, 5}) {
      const auto means =
          MeanHiddenStates(model, ForwardData::OfTokens("rows", rows), {0, 1, 0}, state,
                           {.backend = &backend(), .batch_tokens = batch_tokens});
      ASSERT_THAT(means, IsOk());
      ASSERT_EQ(means->size(), 2);
      ASSERT_EQ((*means)[0].size(), 2);
      for (int layer : {0, 1}) {
        const auto of_row = [&](std::vector<int32_t> row) {
          std::vector<double> all = sum(row, layer);
          if (state == RowState::kMean) {
            for (double& value : all) value /= static_cast<double>(row.size());
            return all;
          }
          row.pop_back();
          const std::vector<double> before = sum(row, layer);
          for (size_t i = 0; i < all.size(); ++i) all[i] -= before[i];
          return all;
        };
        std::vector<double> both = of_row(rows[0]);
        const std::vector<double> other = of_row(rows[2]);
        for (size_t i = 0; i < both.size(); ++i) both[i] = (both[i] + other[i]) / 2;
        EXPECT_LT(Difference((*means)[0][layer], both), 1e-5);
        EXPECT_LT(Difference((*means)[1][layer], of_row(rows[1])), 1e-5);
      }
    }
  }
}

// What a linear layer gives out has the moments that its inputs' say: this ties sites to each other
// and to the outputs.
TEST_P(StatisticsTest, MomentsGoThroughLinearLayers) {
  const std::string folder = kModels + "qwen3";
  auto weights = ReadTensors(folder + "/model.safetensors");
  auto io = ReadTensors(folder + "/io.safetensors");
  const auto reader =
      Collect({OpenModel(folder)}, OpenData(folder + "/io.safetensors"), Options(Grams::kOwn));
  ASSERT_NE(reader, nullptr);
  const auto times = [](const TinyTensor& weight, const std::vector<double>& sums) {
    std::vector<double> out(weight.shape[0]);
    for (int64_t i = 0; i < weight.shape[0]; ++i) {
      for (int64_t j = 0; j < weight.shape[1]; ++j) {
        out[i] += weight.values[i * weight.shape[1] + j] * sums[j];
      }
    }
    return out;
  };
  const auto read = [&](const std::string& site) { return *reader->Read(site); };
  const std::string layer = "model.layers.1.";
  const std::vector<double> input = read("attention_input.1").sums[0];
  EXPECT_LT(
      Difference(read("query.1").sums[0], times(weights[layer + "self_attn.q_proj.weight"], input)),
      1e-5);
  EXPECT_LT(
      Difference(read("key.1").sums[0], times(weights[layer + "self_attn.k_proj.weight"], input)),
      1e-5);
  EXPECT_LT(
      Difference(read("value.1").sums[0], times(weights[layer + "self_attn.v_proj.weight"], input)),
      1e-5);
  // The stream: what was there, and what the block adds.
  std::vector<double> stream = read("residual.2").sums[0];
  const auto add = [&](const std::vector<double>& sums) {
    for (size_t i = 0; i < stream.size(); ++i) stream[i] += sums[i];
  };
  add(times(weights[layer + "self_attn.o_proj.weight"], read("attention.1").sums[0]));
  EXPECT_LT(Difference(read("residual.3").sums[0], stream), 1e-5);
  add(times(weights[layer + "mlp.down_proj.weight"], read("ffn.1").sums[0]));
  EXPECT_LT(Difference(read("residual.4").sums[0], stream), 1e-5);
  // The logits, of all tokens (those of padding are zero in the file).
  const SiteMoments head = read("head_input");
  EXPECT_EQ(head.count, 4 * 12 - 3 - 7 - 1);
  TinyTensor logits = io["outputs"];
  logits.shape = {logits.shape[0] * logits.shape[1], logits.shape[2]};
  EXPECT_LT(Difference(Sums(logits), times(weights["lm_head.weight"], head.sums[0])), 1e-5);
  for (const std::string& site : reader->sites()) {
    const SiteMoments moments = read(site);
    const size_t width = moments.sums[0].size();
    std::vector<double> diagonal;
    for (size_t i = 0; i < width; ++i) diagonal.push_back(moments.grams[0][0][i * width + i]);
    EXPECT_LT(Difference(diagonal, moments.squares[0]), 1e-6) << site;
    for (size_t i = 0; i < width; ++i) {
      for (size_t j = 0; j < i; ++j) {
        ASSERT_EQ(moments.grams[0][0][i * width + j], moments.grams[0][0][j * width + i]) << site;
      }
    }
  }
}

TEST_P(StatisticsTest, SitesAreChosen) {
  const std::string folder = kModels + "bert";
  StatisticsOptions options = Options(Grams::kNone);
  options.choose = [](absl::string_view site) {
    if (site == "ffn.1") return Grams::kCross;
    if (site == "transform_input") return Grams::kDiagonals;
    return site == "head_input" ? Grams::kOwn : Grams::kNone;
  };
  const auto reader = Collect({OpenModel(folder), OpenModel(folder)},
                              OpenData(folder + "/io.safetensors"), options);
  ASSERT_NE(reader, nullptr);
  EXPECT_THAT(reader->sites(), ElementsAre("ffn.1", "transform_input", "head_input"));
  EXPECT_EQ(reader->models().size(), 2);
  const SiteMoments ffn = *reader->Read("ffn.1");
  EXPECT_TRUE(ffn.grams[0][0].empty());
  EXPECT_FALSE(ffn.grams[0][1].empty());
  EXPECT_EQ(ffn.sums[0], ffn.sums[1]);
  const SiteMoments transform = *reader->Read("transform_input");
  EXPECT_TRUE(transform.grams[0][1].empty());
  EXPECT_FALSE(transform.squares[1].empty());
  const SiteMoments head = *reader->Read("head_input");
  EXPECT_FALSE(head.grams[1][1].empty());
  EXPECT_TRUE(head.grams[0][1].empty());
  EXPECT_THAT(reader->Read("ffn.0"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("ffn.0")));
}

TEST_P(StatisticsTest, BatchSizeChangesRoundingAlone) {
  const std::string folder = kModels + "roberta_classifier";
  const std::vector<ForwardModel> models = {OpenModel(folder)};
  const auto data = OpenData(folder + "/io.safetensors");
  StatisticsOptions options = Options(Grams::kOwn);
  options.overwrite = true;
  std::vector<std::vector<double>> grams[2];
  for (int i = 0; i < 2; ++i) {
    options.forward.batch_tokens = i == 0 ? 4096 : 1;
    const auto reader = Collect(models, data, options);
    ASSERT_NE(reader, nullptr);
    for (const std::string& site : reader->sites()) {
      const SiteMoments moments = *reader->Read(site);
      EXPECT_EQ(moments.count, site == "pooler_input" || site == "classifier_input" ? 4 : 37);
      grams[i].push_back(moments.grams[0][0]);
    }
  }
  ASSERT_EQ(grams[0].size(), grams[1].size());
  for (size_t i = 0; i < grams[0].size(); ++i)
    EXPECT_LT(Difference(grams[0][i], grams[1][i]), 1e-5);
}

TEST_P(StatisticsTest, KilledPassIsResumedWithTheSameBytes) {
  const std::string folder = kModels + "llama3";
  const std::vector<ForwardModel> models = {OpenModel(folder), OpenModel(kModels + "llama_linear")};
  const auto data = OpenData(folder + "/io.safetensors");
  const StatisticsOptions options = Options(Grams::kAll);
  ASSERT_NE(Collect(models, data, options), nullptr);
  const std::string whole = ReadFile(folder_ / kKey);

  const TempFolder other;
  auto store = std::make_shared<FileStore>(other.path());
  // The third layer's moments cannot be written.
  auto faulty = std::make_shared<FaultyStore>(store, testing::Faults{.fail_commit = 3});
  EXPECT_THAT(CollectStatistics(models, data, options, faulty, kKey),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("injected")));
  EXPECT_FALSE(store->Stat(kKey).ok());
  auto resumed = CollectStatistics(models, data, options, store, kKey);
  ASSERT_THAT(resumed, IsOk());
  EXPECT_EQ(resumed->layers_resumed, 2);
  EXPECT_EQ(ReadFile(other / kKey), whole);
  EXPECT_EQ(store->List("")->size(), 1) << "parts are left";

  auto again = CollectStatistics(models, data, options, store, kKey);
  ASSERT_THAT(again, IsOk());
  EXPECT_TRUE(again->reused);
  // Other choices are another artefact.
  EXPECT_THAT(CollectStatistics(models, data, Options(Grams::kCross), store, kKey),
              StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr(kKey)));
}

TEST_P(StatisticsTest, StopsWhenAsked) {
  const std::string folder = kModels + "bert";
  std::stop_source stop;
  StatisticsOptions options = Options(Grams::kOwn);
  options.forward.stop = stop.get_token();
  options.forward.progress = [&](int64_t done, int64_t total) {
    EXPECT_LE(done, total);
    if (done == 2) stop.request_stop();
  };
  auto store = std::make_shared<FileStore>(folder_.path());
  EXPECT_THAT(CollectStatistics({OpenModel(folder)}, OpenData(folder + "/io.safetensors"), options,
                                store, kKey),
              StatusIs(absl::StatusCode::kCancelled, HasSubstr("stopped")));
}

TEST_P(StatisticsTest, RefusesWhatCannotBe) {
  const auto data = OpenData(kModels + "bert/io.safetensors");
  auto store = std::make_shared<FileStore>(folder_.path());
  EXPECT_THAT(CollectStatistics({OpenModel(kModels + "bert"), OpenModel(kModels + "llama3")}, data,
                                Options(Grams::kCross), store, kKey),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("llama3")));
  StatisticsOptions small = Options(Grams::kCross);
  small.forward.memory_bytes = 10'240;
  EXPECT_THAT(CollectStatistics({OpenModel(kModels + "bert")}, data, small, store, kKey),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("memory is 10.0 KiB")));
  EXPECT_THAT(
      CollectStatistics({OpenModel(kModels + "bert")}, data, Options(Grams::kNone), store, kKey),
      StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no site")));
  EXPECT_TRUE(store->List("")->empty());
}

TEST(StatisticsReaderTest, RefusesOtherFiles) {
  EXPECT_THAT(StatisticsReader::Open(kModels + "bert/model.safetensors"),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("not a statistics file")));
  EXPECT_THAT(StatisticsReader::Open(kModels + "none"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("none")));
}

}  // namespace
}  // namespace pewter
