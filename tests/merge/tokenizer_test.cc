#include "merge/plan/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/backend.h"
#include "tests/support/matchers.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace pewter {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::IsOk;
using ::testing::Pair;
using testing::StatusIs;
using Rows = RecipeToken::Rows;
using Source = RecipeTokenizer::Source;
using Models = std::vector<std::shared_ptr<const Checkpoint>>;

constexpr char kConfig[] = "{\"architectures\": [\"LlamaForCausalLM\"], \"vocab_size\": 8}";

class TokenizerTest : public ::testing::Test {
 protected:
  // A model whose `emb` has rows [10 k + row, 10 k + row + 0.5]. Tokens get the ids 0, 1, ...;
  // those that begin with '<' are added tokens.
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
    std::vector<std::string> ordinary, added;
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (tokens[i][0] == '<') {
        added.push_back(absl::StrCat("{\"id\":", i, ",\"content\":\"", tokens[i],
                                     "\",\"special\":true,\"normalized\":false}"));
      } else {
        ordinary.push_back(absl::StrCat("\"", tokens[i], "\":", i));
      }
    }
    if (!tokens.empty()) {
      folder_.Write(name + "/tokenizer.json",
                    absl::StrCat("{\"model\":{\"vocab\":{", absl::StrJoin(ordinary, ","),
                                 "}},\"added_tokens\":[", absl::StrJoin(added, ","), "]}"));
    }
    return Open(name);
  }

  std::shared_ptr<const Checkpoint> Open(const std::string& name) {
    auto model = Checkpoint::Open({.path = folder_ / name});
    EXPECT_THAT(model, IsOk());
    return *model;
  }

  // First values of all rows of a view, read `step` elements at a time.
  static std::vector<double> RowsOf(const TensorSource& source, int64_t step) {
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

  static std::vector<std::shared_ptr<const TensorSource>> Sources(const Models& models) {
    std::vector<std::shared_ptr<const TensorSource>> sources;
    for (const auto& model : models) sources.push_back(*model->OpenTensor("emb", 0));
    return sources;
  }

  // The first model is the base and the donor.
  absl::StatusOr<TokenAlignment> Make(const RecipeTokenizer& recipe, const Models& models,
                                      const Checkpoint& source) {
    return TokenAlignment::Make(recipe, models, 0, source, *models[0], warnings_);
  }
  absl::StatusOr<TokenAlignment> Unite(const Models& models, std::vector<RecipeToken> tokens = {},
                                       int64_t multiple = 1) {
    return Make({.tokens = std::move(tokens), .pad_to_multiple_of = multiple}, models, *models[0]);
  }

  static ModelRef Ref(const Checkpoint& model) {
    ModelRef ref = model.ref();
    ref.at = {3, 4};
    return ref;
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
  const Models models = {m0, m1, m2};
  const auto alignment = Make({.source = Source::kModel}, models, *m2);
  ASSERT_THAT(alignment, IsOk());
  EXPECT_EQ(alignment->rows(), 5);
  EXPECT_TRUE(alignment->edit().empty());
  const auto views = alignment->Align({0, 1, 2}, Sources(models), {}, warnings_);
  ASSERT_THAT(views, IsOk());
  for (int64_t step : {1, 2, 3, 7, 100}) {
    EXPECT_THAT(RowsOf(*(*views)[0], step), ElementsAre(1, (10 + 21) / 2.0, 22, 2, 0));
    EXPECT_THAT(RowsOf(*(*views)[1], step), ElementsAre(12, 10, 22, 2, 11));
    EXPECT_THAT(RowsOf(*(*views)[2], step), ElementsAre(20, 21, 22, 23, 24));
  }
  EXPECT_THAT(warnings_, IsEmpty());
  // Without the base, "base" of model 1 is model 2's alone.
  const auto two = alignment->Align({1, 2}, Sources({m1, m2}), {}, warnings_);
  ASSERT_THAT(two, IsOk());
  EXPECT_THAT(RowsOf(*(*two)[0], 4), ElementsAre(12, 10, 22, 23, 11));
}

TEST_F(TokenizerTest, UnionHasTheTokensOfAllInTheOrderOfModelsAndIds) {
  const auto m0 = Model(0, {"a", "b"}, 2);
  const auto m1 = Model(1, {"z", "a", "<x>", "k"}, 4);
  const auto m2 = Model(2, {"<x>", "b", "<y>", "j"}, 4);
  const Models models = {m0, m1, m2};
  const auto alignment = Unite(models);
  ASSERT_THAT(alignment, IsOk());
  const Vocabulary& ids = alignment->ids().output;
  EXPECT_THAT(
      ids, ::testing::UnorderedElementsAre(Pair("a", 0), Pair("b", 1), Pair("z", 2), Pair("<x>", 3),
                                           Pair("k", 4), Pair("<y>", 5), Pair("j", 6)));
  const AddedToken special{.content = "<x>", .normalized = false, .special = true};
  EXPECT_EQ(alignment->edit().added.at(3), special);
  EXPECT_EQ(alignment->edit().added.at(2), AddedToken{.content = "z"});
  const auto views = alignment->Align({0, 1, 2}, Sources(models), {}, warnings_);
  ASSERT_THAT(views, IsOk());
  EXPECT_THAT(RowsOf(*(*views)[0], 3), ElementsAre(0, 1, 10, (12 + 20) / 2.0, 13, 22, 23));
  EXPECT_THAT(RowsOf(*(*views)[1], 3), ElementsAre(11, 1, 10, 12, 13, 22, 23));
  EXPECT_THAT(RowsOf(*(*views)[2], 3), ElementsAre(0, 21, 10, 20, 13, 22, 23));
  EXPECT_THAT(warnings_, IsEmpty());
}

TEST_F(TokenizerTest, OrdinaryTokensBecomeAddedOnesWhereAnotherModelAddsThem) {
  const auto m0 = Model(0, {"a", "b"}, 2);
  folder_.Write("m9/config.json", kConfig);
  folder_.Write("m9/tokenizer.json",
                "{\"model\":{\"vocab\":{\"a\":0,\"b\":1}},\"added_tokens\":[{\"id\":1,\"content\":"
                "\"b\",\"special\":true,\"rstrip\":true}]}");
  testing::WriteSafetensors(folder_ / "m9/model.safetensors",
                            {testing::RandomTensor("emb", DType::kBF16, {2, 2}, 1)});
  const auto alignment = Unite({m0, Open("m9")});
  ASSERT_THAT(alignment, IsOk());
  EXPECT_EQ(alignment->rows(), 2);
  EXPECT_EQ(alignment->edit().added.at(1),
            (AddedToken{.content = "b", .rstrip = true, .special = true}));
}

TEST_F(TokenizerTest, ConflictingFlagsAreWarnedOf) {
  const auto m0 = Model(0, {"a", "<x>"}, 2);
  const auto m1 = Model(1, {"a", "<x>"}, 2);
  folder_.Write("m1/tokenizer.json",
                "{\"model\":{\"vocab\":{\"a\":0}},\"added_tokens\":[{\"id\":1,\"content\":\"<x>\","
                "\"lstrip\":true}]}");
  const auto alignment = Unite({m0, m1});
  ASSERT_THAT(alignment, IsOk());
  EXPECT_TRUE(alignment->edit().empty());
  EXPECT_THAT(warnings_, ElementsAre(AllOf(HasSubstr("differently"), HasSubstr("\"<x>\""))));
}

TEST_F(TokenizerTest, TheRecipeNamesRows) {
  const auto m0 = Model(0, {"a", "b"}, 3);
  const auto m1 = Model(1, {"a", "<x>", "c"}, 4);
  const Models models = {m0, m1};
  RecipeToken of_model{.token = "<x>", .rows = Rows::kModel, .model = Ref(*m1)};
  RecipeToken forced = of_model;
  forced.token = "a";
  forced.force = true;
  const RecipeToken zero{.token = "b", .rows = Rows::kZero};
  const RecipeToken other{.token = "n", .rows = Rows::kModelToken, .model = Ref(*m1), .other = "c"};
  const RecipeToken padding{
      .token = "p", .rows = Rows::kModelToken, .model = Ref(*m0), .other_id = 2};
  const RecipeToken nowhere{.token = "q"};
  const auto alignment =
      Make({.source = Source::kBase, .tokens = {of_model, forced, zero, other, padding, nowhere}},
           models, *m0);
  ASSERT_THAT(alignment, IsOk());
  EXPECT_EQ(alignment->rows(), 6);
  EXPECT_TRUE(alignment->edit().added.at(2).special);  // "<x>", as its model has it
  EXPECT_FALSE(alignment->edit().added.at(3).special);
  const auto views = alignment->Align({0, 1}, Sources(models), {}, warnings_);
  ASSERT_THAT(views, IsOk());
  // a, b, <x>, n, p, q
  EXPECT_THAT(RowsOf(*(*views)[0], 5), ElementsAre(10, 1, 11, 12, 2, 0));
  EXPECT_THAT(RowsOf(*(*views)[1], 5), ElementsAre(10, 0, 11, 12, 2, 0));
  EXPECT_THAT(warnings_, ElementsAre(AllOf(HasSubstr("1 token is"), HasSubstr("\"q\""))));
  // A tensor that the named model has no part in.
  EXPECT_THAT(alignment->Align({0}, Sources({m0}), {}, warnings_),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("not merged from")));
}

TEST_F(TokenizerTest, RowsThatAreNotThereAreErrors) {
  const auto m0 = Model(0, {"a", "b"}, 3);
  const auto m1 = Model(1, {"a", "c"}, 2);
  const auto stranger = Model(7, {"a", "c"}, 2);
  const Models models = {m0, m1};
  const RecipeToken unknown_model{.token = "c", .rows = Rows::kModel, .model = Ref(*stranger)};
  EXPECT_THAT(Unite(models, {unknown_model}),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("recipe:3:4: "), HasSubstr("not one of the models"))));
  const RecipeToken missing{.token = "c", .rows = Rows::kModel, .model = Ref(*m0)};
  EXPECT_THAT(Unite(models, {missing}),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("recipe:3:4: "), HasSubstr("has no token \"c\""))));
  const RecipeToken beyond{
      .token = "c", .rows = Rows::kModelToken, .model = Ref(*m0), .other_id = 3, .at = {5, 6}};
  const auto alignment = Unite(models, {beyond});
  ASSERT_THAT(alignment, IsOk());
  EXPECT_THAT(alignment->Align({0, 1}, Sources(models), {}, warnings_),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("recipe:5:6: "), HasSubstr("row 3"), HasSubstr("3 rows"))));
}

TEST_F(TokenizerTest, PaddingIsTheMeanOfTheRows) {
  const auto m0 = Model(0, {"a", "b", "c"}, 6);
  const auto m1 = Model(1, {"c", "a"}, 2);
  const Models models = {m0, m1};
  const auto alignment = Unite(models, {}, 4);
  ASSERT_THAT(alignment, IsOk());
  EXPECT_EQ(alignment->rows(), 4);
  const auto views = alignment->Align({0, 1}, Sources(models), {}, warnings_);
  ASSERT_THAT(views, IsOk());
  for (int64_t step : {1, 3, 8}) {
    EXPECT_THAT(RowsOf(*(*views)[0], step), ElementsAre(0, 1, 2, 1));
    EXPECT_THAT(RowsOf(*(*views)[1], step), ElementsAre(11, 1, 10, 7.34375));  // 22 / 3 in bf16
  }
  // Whoever comes first computes it for all.
  const auto fresh = alignment->Align({0, 1}, Sources(models), {}, warnings_);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] { EXPECT_EQ(RowsOf(*(*fresh)[1], 1)[3], 7.34375); });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_F(TokenizerTest, GapsBetweenIdsArePadding) {
  const auto m0 = Model(0, {"a", "b"}, 6);
  folder_.Write("m0/tokenizer.json", "{\"model\":{\"vocab\":{\"a\":0,\"b\":3}}}");
  const auto m1 = Model(1, {"a", "c"}, 2);
  const auto alignment = Make({.source = Source::kBase}, {m0, m1}, *m0);
  ASSERT_THAT(alignment, IsOk());
  const auto views = alignment->Align({0, 1}, Sources({m0, m1}), {}, warnings_);
  EXPECT_THAT(RowsOf(*(*views)[0], 4), ElementsAre(0, 1.5, 1.5, 3));
  // Where a new token would come is not what loaders say.
  EXPECT_THAT(Unite({m0, m1}), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("gaps")));
}

TEST_F(TokenizerTest, PaddingIsDroppedAndUntouchedRowsStayTheSame) {
  const auto m0 = Model(0, {"a", "b"}, 6);
  const auto m1 = Model(1, {"a", "b"}, 2);
  const auto alignment = Unite({m0, m1});
  ASSERT_THAT(alignment, IsOk());
  const auto sources = Sources({m0, m1});
  const auto views = alignment->Align({0, 1}, sources, {}, warnings_);
  ASSERT_THAT(views, IsOk());
  EXPECT_EQ((*views)[0]->shape(), (Shape{2, 2}));
  EXPECT_THAT(RowsOf(*(*views)[0], 3), ElementsAre(0, 1));
  EXPECT_EQ((*views)[1], sources[1]);
}

TEST_F(TokenizerTest, IdsBeyondVocabularySizeAreNoTokens) {
  const std::string small = "{\"text_config\": {\"vocab_size\": 1}}";
  const auto m0 = Model(0, {"a", "b"}, 3);
  const auto m1 = Model(1, {"a", "b"}, 3, small);
  const auto alignment = Unite({m0, m1});
  ASSERT_THAT(alignment, IsOk());
  const auto views = alignment->Align({0, 1}, Sources({m0, m1}), {}, warnings_);
  EXPECT_THAT(RowsOf(*(*views)[1], 4), ElementsAre(10, 1));
  EXPECT_THAT(warnings_, IsEmpty());
  // As the output's tokenizer it loses them.
  const auto stripped = Make({.source = Source::kModel}, {m0, m1}, *m1);
  ASSERT_THAT(stripped, IsOk());
  EXPECT_EQ(stripped->rows(), 1);
  EXPECT_THAT(stripped->edit().surplus, ElementsAre(Pair(1, "b")));
  EXPECT_THAT(warnings_, ElementsAre(AllOf(HasSubstr("beyond"), HasSubstr("\"b\""))));
}

TEST_F(TokenizerTest, AModelWithoutTokenizerHasTheDonors) {
  const auto m0 = Model(0, {"a", "b"}, 2);
  const auto m1 = Model(1, {}, 2);
  const auto alignment = Unite({m0, m1});
  ASSERT_THAT(alignment, IsOk());
  EXPECT_THAT(warnings_, ElementsAre(HasSubstr("has no tokenizer")));
  EXPECT_THAT(RowsOf(*(*alignment->Align({0, 1}, Sources({m0, m1}), {}, warnings_))[1], 4),
              ElementsAre(10, 11));
  EXPECT_THAT(Unite({m1, m0}),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("tokenizer is needed")));
}

TEST_F(TokenizerTest, WidthsMustAgree) {
  const auto m0 = Model(0, {"a"}, 1);
  const auto m1 = Model(1, {"a"}, 1);
  testing::WriteSafetensors(folder_ / "wide.safetensors",
                            {testing::RandomTensor("emb", DType::kBF16, {1, 3}, 1)});
  const auto wide = Checkpoint::Open({.path = folder_ / "wide.safetensors"});
  ASSERT_THAT(wide, IsOk());
  EXPECT_THAT(
      Unite({m0, m1})->Align({0, 1}, Sources({m0, *wide}), {}, warnings_),
      StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("only the number of rows")));
}

TEST_F(TokenizerTest, FirstRowsAreAView) {
  const auto m0 = Model(0, {"a"}, 4);
  const auto source = *m0->OpenTensor("emb", 0);
  const auto view = FirstRows(source, 2);
  ASSERT_THAT(view, IsOk());
  EXPECT_THAT(RowsOf(**view, 3), ElementsAre(0, 1));
  EXPECT_EQ(*FirstRows(source, 4), source);
}

}  // namespace
}  // namespace pewter
