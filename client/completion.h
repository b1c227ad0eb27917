// Shell completions, made from the tree of CLI11 commands: what is not declared there is not
// completed, and nothing is listed twice.
#pragma once

#include <string>

#include "CLI/CLI.hpp"

namespace pewter::client {

std::string BashCompletion(const CLI::App& app);
std::string ZshCompletion(const CLI::App& app);
std::string FishCompletion(const CLI::App& app);

}  // namespace pewter::client
