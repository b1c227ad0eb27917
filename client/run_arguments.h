// The arguments of commands that run a plan on this machine, and the run itself: progress, Ctrl-C,
// what is said at the end.
#pragma once

#include <string>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "client/output.h"
#include "merge/pewter.h"

namespace pewter::client {

// --on-existing fail|reuse_if_identical|new_version.
CLI::Option* DeclareOnExisting(CLI::App& app, std::string& value);

// Parsed into by CLI11: must outlive the parse and stay in place.
struct RunArguments {
  std::string output;
  bool resume = false;
  bool overwrite = false;
  std::string on_existing;  // of commands that declare it
  bool allow_nonfinite = false;
  bool dry_run = false;
  bool no_hash = false;
  // Of recipes alone; declared by the command that has one.
  std::string stages;
  bool keep_stages = false;

  // The folder to write to, as an argument or option of that name, and what is done when something
  // is there; then the rest.
  void DeclareOutput(CLI::App& app, const std::string& name, const std::string& help);
  void Declare(CLI::App& app);
  // Runs the plan, or prints it with dry_run, and says the result, which begins with `done`
  // ("Merged into"). Gives the exit code.
  absl::StatusOr<int> Run(const Plan& plan, absl::string_view done, Output& out) const;
};

}  // namespace pewter::client
