#include "client/recipe_paths.h"

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "client/output.h"
#include "merge/recipe/recipe.h"
#include "merge/recipe/referenced_models.h"
#include "merge/recipe/yaml.h"
#include "store/hub_cache_store.h"

namespace pewter::client {

namespace {

namespace fs = std::filesystem;

std::string Absolute(absl::string_view path, const std::string& working_directory) {
  std::string absolute =
      (fs::path(working_directory) / std::string(path)).lexically_normal().string();
  if (absolute.size() > 1 && absolute.back() == '/') absolute.pop_back();
  return absolute;
}

const YamlNode* FindNode(const YamlNode& node, TextPosition at) {
  if (node.kind != YamlNode::Kind::kNull && node.at.line == at.line &&
      node.at.column == at.column) {
    return &node;
  }
  for (const YamlNode* item : node.items) {
    if (const YamlNode* found = FindNode(*item, at)) return found;
  }
  for (const YamlNode::Entry& entry : node.entries) {
    if (const YamlNode* found = FindNode(*entry.key, at)) return found;
    if (const YamlNode* found = FindNode(*entry.value, at)) return found;
  }
  return nullptr;
}

// Scalars that hold a path, and those that hold the whole of PATH@REV+ADAPTER@REV.
struct PathScalar {
  const YamlNode* node = nullptr;
  bool whole_reference = false;
};

// The string form, or {model: PATH | {path: PATH}, lora: PATH | {path: PATH}}.
std::vector<PathScalar> PathScalars(const YamlNode& reference) {
  if (reference.kind == YamlNode::Kind::kScalar) return {{&reference, true}};
  std::vector<PathScalar> scalars;
  const auto add = [&scalars](const YamlNode* part) {
    if (part == nullptr) return;
    if (part->kind == YamlNode::Kind::kMapping) part = part->Find("path");
    if (part != nullptr && part->kind == YamlNode::Kind::kScalar) scalars.push_back({part, false});
  };
  if (reference.Find("path") != nullptr) {
    add(&reference);
  } else {
    add(reference.Find("model"));
  }
  add(reference.Find("lora"));
  return scalars;
}

// What a path becomes.
using Move = std::function<std::string(absl::string_view path)>;

// The scalar's new text, or nothing when it stays. `what` names it in errors.
absl::StatusOr<std::optional<std::string>> NewText(absl::string_view text, bool whole_reference,
                                                   const Move& move, const std::string& what) {
  if (!whole_reference) {
    std::string portable = move(text);
    if (portable == text) return std::nullopt;
    return portable;
  }
  ASSIGN_OR_RETURN(ModelRef ref, ParseModelRef(text));
  bool changed = false;
  for (std::string* path : {&ref.path, &ref.adapter}) {
    if (path->empty()) continue;
    std::string portable = move(*path);
    if (portable == *path) continue;
    changed = true;
    *path = std::move(portable);
    if (path->find_first_of("@+") != std::string::npos) {
      return absl::InvalidArgumentError(absl::StrCat(
          what, ": the absolute path ", *path,
          " has a '@' or '+', which mean a revision or an adapter here; write {model: {path: \"",
          *path, "\"}}"));
    }
  }
  if (!changed) return std::nullopt;
  return ref.ToString();
}

// As a YAML scalar: plain where that is safe, else in double quotes, as JSON writes it.
std::string Quote(const std::string& text) {
  const bool plain = std::all_of(text.begin(), text.end(), [](unsigned char c) {
    return std::isalnum(c) != 0 || c == '/' || c == '.' || c == '_' || c == '-' || c == '+' ||
           c == '@' || c == ':';
  });
  return plain ? text : Json(text).dump(-1, ' ', false, Json::error_handler_t::replace);
}

struct Range {
  size_t begin = 0;
  size_t size = 0;
};

// Where the scalar's characters are in the text, quotes included; nothing when they are not there
// as they are read.
std::optional<Range> Locate(absl::string_view text, const YamlNode& scalar) {
  size_t at = 0;
  for (int line = 1; line < scalar.at.line; ++line) {
    at = text.find('\n', at);
    if (at == absl::string_view::npos) return std::nullopt;
    ++at;
  }
  at += scalar.at.column - 1;
  // Anchors and tags stand before the scalar.
  while (at < text.size() && (text[at] == '&' || text[at] == '!')) {
    at = text.find_first_of(" \t\n", at);
    if (at == absl::string_view::npos) return std::nullopt;
    at = text.find_first_not_of(" \t", at);
  }
  if (at >= text.size()) return std::nullopt;
  const bool quoted = text[at] == '"' || text[at] == '\'';
  const std::string raw =
      quoted ? absl::StrCat(text.substr(at, 1), scalar.text, text.substr(at, 1)) : scalar.text;
  if (text.substr(at, raw.size()) != raw) return std::nullopt;
  return Range{at, raw.size()};
}

}  // namespace

namespace {

absl::StatusOr<PortableRecipe> MovePaths(
    absl::string_view text, const std::vector<std::pair<std::string, std::string>>& overrides,
    const Move& move) {
  ASSIGN_OR_RETURN(const Recipe recipe, ParseRecipe(text, overrides));
  std::vector<YamlDocument> documents;
  for (const DocumentText& part : SplitYamlDocuments(text)) {
    ASSIGN_OR_RETURN(YamlDocument document, YamlDocument::Parse(part.text, part.first_line));
    documents.push_back(std::move(document));
  }
  PortableRecipe portable{
      .text = std::string(text), .overrides = overrides, .warnings = recipe.warnings};

  // Aliases lead to one place several times. Later places first, so that offsets stay good.
  std::map<size_t, std::pair<size_t, std::string>, std::greater<>> replacements;
  for (const ModelRef& ref : ReferencedModels(recipe)) {
    if (ref.at.line == 0) continue;  // of an override: below
    const YamlNode* reference = nullptr;
    for (const YamlDocument& document : documents) {
      if (reference == nullptr) reference = FindNode(document.root(), ref.at);
    }
    if (reference == nullptr) {
      return absl::InternalError(
          absl::StrCat(ref.at.ToString(), ": no text for model ", ref.ToString()));
    }
    for (const PathScalar& scalar : PathScalars(*reference)) {
      const std::string what = scalar.node->at.ToString();
      ASSIGN_OR_RETURN(const std::optional<std::string> absolute,
                       NewText(scalar.node->text, scalar.whole_reference, move, what));
      if (!absolute.has_value()) continue;
      const std::optional<Range> range = Locate(text, *scalar.node);
      if (!range.has_value()) {
        return absl::InvalidArgumentError(absl::StrCat(
            what, ": cannot make this path absolute as it is written; write ", *absolute));
      }
      replacements[range->begin] = {range->size, Quote(*absolute)};
    }
  }
  for (const auto& [begin, replacement] : replacements) {
    portable.text.replace(begin, replacement.first, replacement.second);
  }

  for (auto& [key, value] : portable.overrides) {
    const absl::StatusOr<YamlDocument> parsed = YamlDocument::Parse(value);
    if (!parsed.ok()) continue;  // ParseRecipe has taken it, so it is no model
    for (const ModelRef& ref : ReferencedModels(recipe)) {
      if (ref.at.line != 0) continue;
      const std::string what = absl::StrCat("--set ", key);
      const YamlNode& root = parsed->root();
      if (root.kind == YamlNode::Kind::kScalar && root.text == ref.ToString()) {
        ASSIGN_OR_RETURN(const std::optional<std::string> absolute,
                         NewText(root.text, /*whole_reference=*/true, move, what));
        if (absolute.has_value()) value = Quote(*absolute);
        break;
      }
      const bool compound =
          root.kind == YamlNode::Kind::kSequence || root.kind == YamlNode::Kind::kMapping;
      ASSIGN_OR_RETURN(const std::optional<std::string> portable,
                       NewText(ref.ToString(), /*whole_reference=*/true, move, what));
      if (compound && portable.has_value() && absl::StrContains(value, ref.path)) {
        return absl::InvalidArgumentError(
            absl::StrCat(what, ": for a server, write ", ref.ToString(), " as ", *portable));
      }
    }
  }
  return portable;
}

}  // namespace

absl::StatusOr<PortableRecipe> MakePathsAbsolute(
    absl::string_view text, const std::vector<std::pair<std::string, std::string>>& overrides,
    const std::string& working_directory) {
  return MovePaths(text, overrides, [&](absl::string_view path) {
    return PortableModelPath(path, working_directory);
  });
}

absl::StatusOr<std::vector<std::string>> LocalPathsOf(const PortableRecipe& recipe) {
  ASSIGN_OR_RETURN(const Recipe parsed, ParseRecipe(recipe.text, recipe.overrides));
  std::vector<std::string> paths;
  for (const ModelRef& ref : ReferencedModels(parsed)) {
    for (const std::string& path : {ref.path, ref.adapter}) {
      const bool local = absl::StartsWith(path, "/") || absl::StartsWith(path, "file://");
      if (local && std::find(paths.begin(), paths.end(), path) == paths.end()) {
        paths.push_back(path);
      }
    }
  }
  return paths;
}

absl::StatusOr<PortableRecipe> ReplacePaths(const PortableRecipe& recipe,
                                            const std::map<std::string, std::string>& places) {
  return MovePaths(recipe.text, recipe.overrides, [&](absl::string_view path) {
    const auto place = places.find(std::string(path));
    return place == places.end() ? std::string(path) : place->second;
  });
}

std::string PortableModelPath(absl::string_view path, const std::string& working_directory) {
  if (absl::StartsWith(path, "/") || absl::StrContains(path, "://")) return std::string(path);
  const bool says_local =
      path == "." || path == ".." || absl::StartsWith(path, "./") || absl::StartsWith(path, "../");
  std::error_code error;  // as good as absent
  if (!says_local && !fs::exists(fs::path(working_directory) / std::string(path), error) &&
      HubCacheStore::IsModelId(path)) {
    return absl::StrCat("hf://", path);
  }
  return Absolute(path, working_directory);
}

std::string AbsoluteDestination(absl::string_view path, const std::string& working_directory) {
  if (absl::StrContains(path, "://")) return std::string(path);
  return Absolute(path, working_directory);
}

}  // namespace pewter::client
