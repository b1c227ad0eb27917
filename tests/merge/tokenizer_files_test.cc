#include "merge/plan/tokenizer_files.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "merge/plan/chat_template.h"
#include "merge/plan/json_text.h"
#include "tests/support/matchers.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace pewter {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::IsOk;
using ::testing::Not;
using ::testing::Optional;
using ::testing::Pair;
using testing::StatusIs;
using ::testing::UnorderedElementsAre;

MATCHER_P(IsOkAndHolds, value, "is OK and holds the value") {
  *result_listener << arg.status();
  return arg.ok() && ::testing::ExplainMatchResult(value, *arg, result_listener);
}

using Files = std::vector<std::pair<std::string, std::string>>;

class TokenizerFilesTest : public ::testing::Test {
 protected:
  std::shared_ptr<const Checkpoint> Model(const Files& files, const std::string& config = "{}") {
    const std::string name = absl::StrCat("m", count_++);
    folder_.Write(name + "/config.json", config);
    testing::WriteSafetensors(folder_ / (name + "/model.safetensors"),
                              {testing::RandomTensor("x", DType::kF32, {1}, 1)});
    for (const auto& [file, text] : files) folder_.Write(absl::StrCat(name, "/", file), text);
    auto model = Checkpoint::Open({.path = folder_ / name});
    EXPECT_THAT(model, IsOk());
    return *model;
  }

  absl::StatusOr<std::optional<std::string>> Edit(const Checkpoint& model, absl::string_view file,
                                                  const TokenizerEdit& edit) {
    return EditTokenizerFile(model, file, edit, warnings_);
  }

  testing::TempFolder folder_;
  std::vector<std::string> warnings_;
  int count_ = 0;
};

TEST_F(TokenizerFilesTest, ReadsEveryFormOfVocabulary) {
  const auto read = [&](const Files& files) {
    const auto tokenizer = ReadTokenizer(*Model(files));
    EXPECT_THAT(tokenizer, IsOk());
    return (*tokenizer)->vocabulary;
  };
  EXPECT_THAT(read({{"tokenizer.json",
                     "{\"model\":{\"vocab\":{\"a\":1}},\"added_tokens\":[{\"id\":5,"
                     "\"content\":\"<s>\"}]}"}}),
              UnorderedElementsAre(Pair("a", 1), Pair("<s>", 5)));
  EXPECT_THAT(read({{"tokenizer.json", "{\"model\":{\"vocab\":[[\"a\",-1.5],[\"b\",-2]]}}"}}),
              UnorderedElementsAre(Pair("a", 0), Pair("b", 1)));
  EXPECT_THAT(read({{"vocab.txt", "a\r\nb\n"}, {"added_tokens.json", "{\"c\": 7}"}}),
              UnorderedElementsAre(Pair("a", 0), Pair("b", 1), Pair("c", 7)));
  EXPECT_THAT(read({{"vocab.json", "{\"a\": 3}"}}), UnorderedElementsAre(Pair("a", 3)));
  EXPECT_EQ(*ReadTokenizer(*Model({{"tokenizer_config.json", "{}"}})), std::nullopt);
  // A token of the model keeps its id whatever added_tokens says.
  EXPECT_THAT(read({{"tokenizer.json",
                     "{\"model\":{\"vocab\":{\"a\":1}},\"added_tokens\":[{\"id\":5,"
                     "\"content\":\"a\"}]}"}}),
              UnorderedElementsAre(Pair("a", 1)));
}

TEST_F(TokenizerFilesTest, ReadsWhatTransformersAdds) {
  const auto tokenizer = ReadTokenizer(
      *Model({{"tokenizer.json", "{\"model\":{\"vocab\":{\"a\":0,\"<s>\":1}}}"},
              {"tokenizer_config.json",
               "{\"added_tokens_decoder\":{\"2\":{\"content\":\"<x>\",\"special\":true}},"
               "\"bos_token\":{\"content\":\"<s>\"},\"add_bos_token\":true}"},
              {"special_tokens_map.json", "{\"pad_token\":\"<pad>\",\"bos_token\":\"a\"}"}}));
  ASSERT_THAT(tokenizer, IsOk());
  EXPECT_THAT((*tokenizer)->vocabulary,
              UnorderedElementsAre(Pair("a", 0), Pair("<s>", 1), Pair("<x>", 2), Pair("<pad>", 3)));
  EXPECT_TRUE((*tokenizer)->added.at(2).special);
  EXPECT_THAT((*tokenizer)->implied, ElementsAre(Pair(3, ::testing::_)));
  EXPECT_THAT((*tokenizer)->roles,
              ElementsAre(Pair("bos_token", "<s>"), Pair("pad_token", "<pad>")));
}

TEST_F(TokenizerFilesTest, IdsBeyondTheModelAreSurplus) {
  const auto tokenizer = ReadTokenizer(
      *Model({{"tokenizer.json",
               "{\"model\":{\"vocab\":{\"a\":0,\"b\":1,\"c\":2}},\"added_tokens\":[{\"id\":3,"
               "\"content\":\"<x>\"}]}"}},
             "{\"vocab_size\": 2}"));
  ASSERT_THAT(tokenizer, IsOk());
  EXPECT_THAT((*tokenizer)->vocabulary, UnorderedElementsAre(Pair("a", 0), Pair("b", 1)));
  EXPECT_THAT((*tokenizer)->added, IsEmpty());
  EXPECT_THAT((*tokenizer)->surplus, ElementsAre(Pair(2, "c"), Pair(3, "<x>")));
}

TEST_F(TokenizerFilesTest, RefusesMalformedAndHostileFiles) {
  const auto vocab = [](absl::string_view ids) {
    return absl::StrCat("{\"model\":{\"vocab\":{", ids, "}}}");
  };
  const auto added = [](absl::string_view entry) {
    return absl::StrCat("{\"model\":{\"vocab\":{}},\"added_tokens\":[", entry, "]}");
  };
  const std::string bad[] = {
      "",
      "[]",
      "nul",
      "{\"model\":{}}",
      "{\"model\":null}",
      "{\"model\":{\"vocab\":3}}",
      "{\"model\":{\"vocab\":[3]}}",
      "{\"model\":{\"vocab\":[[1, 2]]}}",
      vocab("\"a\":\"b\""),
      vocab("\"a\":-1"),
      vocab("\"a\":1.0"),
      vocab("\"a\":16777216"),
      vocab("\"a\":9223372036854775807"),
      vocab("\"a\":9223372036854775808"),
      vocab("\"a\":18446744073709551615"),
      vocab("\"a\":-9223372036854775808"),
      vocab("\"a\":1e300"),
      vocab("\"a\":[]"),
      added("{}"),
      added("3"),
      added("{\"id\":1}"),
      added("{\"content\":\"x\"}"),
      added("{\"id\":\"1\",\"content\":\"x\"}"),
      added("{\"id\":1,\"content\":2}"),
      added("{\"id\":1,\"content\":\"x\",\"special\":1}"),
      added("{\"id\":9223372036854775807,\"content\":\"x\"}"),
      "{\"model\":{\"vocab\":{}},\"added_tokens\":{}}",
      absl::StrCat("{\"a\":", std::string(100'000, '['), std::string(100'000, ']'), "}"),
      std::string(1'000'000, '['),
      "{\"model\":{\"vocab\":{\"a\xff\":1}}}",
  };
  for (const std::string& text : bad) {
    EXPECT_THAT(ReadTokenizer(*Model({{"tokenizer.json", text}})),
                StatusIs(absl::StatusCode::kDataLoss, HasSubstr("tokenizer.json")))
        << text.substr(0, 100);
  }
  // Two tokens of one id.
  for (const std::string& text :
       {vocab("\"a\":1,\"b\":1"),
        std::string("{\"model\":{\"vocab\":{\"a\":1}},\"added_tokens\":[{\"id\":1,"
                    "\"content\":\"x\"}]}")}) {
    EXPECT_THAT(
        ReadTokenizer(*Model({{"tokenizer.json", text}})),
        StatusIs(absl::StatusCode::kDataLoss, HasSubstr("gives id 1 to more than one token")));
  }
  const std::string good = vocab("\"a\":1");
  for (const char* config :
       {"[]", "{", "{\"added_tokens_decoder\":[]}", "{\"added_tokens_decoder\":{\"x\":{}}}",
        "{\"added_tokens_decoder\":{\"99999999999999999999\":{\"content\":\"x\"}}}",
        "{\"added_tokens_decoder\":{\"-1\":{\"content\":\"x\"}}}",
        "{\"added_tokens_decoder\":{\"3\":\"x\"}}"}) {
    EXPECT_THAT(
        ReadTokenizer(*Model({{"tokenizer.json", good}, {"tokenizer_config.json", config}})),
        StatusIs(absl::StatusCode::kDataLoss, HasSubstr("tokenizer_config.json")))
        << config;
  }
  EXPECT_THAT(ReadTokenizer(*Model({{"tokenizer.json", good}, {"special_tokens_map.json", "3"}})),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("special_tokens_map.json")));
}

TEST_F(TokenizerFilesTest, TooManyValuesAreRefusedBeforeTheyAreKept) {
  std::string text = "[0";
  for (int64_t i = 0; i < kMaxJsonValues; ++i) text += ",0";
  EXPECT_THAT(ParseBoundedJson(text + "]"),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("more than")));
}

TEST_F(TokenizerFilesTest, Differences) {
  const auto model = [&](const char* ids) {
    return Model({{"tokenizer.json", absl::StrCat("{\"model\":{\"vocab\":{", ids, "}}}")}});
  };
  const auto a = model("\"a\":0,\"b\":1");
  EXPECT_FALSE(*VocabulariesDiffer(*a, *model("\"b\":1,\"a\":0")));
  EXPECT_TRUE(*VocabulariesDiffer(*a, *model("\"b\":0,\"a\":1")));
  EXPECT_FALSE(*VocabulariesDiffer(*a, *Model({})));
}

constexpr char kFast[] = R"({
  "version": "1.0",
  "added_tokens": [{"id": 3, "content": "<x>", "special": true}],
  "post_processor": null,
  "model": {"type": "BPE", "vocab": {"b": 1, "a": 0, "ab": 2}, "merges": ["a b", ["a", "b"]],
            "dropout": 1.50}
})";

TEST_F(TokenizerFilesTest, AddsTokens) {
  const auto model = Model({{"tokenizer.json", kFast},
                            {"tokenizer_config.json",
                             "{\"added_tokens_decoder\": {\"3\": {\"content\": \"<x>\"}},\n"
                             "\"unk_token\": \"<x>\"}"},
                            {"added_tokens.json", "{\"<x>\": 3}"},
                            {"vocab.json", "{}"}});
  const auto tokenizer = ReadTokenizer(*model);
  ASSERT_THAT(tokenizer, IsOk());
  const TokenizerEdit edit{
      .listed = (*tokenizer)->added,
      .added = {{4, {.content = "n\"\n\xc3\xa4", .normalized = false, .special = true}}}};
  const auto fast = Edit(*model, "tokenizer.json", edit);
  ASSERT_THAT(fast, IsOkAndHolds(Optional(::testing::_)));
  // What does not change is as it was.
  EXPECT_THAT(**fast, HasSubstr("\"dropout\": 1.50"));
  EXPECT_THAT(**fast, HasSubstr("{\"b\": 1, \"a\": 0, \"ab\": 2}"));
  const json parsed = json::parse(**fast);
  ASSERT_EQ(parsed["added_tokens"].size(), 2u);
  EXPECT_EQ(parsed["added_tokens"][0]["content"], "<x>");
  EXPECT_EQ(parsed["added_tokens"][1],
            json::parse("{\"id\":4,\"content\":\"n\\\"\\n\u00e4\",\"single_word\":false,"
                        "\"lstrip\":false,\"rstrip\":false,\"normalized\":false,"
                        "\"special\":true}"));
  const auto config = Edit(*model, "tokenizer_config.json", edit);
  ASSERT_THAT(config, IsOkAndHolds(Optional(HasSubstr("\"unk_token\": \"<x>\""))));
  EXPECT_EQ(json::parse(**config)["added_tokens_decoder"]["4"]["content"], "n\"\n\xc3\xa4");
  const auto map = Edit(*model, "added_tokens.json", edit);
  ASSERT_THAT(map, IsOkAndHolds(Optional(::testing::_)));
  EXPECT_EQ(json::parse(**map).size(), 2u);
  EXPECT_THAT(Edit(*model, "vocab.json", edit), IsOkAndHolds(std::nullopt));
  EXPECT_THAT(Edit(*model, "merges.txt", edit), IsOkAndHolds(std::nullopt));
  EXPECT_THAT(MakeAddedTokensFile(*model, edit), IsOkAndHolds(std::nullopt));
  EXPECT_THAT(warnings_, IsEmpty());

  // Without the other lists, added_tokens.json is where they can be said.
  const auto slow = Model({{"vocab.json", "{\"a\": 0}"}});
  EXPECT_THAT(MakeAddedTokensFile(*slow, {.added = {{1, {.content = "n"}}}}),
              IsOkAndHolds(Optional(HasSubstr("\"n\": 1"))));
}

TEST_F(TokenizerFilesTest, TakesSurplusOut) {
  const auto model =
      Model({{"tokenizer.json", kFast},
             {"tokenizer_config.json",
              "{\"pad_token\": \"<x>\", \"eos_token\": \"a\", \"additional_special_tokens\": "
              "[\"<x>\", \"b\"], \"added_tokens_decoder\": {\"3\": {\"content\": \"<x>\"}}}"},
             {"special_tokens_map.json", "{\"pad_token\": {\"content\": \"<x>\"}}"},
             {"added_tokens.json", "{\"<x>\": 3}"},
             {"merges.txt", "a b\n"}},
            "{\"vocab_size\": 2}");
  const auto tokenizer = ReadTokenizer(*model);
  ASSERT_THAT(tokenizer, IsOk());
  const TokenizerEdit edit{.listed = (*tokenizer)->added, .surplus = (*tokenizer)->surplus};
  const auto text = [&](absl::string_view file) {
    const auto edited = Edit(*model, file, edit);
    EXPECT_THAT(edited, IsOkAndHolds(Optional(::testing::_)));
    return **edited;
  };
  EXPECT_EQ(json::parse(text("tokenizer.json")),
            json::parse("{\"version\":\"1.0\",\"added_tokens\":[],\"post_processor\":null,"
                        "\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1},\"merges\":[],"
                        "\"dropout\":1.5}}"));
  EXPECT_EQ(json::parse(text("tokenizer_config.json")),
            json::parse("{\"eos_token\":\"a\",\"additional_special_tokens\":[\"b\"],"
                        "\"added_tokens_decoder\":{}}"));
  EXPECT_EQ(json::parse(text("special_tokens_map.json")), json::object());
  EXPECT_EQ(json::parse(text("added_tokens.json")), json::object());
  EXPECT_THAT(warnings_, UnorderedElementsAre(HasSubstr("tokenizer_config.json: pad_token"),
                                              HasSubstr("special_tokens_map.json: pad_token")));
  warnings_.clear();
  EXPECT_EQ(text("merges.txt"), "");
  EXPECT_THAT(warnings_, ElementsAre(HasSubstr("merges.txt is left out")));
}

TEST_F(TokenizerFilesTest, SurplusThatIsNeededIsAnError) {
  for (const char* needs :
       {"\"model\":{\"vocab\":{\"a\":0,\"b\":1},\"unk_token\":\"b\"}",
        "\"model\":{\"vocab\":{\"a\":0,\"b\":1}},\"post_processor\":{\"special_tokens\":{\"b\":1}}",
        "\"model\":{\"vocab\":{\"a\":0,\"b\":1},\"merges\":[3]}"}) {
    const auto model = Model({{"tokenizer.json", absl::StrCat("{", needs, "}")}});
    const auto edited = Edit(*model, "tokenizer.json", {.surplus = {{1, "b"}}});
    EXPECT_THAT(edited.status().code(), ::testing::AnyOf(absl::StatusCode::kFailedPrecondition,
                                                         absl::StatusCode::kDataLoss))
        << needs;
  }
  const auto slow = Model({{"vocab.txt", "a\nb\n"}});
  EXPECT_THAT(Edit(*slow, "vocab.txt", {.surplus = {{1, "b"}}}),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("tokenizer.json")));
}

TEST_F(TokenizerFilesTest, ChatTemplates) {
  EXPECT_THAT(ReadChatTemplate(*Model({{"chat_template.jinja", "J"},
                                       {"tokenizer_config.json", "{\"chat_template\":\"K\"}"}})),
              IsOkAndHolds(Optional(std::string("J"))));
  const auto of_config = [&](const char* value) {
    return *ReadChatTemplate(
        *Model({{"tokenizer_config.json", absl::StrCat("{\"chat_template\":", value, "}")}}));
  };
  EXPECT_EQ(of_config("\"K\""), "K");
  EXPECT_EQ(of_config("{\"default\":\"D\",\"tool_use\":\"T\"}"), "D");
  EXPECT_EQ(of_config("[{\"name\":\"x\",\"template\":\"X\"},{\"name\":\"default\",\"template\":"
                      "\"D\"}]"),
            "D");
  for (const char* none :
       {"null", "3", "{}", "[3]", "{\"default\":3}", "[{\"name\":\"default\"}]"}) {
    EXPECT_EQ(of_config(none), std::nullopt) << none;
  }
  const auto model = Model({{"tokenizer_config.json", "{\"a\": 1, \"chat_template\": \"old\"}"},
                            {"chat_template.json", "{\"chat_template\": \"old\"}"},
                            {"chat_template.jinja", "old"}});
  const TokenizerEdit edit{.chat_template = "{{ \"new\" }}"};
  EXPECT_THAT(
      Edit(*model, "tokenizer_config.json", edit),
      IsOkAndHolds(Optional(std::string("{\"a\": 1, \"chat_template\": \"{{ \\\"new\\\" }}\"}"))));
  EXPECT_THAT(Edit(*model, "chat_template.json", edit),
              IsOkAndHolds(Optional(Not(HasSubstr("old")))));
  EXPECT_THAT(Edit(*model, "chat_template.jinja", edit),
              IsOkAndHolds(Optional(std::string("{{ \"new\" }}"))));
}

TEST_F(TokenizerFilesTest, ChoosesAChatTemplate) {
  const auto model = [&](const std::string& text) {
    return Model({{"chat_template.jinja", text}});
  };
  const std::vector<std::shared_ptr<const Checkpoint>> models = {
      Model({}), model("{{ a }}"), model(" {{ b }}\n"), model("{{ b }}"), model("{{ a }}")};
  EXPECT_THAT(ChooseChatTemplate("auto", models, warnings_),
              IsOkAndHolds(Optional(std::string("{{ a }}"))));
  EXPECT_THAT(ChooseChatTemplate("auto", absl::MakeConstSpan(models).subspan(0, 4), warnings_),
              IsOkAndHolds(Optional(std::string("{{ b }}"))));
  EXPECT_THAT(warnings_, IsEmpty());
  EXPECT_THAT(ChooseChatTemplate("auto", absl::MakeConstSpan(models).subspan(0, 1), warnings_),
              IsOkAndHolds(std::nullopt));
  EXPECT_THAT(warnings_, ElementsAre(HasSubstr("no model has a chat template")));
  EXPECT_THAT(ChatTemplateNames(), ElementsAre("alpaca", "chatml", "exaone", "llama3", "mistral"));
  for (const std::string& name : ChatTemplateNames()) {
    EXPECT_THAT(ChooseChatTemplate(name, {}, warnings_),
                IsOkAndHolds(Optional(HasSubstr("messages"))))
        << name;
  }
  EXPECT_THAT(ChooseChatTemplate("{% for message in messages %}", {}, warnings_),
              IsOkAndHolds(Optional(std::string("{% for message in messages %}"))));
  for (const char* bad : {"nosuch", "{{ too short }}", "long enough but without a brace"}) {
    EXPECT_THAT(ChooseChatTemplate(bad, {}, warnings_),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("chatml")))
        << bad;
  }
}

TEST(JsonTextTest, Members) {
  const char* text = "{ \"a\" : [1, \"}\\\"\"] , \"b\":{\"a\": 2}, \"a\": 3 }";
  EXPECT_EQ(JsonMember(text, "a"), "3");
  EXPECT_EQ(JsonMember(text, "b"), "{\"a\": 2}");
  EXPECT_EQ(JsonMember(text, "c"), std::nullopt);
  EXPECT_EQ(SetJsonMember(text, "b", "0"), "{ \"a\" : [1, \"}\\\"\"] , \"b\":0, \"a\": 3 }");
  EXPECT_EQ(json::parse(RemoveJsonMember(text, "a")), json::parse("{\"b\":{\"a\":2}}"));
  EXPECT_EQ(json::parse(SetJsonMember("{}", "a\n", "1")), json::parse("{\"a\\n\":1}"));
  EXPECT_EQ(json::parse(SetJsonMember(" {\"x\": {}\n}\n", "a", "1")),
            json::parse("{\"x\":{},\"a\":1}"));
  EXPECT_EQ(json::parse(RemoveJsonMember("{\"a\":1}", "a")), json::object());
  EXPECT_EQ(json::parse(RemoveJsonMember("{\"a\":1,\"b\":2}", "a")), json::parse("{\"b\":2}"));
}

}  // namespace
}  // namespace pewter
