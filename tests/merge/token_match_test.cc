#include "merge/plan/token_match.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "merge/plan/utf8.h"
#include "tests/support/matchers.h"

namespace pewter {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using testing::IsOk;

Tokenizer Words(const std::vector<std::string>& tokens,
                const std::map<std::string, std::string>& roles = {}) {
  Tokenizer tokenizer{.roles = roles};
  for (size_t id = 0; id < tokens.size(); ++id) {
    tokenizer.vocabulary[tokens[id]] = static_cast<int64_t>(id);
  }
  return tokenizer;
}

TEST(TokenMatchTest, TokensStandForTheSameHoweverWritten) {
  const Tokenizer own =
      Words({"<s>", "▁of", "of", "</s>", "▁a"}, {{"bos_token", "<s>"}, {"eos_token", "</s>"}});
  const Tokenizer other = Words({"<|end|>", "Ġof", "Ġ", "of", "Ġa", "▁a", "Ġb"},
                                {{"eos_token", "<|end|>"}, {"pad_token", "<|end|>"}});
  const TokenMatches matches = MatchTokens({}, own, other, nullptr, nullptr);
  EXPECT_THAT(matches.same, ElementsAre(3, 1, -1, 2, 4, -1, -1));
  EXPECT_THAT(matches.byte, IsEmpty());
  EXPECT_THAT(matches.prefix, IsEmpty());
  EXPECT_THAT(matches.junk, IsEmpty());
}

TEST(TokenMatchTest, TheFirstRoleCounts) {
  const Tokenizer own = Words({"<unk>", "x"}, {{"unk_token", "<unk>"}});
  const Tokenizer other = Words({"[U]"}, {{"pad_token", "[U]"}, {"unk_token", "[U]"}});
  EXPECT_THAT(MatchTokens({}, own, other, nullptr, nullptr).same, ElementsAre(0));
}

TEST(TokenMatchTest, BytesAndPrefixes) {
  TokenApproximation how;
  how.byte = how.prefix = TokenApproximation::Match::kBoth;
  const Tokenizer own = Words({"<0x41>", "é", "▁th", "▁the", "Über", "Ü"}, {{"eos_token", "th"}});
  const Tokenizer other =
      Words({"A", "<0xE9>", "Ġthere", "Ġthird", "there", "Überall", "Üb", "<0x4>", "Ġ"}, {});
  const TokenMatches matches = MatchTokens(how, own, other, nullptr, nullptr);
  EXPECT_THAT(matches.byte, ElementsAre(0, 1, -1, -1, -1, -1, -1, -1, -1));
  EXPECT_THAT(matches.prefix, ElementsAre(-1, -1, 3, 2, -1, 4, 5, -1, -1));
}

TEST(TokenMatchTest, UntrainedTokensAreNobodys) {
  const Tokenizer own = Words({"a", "b", "c", "d"});
  const Tokenizer other = Words({"d", "c", "b", "a", "e"});
  const std::vector<bool> trained_own = {true, true, false, false};
  const std::vector<bool> trained_other = {false, false, false, true, false};
  const TokenMatches matches = MatchTokens({}, own, other, &trained_own, &trained_other);
  // "b" is trained in the one alone: no longer shared, but no junk either.
  EXPECT_THAT(matches.same, ElementsAre(-1, -1, -1, 0, -1));
  EXPECT_THAT(matches.junk, ElementsAre(true, true, false, false, true));
}

TEST(TokenMatchTest, Texts) {
  const TokenMeanings bytes(Words({"Ġa", "Ã©", "ĠĊ", "Ã"}, {{"eos_token", "<e>"}}));
  EXPECT_EQ(bytes.Text("Ġa"), " a");
  EXPECT_EQ(bytes.Text("Ã©"), "é");
  EXPECT_EQ(bytes.Text("ĠĊ"), " \n");
  EXPECT_EQ(bytes.Text("Ã"), "Ã");  // half of a character
  EXPECT_EQ(bytes.Text("<e>"), "eos_token");
  EXPECT_EQ(TokenMeanings(Words({"▁a"})).Text("▁a▁b"), " a b");
}

TEST(TokenMatchTest, ByteAlphabet) {
  std::string all;
  for (int byte = 0; byte < 256; ++byte) all += static_cast<char>(byte);
  EXPECT_EQ(DecodeByteLevel(EncodeByteLevel(all)), all);
  EXPECT_EQ(EncodeByteLevel(" A\xad"), "ĠA\xc5\x83");
  EXPECT_EQ(DecodeByteLevel("€"), std::nullopt);
  for (const char* bad : {"\xff", "\xc3", "\xc0\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80"}) {
    EXPECT_EQ(DecodeUtf8(bad), std::nullopt);
  }
  for (char32_t c : {U'A', U'é', U'€', U'\U0001f600'}) {
    EXPECT_EQ(DecodeUtf8(EncodeUtf8(c)), std::u32string(1, c));
  }
}

class Rows final : public TensorSource {
 public:
  Rows(int64_t rows, int64_t width) : shape_({rows, width}), values_(rows * width) {}
  double& at(int64_t row, int64_t column) { return values_[row * shape_[1] + column]; }
  DType dtype() const override { return DType::kF64; }
  const Shape& shape() const override { return shape_; }
  const std::string& name() const override { return name_; }
  absl::Status Read(int64_t first, int64_t count, absl::Span<std::byte> out,
                    ReadObserver* /*observer*/) const override {
    std::memcpy(out.data(), values_.data() + first, count * sizeof(double));
    return absl::OkStatus();
  }

 private:
  Shape shape_;
  std::string name_ = "rows";
  std::vector<double> values_;
};

TEST(TokenMatchTest, TrainedRows) {
  // Row i points towards i degrees, with norm 1 + i / 1000. Of 200 rows the last two have no token,
  // "unused_token_9" has row 197.
  Rows embedding(200, 2), head(200, 2);
  Vocabulary vocabulary;
  for (int64_t i = 0; i < 200; ++i) {
    const double angle = static_cast<double>(i) * std::acos(-1.0) / 180;
    const double norm = 1 + static_cast<double>(i) / 1000;
    embedding.at(i, 0) = head.at(i, 1) = norm * std::cos(angle);
    embedding.at(i, 1) = head.at(i, 0) = norm * std::sin(angle);
    if (i < 198) vocabulary[i == 197 ? "unused_token_9" : std::to_string(i)] = i;
  }
  const auto untrained = [&](const TensorSource* of_head) {
    const auto trained = TrainedRows(vocabulary, embedding, of_head);
    EXPECT_THAT(trained, IsOk());
    std::vector<int64_t> rows;
    for (size_t i = 0; i < trained->size(); ++i) {
      if (!(*trained)[i]) rows.push_back(static_cast<int64_t>(i));
    }
    return rows;
  };
  // The hundredth that is most like the mean of the three, 198 degrees, and the unused ones
  // themselves; with a head also the hundredth with the smallest norms.
  EXPECT_THAT(untrained(nullptr), ElementsAre(197, 198, 199));
  EXPECT_THAT(untrained(&head), ElementsAre(0, 1, 197, 198, 199));
}

}  // namespace
}  // namespace pewter
