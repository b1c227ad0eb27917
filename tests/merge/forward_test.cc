// The forward pass against what PyTorch gives (tests/merge/forward, and ../shared where it is
// there), and by what must hold of it, on every backend.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "kernels/backends.h"
#include "merge/forward/evaluate.h"
#include "merge/forward/forward_pass.h"
#include "tests/kernels/under_test.h"
#include "tests/support/matchers.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace pewter {
namespace {

using pewter::testing::IsOk;
using pewter::testing::ReadFile;
using pewter::testing::ReadTensors;
using pewter::testing::StatusIs;
using pewter::testing::TempFolder;
using pewter::testing::TinyTensor;
using pewter::testing::WriteSafetensors;
using ::testing::AllOf;
using ::testing::HasSubstr;

const std::string kShared = std::string(PEWTER_SOURCE_DIR) + "/../shared/";
const std::string kModels = std::string(PEWTER_SOURCE_DIR) + "/tests/merge/forward/";

ForwardModel OpenModel(const std::string& path) {
  auto checkpoint = Checkpoint::Open({.path = path});
  EXPECT_THAT(checkpoint, IsOk());
  auto model = MakeForwardModel(*checkpoint);
  EXPECT_THAT(model, IsOk());
  return *model;
}

std::shared_ptr<const ForwardData> OpenData(const std::string& path) {
  auto data = ForwardData::Open(path);
  EXPECT_THAT(data, IsOk());
  return data.ok() ? *data : nullptr;
}

class ForwardTest : public kernels::BackendTest {
 protected:
  ForwardOptions options() { return {.backend = &backend()}; }
};
INSTANTIATE_ON_BACKENDS(ForwardTest);

// Largest difference from the rows of `reference` whose tokens are not padding, as a share of its
// largest value.
double RelativeError(const ForwardOutputs& outputs, const TinyTensor& reference,
                     const ForwardData& data) {
  double difference = 0, largest = 0;
  int64_t at = 0;
  const bool by_token = reference.shape.rank() == 3;
  const int64_t rows = reference.shape.elements() / outputs.columns;
  for (int64_t row = 0; row < rows; ++row) {
    if (by_token && data.has_tokens() && !data.real(row / data.length(), row % data.length())) {
      continue;
    }
    for (int64_t j = 0; j < outputs.columns; ++j) {
      const double wanted = reference.values[row * outputs.columns + j];
      difference = std::max(difference, std::abs(wanted - outputs.values[at++]));
      largest = std::max(largest, std::abs(wanted));
    }
  }
  EXPECT_EQ(at, static_cast<int64_t>(outputs.values.size()));
  return difference / largest;
}

TEST_P(ForwardTest, AgreesWithPyTorch) {
  int cases = 0;
  for (const auto& entry : std::filesystem::directory_iterator(kModels)) {
    if (!entry.is_directory()) continue;
    const std::string folder = entry.path();
    SCOPED_TRACE(folder);
    const auto data = OpenData(folder + "/io.safetensors");
    auto outputs = ComputeOutputs(OpenModel(folder), data, options());
    ASSERT_THAT(outputs, IsOk());
    const TinyTensor reference = ReadTensors(folder + "/io.safetensors")["outputs"];
    EXPECT_LT(RelativeError(*outputs, reference, *data), 2e-6);
    ++cases;
  }
  EXPECT_GE(cases, 15);
}

TEST_P(ForwardTest, AgreesWithGoldenLogits) {
  const std::string goldens = kShared + "goldens/alignment/";
  if (!std::filesystem::exists(goldens)) GTEST_SKIP() << "there is no " << goldens;
  for (const char* name :
       {"bert_mlm", "bert_cls_splitqk", "gpt2", "llama_gqa", "llama_sym", "qwen3_qknorm", "vit"}) {
    const std::string folder = goldens + name;
    const auto data = OpenData(folder + "/io.safetensors");
    auto tensors = ReadTensors(folder + "/io.safetensors");
    for (const std::string which : {"a", "b"}) {
      auto outputs = ComputeOutputs(OpenModel(folder + "/" + which), data, options());
      ASSERT_THAT(outputs, IsOk()) << name;
      const double error = RelativeError(*outputs, tensors["logits_" + which], *data);
      EXPECT_LT(error, 1e-5) << name << " " << which;
      RecordProperty(std::string(name) + "_" + which, std::to_string(error * 1e6) + "e-6");
    }
  }
}

// The mean of two tensors.
class MeanSource final : public TensorSource {
 public:
  MeanSource(std::shared_ptr<const TensorSource> a, std::shared_ptr<const TensorSource> b)
      : a_(std::move(a)), b_(std::move(b)) {}
  DType dtype() const override { return DType::kF32; }
  const Shape& shape() const override { return a_->shape(); }
  const std::string& name() const override { return a_->name(); }
  absl::Status Read(int64_t first, int64_t count, absl::Span<std::byte> out,
                    ReadObserver* observer) const override {
    std::vector<std::byte> other(out.size());
    if (absl::Status read = a_->Read(first, count, out, observer); !read.ok()) return read;
    if (absl::Status read = b_->Read(first, count, absl::MakeSpan(other), observer); !read.ok()) {
      return read;
    }
    for (int64_t i = 0; i < count; ++i) {
      float x = 0, y = 0;
      std::memcpy(&x, out.data() + 4 * i, 4);
      std::memcpy(&y, other.data() + 4 * i, 4);
      x = 0.5f * x + 0.5f * y;
      std::memcpy(out.data() + 4 * i, &x, 4);
    }
    return absl::OkStatus();
  }

 private:
  const std::shared_ptr<const TensorSource> a_, b_;
};

ForwardModel MeanOf(const ForwardModel& a, const ForwardModel& b) {
  ForwardModel mean = a;
  mean.name = "mean";
  mean.tensors =
      [a, b](absl::string_view name) -> absl::StatusOr<std::shared_ptr<const TensorSource>> {
    auto x = a.tensors(name);
    auto y = b.tensors(name);
    if (!x.ok() || !y.ok() || *x == nullptr) return x;
    return std::make_shared<MeanSource>(*x, *y);
  };
  return mean;
}

TEST_P(ForwardTest, TensorsMayBeMadeOfTwoModels) {
  const std::string folder = kShared + "goldens/alignment/bert_mlm/";
  if (!std::filesystem::exists(folder)) GTEST_SKIP() << "there is no " << folder;
  const auto data = OpenData(folder + "io.safetensors");
  auto outputs =
      ComputeOutputs(MeanOf(OpenModel(folder + "a"), OpenModel(folder + "b")), data, options());
  ASSERT_THAT(outputs, IsOk());
  const TinyTensor reference = ReadTensors(folder + "io.safetensors")["logits_avg_naive"];
  EXPECT_LT(RelativeError(*outputs, reference, *data), 1e-5);
}

TEST_P(ForwardTest, LossesOfTheRealPair) {
  const std::string pair = kShared + "models/bert-pair/";
  if (!std::filesystem::exists(pair)) GTEST_SKIP() << "there is no " << pair;
  const auto data = OpenData(pair + "eval.safetensors");
  auto a = Evaluate(OpenModel(pair + "a"), data, Metric::kMlmLoss, options());
  ASSERT_THAT(a, IsOk());
  EXPECT_NEAR(a->loss, 3.6239, 5e-5);
  EXPECT_NEAR(a->accuracy, 0.346, 5e-4);
  EXPECT_EQ(a->tokens, 5572);
  auto b = Evaluate(OpenModel(pair + "b"), data, Metric::kMlmLoss, options());
  ASSERT_THAT(b, IsOk());
  EXPECT_NEAR(b->loss, 3.6094, 5e-5);
}

double LargestDifference(const ForwardOutputs& a, const ForwardOutputs& b) {
  EXPECT_EQ(a.values.size(), b.values.size());
  double difference = 0;
  for (size_t i = 0; i < std::min(a.values.size(), b.values.size()); ++i) {
    difference = std::max(difference, std::abs(double{a.values[i]} - b.values[i]));
  }
  return difference;
}

TEST_P(ForwardTest, BatchSizeChangesRoundingAlone) {
  for (const char* name : {"bert", "llama3", "mistral_window", "t5_encoder", "vit"}) {
    const std::string folder = kModels + name;
    const auto data = OpenData(folder + "/io.safetensors");
    const ForwardModel model = OpenModel(folder);
    auto whole = ComputeOutputs(model, data, options());
    ASSERT_THAT(whole, IsOk());
    for (const int64_t tokens : {1, 20}) {
      ForwardOptions small = options();
      small.batch_tokens = tokens;
      auto parts = ComputeOutputs(model, data, small);
      ASSERT_THAT(parts, IsOk());
      EXPECT_LT(LargestDifference(*whole, *parts), 2e-5) << name;
    }
  }
}

TinyTensor Integers(const std::string& name, std::vector<int64_t> extents,
                    std::vector<double> values) {
  return {name, DType::kI64, *Shape::Make(extents), std::move(values)};
}

TEST_P(ForwardTest, PaddingDoesNotChangeTokens) {
  const TempFolder folder;
  const std::vector<double> ids = {5, 9, 3, 17, 8, 2};
  WriteSafetensors(folder / "plain", {Integers("input_ids", {1, 6}, ids)});
  std::vector<double> padded = {11, 11, 11, 11, 11, 11, 11, 11, 11};
  std::vector<double> mask(18, 1);
  padded.insert(padded.end(), ids.begin(), ids.end());
  for (int i = 15; i < 18; ++i) mask[i] = 0;
  padded.resize(18, 7);
  WriteSafetensors(folder / "padded", {Integers("input_ids", {2, 9}, padded),
                                       Integers("attention_mask", {2, 9}, mask)});
  for (const char* name : {"bert", "distilbert", "gpt2", "qwen3", "t5_gated_encoder"}) {
    const ForwardModel model = OpenModel(kModels + name);
    auto plain = ComputeOutputs(model, OpenData(folder / "plain"), options());
    auto with_padding = ComputeOutputs(model, OpenData(folder / "padded"), options());
    ASSERT_THAT(plain, IsOk());
    ASSERT_THAT(with_padding, IsOk());
    ASSERT_EQ(with_padding->rows, 15);
    ForwardOutputs second = {.rows = 6, .columns = plain->columns};
    second.values.assign(with_padding->values.end() - plain->values.size(),
                         with_padding->values.end());
    EXPECT_LT(LargestDifference(*plain, second), 2e-5) << name;
  }
}

// The cross-entropy of outputs, in double.
struct Direct {
  double loss = 0, accuracy = 0;
};
Direct LossOf(const ForwardOutputs& outputs, const std::vector<std::pair<int64_t, int>>& targets) {
  Direct direct;
  for (const auto& [row, label] : targets) {
    const float* const logits = outputs.values.data() + row * outputs.columns;
    double sum = 0;
    for (int64_t j = 0; j < outputs.columns; ++j) sum += std::exp(double{logits[j]});
    direct.loss += std::log(sum) - logits[label];
    direct.accuracy += std::max_element(logits, logits + outputs.columns) - logits == label;
  }
  direct.loss /= static_cast<double>(targets.size());
  direct.accuracy /= static_cast<double>(targets.size());
  return direct;
}

TEST_P(ForwardTest, LossesAreThoseOfTheLogits) {
  const TempFolder folder;
  const std::vector<double> ids = {5, 9, 3, 17, 8, 2, 4, 4, 19, 6};
  const std::vector<double> mask = {1, 1, 1, 1, 1, 1, 1, 1, 1, 0};
  WriteSafetensors(folder / "masked",
                   {Integers("input_ids", {2, 5}, ids), Integers("attention_mask", {2, 5}, mask),
                    Integers("labels", {2, 5}, {-100, 7, -100, -100, 1, 4, -100, -100, 23, -100})});
  WriteSafetensors(folder / "causal",
                   {Integers("input_ids", {2, 5}, ids), Integers("attention_mask", {2, 5}, mask)});
  WriteSafetensors(folder / "classes",
                   {Integers("input_ids", {2, 5}, ids), Integers("attention_mask", {2, 5}, mask),
                    Integers("labels", {2}, {2, 0})});
  struct Case {
    std::string model, data;
    Metric metric;
    std::vector<std::pair<int64_t, int>> targets;  // output rows, and labels
  };
  for (const Case& c : {
           Case{"roberta", "masked", Metric::kMlmLoss, {{1, 7}, {4, 1}, {5, 4}, {8, 23}}},
           Case{"llama3",
                "causal",
                Metric::kClmLoss,
                {{0, 9}, {1, 3}, {2, 17}, {3, 8}, {5, 4}, {6, 4}, {7, 19}}},
           Case{"distilbert_classifier", "classes", Metric::kAccuracy, {{0, 2}, {1, 0}}},
       }) {
    SCOPED_TRACE(c.model);
    const ForwardModel model = OpenModel(kModels + c.model);
    const auto data = OpenData(folder / c.data);
    auto outputs = ComputeOutputs(model, data, options());
    ASSERT_THAT(outputs, IsOk());
    const Direct direct = LossOf(*outputs, c.targets);
    auto evaluation = Evaluate(model, data, c.metric, options());
    ASSERT_THAT(evaluation, IsOk());
    EXPECT_NEAR(evaluation->loss, direct.loss, 1e-6 * std::max(1.0, direct.loss));
    EXPECT_EQ(evaluation->accuracy, direct.accuracy);
    EXPECT_EQ(evaluation->tokens, static_cast<int64_t>(c.targets.size()));
    EXPECT_EQ(evaluation->perplexity, std::exp(evaluation->loss));
    EXPECT_EQ(*DefaultMetric(model), c.metric);
  }
}

TEST_P(ForwardTest, LittleMemoryGivesTheSameBits) {
  const std::string folder = kModels + "llama3";
  const ForwardModel model = OpenModel(folder);
  const TempFolder files;
  std::vector<double> ids;
  for (int i = 0; i < 64 * 12; ++i) ids.push_back(2 + i * 7 % 22);
  WriteSafetensors(files / "data", {Integers("input_ids", {64, 12}, ids)});
  const auto data = OpenData(files / "data");
  ForwardOptions bounded = options();
  bounded.batch_tokens = 24;
  auto whole = Evaluate(model, data, Metric::kClmLoss, bounded);
  ASSERT_THAT(whole, IsOk());
  auto pass = ForwardPass::Open({model}, data, bounded);
  ASSERT_THAT(pass, IsOk());
  // Room for a few batches beside the head's, which their number does not change.
  const int64_t head_bytes = 4 * (24 * (8 + 1) + 1024 * 24);
  bounded.memory_bytes = (*pass)->Bytes(200) + head_bytes;
  auto bounded_pass = ForwardPass::Open({model}, data, bounded);
  ASSERT_THAT(bounded_pass, IsOk());
  auto fitting = (*bounded_pass)->BatchesThatFit(0, [&](int64_t) { return head_bytes; });
  ASSERT_THAT(fitting, IsOk());
  EXPECT_EQ(*fitting, 200 / 24);
  auto parts = Evaluate(model, data, Metric::kClmLoss, bounded);
  ASSERT_THAT(parts, IsOk());
  EXPECT_EQ(whole->loss, parts->loss);
  EXPECT_EQ(whole->accuracy, parts->accuracy);

  bounded.memory_bytes = 1000;
  EXPECT_THAT(Evaluate(model, data, Metric::kClmLoss, bounded),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("24 tokens at a time")));
}

TEST(ForwardCpuTest, ThreadsDoNotChangeBits) {
  const std::string folder = kModels + "bert";
  const auto data = OpenData(folder + "/io.safetensors");
  const auto one = kernels::OpenBackend({}, 1), three = kernels::OpenBackend({}, 3);
  auto a = ComputeOutputs(OpenModel(folder), data, {.backend = one->get()});
  auto b = ComputeOutputs(OpenModel(folder), data, {.backend = three->get()});
  ASSERT_THAT(a, IsOk());
  ASSERT_THAT(b, IsOk());
  EXPECT_EQ(a->values, b->values);
}

// --- Bad input ----------------------------------------------------------------------------------

class BadInputTest : public ::testing::Test {
 protected:
  // Of a model and a file of such tensors.
  absl::Status Error(const ForwardModel& model, const std::vector<TinyTensor>& tensors,
                     Metric metric = Metric::kMlmLoss) {
    WriteSafetensors(folder_ / "data.safetensors", tensors);
    auto data = ForwardData::Open(folder_ / "data.safetensors");
    if (!data.ok()) return data.status();
    return Evaluate(model, *data, metric, {.backend = backend_.get()}).status();
  }
  // Of a model whose configuration is changed.
  absl::Status ConfigError(const std::string& name, const std::string& key,
                           const nlohmann::json& value) {
    ForwardModel model = OpenModel(kModels + name);
    nlohmann::json config = nlohmann::json::parse(model.config_json);
    config[key] = value;
    model.config_json = config.dump();
    return Error(model,
                 {Integers("input_ids", {1, 3}, {3, 4, 5}), Integers("labels", {1, 3}, {3, 4, 5})});
  }

  const TempFolder folder_;
  const std::unique_ptr<kernels::Backend> backend_ = *kernels::OpenBackend({}, 1);
  const ForwardModel bert_ = OpenModel(kModels + "bert");
};

constexpr auto kPrecondition = absl::StatusCode::kFailedPrecondition;

TEST_F(BadInputTest, DataThatCannotBe) {
  const TinyTensor ids = Integers("input_ids", {2, 3}, {3, 4, 5, 6, 7, 8});
  EXPECT_THAT(Error(bert_, {Integers("tokens", {2, 3}, {3, 4, 5, 6, 7, 8})}),
              StatusIs(kPrecondition, AllOf(HasSubstr("neither input_ids nor pixel_values"),
                                            HasSubstr("tokens"))));
  EXPECT_THAT(Error(bert_, {Integers("input_ids", {3}, {3, 4, 5})}),
              StatusIs(kPrecondition, HasSubstr("has the shape [3]; wanted is [rows, length]")));
  EXPECT_THAT(Error(bert_, {Integers("input_ids", {0, 3}, {})}),
              StatusIs(kPrecondition, HasSubstr("input_ids is empty")));
  EXPECT_THAT(Error(bert_, {{"input_ids", DType::kF32, {2, 2}, {1, 2, 3, 4}}}),
              StatusIs(kPrecondition, HasSubstr("input_ids is F32 and not of an integer type")));
  EXPECT_THAT(Error(bert_, {Integers("input_ids", {1, 3}, {3, -4, 5})}),
              StatusIs(kPrecondition, HasSubstr("input_ids [0, 1] is -4")));
  EXPECT_THAT(Error(bert_, {ids, Integers("attention_mask", {2, 2}, {1, 1, 1, 1})}),
              StatusIs(kPrecondition, HasSubstr("attention_mask has the shape [2, 2]")));
  EXPECT_THAT(Error(bert_, {ids, Integers("attention_mask", {2, 3}, {1, 1, 1, 0, 0, 0})}),
              StatusIs(kPrecondition, HasSubstr("leaves nothing of row 1")));
  EXPECT_THAT(Error(bert_, {ids, Integers("attention_mask", {2, 3}, {1, 1, 1, 2, 0, 0})}),
              StatusIs(kPrecondition, HasSubstr("attention_mask [1, 0] is 2")));
  EXPECT_THAT(Error(bert_, {ids, Integers("labels", {2, 3}, {1, 1, 1, 2, -5, 0})}),
              StatusIs(kPrecondition, HasSubstr("labels [1, 1] is -5")));
  EXPECT_THAT(Error(bert_, {ids, Integers("attention_mask", {2, 3}, {1, 1, 0, 1, 1, 1}),
                            Integers("labels", {2, 3}, {1, 1, 1, 2, 3, 0})}),
              StatusIs(kPrecondition, HasSubstr("labels [0, 2] is 1 where attention_mask is 0")));
  EXPECT_THAT(Error(bert_, {ids, Integers("labels", {3}, {1, 1, 1})}),
              StatusIs(kPrecondition, HasSubstr("labels has the shape [3]")));
}

TEST_F(BadInputTest, DataThatTheModelCannotRead) {
  const TinyTensor ids = Integers("input_ids", {1, 3}, {3, 4, 5});
  const TinyTensor labels = Integers("labels", {1, 3}, {-100, 4, -100});
  EXPECT_THAT(
      Error(bert_, {Integers("input_ids", {1, 3}, {3, 24, 5}), labels}),
      StatusIs(kPrecondition, HasSubstr("input_ids[0, 1] is 24 and its vocabulary has 24 tokens")));
  EXPECT_THAT(Error(bert_, {Integers("input_ids", {1, 17}, std::vector<double>(17, 3))}),
              StatusIs(kPrecondition, HasSubstr("17 tokens are longer than its 16 positions")));
  EXPECT_THAT(Error(bert_, {ids, labels, Integers("token_type_ids", {1, 3}, {0, 2, 0})}),
              StatusIs(kPrecondition, HasSubstr("token_type_ids[0, 1] is 2")));
  EXPECT_THAT(Error(bert_, {ids}), StatusIs(kPrecondition, HasSubstr("has no labels")));
  EXPECT_THAT(Error(bert_, {ids, Integers("labels", {1, 3}, {-100, -100, -100})}),
              StatusIs(kPrecondition, HasSubstr("nothing to predict")));
  EXPECT_THAT(Error(bert_, {ids, Integers("labels", {1}, {1})}),
              StatusIs(kPrecondition, HasSubstr("no label for each token")));
  EXPECT_THAT(Error(bert_, {ids, Integers("labels", {1, 3}, {1, 24, 1})}),
              StatusIs(kPrecondition, HasSubstr("is 24 and the model has 24 classes")));
  EXPECT_THAT(Error(bert_, {ids, labels}, Metric::kClmLoss),
              StatusIs(kPrecondition, HasSubstr("mlm_loss is")));
  EXPECT_THAT(Error(OpenModel(kModels + "t5_encoder"), {ids, labels}),
              StatusIs(kPrecondition, HasSubstr("no head")));
  EXPECT_THAT(Error(OpenModel(kModels + "vit"), {ids, labels}, Metric::kAccuracy),
              StatusIs(kPrecondition, HasSubstr("reads pixel_values")));
  EXPECT_THAT(
      Error(OpenModel(kModels + "bert_classifier"),
            {ids, Integers("labels", {1}, {1}), Integers("attention_mask", {1, 3}, {0, 1, 1})},
            Metric::kAccuracy),
      StatusIs(kPrecondition, HasSubstr("the token that a classifier reads")));
  const ForwardModel vit = OpenModel(kModels + "vit");
  EXPECT_THAT(Error(vit, {{"pixel_values", DType::kF32, {1, 2, 8, 4}, std::vector<double>(64)}},
                    Metric::kAccuracy),
              StatusIs(kPrecondition, HasSubstr("config.json says [1, 2, 8, 8]")));
}

TEST_F(BadInputTest, ModelsThatAreNotKnown) {
  EXPECT_THAT(ConfigError("bert", "model_type", "mamba"),
              StatusIs(kPrecondition, AllOf(HasSubstr("\"mamba\""), HasSubstr("qwen3"))));
  EXPECT_THAT(ConfigError("bert", "hidden_act", "gelu_10"),
              StatusIs(kPrecondition, HasSubstr("hidden_act is \"gelu_10\"")));
  EXPECT_THAT(ConfigError("bert", "is_decoder", true),
              StatusIs(kPrecondition, HasSubstr("is_decoder is true")));
  EXPECT_THAT(ConfigError("bert", "position_embedding_type", "relative_key"),
              StatusIs(kPrecondition, HasSubstr("position_embedding_type")));
  EXPECT_THAT(ConfigError("bert", "hidden_size", "8"),
              StatusIs(kPrecondition, HasSubstr("hidden_size must be an integer")));
  EXPECT_THAT(ConfigError("bert", "num_hidden_layers", 0),
              StatusIs(kPrecondition, HasSubstr("num_hidden_layers is 0")));
  EXPECT_THAT(ConfigError("bert", "num_attention_heads", 3),
              StatusIs(kPrecondition, HasSubstr("does not divide 8")));
  EXPECT_THAT(ConfigError("bert", "hidden_size", int64_t{1} << 62),
              StatusIs(kPrecondition, HasSubstr("hidden_size is 4611686018427387904")));
  EXPECT_THAT(ConfigError("bert", "hidden_size", -8),
              StatusIs(kPrecondition, HasSubstr("hidden_size is -8")));
  EXPECT_THAT(ConfigError("bert", "vocab_size", 2147483647),
              StatusIs(kPrecondition, HasSubstr("config.json says [2147483647, 8]")));
  EXPECT_THAT(ConfigError("bert", "intermediate_size", 13),
              StatusIs(kPrecondition, AllOf(HasSubstr("intermediate.dense.weight"),
                                            HasSubstr("config.json says [13, 8]"))));
  EXPECT_THAT(ConfigError("bert", "num_hidden_layers", 3),
              StatusIs(kPrecondition, HasSubstr("there is no tensor bert.encoder.layer.2.")));
  EXPECT_THAT(ConfigError("llama3", "rope_parameters",
                          nlohmann::json::object({{"rope_type", "longrope"}, {"factor", 2.0}})),
              StatusIs(kPrecondition, HasSubstr("rope_parameters.rope_type is \"longrope\"")));
  EXPECT_THAT(ConfigError("llama3", "num_key_value_heads", 3),
              StatusIs(kPrecondition, HasSubstr("num_key_value_heads is 3")));
  EXPECT_THAT(ConfigError("llama3", "quantization_config", nlohmann::json::object({{"bits", 4}})),
              StatusIs(kPrecondition, HasSubstr("quantization_config")));
  EXPECT_THAT(ConfigError("bert", "architectures", nlohmann::json::array({"GPT2LMHeadModel"})),
              StatusIs(kPrecondition, HasSubstr("causal language model")));
}

}  // namespace
}  // namespace pewter
