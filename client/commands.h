// The commands of `pewter`: one row a command, one cmd_*.cc file a row. main.cc, the help, the
// suggestions and the shell completions are all views of this table.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/output.h"

namespace pewter::client {

// Runs a command whose options have been parsed and returns the process's exit code. A failed
// status is printed by the caller, which takes the exit code from it.
using CommandBody = std::function<absl::StatusOr<int>(Output& out)>;

struct Command {
  const char* name;
  const char* summary;
  // Adds the command's arguments to its CLI::App. The body owns what they are parsed into.
  CommandBody (*declare)(CLI::App& app);
};

absl::Span<const Command> Commands();

// A command that only groups others: `pewter jobs list`.
struct Subcommand {
  const char* name;
  const char* summary;
  std::function<CommandBody(CLI::App& app)> declare;
};
CommandBody DeclareGroup(CLI::App& app, const std::vector<Subcommand>& subcommands);

CommandBody DeclareMerge(CLI::App& app);
CommandBody DeclarePlan(CLI::App& app);
CommandBody DeclareMoe(CLI::App& app);
CommandBody DeclareAlign(CLI::App& app);
CommandBody DeclareExtractLora(CLI::App& app);
CommandBody DeclareMethods(CLI::App& app);
CommandBody DeclareConvert(CLI::App& app);
CommandBody DeclareInspect(CLI::App& app);
CommandBody DeclareDiff(CLI::App& app);
CommandBody DeclareEval(CLI::App& app);
CommandBody DeclareShuffleLayers(CLI::App& app);
CommandBody DeclareSubmit(CLI::App& app);
CommandBody DeclareJobs(CLI::App& app);
CommandBody DeclareUpload(CLI::App& app);
CommandBody DeclareDownload(CLI::App& app);
CommandBody DeclareArtifacts(CLI::App& app);
CommandBody DeclareStore(CLI::App& app);
CommandBody DeclareTransplantTokens(CLI::App& app);
CommandBody DeclareCompletion(CLI::App& app);

// The whole command line: what main.cc parses and what completions are made from. Parsing sets
// `output` and the `body` of the command that was chosen.
struct CommandLine {
  CommandLine();
  CommandLine(const CommandLine&) = delete;

  // The words after the program's name. Throws CLI11's errors.
  void Parse(std::vector<std::string> words);

  CLI::App app;
  OutputOptions output;
  CommandBody body;
};

// What stands for the kind of an argument's value: the word in the help, and what completions offer
// for it.
inline constexpr char kFileType[] = "FILE";
inline constexpr char kPathType[] = "PATH";
inline constexpr char kModelType[] = "MODEL";
inline constexpr char kMethodType[] = "METHOD";
inline constexpr char kJobType[] = "JOB";

}  // namespace pewter::client
