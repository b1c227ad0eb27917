#include <cstdlib>
#include <set>
#include <string>

#include "client/commands.h"
#include "client/recipe_arguments.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pewter::client {
namespace {

using testing::HasSubstr;

void Parse(CommandLine& line, const std::string& arguments) {
  line.app.parse(arguments, /*program_name_included=*/false);
}

TEST(CommandLineTest, EveryCommandSetsABody) {
  const std::pair<const char*, const char*> cases[] = {
      {"merge", "merge r.yaml out"},
      {"plan", "plan r.yaml"},
      {"moe", "moe r.yaml out --separate-experts"},
      {"methods", "methods"},
      {"inspect", "inspect m"},
      {"convert", "convert m out"},
      {"diff", "diff a b"},
      {"submit", "submit r.yaml out --upload always"},
      {"upload", "upload m n -s host:1"},
      {"download", "download j1 out --overwrite"},
      {"artifacts", "artifacts list --limit 3"},
      {"align", "align a b out --groups ffn,heads --restarts 3 --evidence weights"},
      {"align", "align a b out --method cca --calibration c --mapped heads,ffn --gamma 0.5"},
      {"align", "align a b out --method staged --calibration c --last-stage weights --objective d"},
      {"align", "align a b out --calibration c --query-key shared"},
      {"eval", "eval m --data d --metric mlm_loss"},
      {"extract-lora",
       "extract-lora --model a --base-model b --out-path c -i x -e y --no-distribute-scale"},
      {"jobs", "jobs list --project nlp"},
      {"jobs", "jobs retry j1 j2 -s host:1"},
      {"jobs", "jobs delete j1 --force --outputs"},
      {"submit",
       "submit r.yaml out --project nlp --queue-deadline 5m --run-deadline 2h30m --total-deadline "
       "1h --on-existing reuse_if_identical"},
      {"merge", "merge r.yaml out --on-existing new_version --resume"},
      {"store", "store check s3://bucket/prefix"},
      {"shuffle-layers", "shuffle-layers out -m a -w 1 -m b -w 2"},
      {"transplant-tokens", "transplant-tokens a b out -a mean -k 8 -c -w barycentric"},
      {"completion", "completion bash"},
  };
  std::set<std::string> covered;
  for (const auto& [name, arguments] : cases) {
    CommandLine line;
    Parse(line, arguments);
    EXPECT_TRUE(line.body) << arguments;
    covered.insert(name);
  }
  for (const Command& command : Commands()) EXPECT_TRUE(covered.contains(command.name));
}

TEST(CommandLineTest, OptionsStandAnywhere) {
  CommandLine line;
  Parse(line, "merge --set a.b=1 -o json r.yaml --set c=2 out -q --no-copy-tokenizer -j 3");
  EXPECT_EQ(line.output.format, "json");
  EXPECT_TRUE(line.output.quiet);
}

TEST(CommandLineTest, OneDashAndSeveralLetters) {
  CommandLine line;
  line.Parse({"transplant-tokens", "a", "b", "out", "-nc", "-pm", "yes", "-bm", "embed", "-nvn",
              "0.1", "-nvs", "2", "-q"});
  EXPECT_TRUE(line.body);
  CommandLine other;  // elsewhere they stay what they are
  EXPECT_THROW(other.Parse({"merge", "r.yaml", "out", "-pm", "yes"}), CLI::ParseError);
}

TEST(CommandLineTest, RefusesBadUsage) {
  for (const char* arguments : {
           "",
           "mrege r.yaml out",
           "merge",
           "merge r.yaml",
           "merge r.yaml out extra",
           "merge r.yaml out --devise cpu",
           "merge r.yaml out --memory lots",
           "merge r.yaml out --memory 0",
           "merge r.yaml out --threads 0",
           "merge r.yaml out --resume --overwrite",
           "merge r.yaml out -o yaml",
           "merge r.yaml out -i -u",
           "moe r.yaml",
           "convert m",
           "convert m out --dtype int4",
           "jobs",
           "jobs get",
           "extract-lora --model a --base-model b",
           "extract-lora --model a --base-model b --out-path c --max-rank 0",
           "jobs list --limit none",
           "jobs retry",
           "jobs delete",
           "merge r.yaml out --on-existing overwrite",
           "merge r.yaml out --on-existing new_version --overwrite",
           "submit r.yaml out --on-existing reuse_if_identical --overwrite",
           "submit r.yaml out --priority 5000",
           "submit r.yaml out --upload sometimes",
           "upload",
           "download",
           "download j1 out extra",
           "artifacts",
           "artifacts delete",
           "artifacts list --limit 0",
       }) {
    CommandLine line;
    EXPECT_THROW(Parse(line, arguments), CLI::ParseError) << arguments;
  }
}

TEST(CommandLineTest, HelpNamesEveryCommandAndTheExitCodes) {
  CommandLine line;
  const std::string help = line.app.help();
  for (const Command& command : Commands()) EXPECT_THAT(help, HasSubstr(command.name));
  EXPECT_THAT(help, HasSubstr("130"));
}

TEST(RecipeArgumentsTest, NamesTheFileInMessages) {
  const RecipeArguments arguments{.path = "merge.yaml"};
  EXPECT_EQ(arguments.NameFile("recipe:12:7: unknown key"), "merge.yaml:12:7: unknown key");
  EXPECT_EQ(arguments.NameFile("recipe: unknown"), "recipe: unknown");
  EXPECT_EQ(arguments.NameFile("no model"), "no model");
  const RecipeArguments input{.path = "-"};
  EXPECT_EQ(input.NameFile("recipe:1:1: x"), "standard input:1:1: x");
}

TEST(RecipeArgumentsTest, RefusesSetWithoutValue) {
  EXPECT_FALSE(SplitAssignments("--set", {"dtype"}).ok());
  EXPECT_FALSE(SplitAssignments("--set", {"=x"}).ok());
  const auto pairs = SplitAssignments("--set", {"a=b=c", "d="});
  ASSERT_TRUE(pairs.ok());
  EXPECT_EQ(*pairs, (std::vector<std::pair<std::string, std::string>>{{"a", "b=c"}, {"d", ""}}));
}

TEST(RecipeArgumentsTest, MissingRecipeIsNotFound) {
  const RecipeArguments arguments{.path = "/nowhere/r.yaml"};
  const auto text = arguments.ReadText();
  EXPECT_TRUE(absl::IsNotFound(text.status())) << text.status();
  EXPECT_THAT(std::string(text.status().message()), HasSubstr("/nowhere/r.yaml"));
}

TEST(PlanArgumentsTest, ToOptions) {
  PlanArguments arguments;
  arguments.memory = "2GiB";
  arguments.shard_size = "5GB";
  arguments.allow_crimes = true;
  arguments.truncate_embeddings = true;
  arguments.tensor_union = true;
  arguments.copy_tokenizer = false;
  const auto options = arguments.ToOptions();
  ASSERT_TRUE(options.ok());
  EXPECT_EQ(options->memory_bytes, int64_t{2} << 30);
  EXPECT_EQ(options->shard_bytes, 5'000'000'000);
  EXPECT_TRUE(options->allow_mixed);
  EXPECT_TRUE(options->truncate_vocabularies);
  EXPECT_EQ(options->raw_names, RawNames::kUnion);
  EXPECT_FALSE(options->copy_tokenizer);
  EXPECT_TRUE(options->write_model_card);
}

TEST(PlanArgumentsTest, MergekitsFiveBillionIsNotFiveBytes) {
  PlanArguments arguments;
  arguments.shard_size = "5B";
  EXPECT_TRUE(absl::IsInvalidArgument(arguments.ToOptions().status()));
}

}  // namespace
}  // namespace pewter::client
