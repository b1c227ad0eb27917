#include "merge/plan/prompt_tokens.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/support/matchers.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace pewter {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::IsOk;
using testing::StatusIs;

class PromptTokensTest : public ::testing::Test {
 protected:
  // The model of every tokenizer here: 18 tokens and 6 of single bytes.
  static json Tokenizer() {
    std::vector<std::string> tokens = {"<unk>", "<s>", "</s>", "▁", "a", "b",
                                       "c",     "t",   "h",    "e", "é"};
    const std::vector<std::vector<std::string>> merges = {
        {"t", "h"}, {"th", "e"}, {"▁", "the"}, {"a", "b"}, {"b", "c"}, {"ab", "c"}, {"▁", "a"}};
    for (const auto& merge : merges) tokens.push_back(merge[0] + merge[1]);
    for (const char* byte : {"78", "C3", "A4", "E2", "82", "AC"}) {
      tokens.push_back(absl::StrCat("<0x", byte, ">"));
    }
    json vocabulary, added;
    for (size_t i = 0; i < tokens.size(); ++i) vocabulary[tokens[i]] = i;
    for (size_t i = 0; i < 3; ++i) {
      added.push_back({{"id", i}, {"content", tokens[i]}, {"normalized", false}});
    }
    return {{"added_tokens", added},
            {"normalizer", nullptr},
            {"pre_tokenizer", nullptr},
            {"model",
             {{"type", "BPE"},
              {"unk_token", "<unk>"},
              {"fuse_unk", true},
              {"vocab", vocabulary},
              {"merges", merges}}}};
  }

  static json Prepending() {
    return {{"type", "Sequence"},
            {"normalizers",
             {{{"type", "Prepend"}, {"prepend", "▁"}},
              {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "▁"}}}}};
  }

  static json Metaspace(const char* scheme, bool split) {
    return {
        {"type", "Metaspace"}, {"replacement", "▁"}, {"prepend_scheme", scheme}, {"split", split}};
  }

  // `config` is tokenizer_config.json, where there is one.
  absl::StatusOr<PromptTokenizer> Make(const json& tokenizer, const std::string& config = "",
                                       const std::string& type = "llama") {
    folder_.Write("m/config.json", json{{"model_type", type}}.dump());
    testing::WriteSafetensors(folder_ / "m/model.safetensors",
                              {testing::RandomTensor("x", DType::kF32, {2}, 1)});
    folder_.Write("m/tokenizer.json", tokenizer.dump());
    if (!config.empty()) folder_.Write("m/tokenizer_config.json", config);
    const auto model = Checkpoint::Open({.path = folder_ / "m"});
    if (!model.ok()) return model.status();
    return PromptTokenizer::Make(**model);
  }

  testing::TempFolder folder_;
};

// Expected: the tokenizers library, version 0.23.
TEST_F(PromptTokensTest, AgreesWithTokenizers) {
  const std::vector<std::string> texts = {
      "<s>the abc", "the the", "abcabc bca", "<s>a<s> </s>the", "xx",
      "ä€é",        "  a  ",   "",           "a x€ bc",         "thethe<unk>e"};
  std::map<std::string, json> kinds;
  json tokenizer = Tokenizer();
  tokenizer["normalizer"] = Prepending();
  kinds["normalizer"] = kinds["bytes"] = kinds["unfused"] = kinds["ignore"] = tokenizer;
  kinds["bytes"]["model"]["byte_fallback"] = true;
  kinds["bytes"]["model"]["fuse_unk"] = false;
  kinds["unfused"]["model"]["fuse_unk"] = false;
  kinds["ignore"]["model"]["ignore_merges"] = true;
  kinds["metaspace_first"] = kinds["metaspace_always_split"] = kinds["metaspace_never"] =
      Tokenizer();
  kinds["metaspace_first"]["pre_tokenizer"] = Metaspace("first", false);
  kinds["metaspace_first"]["model"]["byte_fallback"] = true;
  kinds["metaspace_always_split"]["pre_tokenizer"] = Metaspace("always", true);
  kinds["metaspace_never"]["pre_tokenizer"] = Metaspace("never", true);
  const auto check = [&](const char* kind, const std::vector<std::vector<int32_t>>& expected) {
    SCOPED_TRACE(kind);
    const auto made = Make(kinds.at(kind));
    ASSERT_THAT(made, IsOk());
    for (size_t i = 0; i < texts.size(); ++i) {
      const auto ids = made->Encode(texts[i]);
      ASSERT_THAT(ids, IsOk()) << texts[i];
      EXPECT_EQ(ids->ids, expected[i]) << texts[i];
    }
  };
  check("normalizer", {{1, 13, 3, 16},
                       {13, 13},
                       {3, 16, 16, 3, 15, 4},
                       {1, 17, 1, 3, 3, 2, 13},
                       {3, 0},
                       {3, 0, 10},
                       {3, 3, 17, 3, 3},
                       {},
                       {17, 3, 0, 3, 15},
                       {13, 12, 0, 3, 9}});
  check("bytes", {{1, 13, 3, 16},
                  {13, 13},
                  {3, 16, 16, 3, 15, 4},
                  {1, 17, 1, 3, 3, 2, 13},
                  {3, 18, 18},
                  {3, 19, 20, 21, 22, 23, 10},
                  {3, 3, 17, 3, 3},
                  {},
                  {17, 3, 18, 21, 22, 23, 3, 15},
                  {13, 12, 0, 3, 9}});
  check("unfused", {{1, 13, 3, 16},
                    {13, 13},
                    {3, 16, 16, 3, 15, 4},
                    {1, 17, 1, 3, 3, 2, 13},
                    {3, 0, 0},
                    {3, 0, 0, 10},
                    {3, 3, 17, 3, 3},
                    {},
                    {17, 3, 0, 0, 3, 15},
                    {13, 12, 0, 3, 9}});
  check("metaspace_first", {{1, 12, 3, 16},
                            {13, 13},
                            {3, 16, 16, 3, 15, 4},
                            {1, 4, 1, 3, 2, 12},
                            {3, 18, 18},
                            {3, 19, 20, 21, 22, 23, 10},
                            {3, 17, 3, 3},
                            {},
                            {17, 3, 18, 21, 22, 23, 3, 15},
                            {13, 12, 0, 9}});
  check("metaspace_always_split", {{1, 13, 3, 16},
                                   {13, 13},
                                   {3, 16, 16, 3, 15, 4},
                                   {1, 17, 1, 3, 2, 13},
                                   {3, 0},
                                   {3, 0, 10},
                                   {3, 17, 3, 3},
                                   {},
                                   {17, 3, 0, 3, 15},
                                   {13, 12, 0, 3, 9}});
  check("metaspace_never", {{1, 12, 3, 16},
                            {12, 13},
                            {16, 16, 3, 15, 4},
                            {1, 4, 1, 3, 2, 12},
                            {0},
                            {0, 10},
                            {3, 17, 3, 3},
                            {},
                            {4, 3, 0, 3, 15},
                            {12, 12, 0, 9}});
  check("ignore", {{1, 13, 3, 16},
                   {13, 13},
                   {3, 16, 16, 3, 15, 4},
                   {1, 17, 1, 3, 3, 2, 13},
                   {3, 0},
                   {3, 0, 10},
                   {3, 3, 17, 3, 3},
                   {},
                   {17, 3, 0, 3, 15},
                   {13, 12, 0, 3, 9}});
}

// Byte-level BPE after the splits of GPT-2, Llama 3, Qwen and Mistral Nemo. The merges would join
// what the splits hold apart. Expected: the tokenizers library, version 0.23.
TEST_F(PromptTokensTest, ByteLevelAgreesWithTokenizers) {
  const std::vector<std::string> texts = {"the cat's 12345 hats",
                                          "  two  spaces \n\n and\tTabs  ",
                                          "I'LL do it, don't?!\r\nx",
                                          "é€ naïve 你好 мир",
                                          "a\302\240b \343\200\200 c",
                                          "<|s|>the <|s|> the",
                                          "",
                                          " ",
                                          "\n \n",
                                          "x  ",
                                          "1234 56",
                                          "_under_score __x",
                                          "\302\205x",
                                          "\013x\037y",
                                          "ABCdef/ghi//\n",
                                          "日本語 テスト"};
  const std::vector<std::vector<std::string>> merges = {
      {"t", "h"},  {"th", "e"}, {"Ġ", "the"}, {"Ġ", "t"}, {"a", "t"}, {"c", "at"}, {"1", "2"},
      {"12", "3"}, {"'", "s"},  {"Ġ", "Ġ"},   {"Ċ", "Ċ"}, {"Ġ", "Ċ"}, {"Ã", "©"},  {"ĠĠ", "Ġ"},
      {"å", "¥"},  {"Ġ", "1"},  {"123", "4"}, {"e", "Ġ"}, {"t", "'"}, {"'", "t"},  {"?", "!"},
      {"!", "č"},  {"č", "Ċ"},  {"Ċ", "x"},   {"_", "x"}, {"_", "_"}, {"/", "Ċ"},  {"C", "d"},
      {"'", "L"},  {"'L", "L"}, {"Ċ", "Ġ"},   {"ĉ", "T"}, {"Â", "ł"}, {"x", "Ġ"},  {"Ġ", "ĉ"},
      {"ĸ", "ç"},  {"5", "6"},  {"f", "/"}};
  json vocabulary;
  // The characters of bytes: those that are visible, and as many from 256 on as are not.
  for (uint32_t code = 33; code < 324; ++code) {
    if ((code > 126 && code < 161) || code == 173) continue;
    const std::string character = code < 0x80
                                      ? std::string(1, static_cast<char>(code))
                                      : std::string{static_cast<char>(0xc0 | code >> 6),
                                                    static_cast<char>(0x80 | (code & 0x3f))};
    vocabulary[character] = vocabulary.size();
  }
  for (const auto& merge : merges) {
    const std::string both = merge[0] + merge[1];
    if (!vocabulary.contains(both)) vocabulary[both] = vocabulary.size();
  }
  const auto check = [&](const json& splitter, const std::vector<std::vector<int32_t>>& expected) {
    SCOPED_TRACE(splitter.dump());
    const json tokenizer = {
        {"added_tokens",
         json::array(
             {json{{"id", vocabulary.size()}, {"content", "<|s|>"}, {"normalized", false}}})},
        {"normalizer", {{"type", "NFC"}}},
        {"pre_tokenizer", splitter},
        {"model", {{"type", "BPE"}, {"vocab", vocabulary}, {"merges", merges}}}};
    const auto made = Make(tokenizer);
    ASSERT_THAT(made, IsOk());
    for (size_t i = 0; i < texts.size(); ++i) {
      const auto ids = made->Encode(texts[i]);
      ASSERT_THAT(ids, IsOk()) << texts[i];
      EXPECT_EQ(ids->ids, expected[i]) << texts[i];
    }
  };
  const auto split = [](const char* pattern) {
    return json{{"type", "Sequence"},
                {"pretokenizers",
                 {{{"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Isolated"}},
                  {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}}}};
  };
  check({{"type", "ByteLevel"}, {"add_prefix_space", false}},
        {{257, 220, 261, 264, 220, 272, 20, 220, 71, 260, 82},
         {220, 259, 86,  78, 220, 220, 82,  79, 64, 66, 68, 82,
          220, 266, 220, 64, 77,  67,  197, 51, 64, 65, 82, 265},
         {40, 6, 43, 43, 220, 67, 78, 220, 72, 83, 11, 220, 67, 78, 77, 275, 276, 201, 198, 87},
         {268, 158, 224, 105, 220, 77,  64,  127, 107, 85,  68,  220,
          160, 121, 254, 270, 121, 220, 140, 120, 140, 116, 141, 222},
         {64, 288, 65, 220, 159, 222, 222, 220, 66},
         {294, 257, 220, 294, 258},
         {},
         {220},
         {198, 267},
         {87, 265},
         {272, 220, 292},
         {62, 84, 77, 67, 68, 81, 62, 82, 66, 78, 81, 68, 220, 281, 87},
         {126, 227, 87},
         {199, 87, 219, 88},
         {32, 33, 283, 68, 69, 14, 70, 71, 72, 14, 14, 198},
         {162, 245, 98, 162, 250, 105, 164, 103, 252, 220, 159, 225, 228, 159, 224, 117, 159, 225,
          230}});
  check(
      {{"type", "ByteLevel"}, {"add_prefix_space", true}},
      {{258, 220, 261, 264, 220, 272, 20, 220, 71, 260, 82},
       {220, 259, 86,  78, 220, 220, 82,  79, 64, 66, 68, 82,
        220, 266, 220, 64, 77,  67,  197, 51, 64, 65, 82, 265},
       {220, 40, 6, 43, 43, 220, 67, 78, 220, 72, 83, 11, 220, 67, 78, 77, 275, 276, 201, 198, 87},
       {220, 268, 158, 224, 105, 220, 77,  64,  127, 107, 85,  68, 220,
        160, 121, 254, 270, 121, 220, 140, 120, 140, 116, 141, 222},
       {220, 64, 288, 65, 220, 159, 222, 222, 220, 66},
       {294, 258, 220, 294, 258},
       {},
       {220},
       {267, 267},
       {220, 87, 265},
       {220, 272, 220, 292},
       {220, 62, 84, 77, 67, 68, 81, 62, 82, 66, 78, 81, 68, 220, 281, 87},
       {220, 126, 227, 87},
       {220, 199, 87, 219, 88},
       {220, 32, 33, 283, 68, 69, 14, 70, 71, 72, 14, 14, 198},
       {220, 162, 245, 98,  162, 250, 105, 164, 103, 252,
        220, 159, 225, 228, 159, 224, 117, 159, 225, 230}});
  check(
      split(
          R"re((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)re"),
      {{257, 220, 261, 264, 220, 263, 19, 20, 220, 71, 260, 82},
       {220, 259, 86,  78, 220, 220, 82,  79, 64, 66, 68, 82,
        220, 266, 220, 64, 77,  67,  287, 64, 65, 82, 265},
       {40, 285, 220, 67, 78, 220, 72, 83, 11, 220, 67, 78, 77, 275, 276, 278, 87},
       {268, 158, 224, 105, 220, 77,  64,  127, 107, 85,  68,  220,
        160, 121, 254, 270, 121, 220, 140, 120, 140, 116, 141, 222},
       {64, 288, 65, 220, 159, 222, 222, 220, 66},
       {294, 257, 220, 294, 258},
       {},
       {220},
       {198, 267},
       {87, 265},
       {263, 19, 220, 292},
       {62, 84, 77, 67, 68, 81, 62, 82, 66, 78, 81, 68, 220, 281, 87},
       {126, 227, 87},
       {199, 87, 219, 88},
       {32, 33, 283, 68, 69, 14, 70, 71, 72, 14, 282},
       {162, 245, 98, 162, 250, 105, 164, 103, 252, 220, 159, 225, 228, 159, 224, 117, 159, 225,
        230}});
  check(
      split(
          R"re((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)re"),
      {{257, 220, 261, 264, 220, 16, 17, 18, 19, 20, 220, 71, 260, 82},
       {220, 259, 86,  78, 220, 220, 82,  79, 64, 66, 68, 82,
        220, 266, 220, 64, 77,  67,  287, 64, 65, 82, 265},
       {40, 285, 220, 67, 78, 220, 72, 83, 11, 220, 67, 78, 77, 275, 276, 278, 87},
       {268, 158, 224, 105, 220, 77,  64,  127, 107, 85,  68,  220,
        160, 121, 254, 270, 121, 220, 140, 120, 140, 116, 141, 222},
       {64, 288, 65, 220, 159, 222, 222, 220, 66},
       {294, 257, 220, 294, 258},
       {},
       {220},
       {198, 267},
       {87, 265},
       {16, 17, 18, 19, 220, 20, 21},
       {62, 84, 77, 67, 68, 81, 62, 82, 66, 78, 81, 68, 220, 281, 87},
       {126, 227, 87},
       {199, 87, 219, 88},
       {32, 33, 283, 68, 69, 14, 70, 71, 72, 14, 282},
       {162, 245, 98, 162, 250, 105, 164, 103, 252, 220, 159, 225, 228, 159, 224, 117, 159, 225,
        230}});
  check(
      split(
          R"re([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)re"),
      {{257, 220, 261, 264, 220, 16, 17, 18, 19, 20, 220, 71, 260, 82},
       {220, 259, 86,  78, 220, 220, 82,  79, 64, 66, 68, 82,
        220, 266, 220, 64, 77,  67,  287, 64, 65, 82, 265},
       {40, 285, 220, 67, 78, 220, 72, 83, 11, 220, 67, 78, 77, 275, 276, 278, 87},
       {268, 158, 224, 105, 220, 77,  64,  127, 107, 85,  68,  220,
        160, 121, 254, 270, 121, 220, 140, 120, 140, 116, 141, 222},
       {64, 288, 65, 220, 159, 222, 222, 220, 66},
       {294, 257, 220, 294, 258},
       {},
       {220},
       {198, 267},
       {87, 265},
       {16, 17, 18, 19, 220, 20, 21},
       {62, 84, 77, 67, 68, 81, 62, 82, 66, 78, 81, 68, 220, 281, 87},
       {126, 227, 87},
       {199, 87, 219, 88},
       {32, 33, 283, 68, 69, 14, 70, 71, 72, 14, 282},
       {162, 245, 98, 162, 250, 105, 164, 103, 252, 220, 159, 225, 228, 159, 224, 117, 159, 225,
        230}});
}

// Expected: AutoTokenizer of transformers 5.23.
TEST_F(PromptTokensTest, ClassesThatTransformersMakesAnew) {
  json tokenizer = Tokenizer();
  tokenizer["normalizer"] = Prepending();
  const std::vector<std::string> texts = {"<s>the abc", "the the", "a<s>the", "ä x", "  a", "y"};
  const auto check = [&](const char* type, const char* config,
                         const std::vector<std::vector<int32_t>>& expected) {
    SCOPED_TRACE(absl::StrCat(type, " ", config));
    const auto made = Make(tokenizer, config, type);
    ASSERT_THAT(made, IsOk());
    for (size_t i = 0; i < texts.size(); ++i) {
      const auto ids = made->Encode(texts[i]);
      ASSERT_THAT(ids, IsOk()) << texts[i];
      EXPECT_EQ(ids->ids, expected[i]) << texts[i];
    }
  };
  check("llama", R"({"tokenizer_class": "LlamaTokenizer"})",
        {{1, 12, 3, 16}, {13, 13}, {17, 1, 12}, {3, 19, 20, 3, 18}, {3, 17}, {3}});
  check("llama", R"({"tokenizer_class": "LlamaTokenizerFast", "legacy": true})",
        {{1, 13, 3, 16}, {13, 13}, {17, 1, 13}, {3, 19, 20, 3, 18}, {3, 17}, {3}});
  check("llama", R"({"tokenizer_class": "LlamaTokenizer", "add_prefix_space": false})",
        {{1, 12, 3, 16}, {12, 13}, {4, 1, 12}, {19, 20, 3, 18}, {3, 17}, {}});
  check("mistral", R"({"tokenizer_class": "LlamaTokenizer"})",
        {{1, 13, 3, 16}, {13, 13}, {17, 1, 13}, {3, 0, 3, 0}, {3, 3, 17}, {3, 0}});
  check("llama", R"({"tokenizer_class": "PreTrainedTokenizerFast"})",
        {{1, 13, 3, 16}, {13, 13}, {17, 1, 13}, {3, 0, 3, 0}, {3, 3, 17}, {3, 0}});
  check("qwen2", R"({"tokenizer_class": "PreTrainedTokenizerFast"})",
        {{1, 12, 16}, {12, 12}, {4, 1, 12}, {}, {4}, {}});
  check("qwen3", R"({"tokenizer_class": "Qwen2Tokenizer"})",
        {{1, 12, 16}, {12, 12}, {4, 1, 12}, {}, {4}, {}});
  // What has no token is counted.
  const auto made = Make(tokenizer, R"({"tokenizer_class": "LlamaTokenizer"})");
  ASSERT_THAT(made, IsOk());
  EXPECT_EQ(made->Encode("y")->left_out, 1);
  EXPECT_EQ(made->Encode("the")->left_out, 0);
  EXPECT_THAT(Make(tokenizer, R"({"add_prefix_space": true})", "qwen2").status(),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("add_prefix_space")));
}

TEST_F(PromptTokensTest, NormalFormC) {
  json tokenizer = Tokenizer();
  tokenizer["normalizer"] = {{"type", "NFC"}};
  const auto made = Make(tokenizer);
  ASSERT_THAT(made, IsOk());
  EXPECT_THAT(made->Encode("thé")->ids, ::testing::ElementsAre(11, 10));
  // An e and an accent, which become one.
  EXPECT_THAT(made->Encode("the\xcc\x81")->ids, ::testing::ElementsAre(11, 10));
}

TEST_F(PromptTokensTest, BeginningOfText) {
  EXPECT_EQ(Make(Tokenizer(), R"({"bos_token": "<s>"})")->bos(), "<s>");
  EXPECT_EQ(Make(Tokenizer(), R"({"bos_token": {"content": "</s>"}})")->bos(), "</s>");
  EXPECT_EQ(Make(Tokenizer(), R"({"bos_token": null})")->bos(), "");
}

TEST_F(PromptTokensTest, RefusesOtherKindsByName) {
  const auto refused = [&](const char* path, const json& value, const char* part) {
    json tokenizer = Tokenizer();
    tokenizer[json::json_pointer(path)] = value;
    EXPECT_THAT(Make(tokenizer).status(),
                StatusIs(absl::StatusCode::kFailedPrecondition,
                         AllOf(HasSubstr(part), HasSubstr("positive_prompt_ids"))))
        << path;
  };
  refused("/model/type", "Other", "Other");
  refused("/model/dropout", 0.1, "dropout");
  refused("/normalizer", {{"type", "Precompiled"}}, "Precompiled");
  refused("/pre_tokenizer", {{"type", "UnicodeScripts"}}, "UnicodeScripts");
}

TEST_F(PromptTokensTest, TokensWithRulesOfTheirOwn) {
  json tokenizer = Tokenizer();
  tokenizer["added_tokens"].push_back({{"id", 14}, {"content", "ab"}, {"lstrip", true}});
  const auto made = Make(tokenizer);
  ASSERT_THAT(made, IsOk());
  EXPECT_THAT(made->Encode("t  abe")->ids, ::testing::ElementsAre(7, 14, 9));
}

TEST_F(PromptTokensTest, MalformedFiles) {
  for (const char* path : {"/model/vocab", "/model/merges", "/model"}) {
    json tokenizer = Tokenizer();
    tokenizer[json::json_pointer(path)] = 3;
    EXPECT_THAT(Make(tokenizer).status(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("m")))
        << path;
  }
  json tokenizer = Tokenizer();
  tokenizer["model"]["merges"].push_back({"t", "t"});
  EXPECT_THAT(Make(tokenizer).status(),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("model.vocab does not have")));
}

TEST_F(PromptTokensTest, HostileTexts) {
  const auto made = Make(Tokenizer());
  ASSERT_THAT(made, IsOk());
  EXPECT_THAT(made->Encode("\xff").status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("UTF-8")));
  EXPECT_THAT(made->Encode("a\xc3").status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("UTF-8")));
  EXPECT_THAT(made->Encode(std::string(65 << 10, 'a')).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("bytes")));
  EXPECT_THAT(made->Encode(std::string(64 << 10, 'a')), IsOk());
}

}  // namespace
}  // namespace pewter
