// What readers of recipes share: keys, texts, model references. Messages have line and column.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "base/dtype.h"
#include "merge/recipe/problems.h"
#include "merge/recipe/recipe.h"
#include "merge/recipe/yaml.h"

namespace pewter {

class YamlReader {
 protected:
  using Kind = YamlNode::Kind;

  // One key that a mapping may have.
  struct Key {
    const char* name;
    // Not null: known, but a recipe that uses it is refused, with this reason.
    const char* refused = nullptr;
  };

  explicit YamlReader(std::vector<std::string>& warnings) : warnings_(warnings) {}

  static bool IsNull(const YamlNode* node) { return node == nullptr || node->kind == Kind::kNull; }

  static absl::Status Expected(const YamlNode& node, absl::string_view what,
                               absl::string_view expected);

  // Remembers what is wrong and goes on with the next part of the text, so that a user is told all
  // of it; what was read is not to be used then.
  void Note(absl::Status problem) {
    if (!problem.ok()) problems_.push_back(std::move(problem));
  }
  // All that was noted.
  absl::Status Problems() const { return JoinProblems(problems_); }

  // Refuses keys that are known and not supported; warns of unknown ones, which mergekit ignores.
  absl::Status CheckKeys(const YamlNode& mapping, absl::string_view where,
                         absl::Span<const Key> keys);

  static absl::StatusOr<std::string> Text(const YamlNode& node, absl::string_view what);
  static absl::Status ReadDType(const YamlNode& root, absl::string_view key,
                                std::optional<DType>& dtype);

  // A reference in either form.
  absl::StatusOr<ModelRef> ReadModel(const YamlNode& node, absl::string_view what);
  absl::Status ReadOptionalModel(const YamlNode& mapping, absl::string_view key,
                                 std::optional<ModelRef>& model);

  // The list below `key`; null when it is absent or empty.
  static absl::StatusOr<const YamlNode*> List(const YamlNode& mapping, absl::string_view key);

 private:
  // {path, revision}, or text.
  absl::Status ReadModelPath(const YamlNode& node, absl::string_view what, std::string& path,
                             std::string& revision);
  static absl::StatusOr<ModelRef> ModelFromText(const YamlNode& node, absl::string_view what);

  std::vector<std::string>& warnings_;
  std::vector<absl::Status> problems_;
};

}  // namespace pewter
