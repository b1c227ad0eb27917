// pewter: merges models on this machine or through a pewterd.
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/nearest.h"
#include "base/version.h"
#include "client/commands.h"
#include "client/exit_code.h"
#include "client/output.h"

namespace pewter::client {

namespace {

// The command that was typed, as far as it could be understood.
const CLI::App* Deepest(const CLI::App* app) {
  while (!app->get_subcommands().empty()) app = app->get_subcommands().front();
  return app;
}

std::string FullName(const CLI::App* app) {
  return app->get_parent() == nullptr
             ? app->get_name()
             : absl::StrCat(FullName(app->get_parent()), " ", app->get_name());
}

// What is wrong with a command line, in our words where CLI11's do not help.
std::string Explain(const CLI::App& app, const CLI::ParseError& error) {
  const CLI::App* command = Deepest(&app);
  const std::vector<std::string> leftover = app.remaining(/*recurse=*/true);
  std::vector<std::string> known;
  if (!leftover.empty() && absl::StartsWith(leftover.front(), "-")) {
    for (const CLI::Option* option : command->get_options()) {
      for (const std::string& name : option->get_lnames()) known.push_back("--" + name);
    }
    const std::string typed = leftover.front().substr(0, leftover.front().find('='));
    return absl::StrCat(FullName(command), " has no option ", typed, DidYouMean(typed, known));
  }
  for (const CLI::App* nested : command->get_subcommands([](const CLI::App*) { return true; })) {
    known.push_back(nested->get_name());
  }
  if (!known.empty()) {
    if (leftover.empty()) return absl::StrCat(FullName(command), ": a command is missing");
    return absl::StrCat(FullName(command), " has no command \"", leftover.front(), "\"",
                        DidYouMean(leftover.front(), known));
  }
  if (!leftover.empty()) {
    return absl::StrCat("one argument too many for ", FullName(command), ": ", leftover.front());
  }
  return error.what();
}

// The option itself may not have been reached when the command line is wrong.
bool AsksForJson(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const absl::string_view word = argv[i];
    if (word == "-ojson" || word == "--output=json") return true;
    if ((word == "-o" || word == "--output") && i + 1 < argc &&
        absl::string_view(argv[i + 1]) == "json") {
      return true;
    }
  }
  return false;
}

int Main(int argc, char** argv) {
  CommandLine line;
  line.app.set_version_flag("--version", absl::StrCat("pewter ", kVersion), "Show the version");
  if (argc <= 1) {
    // Asked for nothing: say what there is.
    Output({}).Text(line.app.help());
    return kExitUsage;
  }
  try {
    line.Parse({argv + 1, argv + argc});
  } catch (const CLI::Success& success) {  // --help, --version
    return line.app.exit(success);
  } catch (const CLI::ParseError& error) {
    Output out({.format = AsksForJson(argc, argv) ? "json" : "text"});
    out.Error(absl::InvalidArgumentError(Explain(line.app, error)), kExitUsage);
    out.Note(absl::StrCat("see ", FullName(Deepest(&line.app)), " --help"));
    return kExitUsage;
  }

  Output out(line.output);
  const absl::StatusOr<int> code = line.body(out);
  if (!code.ok()) {
    out.Error(code.status(), ExitCodeOf(code.status()));
    return ExitCodeOf(code.status());
  }
  if (!out.Flush()) {
    out.Error(absl::DataLossError("cannot write to standard output"), kExitFailed);
    return kExitFailed;
  }
  return *code;
}

}  // namespace

}  // namespace pewter::client

int main(int argc, char** argv) {
  try {
    return pewter::client::Main(argc, argv);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "error: internal: %s\n", e.what());
    return pewter::client::kExitFailed;
  }
}
