// The forward pass against logits that PyTorch gave, where ../shared has them, and by what must
// hold of it on every backend.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

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
using pewter::testing::ReadTensors;
using pewter::testing::TinyTensor;

const std::string kShared = std::string(PEWTER_SOURCE_DIR) + "/../shared/";

ForwardModel OpenModel(const std::string& path) {
  auto checkpoint = Checkpoint::Open({.path = path});
  EXPECT_THAT(checkpoint, IsOk());
  auto model = MakeForwardModel(*checkpoint);
  EXPECT_THAT(model, IsOk());
  return *model;
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

TEST_P(ForwardTest, AgreesWithGoldenLogits) {
  const std::string goldens = kShared + "goldens/alignment/";
  if (!std::filesystem::exists(goldens)) GTEST_SKIP() << "there is no " << goldens;
  for (const char* name :
       {"bert_mlm", "bert_cls_splitqk", "gpt2", "llama_gqa", "llama_sym", "qwen3_qknorm", "vit"}) {
    const std::string folder = goldens + name;
    auto data = ForwardData::Open(folder + "/io.safetensors");
    ASSERT_THAT(data, IsOk());
    auto tensors = ReadTensors(folder + "/io.safetensors");
    for (const std::string which : {"a", "b"}) {
      auto outputs = ComputeOutputs(OpenModel(folder + "/" + which), *data, options());
      ASSERT_THAT(outputs, IsOk()) << name;
      const double error = RelativeError(*outputs, tensors["logits_" + which], **data);
      EXPECT_LT(error, 1e-5) << name << " " << which;
      RecordProperty(std::string(name) + "_" + which, std::to_string(error * 1e6) + "e-6");
    }
  }
}

TEST_P(ForwardTest, LossesOfTheRealPair) {
  const std::string pair = kShared + "models/bert-pair/";
  if (!std::filesystem::exists(pair)) GTEST_SKIP() << "there is no " << pair;
  auto data = ForwardData::Open(pair + "eval.safetensors");
  ASSERT_THAT(data, IsOk());
  auto a = Evaluate(OpenModel(pair + "a"), *data, Metric::kMlmLoss, options());
  ASSERT_THAT(a, IsOk());
  EXPECT_NEAR(a->loss, 3.6239, 5e-5);
  EXPECT_NEAR(a->accuracy, 0.346, 5e-4);
  EXPECT_EQ(a->tokens, 5572);
  auto b = Evaluate(OpenModel(pair + "b"), *data, Metric::kMlmLoss, options());
  ASSERT_THAT(b, IsOk());
  EXPECT_NEAR(b->loss, 3.6094, 5e-5);
}

}  // namespace
}  // namespace pewter
