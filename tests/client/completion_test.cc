#include "client/completion.h"

#include <string>

#include "client/commands.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pewter::client {
namespace {

using testing::HasSubstr;

// Every option and command of the tree is in every script: they are generated, not listed.
void ExpectAllNamed(const CLI::App& app, const std::string& script, bool dashes) {
  for (const CLI::Option* option : app.get_options()) {
    for (const std::string& name : option->get_lnames()) {
      EXPECT_THAT(script, HasSubstr((dashes ? "--" : " -l ") + name)) << app.get_name();
    }
  }
  for (const CLI::App* nested : app.get_subcommands([](const CLI::App*) { return true; })) {
    EXPECT_THAT(script, HasSubstr(nested->get_name()));
    ExpectAllNamed(*nested, script, dashes);
  }
}

TEST(CompletionTest, NamesEverything) {
  CommandLine line;
  ExpectAllNamed(line.app, BashCompletion(line.app), /*dashes=*/true);
  ExpectAllNamed(line.app, ZshCompletion(line.app), /*dashes=*/true);
  ExpectAllNamed(line.app, FishCompletion(line.app), /*dashes=*/false);
}

TEST(CompletionTest, OffersValues) {
  CommandLine line;
  const std::string bash = BashCompletion(line.app);
  EXPECT_THAT(bash,
              HasSubstr("'merge|-o' | 'merge|--output') COMPREPLY=($(compgen -W 'text json'"));
  EXPECT_THAT(bash, HasSubstr("'bash zsh fish'"));
  EXPECT_THAT(bash, HasSubstr("linear"));
  EXPECT_THAT(bash, HasSubstr("pewter jobs list -q"));
  EXPECT_THAT(FishCompletion(line.app), HasSubstr("-a 'text json'"));
  EXPECT_THAT(ZshCompletion(line.app), HasSubstr("(text json)"));
}

}  // namespace
}  // namespace pewter::client
