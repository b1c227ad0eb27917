// YAML 1.1 as PyYAML's safe_load reads it, kept with positions: what mergekit recipes are written
// in.
//
// One document becomes a graph of nodes; an alias shares its anchor's node. Merge keys (`<<`) are
// expanded. Of equal keys the last wins, with a warning. Scalars keep their text and are resolved
// on demand, so "5e-1" can be a number where a number is expected. Refused: text above 1 MiB,
// invalid UTF-8, more than one document, nesting deeper than 64, an alias inside its own anchor,
// and documents that would grow beyond kMaxNodes when aliases are expanded. Never throws.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "merge/recipe/recipe.h"

namespace pewter {

struct YamlNode {
  enum class Kind { kNull, kScalar, kSequence, kMapping };
  struct Entry {
    const YamlNode* key = nullptr;
    const YamlNode* value = nullptr;
  };

  Kind kind = Kind::kNull;
  bool quoted = false;  // a scalar that is text whatever it looks like
  std::string text;     // of a scalar
  std::vector<const YamlNode*> items;
  std::vector<Entry> entries;  // keys are scalars, each once
  TextPosition at;
  int64_t expanded_nodes = 1;  // with aliases counted each time

  const YamlNode* Find(absl::string_view key) const;
  std::string Describe() const;  // "a list", "the text \"abc\"": for messages
};

// One of the documents of a text, and the line that it begins with.
struct DocumentText {
  absl::string_view text;
  int first_line = 1;
};
// The documents between lines that begin with "---"; those without content are left out, but for
// the only one. Such a line begins a document wherever it stands, so no parsing is needed.
std::vector<DocumentText> SplitYamlDocuments(absl::string_view text);

class YamlDocument {
 public:
  static constexpr int64_t kMaxBytes = int64_t{1} << 20;
  static constexpr int64_t kMaxNodes = 200'000;
  static constexpr int kMaxDepth = 64;

  // Not copied: nodes point to each other.
  YamlDocument(YamlDocument&&) = default;
  YamlDocument& operator=(YamlDocument&&) = default;

  // Positions count from `first_line`.
  static absl::StatusOr<YamlDocument> Parse(absl::string_view text, int first_line = 1);

  const YamlNode& root() const { return *root_; }
  const std::vector<std::string>& warnings() const { return warnings_; }

  // Sets what the dotted `path` names to the YAML text `value`: mappings by key (made when
  // missing), lists by index. Shared nodes are copied first, so aliases keep their value.
  absl::Status Set(absl::string_view path, absl::string_view value);

 private:
  friend class YamlBuilder;
  YamlDocument() = default;

  std::deque<YamlNode> nodes_;  // owns every node; addresses are stable
  const YamlNode* root_ = nullptr;
  std::vector<std::string> warnings_;
};

// InvalidArgument with the position in front.
absl::Status RecipeError(TextPosition at, absl::string_view message);

// Scalars by YAML 1.1's rules plus what mergekit coerces. Empty when the node is something else.
// yes/no/on/off/true/false, not quoted.
std::optional<bool> YamlBool(const YamlNode& node);
// Decimal, 0x, 0b, 0-prefixed octal, underscores; not quoted.
std::optional<int64_t> YamlInt(const YamlNode& node);
// Integers, 1.5, 1e-5, .inf, .nan; not quoted.
std::optional<double> YamlFloat(const YamlNode& node);

}  // namespace pewter
