// Makes a recipe portable: a server has another working directory, so relative paths of models
// become absolute before the recipe is sent, and hub ids become hf:// URIs; and what was uploaded
// is named by where it is then. Nothing else of the text changes, comments included.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pewter::client {

struct PortableRecipe {
  std::string text;
  std::vector<std::pair<std::string, std::string>> overrides;
  std::vector<std::string> warnings;  // of the recipe
};

// `working_directory` is absolute. InvalidArgument, with the position, for what ParseRecipe refuses
// and for a path that is written in a way that cannot be replaced (escapes, several lines, '@' or
// '+' in the absolute path).
absl::StatusOr<PortableRecipe> MakePathsAbsolute(
    absl::string_view text, const std::vector<std::pair<std::string, std::string>>& overrides,
    const std::string& working_directory);

// The local paths that a portable recipe names, each once: models, adapters, files of data.
absl::StatusOr<std::vector<std::string>> LocalPathsOf(const PortableRecipe& recipe);
// The recipe with other places for them. Errors as of MakePathsAbsolute.
absl::StatusOr<PortableRecipe> ReplacePaths(const PortableRecipe& recipe,
                                            const std::map<std::string, std::string>& places);

// One path of a model: absolute paths and URIs stay; what starts with ./ or ../ or exists below
// `working_directory` is a local path; of the rest, what looks like ORG/NAME is a hub id.
std::string PortableModelPath(absl::string_view path, const std::string& working_directory);
// The same for a place to write to: a URI stays, everything else is a local path.
std::string AbsoluteDestination(absl::string_view path, const std::string& working_directory);

}  // namespace pewter::client
