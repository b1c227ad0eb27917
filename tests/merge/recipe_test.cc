#include "merge/recipe/recipe.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "merge/recipe/problems.h"
#include "merge/recipe/referenced_models.h"
#include "tests/support/matchers.h"

namespace pewter {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::IsOk;
using ::testing::StartsWith;
using testing::StatusIs;

constexpr char kModels[] = "models:\n  - model: ./a\n  - model: ./b\n";

// A recipe of two models with more keys after them.
std::string With(absl::string_view more) {
  return absl::StrCat("merge_method: linear\n", kModels, more);
}

absl::StatusOr<Recipe> Parse(absl::string_view text) { return ParseRecipe(text); }

absl::StatusOr<ParamSetting> Parameter(absl::string_view value) {
  const auto recipe = Parse(With(absl::StrCat("parameters:\n  p: ", value, "\n")));
  if (!recipe.ok()) return recipe.status();
  return recipe->parameters.at("p");
}

auto InvalidAt(absl::string_view position, absl::string_view part) {
  return StatusIs(absl::StatusCode::kInvalidArgument,
                  AllOf(StartsWith(absl::StrCat(position, ": ")), HasSubstr(std::string(part))));
}

TEST(RecipeTest, ReadsModels) {
  const auto recipe = Parse(
      "merge_method: ties\n"
      "base_model: ./base\n"
      "models:\n"
      "  - model: org/a@main+./lora@v2\n"
      "    parameters: {weight: 0.5, density: [0.1, 0.9]}\n"
      "  - model: ./b\n"
      "parameters: {normalize: yes}\n"
      "dtype: torch.bfloat16\n"
      "out_dtype: float32\n");
  ASSERT_THAT(recipe, IsOk());
  EXPECT_EQ(recipe->merge_method, "ties");
  EXPECT_EQ(recipe->base_model->path, "./base");
  EXPECT_EQ(recipe->dtype, DType::kBF16);
  EXPECT_EQ(recipe->out_dtype, DType::kF32);
  ASSERT_EQ(recipe->modules.size(), 1u);
  EXPECT_TRUE(recipe->modules[0].from_models);
  EXPECT_FALSE(recipe->has_modules_key);
  const RecipeSlice& slice = recipe->modules[0].slices.at(0);
  ASSERT_EQ(slice.sources.size(), 2u);
  const ModelRef& model = slice.sources[0].model;
  EXPECT_EQ(model.path, "org/a");
  EXPECT_EQ(model.revision, "main");
  EXPECT_EQ(model.adapter, "./lora");
  EXPECT_EQ(model.adapter_revision, "v2");
  EXPECT_EQ(model.ToString(), "org/a@main+./lora@v2");
  EXPECT_EQ(model.at.line, 4);
  EXPECT_EQ(model.at.column, 12);
  const ParamSetting& density = slice.sources[0].parameters.at("density");
  ASSERT_EQ(density.cases.size(), 1u);
  EXPECT_TRUE(density.cases[0].gradient);
  EXPECT_THAT(density.cases[0].values, ElementsAre(ParamScalar(0.1), ParamScalar(0.9)));
  EXPECT_EQ(recipe->parameters.at("normalize").cases[0].values[0], ParamScalar(true));
  EXPECT_THAT(recipe->warnings, IsEmpty());
}

TEST(RecipeTest, ReadsModelMappings) {
  const auto recipe = Parse(
      "merge_method: linear\n"
      "models:\n"
      "  - model:\n"
      "      model: {path: ./odd@name+x, revision: main}\n"
      "      lora: {path: ./lora}\n"
      "      override_architecture: LlamaForCausalLM\n"
      "  - model: {model: ./plain}\n");
  ASSERT_THAT(recipe, IsOk());
  const auto& sources = recipe->modules[0].slices[0].sources;
  EXPECT_EQ(sources[0].model.path, "./odd@name+x");
  EXPECT_EQ(sources[0].model.revision, "main");
  EXPECT_EQ(sources[0].model.adapter, "./lora");
  EXPECT_EQ(sources[0].model.override_architecture, "LlamaForCausalLM");
  EXPECT_EQ(sources[1].model.path, "./plain");
}

TEST(RecipeTest, ReadsEvaluation) {
  const auto recipe = Parse(
      "merge_method: linear\nmodels: [{model: ./a}]\n"
      "evaluate: {data: ./d.safetensors, metric: mlm_loss, barrier_points: 21}\n");
  ASSERT_THAT(recipe, IsOk());
  ASSERT_TRUE(recipe->evaluation.has_value());
  EXPECT_EQ(recipe->evaluation->data.path, "./d.safetensors");
  EXPECT_EQ(recipe->evaluation->metric, "mlm_loss");
  EXPECT_EQ(recipe->evaluation->barrier_points, 21);
  EXPECT_THAT(recipe->warnings, IsEmpty());
  // A server must allow the file as it must allow models.
  EXPECT_EQ(ReferencedModels(*recipe).back().path, "./d.safetensors");

  const auto refused = [](const std::string& evaluate, const char* part) {
    EXPECT_THAT(Parse("merge_method: linear\nmodels: [{model: ./a}]\nevaluate: " + evaluate + "\n")
                    .status(),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(part)));
  };
  refused("./d.safetensors", "recipe:3:11");
  refused("{metric: mlm_loss}", "`data`");
  refused("{data: ./d+./lora}", "recipe:3:18");
  refused("{data: ./d, barrier_points: 2}", "from 3 to");
  refused("{data: ./d, barrier_points: many}", "from 3 to");
}

TEST(RecipeTest, ReadsStatistics) {
  const auto recipe = Parse(
      "merge_method: linear\nmodels: [{model: ./a}, {model: ./b+./lora}]\n"
      "statistics:\n  ./a: ./a.safetensors\n  ./b+./lora: {model: {path: ./odd@b.safetensors}}\n");
  ASSERT_THAT(recipe, IsOk());
  ASSERT_EQ(recipe->statistics.size(), 2u);
  EXPECT_EQ(recipe->statistics[0].model.path, "./a");
  EXPECT_EQ(recipe->statistics[0].file.path, "./a.safetensors");
  EXPECT_EQ(recipe->statistics[1].model.ToString(), "./b+./lora");
  EXPECT_EQ(recipe->statistics[1].file.path, "./odd@b.safetensors");
  EXPECT_EQ(recipe->statistics[1].file.at.ToString(), "recipe:5:15");
  EXPECT_THAT(recipe->warnings, IsEmpty());
  // A server must allow these files as it must allow models.
  std::vector<std::string> paths;
  for (const ModelRef& model : ReferencedModels(*recipe)) paths.push_back(model.path);
  EXPECT_THAT(paths,
              ElementsAre("./a", "./b", "./a", "./a.safetensors", "./b", "./odd@b.safetensors"));

  const auto status = [](const std::string& statistics) {
    return Parse("merge_method: linear\nmodels: [{model: ./a}]\nstatistics: " + statistics + "\n")
        .status();
  };
  EXPECT_THAT(status("./a.safetensors"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("recipe:3:13")));
  EXPECT_THAT(status("{./a: ./x+./y}"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("recipe:3:19")));
}

TEST(RecipeTest, ReadsSlicesAndModules) {
  const auto recipe = Parse(
      "merge_method: passthrough\n"
      "modules:\n"
      "  decoder:\n"
      "    parameters: {scale: 2}\n"
      "    slices:\n"
      "      - sources: [{model: ./a, layer_range: [0, 2]}]\n"
      "        base_model: ./c\n"
      "        parameters: {scale: 3}\n"
      "      - sources: [{model: ./b, layer_range: [1, 4], parameters: {scale: 4}}]\n"
      "  encoder:\n"
      "    models: [{model: ./a}]\n");
  ASSERT_THAT(recipe, IsOk());
  EXPECT_TRUE(recipe->has_modules_key);
  ASSERT_EQ(recipe->modules.size(), 2u);
  const RecipeModule& decoder = recipe->modules[0];
  EXPECT_EQ(decoder.name, "decoder");
  EXPECT_FALSE(decoder.from_models);
  EXPECT_TRUE(decoder.parameters.contains("scale"));
  ASSERT_EQ(decoder.slices.size(), 2u);
  EXPECT_EQ(decoder.slices[0].base_model->path, "./c");
  EXPECT_EQ(decoder.slices[0].sources[0].layer_range, std::make_pair(int64_t{0}, int64_t{2}));
  EXPECT_EQ(decoder.slices[1].sources[0].layer_range, std::make_pair(int64_t{1}, int64_t{4}));
  EXPECT_TRUE(recipe->modules[1].from_models);
}

TEST(RecipeTest, ReadsEveryFormOfParameter) {
  auto scalar = Parameter("0.25");
  ASSERT_THAT(scalar, IsOk());
  EXPECT_THAT(scalar->cases[0].values, ElementsAre(ParamScalar(0.25)));
  EXPECT_FALSE(scalar->cases[0].gradient);

  auto one = Parameter("{filter: mlp, value: [1, 2]}");
  ASSERT_THAT(one, IsOk());
  EXPECT_EQ(one->cases[0].filter, "mlp");
  EXPECT_TRUE(one->cases[0].gradient);

  auto several = Parameter("[{filter: self_attn, value: 1}, {filter: '*', value: 2}, {value: 3}]");
  ASSERT_THAT(several, IsOk());
  ASSERT_EQ(several->cases.size(), 3u);
  EXPECT_EQ(several->cases[1].filter, "*");
  EXPECT_EQ(several->cases[2].filter, "");

  auto nothing = Parameter("[]");
  ASSERT_THAT(nothing, IsOk());
  EXPECT_THAT(nothing->cases[0].values, IsEmpty());
}

TEST(RecipeTest, ScalarsAreThoseOfYaml11) {
  const auto value = [](absl::string_view text) { return Parameter(text)->cases[0].values[0]; };
  EXPECT_EQ(value("yes"), ParamScalar(true));
  EXPECT_EQ(value("Off"), ParamScalar(false));
  EXPECT_EQ(value("5e-1"), ParamScalar(0.5));
  EXPECT_EQ(value("1.0e-5"), ParamScalar(1e-5));
  EXPECT_EQ(value("-.5"), ParamScalar(-0.5));
  EXPECT_EQ(value("1_000"), ParamScalar(int64_t{1000}));
  EXPECT_EQ(value("0x10"), ParamScalar(int64_t{16}));
  EXPECT_EQ(value("010"), ParamScalar(int64_t{8}));
  EXPECT_EQ(value("0b101"), ParamScalar(int64_t{5}));
  EXPECT_EQ(value("'0.5'"), ParamScalar(std::string("0.5")));
  EXPECT_EQ(value("!!str 1"), ParamScalar(std::string("1")));
  EXPECT_EQ(value("y"), ParamScalar(std::string("y")));
  EXPECT_EQ(value("nan"), ParamScalar(std::string("nan")));
  EXPECT_EQ(value("9223372036854775808"), ParamScalar(9223372036854775808.0));
  EXPECT_THAT(Parameter(".inf"), InvalidAt("recipe:6:6", "finite"));
  EXPECT_THAT(Parameter(".nan"), InvalidAt("recipe:6:6", "finite"));
  EXPECT_THAT(Parameter("!!python/object:os.system x"), InvalidAt("recipe:6:6", "tag"));
}

TEST(RecipeTest, AnchorsAndMergeKeys) {
  const auto recipe = Parse(
      "merge_method: linear\n"
      "defaults: &d {weight: 1, density: 2}\n"
      "more: &m {density: 3, gamma: 4}\n"
      "models:\n"
      "  - &first\n"
      "    model: ./a\n"
      "    parameters:\n"
      "      <<: [*d, *m]\n"
      "      weight: 9\n"
      "  - <<: *first\n"
      "    model: ./b\n");
  ASSERT_THAT(recipe, IsOk());
  for (const RecipeSource& source : recipe->modules[0].slices[0].sources) {
    const auto value = [&](const char* name) {
      return source.parameters.at(name).cases[0].values[0];
    };
    EXPECT_EQ(value("weight"), ParamScalar(int64_t{9}));   // own keys win
    EXPECT_EQ(value("density"), ParamScalar(int64_t{2}));  // earlier mappings win
    EXPECT_EQ(value("gamma"), ParamScalar(int64_t{4}));
  }
  EXPECT_EQ(recipe->modules[0].slices[0].sources[1].model.path, "./b");
  EXPECT_THAT(Parse(With("parameters: {<<: 3}\n")), InvalidAt("recipe:5:14", "`<<`"));
}

TEST(RecipeTest, UnknownKeysAreWarned) {
  const auto recipe = Parse(
      "merge_method: linear\n"
      "nonsense: 3\n"
      "dtyp: float32\n"
      "models:\n"
      "  - model: ./a\n"
      "    weight: 1\n");
  ASSERT_THAT(recipe, IsOk());
  EXPECT_THAT(recipe->warnings,
              ElementsAre(AllOf(StartsWith("recipe:2:1: "), HasSubstr("nonsense")),
                          AllOf(StartsWith("recipe:3:1: "), HasSubstr("did you mean \"dtype\"")),
                          AllOf(StartsWith("recipe:6:5: "), HasSubstr("weight"))));
}

TEST(RecipeTest, LastOfEqualKeysCounts) {
  const auto recipe = Parse("merge_method: ties\nmerge_method: linear\nmodels: [{model: ./a}]\n");
  ASSERT_THAT(recipe, IsOk());
  EXPECT_EQ(recipe->merge_method, "linear");
  EXPECT_THAT(recipe->warnings,
              ElementsAre(AllOf(StartsWith("recipe:2:1: "), HasSubstr("recipe:1:1"))));
}

TEST(RecipeTest, Tokenizer) {
  using Source = RecipeTokenizer::Source;
  const auto source = [](const std::string& line) {
    const auto recipe = Parse(With(line + "\n"));
    EXPECT_THAT(recipe, IsOk());
    return recipe->tokenizer->source;
  };
  EXPECT_EQ(source("tokenizer_source: base"), Source::kBase);
  EXPECT_EQ(source("tokenizer_source: union"), Source::kUnion);
  EXPECT_EQ(source("tokenizer: {}"), Source::kUnion);
  EXPECT_EQ(source("tokenizer: {pad_to_multiple_of: 64}"), Source::kUnion);
  const auto model = Parse(With("tokenizer: {source: ./b}\n"));
  ASSERT_THAT(model, IsOk());
  EXPECT_EQ(model->tokenizer->source, Source::kModel);
  EXPECT_EQ(model->tokenizer->model->path, "./b");
  EXPECT_EQ(Parse(With(""))->tokenizer, std::nullopt);
}

TEST(RecipeTest, TokensOfTheTokenizer) {
  const auto recipe = Parse(
      With("tokenizer:\n"
           "  pad_to_multiple_of: 64\n"
           "  tokens:\n"
           "    <a>: {source: ./b, force: true}\n"
           "    <b>: {source: {kind: zero}}\n"
           "    <c>: {source: {kind: model_token, model: ./b+./lora, token: 'x: y'}}\n"
           "    <d>: {source: {kind: model_token, model: {model: {path: ./a@b}}, token_id: 7}}\n"
           "    <e>:\n"));
  ASSERT_THAT(recipe, IsOk());
  using Rows = RecipeToken::Rows;
  EXPECT_EQ(recipe->tokenizer->pad_to_multiple_of, 64);
  const std::vector<RecipeToken>& tokens = recipe->tokenizer->tokens;
  ASSERT_EQ(tokens.size(), 5u);
  EXPECT_EQ(tokens[0].token, "<a>");
  EXPECT_EQ(tokens[0].rows, Rows::kModel);
  EXPECT_EQ(tokens[0].model->path, "./b");
  EXPECT_TRUE(tokens[0].force);
  EXPECT_EQ(tokens[1].rows, Rows::kZero);
  EXPECT_FALSE(tokens[1].force);
  EXPECT_EQ(tokens[2].rows, Rows::kModelToken);
  EXPECT_EQ(tokens[2].model->adapter, "./lora");
  EXPECT_EQ(tokens[2].other, "x: y");
  EXPECT_EQ(tokens[3].model->path, "./a@b");
  EXPECT_EQ(tokens[3].other_id, 7);
  EXPECT_EQ(tokens[4].rows, Rows::kUsual);
}

struct Refused {
  const char* text;
  const char* position;
  const char* part;
};

class RefusedTest : public ::testing::TestWithParam<Refused> {};

TEST_P(RefusedTest, NamesPlaceAndReason) {
  EXPECT_THAT(Parse(GetParam().text), InvalidAt(GetParam().position, GetParam().part));
}

INSTANTIATE_TEST_SUITE_P(
    Recipe, RefusedTest,
    ::testing::Values(
        Refused{"", "recipe:1:1", "must be a mapping"}, Refused{"- a\n", "recipe:1:1", "a list"},
        Refused{"models: [{model: ./a}]\n", "recipe:1:1", "`merge_method` is missing"},
        Refused{"merge_method: [linear]\nmodels: [{model: ./a}]\n", "recipe:1:15", "must be text"},
        Refused{"merge_method: linear\n", "recipe:1:1", "exactly one of"},
        Refused{"merge_method: linear\nmodels: []\n", "recipe:1:1", "there is none"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\nslices: [{sources: []}]\n",
                "recipe:1:1", "there are several"},
        Refused{"merge_method: linear\nmodels: {model: a}\n", "recipe:2:9", "must be a list"},
        Refused{"merge_method: linear\nmodels: [a]\n", "recipe:2:10", "a mapping with `model`"},
        Refused{"merge_method: linear\nmodels: [{parameters: {}}]\n", "recipe:2:10",
                "has no `model`"},
        Refused{"merge_method: linear\nmodels: [{model: a+b+c}]\n", "recipe:2:18",
                "more than one '+'"},
        Refused{"merge_method: linear\nmodels: [{model: a@b@c}]\n", "recipe:2:18",
                "more than one '@'"},
        Refused{"merge_method: linear\nmodels: [{model: '+c'}]\n", "recipe:2:18", "an empty part"},
        Refused{"merge_method: linear\nmodels: [{model: {lora: b}}]\n", "recipe:2:18",
                "has no `model`"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\ndtype: int7\n", "recipe:3:8",
                "bfloat16"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\nparameters: [1]\n", "recipe:3:13",
                "must be a mapping"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\nparameters: {t: }\n", "recipe:3:17",
                "not nothing"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\nparameters: {t: [[1]]}\n",
                "recipe:3:18", "not a list"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\nparameters: {t: {filter: x}}\n",
                "recipe:3:17", "has no `value`"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\nparameters: {t: [{value: 1}, 2]}\n",
                "recipe:3:30", "{filter, value}"},
        Refused{"merge_method: linear\nslices: [{sources: [{model: a}]}]\n", "recipe:2:21",
                "layer_range"},
        Refused{"merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, -1]}]}]\n",
                "recipe:2:45", "no layers"},
        Refused{"merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 1, 2]}]}]\n",
                "recipe:2:45", "two whole numbers"},
        Refused{"merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 1.5]}]}]\n",
                "recipe:2:45", "two whole numbers"},
        Refused{"merge_method: linear\nslices: [{}]\n", "recipe:2:10", "without `sources`"},
        Refused{"merge_method: linear\nmodules: {d: {models: [], slices: []}}\n", "recipe:2:14",
                "exactly one"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\ntokenizer_source: base\n"
                "tokenizer: {source: base}\n",
                "recipe:4:12", "both"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\n"
                "tokenizer: base\n",
                "recipe:3:12", "must be a mapping"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\n"
                "tokenizer: {pad_to_multiple_of: 0}\n",
                "recipe:3:33", "from 1 to"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\n"
                "tokenizer: {pad_to_multiple_of: 4000000000}\n",
                "recipe:3:33", "from 1 to"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\n"
                "tokenizer: {pad_to_multiple_of: 1.5}\n",
                "recipe:3:33", "whole number"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\n"
                "tokenizer: {tokens: [a]}\n",
                "recipe:3:21", "mapping of tokens"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\n"
                "tokenizer: {tokens: {x: ./b}}\n",
                "recipe:3:25", "`source` and `force`"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\n"
                "tokenizer: {tokens: {'': {source: ./b}}}\n",
                "recipe:3:22", "empty"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\n"
                "tokenizer: {tokens: {x: {source: ./b, force: 2}}}\n",
                "recipe:3:46", "true or false"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\n"
                "tokenizer: {tokens: {x: {force: true}}}\n",
                "recipe:3:25", "no `source`"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\n"
                "tokenizer: {tokens: {x: {source: {kind: mean}}}}\n",
                "recipe:3:41", "zero or model_token"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\n"
                "tokenizer: {tokens: {x: {source: {kind: model_token, token: a}}}}\n",
                "recipe:3:34", "no `model`"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\n"
                "tokenizer: {tokens: {x: {source: {kind: model_token, model: b}}}}\n",
                "recipe:3:34", "exactly one of"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\n"
                "tokenizer: {tokens: {x: {source: {kind: model_token, model: b, token: a, "
                "token_id: 1}}}}\n",
                "recipe:3:34", "exactly one of"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\n"
                "tokenizer: {tokens: {x: {source: {kind: model_token, model: b, token_id: -1}}}}\n",
                "recipe:3:74", "not negative"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\n"
                "tokenizer: {tokens: {x: {source: {kind: model_token, model: b, token_id: "
                "99999999999999999999}}}}\n",
                "recipe:3:74", "whole number"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\n"
                "chat_template: [auto]\n",
                "recipe:3:16", "text"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\n"
                "tokenizer: {approximate: omp}\n",
                "recipe:3:26", "needs a model"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\n"
                "tokenizer: {source: base, approximate: omp}\n",
                "recipe:3:40", "needs a model"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\n"
                "tokenizer: {source: b, approximate: landmark}\n",
                "recipe:3:37", "omp, common_interpolation"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\n"
                "tokenizer: {source: b, approximate: {k: 0}}\n",
                "recipe:3:41", "from 1 to 1024"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\n"
                "tokenizer: {source: b, approximate: {weight_scheme: even}}\n",
                "recipe:3:53", "barycentric"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\n"
                "tokenizer: {source: b, approximate: {prefix_match: head}}\n",
                "recipe:3:52", "yes, no, embed, lm_head"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\n"
                "tokenizer: {source: b, approximate: {magikarp: maybe}}\n",
                "recipe:3:48", "true or false"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\n"
                "tokenizer: {source: b, approximate: {new_vocab_scale: 0}}\n",
                "recipe:3:55", "other than 0"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\n"
                "tokenizer: {source: b, approximate: {new_vocab_noise: -1}}\n",
                "recipe:3:55", "not negative"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\nalign: {method: cca}\n", "recipe:3:8",
                "`align` has no `reference`"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\narithmetic: dtype\n", "recipe:3:1",
                "`arithmetic` is not supported"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\noutput: {shard_size: 5GB}\n",
                "recipe:3:10", "`shard_size` is not supported"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\noutput: {format: gguf}\n",
                "recipe:3:18", "safetensors (a model) or lora (an adapter)"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\noutput: lora\n", "recipe:3:9",
                "a mapping with `format`"},
        Refused{"merge_method: linear\nmodels: [{model: a}]\n...\nmerge_method: linear\n",
                "recipe:4:1", "second document"},
        Refused{"merge_method: [\n", "recipe:2:1", "not YAML"},
        Refused{"a: *nowhere\n", "recipe:1:4", "not YAML"},
        Refused{"a: &x [1, *x]\n", "recipe:1:11", "alias inside"},
        Refused{"? [a]\n: b\n", "recipe:1:3", "a key must be text"},
        Refused{"a: b\nc: \xff\n", "recipe:2:4", "not UTF-8"},
        Refused{"a: \xed\xa0\x80\n", "recipe:1:4", "not UTF-8"}));

TEST(RecipeTest, HostileDocumentsAreRefused) {
  std::string bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n";
  for (int i = 1; i < 12; ++i) {
    absl::StrAppend(&bomb, "a", i, ": &a", i, " [");
    for (int j = 0; j < 10; ++j) absl::StrAppend(&bomb, "*a", i - 1, ", ");
    absl::StrAppend(&bomb, "]\n");
  }
  EXPECT_THAT(Parse(bomb), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("aliases")));

  std::string merges = "m: &m {";
  for (int i = 0; i < 1000; ++i) absl::StrAppend(&merges, "k", i, ": 1, ");
  absl::StrAppend(&merges, "}\nl:\n");
  for (int i = 0; i < 1000; ++i) absl::StrAppend(&merges, "  - {<<: *m}\n");
  EXPECT_THAT(Parse(merges),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("more values")));

  EXPECT_THAT(Parse(std::string(100'000, '[')),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("nested too deep")));
  std::string nested;
  for (int i = 0; i < 2000; ++i) absl::StrAppend(&nested, "- ");
  EXPECT_THAT(Parse(nested), InvalidAt("recipe:1:129", "nested too deep"));
  EXPECT_THAT(Parse(std::string((1 << 20) + 1, ' ')),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("at most")));
  EXPECT_THAT(Parse(std::string("a: \0b\n", 7)), InvalidAt("recipe:1:4", "NUL"));
}

TEST(RecipeTest, Overrides) {
  const std::string text =
      "merge_method: linear\n"
      "models:\n"
      "  - &m {model: ./a, parameters: {weight: 1}}\n"
      "  - <<: *m\n"
      "    model: ./b\n";
  const auto recipe = ParseRecipe(text, {{"dtype", "float16"},
                                         {"parameters.normalize", "no"},
                                         {"models.0.parameters.weight", "[0, 1]"}});
  ASSERT_THAT(recipe, IsOk());
  EXPECT_EQ(recipe->text, text);
  EXPECT_EQ(recipe->dtype, DType::kF16);
  EXPECT_EQ(recipe->parameters.at("normalize").cases[0].values[0], ParamScalar(false));
  EXPECT_EQ(recipe->parameters.at("normalize").at.ToString(), "--set");
  const auto& sources = recipe->modules[0].slices[0].sources;
  EXPECT_TRUE(sources[0].parameters.at("weight").cases[0].gradient);
  EXPECT_FALSE(sources[1].parameters.at("weight").cases[0].gradient);  // shared before

  const auto fails = [&](const char* key, const char* value, const char* part) {
    EXPECT_THAT(
        ParseRecipe(text, {{key, value}}),
        StatusIs(absl::StatusCode::kInvalidArgument, AllOf(StartsWith("--set"), HasSubstr(part))));
  };
  fails("", "1", "empty key");
  fails("models.7.model", "./c", "number of a list item");
  fails("merge_method.x", "1", "inside");
  fails("dtype", "[", "not YAML");
  fails("dtype", "7", "bfloat16");
}

TEST(RecipeOutput, IsAModelUnlessItSaysLora) {
  const std::string recipe = "merge_method: cat\nmodels: [{model: a}]\n";
  for (const auto& [more, format] : std::vector<std::pair<std::string, OutputFormat>>{
           {"", OutputFormat::kModel},
           {"output:\n", OutputFormat::kModel},
           {"output: {}\n", OutputFormat::kModel},
           {"output: {format: safetensors}\n", OutputFormat::kModel},
           {"output: {format: lora}\n", OutputFormat::kLora}}) {
    const auto parsed = ParseRecipe(recipe + more);
    ASSERT_THAT(parsed, IsOk()) << more;
    EXPECT_EQ(parsed->output_format, format) << more;
    EXPECT_THAT(parsed->warnings, IsEmpty()) << more;
  }
}

// Two stages of which the second is made from the first, then the output.
constexpr char kStages[] =
    "# three documents\n"
    "---\n"
    "name: second\n"
    "merge_method: linear\n"
    "models: [{model: first}, {model: ./c}]\n"
    "---  # the output\n"
    "merge_method: slerp\n"
    "base_model: second\n"
    "models: [{model: first}]\n"
    "parameters: {t: 0.5}\n"
    "---\n"
    "name: first\n"
    "merge_method: linear\n"
    "models: [{model: ./a}, {model: ./b}]\n";

std::vector<std::string> StageNames(const Recipe& recipe) {
  std::vector<std::string> names;
  for (const Recipe& stage : recipe.stages) names.push_back(stage.name);
  return names;
}

TEST(RecipeTest, DocumentsBecomeStages) {
  const auto recipe = Parse(kStages);
  ASSERT_THAT(recipe, IsOk());
  EXPECT_EQ(recipe->merge_method, "slerp");
  EXPECT_EQ(recipe->text, kStages);
  EXPECT_EQ(recipe->merge_method_at.ToString(), "recipe:7:15");
  EXPECT_THAT(StageNames(*recipe), ElementsAre("first", "second"));
  EXPECT_EQ(recipe->stages[0].text,
            "---\nname: first\nmerge_method: linear\nmodels: [{model: ./a}, {model: ./b}]\n");
  EXPECT_THAT(recipe->stages[1].text, StartsWith("# three documents\n---\nname: second"));
  EXPECT_EQ(recipe->stages[1].at.ToString(), "recipe:3:1");
  EXPECT_THAT(recipe->warnings, IsEmpty());
  std::vector<std::string> models;
  for (const ModelRef& model : ReferencedModels(*recipe)) models.push_back(model.path);
  EXPECT_THAT(models, ElementsAre("./a", "./b", "./c"));
}

TEST(RecipeTest, TheOutputMayHaveAName) {
  const auto recipe = Parse(
      "name: end\nmerge_method: linear\nmodels: [{model: linear}]\n---\n"
      "name: linear\nmerge_method: linear\nmodels: [{model: ./a}]\n");
  ASSERT_THAT(recipe, IsOk());
  EXPECT_EQ(recipe->name, "end");
  // Only references to models are references to stages.
  EXPECT_EQ(recipe->merge_method, "linear");
  EXPECT_THAT(StageNames(*recipe), ElementsAre("linear"));
}

TEST(RecipeTest, DocumentsWithoutContentAreLeftOut) {
  const auto recipe = Parse(With("---\n# nothing\n---\n"));
  ASSERT_THAT(recipe, IsOk());
  EXPECT_THAT(recipe->stages, IsEmpty());
  // "---" begins a document only where a line begins with it, alone.
  const auto text = Parse(With("parameters: {p: 'a\n  --- b'}\n"));
  ASSERT_THAT(text, IsOk());
  EXPECT_EQ(text->parameters.at("p").cases[0].values[0], ParamScalar("a --- b"));
  const auto name = Parse(With("name: x\n"));
  ASSERT_THAT(name, IsOk());
  EXPECT_THAT(name->warnings, ElementsAre(StartsWith("recipe:5:7: `name` means something only")));
}

TEST(RecipeTest, WhatNothingDependsOnIsWarnedOf) {
  const auto recipe = Parse(With("---\n" + With("name: x\nmodel: y\n")));
  ASSERT_THAT(recipe, IsOk());
  EXPECT_THAT(recipe->warnings, ElementsAre(HasSubstr("recipe:11:1: key \"model\""),
                                            HasSubstr("recipe:10:7: nothing depends on \"x\"")));
}

TEST(RecipeTest, WrongStagesAreRefused) {
  const auto stage = [](absl::string_view name, absl::string_view models) {
    return absl::StrCat("merge_method: linear\nmodels: [", models, "]\nname: ", name, "\n---\n");
  };
  const std::string a = "{model: ./a}";
  const std::string output = With("");
  EXPECT_THAT(Parse(output + "---\n" + output), InvalidAt("recipe:6:1", "recipe:1:1"));
  EXPECT_THAT(Parse(stage("x", a) + stage("x", a) + output),
              InvalidAt("recipe:7:7", "called \"x\"; the other is at recipe:3:7"));
  for (const char* name : {"a/b", ".", "..", ".x", "a@b", "a+b", "\"a b\""}) {
    EXPECT_THAT(Parse(stage(name, a) + output), InvalidAt("recipe:3:7", "letters, digits"));
  }
  EXPECT_THAT(Parse(stage("[x]", a) + output), InvalidAt("recipe:3:7", "`name` must be text"));
  EXPECT_THAT(Parse(stage("x", "{model: y}") + stage("y", "{model: x}") + output),
              InvalidAt("recipe:6:18", "circle: x <- y <- x"));
  EXPECT_THAT(Parse(stage("x", "{model: x}") + output), InvalidAt("recipe:2:18", "x <- x"));
  EXPECT_THAT(Parse(stage("x", "{model: y@v1}") + stage("y", a) + output),
              InvalidAt("recipe:2:18", "no revision"));
  EXPECT_THAT(Parse(stage("x", a) + stage("y", a)),
              InvalidAt("recipe:1:1", "depends on any of x, y"));
  std::string many;
  for (int i = 0; i < 65; ++i) absl::StrAppend(&many, stage(absl::StrCat("s", i), a));
  EXPECT_THAT(Parse(many), InvalidAt("recipe:256:1", "at most 64 documents"));
  EXPECT_THAT(Parse(stage("x", a) + "merge_method: linear\nmodels: 3\n"),
              InvalidAt("recipe:6:9", "a list"));
  EXPECT_THAT(Parse(stage("x", a) + "a: \xff\n"), InvalidAt("recipe:5:4", "not UTF-8"));
}

TEST(RecipeTest, OverridesOfStages) {
  const auto recipe = ParseRecipe(
      kStages,
      {{"first/dtype", "float16"}, {"dtype", "bfloat16"}, {"second/models.1.model", "first"}});
  ASSERT_THAT(recipe, IsOk());
  EXPECT_EQ(recipe->dtype, DType::kBF16);
  EXPECT_EQ(recipe->overrides.size(), 3u);
  EXPECT_EQ(recipe->stages[0].dtype, DType::kF16);
  EXPECT_EQ(recipe->stages[0].overrides.size(), 1u);
  EXPECT_EQ(recipe->stages[1].modules[0].slices[0].sources[1].model.path, "first");
  EXPECT_THAT(ParseRecipe(kStages, {{"fist/dtype", "float16"}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("first")));
  EXPECT_THAT(ParseRecipe(kStages, {{"first/base_model", "second"}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("circle")));
}

// As the authors' repository has it.
TEST(RecipeTest, ConfigurationsOfDecomRenormMerge) {
  const auto recipe = ParseRecipe(R"(
models:
  - model: org/a  # HuggingFace's repo id, or local path
    parameters:
      coefficient: 1.5
  - model: org/b
base_model: org/base
merging_config:
  singular_matrices_drop_rate: 0.8
  direction: vertical
  linear_parameter_regex_pattern:
    - ".*weight.*"
  linear_parameter_ignore_regex_pattern:
    - ".*embed_tokens.*"
    - ".*lm_head.*"
  ignore_module_regex_pattern: []
  enable_disjoint_mean: false
  enable_sign_resolution: true
  non_linear_module_entries_drop_rate: 0.25
  dtype: float32
save_path: ./tulu-drm-v
)");
  ASSERT_THAT(recipe, IsOk());
  EXPECT_EQ(recipe->merge_method, "drm");
  EXPECT_EQ(recipe->base_model->path, "org/base");
  const auto& sources = recipe->modules[0].slices[0].sources;
  ASSERT_EQ(sources.size(), 2u);
  const auto value = [](const ParamScope& scope, const std::string& name) {
    return scope.at(name).cases[0].values[0];
  };
  EXPECT_EQ(value(sources[0].parameters, "weight"), ParamScalar(1.5));
  EXPECT_TRUE(sources[1].parameters.empty());
  EXPECT_EQ(value(recipe->parameters, "density"), ParamScalar(1 - 0.8));
  EXPECT_EQ(value(recipe->parameters, "other_density"), ParamScalar(0.75));
  EXPECT_EQ(value(recipe->parameters, "direction"), ParamScalar(std::string("vertical")));
  EXPECT_EQ(value(recipe->parameters, "disjoint_mean"), ParamScalar(false));
  EXPECT_EQ(value(recipe->parameters, "sign_resolution"), ParamScalar(true));
  EXPECT_EQ(value(recipe->parameters, "linear_include"), ParamScalar(std::string(".*weight.*")));
  EXPECT_EQ(recipe->parameters.at("linear_exclude").cases[0].values.size(), 2u);
  EXPECT_FALSE(recipe->parameters.contains("ignore"));
  EXPECT_FALSE(recipe->dtype);
  EXPECT_THAT(recipe->warnings,
              ElementsAre(AllOf(HasSubstr("recipe:20:10"), HasSubstr("float64")),
                          AllOf(HasSubstr("recipe:21:12"), HasSubstr("save_path"))));
  EXPECT_THAT(ParseRecipe("models: [{model: a}]\nbase_model: b\nmerging_config:\n  "
                          "singular_matrices_drop_rate: 1.5\n"),
              InvalidAt("recipe:4:32", "a number from 0 to 1"));
  // No list of patterns: nothing is linear, nothing is excluded.
  const auto bare =
      ParseRecipe("models: [{model: a}]\nbase_model: b\nmerging_config: {dtype: x}\n");
  ASSERT_THAT(bare, IsOk());
  EXPECT_EQ(value(bare->parameters, "linear_include"), ParamScalar(std::string("^$")));
  EXPECT_EQ(value(bare->parameters, "linear_exclude"), ParamScalar(std::string("^$")));
}

TEST(RecipeTest, ParsesModelRefs) {
  EXPECT_EQ(ParseModelRef("hf://org/name@v1")->revision, "v1");
  EXPECT_EQ(ParseModelRef("a+b")->adapter, "b");
  EXPECT_FALSE(ParseModelRef("").ok());
  EXPECT_FALSE(ParseModelRef("a@").ok());
}

TEST(RecipeTest, TellsAllProblemsAtOnceInTheirOrder) {
  const auto recipe = Parse(
      "dtype: float99\n"
      "models:\n"
      "  - model: a@b@c\n"
      "    parameters: {weight: .inf, density: {value: {}}}\n"
      "  - weight: 1\n"
      "  - model: ./c\n"
      "calibration: x\n"
      "output: {format: gguf}\n");
  const std::vector<RecipeProblem> problems = ProblemsOf(recipe.status());
  std::vector<std::string> places;
  for (const RecipeProblem& problem : problems) {
    EXPECT_THAT(problem.message, StartsWith(absl::StrCat(problem.at.ToString(), ": ")));
    places.push_back(problem.at.ToString());
  }
  EXPECT_THAT(places, ElementsAre("recipe:1:1", "recipe:1:8", "recipe:3:12", "recipe:4:26",
                                  "recipe:4:49", "recipe:5:5", "recipe:7:1", "recipe:8:18"));
  // One message has them all, a line each.
  for (const RecipeProblem& problem : problems) {
    EXPECT_THAT(std::string(recipe.status().message()), HasSubstr(problem.message));
  }
}

TEST(RecipeTest, ProblemsAreBoundedAndToldOnce) {
  std::string text = "merge_method: linear\nmodels:\n";
  for (int i = 0; i < 500; ++i) text += "  - weight: 1\n";
  EXPECT_EQ(ProblemsOf(Parse(text).status()).size(), 100u);
  // Aliases lead to one place several times.
  const auto aliased = Parse(
      "merge_method: linear\nmodels: [{model: ./a, parameters: &p {w: .inf}}, "
      "{model: ./b, parameters: *p}]\n");
  EXPECT_EQ(ProblemsOf(aliased.status()).size(), 1u);
  EXPECT_THAT(ProblemsOf(absl::OkStatus()), IsEmpty());
  EXPECT_EQ(ProblemsOf(absl::NotFoundError("x")).size(), 1u);
}

}  // namespace
}  // namespace pewter
