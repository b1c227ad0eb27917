// Options of mergekit's commands that Pewter has under another name or does not need, so that
// scripts that call mergekit-yaml and mergekit-multi run.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "client/output.h"

namespace pewter::client {

struct PlanArguments;

// Parsed into by CLI11: must outlive the parse and stay in place.
class MergekitOptions {
 public:
  // Options with a meaning set fields of `plan`, which must outlive the parse, too.
  void Declare(CLI::App& app, PlanArguments& plan);
  // Notes for the options without effect that were given.
  void Explain(Output& out) const;

 private:
  std::vector<std::string> notes_;
};

// "5B", "600M", "60K", "100": bytes; the unit is a power of 1000. InvalidArgument for other text.
absl::StatusOr<int64_t> ParseMergekitSize(absl::string_view text);

}  // namespace pewter::client
