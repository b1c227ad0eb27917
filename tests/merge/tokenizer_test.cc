#include "merge/plan/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/backend.h"
#include "tests/support/matchers.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace pewter {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::IsOk;
using ::testing::Pair;
using testing::StatusIs;
using ::testing::UnorderedElementsAre;

constexpr char kConfig[] = "{\"architectures\": [\"LlamaForCausalLM\"], \"vocab_size\": 8}";

class TokenizerTest : public ::testing::Test {
 protected:
  // A model whose `emb` has rows [10 k + row, 10 k + row + 0.5].
  std::shared_ptr<const Checkpoint> Model(int k, const std::vector<std::string>& tokens, int rows,
                                          const std::string& config = kConfig) {
    const std::string name = absl::StrCat("m", k);
    testing::TinyTensor embedding{"emb", DType::kBF16, {rows, 2}, {}};
    for (int row = 0; row < rows; ++row) {
      embedding.values.push_back(10 * k + row);
      embedding.values.push_back(10 * k + row + 0.5);
    }
    folder_.Write(name + "/config.json", config);
    testing::WriteSafetensors(folder_ / (name + "/model.safetensors"), {embedding});
    std::string vocabulary;
    for (size_t i = 0; i < tokens.size(); ++i) {
      absl::StrAppend(&vocabulary, i == 0 ? "" : ",", "\"", tokens[i], "\":", i);
    }
    if (!tokens.empty()) {
      folder_.Write(name + "/tokenizer.json",
                    absl::StrCat("{\"model\":{\"vocab\":{", vocabulary, "}}}"));
    }
    auto model = Checkpoint::Open({.path = folder_ / name});
    EXPECT_THAT(model, IsOk());
    return *model;
  }

  // First values of all rows of a view, read `step` elements at a time.
  static std::vector<double> Rows(const TensorSource& source, int64_t step) {
    const int64_t elements = source.shape().elements();
    std::vector<uint16_t> bits(elements);
    for (int64_t first = 0; first < elements; first += step) {
      const int64_t count = std::min(step, elements - first);
      EXPECT_THAT(source.Read(first, count,
                              {reinterpret_cast<std::byte*>(bits.data() + first),
                               static_cast<size_t>(2 * count)},
                              nullptr),
                  IsOk());
    }
    std::vector<double> values(elements);
    kernels::Convert({bits.data(), DType::kBF16, elements}, {values.data(), DType::kF64, elements});
    std::vector<double> rows;
    for (int64_t i = 0; i < elements; i += 2) {
      rows.push_back(values[i]);
      const bool zero = values[i] == 0 && values[i + 1] == 0;
      EXPECT_TRUE(zero || values[i + 1] == values[i] + 0.5);
    }
    return rows;
  }

  std::vector<std::shared_ptr<const TensorSource>> Open(
      const std::vector<std::shared_ptr<const Checkpoint>>& models) {
    std::vector<std::shared_ptr<const TensorSource>> sources;
    for (const auto& model : models) sources.push_back(*model->OpenTensor("emb", 0));
    return sources;
  }

  testing::TempFolder folder_;
  std::vector<std::string> warnings_;
};

TEST_F(TokenizerTest, RowsComeFromTheRightModels) {
  // Output: the third model's tokens. "b" of model 0: own row 1. "z" is in 1 and 2 but not in 0
  // nor the base: 0 gets their mean. "q" only in 2. "base" in 0 (the base) and 2.
  const auto m0 = Model(0, {"a", "b", "base"}, 3);
  const auto m1 = Model(1, {"z", "a", "b"}, 4);
  const auto m2 = Model(2, {"b", "z", "q", "base", "a"}, 5);
  const std::vector models = {m0, m1, m2};
  const auto alignment = TokenAlignment::Make(models, 0, *m2, *m0, warnings_);
  ASSERT_THAT(alignment, IsOk());
  EXPECT_EQ(alignment->rows(), 5);
  const auto views = alignment->Align({0, 1, 2}, Open(models));
  ASSERT_THAT(views, IsOk());
  for (int64_t step : {1, 2, 3, 7, 100}) {
    EXPECT_THAT(Rows(*(*views)[0], step), ElementsAre(1, (10 + 21) / 2.0, 22, 2, 0));
    EXPECT_THAT(Rows(*(*views)[1], step), ElementsAre(12, 10, 22, 2, 11));
    EXPECT_THAT(Rows(*(*views)[2], step), ElementsAre(20, 21, 22, 23, 24));
  }
  EXPECT_THAT(warnings_, IsEmpty());
  // Without the base, "base" of model 1 is model 2's alone.
  const auto two = alignment->Align({1, 2}, Open({m1, m2}));
  ASSERT_THAT(two, IsOk());
  EXPECT_THAT(Rows(*(*two)[0], 4), ElementsAre(12, 10, 22, 23, 11));
}

TEST_F(TokenizerTest, PaddingIsDroppedAndUntouchedRowsStayTheSame) {
  const auto m0 = Model(0, {"a", "b"}, 6);
  const auto m1 = Model(1, {"a", "b"}, 2);
  const auto alignment = TokenAlignment::Make(std::vector{m0, m1}, 0, *m0, *m0, warnings_);
  ASSERT_THAT(alignment, IsOk());
  const auto sources = Open({m0, m1});
  const auto views = alignment->Align({0, 1}, sources);
  ASSERT_THAT(views, IsOk());
  EXPECT_EQ((*views)[0]->shape(), (Shape{2, 2}));
  EXPECT_THAT(Rows(*(*views)[0], 3), ElementsAre(0, 1));
  EXPECT_EQ((*views)[1], sources[1]);
}

TEST_F(TokenizerTest, IdsBeyondVocabularySizeAreNoTokens) {
  const std::string small = "{\"architectures\": [\"x\"], \"vocab_size\": 1}";
  const auto m0 = Model(0, {"a", "b"}, 3);
  const auto m1 = Model(1, {"a", "b"}, 3, small);
  const auto alignment = TokenAlignment::Make(std::vector{m0, m1}, 0, *m0, *m0, warnings_);
  ASSERT_THAT(alignment, IsOk());
  const auto views = alignment->Align({0, 1}, Open({m0, m1}));
  EXPECT_THAT(Rows(*(*views)[1], 4), ElementsAre(10, 1));
  EXPECT_THAT(TokenAlignment::Make(std::vector{m0, m1}, 0, *m1, *m0, warnings_),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("vocab_size is 1")));
}

TEST_F(TokenizerTest, TokensOfNoModelAreZeros) {
  const auto m0 = Model(0, {"a", "b"}, 2);
  const auto other = Model(1, {"a", "new"}, 2);
  const auto alignment = TokenAlignment::Make(std::vector{m0}, 0, *other, *m0, warnings_);
  ASSERT_THAT(alignment, IsOk());
  EXPECT_THAT(Rows(*(*alignment->Align({0}, Open({m0})))[0], 3), ElementsAre(0, 0));
  EXPECT_THAT(warnings_, ElementsAre(HasSubstr("1 of 2 rows")));
}

TEST_F(TokenizerTest, WidthsMustAgree) {
  const auto m0 = Model(0, {"a"}, 1);
  const auto m1 = Model(1, {"a"}, 1);
  testing::WriteSafetensors(folder_ / "wide.safetensors",
                            {testing::RandomTensor("emb", DType::kBF16, {1, 3}, 1)});
  const auto wide = Checkpoint::Open({.path = folder_ / "wide.safetensors"});
  ASSERT_THAT(wide, IsOk());
  const auto alignment = TokenAlignment::Make(std::vector{m0, m1}, 0, *m0, *m0, warnings_);
  EXPECT_THAT(
      alignment->Align({0, 1}, Open({m0, *wide})),
      StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("only the number of rows")));
}

TEST_F(TokenizerTest, ReadsEveryFormOfVocabulary) {
  const auto read = [&](const std::string& name,
                        const std::vector<std::pair<const char*, const char*>>& files) {
    folder_.Write(name + "/config.json", "{}");
    testing::WriteSafetensors(folder_ / (name + "/model.safetensors"),
                              {testing::RandomTensor("x", DType::kF32, {1}, 1)});
    for (const auto& [file, text] : files) folder_.Write(absl::StrCat(name, "/", file), text);
    return ReadVocabulary(**Checkpoint::Open({.path = folder_ / name}));
  };
  EXPECT_THAT(**read("map", {{"tokenizer.json",
                              "{\"model\":{\"vocab\":{\"a\":1}},\"added_tokens\":[{\"id\":5,"
                              "\"content\":\"<s>\"}]}"}}),
              UnorderedElementsAre(Pair("a", 1), Pair("<s>", 5)));
  EXPECT_THAT(
      **read("list", {{"tokenizer.json", "{\"model\":{\"vocab\":[[\"a\",-1.5],[\"b\",-2]]}}"}}),
      UnorderedElementsAre(Pair("a", 0), Pair("b", 1)));
  EXPECT_THAT(**read("lines", {{"vocab.txt", "a\r\nb\n"}, {"added_tokens.json", "{\"c\": 7}"}}),
              UnorderedElementsAre(Pair("a", 0), Pair("b", 1), Pair("c", 7)));
  EXPECT_THAT(**read("json", {{"vocab.json", "{\"a\": 3}"}}), UnorderedElementsAre(Pair("a", 3)));
  EXPECT_EQ(*read("none", {}), std::nullopt);
  const char* bad[] = {"",
                       "[]",
                       "{\"model\":{}}",
                       "{\"model\":{\"vocab\":3}}",
                       "{\"model\":{\"vocab\":{\"a\":\"b\"}}}",
                       "{\"model\":{\"vocab\":{\"a\":-1}}}",
                       "{\"model\":{\"vocab\":[3]}}",
                       "{\"model\":{\"vocab\":{\"a\":99999999999}}}",
                       "{\"model\":{\"vocab\":{}},\"added_tokens\":[{}]}"};
  for (int i = 0; i < static_cast<int>(std::size(bad)); ++i) {
    EXPECT_THAT(read(absl::StrCat("bad", i), {{"tokenizer.json", bad[i]}}),
                StatusIs(absl::StatusCode::kDataLoss, HasSubstr("tokenizer.json")))
        << bad[i];
  }
}

TEST_F(TokenizerTest, Differences) {
  const auto a = Model(0, {"a", "b"}, 2);
  const auto same = Model(1, {"a", "b"}, 2);
  const auto other = Model(2, {"b", "a"}, 2);
  const auto none = Model(3, {}, 2);
  EXPECT_FALSE(*VocabulariesDiffer(*a, *same));
  EXPECT_TRUE(*VocabulariesDiffer(*a, *other));
  EXPECT_FALSE(*VocabulariesDiffer(*a, *none));
}

}  // namespace
}  // namespace pewter
