// text_tokenizers.json has tokenizers of many kinds, and what the tokenizers library (0.23.3) makes
// of some texts with each: [{name, tokenizer, texts: [[text, ids], ...]}, ...].
#include "merge/plan/text_tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/support/matchers.h"
#include "tests/support/tiny_model.h"

namespace pewter {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using testing::IsOk;
using testing::StatusIs;

absl::StatusOr<std::shared_ptr<const TextTokenizer>> Parsed(const json& tokenizer) {
  return TextTokenizer::Parse("tokenizer.json", tokenizer.dump());
}

TEST(TextTokenizerTest, AsTheLibrary) {
  const json cases = json::parse(
      testing::ReadFile(std::string(PEWTER_SOURCE_DIR) + "/tests/merge/text_tokenizers.json"));
  ASSERT_GT(cases.size(), 8u);
  for (const json& one : cases) {
    SCOPED_TRACE(one["name"].get<std::string>());
    const auto tokenizer = Parsed(one["tokenizer"]);
    ASSERT_THAT(tokenizer, IsOk());
    for (const json& text : one["texts"]) {
      const auto ids = (*tokenizer)->Encode(text[0].get<std::string>());
      ASSERT_THAT(ids, IsOk());
      EXPECT_EQ(ids->ids, text[1].get<std::vector<int32_t>>()) << text[0];
    }
  }
}

TEST(TextTokenizerTest, WhatIsNotKnownIsNamed) {
  const json model = {{"type", "WordLevel"}, {"vocab", {{"a", 0}}}, {"unk_token", "a"}};
  const auto refused = [&](const json& normalizer, const json& split, const json& of_model) {
    const auto parsed =
        Parsed({{"normalizer", normalizer}, {"pre_tokenizer", split}, {"model", of_model}});
    EXPECT_FALSE(parsed.ok());
    return parsed.status();
  };
  const auto unknown = [](const char* what) {
    return StatusIs(absl::StatusCode::kUnimplemented, HasSubstr(what));
  };
  EXPECT_THAT(refused({{"type", "Precompiled"}}, nullptr, model),
              unknown("normalizer Precompiled"));
  EXPECT_THAT(refused(nullptr, {{"type", "UnicodeScripts"}}, model), unknown("UnicodeScripts"));
  EXPECT_THAT(refused(nullptr, nullptr, {{"type", "Other"}}), unknown("\"Other\""));
  EXPECT_THAT(
      refused(nullptr, {{"type", "Split"}, {"pattern", {{"Regex", "("}}}, {"behavior", "Removed"}},
              model),
      unknown("is not understood"));
}

TEST(TextTokenizerTest, MalformedFiles) {
  for (const char* text : {
           "",
           "[]",
           "{",
           "{\"model\": 3}",
           "{\"model\": {\"type\": \"BPE\"}}",
           "{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": -1}, \"merges\": []}}",
           "{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0}, \"merges\": [\"a b\"]}}",
           "{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0}, \"merges\": [7]}}",
           "{\"model\": {\"type\": \"Unigram\", \"vocab\": [[1, 2]]}}",
           "{\"normalizer\": 1, \"model\": {\"type\": \"WordLevel\", \"vocab\": {}}}",
           "{\"normalizer\": {\"type\": \"Sequence\"}, \"model\": {\"type\": \"WordLevel\"}}",
           "{\"model\": {\"type\": \"WordLevel\", \"vocab\": {}}, \"added_tokens\": [{}]}",
       }) {
    EXPECT_THAT(TextTokenizer::Parse("tokenizer.json", text),
                StatusIs(absl::StatusCode::kDataLoss, HasSubstr("tokenizer.json")))
        << text;
  }
}

TEST(TextTokenizerTest, HostileTextsAndPatterns) {
  const json model = {{"type", "WordLevel"}, {"vocab", {{"a", 0}}}, {"unk_token", "a"}};
  const auto plain = Parsed({{"model", model}});
  ASSERT_THAT(plain, IsOk());
  for (const std::string& text : {std::string("\xff"), std::string(70000, 'a')}) {
    EXPECT_THAT((*plain)->Encode(text),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("UTF-8")));
  }
  EXPECT_THAT((*plain)->Encode(""), IsOk());
  // Takes time that doubles with every letter.
  const auto slow = Parsed(
      {{"model", model},
       {"pre_tokenizer",
        {{"type", "Split"}, {"pattern", {{"Regex", "(a|a)*b"}}}, {"behavior", "Isolated"}}}});
  ASSERT_THAT(slow, IsOk());
  EXPECT_THAT((*slow)->Encode(std::string(60, 'a')),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("pattern failed")));
}

}  // namespace
}  // namespace pewter
