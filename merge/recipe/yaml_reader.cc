#include "merge/recipe/yaml_reader.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/dtype_names.h"
#include "base/nearest.h"
#include "base/status.h"

namespace pewter {

absl::Status YamlReader::Expected(const YamlNode& node, absl::string_view what,
                                  absl::string_view expected) {
  return RecipeError(node.at, absl::StrCat(what, " must be ", expected, ", not ", node.Describe()));
}

absl::Status YamlReader::CheckKeys(const YamlNode& mapping, absl::string_view where,
                                   absl::Span<const Key> keys) {
  std::vector<absl::Status> refused;
  std::vector<std::string> names;
  for (const Key& key : keys) names.emplace_back(key.name);
  for (const YamlNode::Entry& entry : mapping.entries) {
    const auto key = std::find_if(keys.begin(), keys.end(),
                                  [&](const Key& k) { return entry.key->text == k.name; });
    if (key == keys.end()) {
      warnings_.push_back(absl::StrCat(entry.key->at.ToString(), ": key ", entry.key->Describe(),
                                       " of ", where, " means nothing and is ignored",
                                       DidYouMean(entry.key->text, names)));
    } else if (key->refused != nullptr && !IsNull(entry.value)) {
      refused.push_back(
          RecipeError(entry.key->at, absl::StrCat("`", key->name, "` ", key->refused)));
    }
  }
  return JoinProblems(refused);
}

absl::StatusOr<std::string> YamlReader::Text(const YamlNode& node, absl::string_view what) {
  if (node.kind != Kind::kScalar || node.text.empty()) {
    return Expected(node, absl::StrCat("`", what, "`"), "text");
  }
  return node.text;
}

absl::Status YamlReader::ReadDType(const YamlNode& root, absl::string_view key,
                                   std::optional<DType>& dtype) {
  const YamlNode* node = root.Find(key);
  if (IsNull(node)) return absl::OkStatus();
  ASSIGN_OR_RETURN(const std::string name, Text(*node, key));
  const auto parsed = DTypeFromTorch(name);
  const bool supported = parsed.ok() && (*parsed == DType::kF64 || *parsed == DType::kF32 ||
                                         *parsed == DType::kF16 || *parsed == DType::kBF16);
  if (!supported) {
    return Expected(*node, absl::StrCat("`", key, "`"), "float64, float32, float16 or bfloat16");
  }
  dtype = *parsed;
  return absl::OkStatus();
}

absl::Status YamlReader::ReadModelPath(const YamlNode& node, absl::string_view what,
                                       std::string& path, std::string& revision) {
  if (node.kind == Kind::kScalar) {
    ASSIGN_OR_RETURN(const ModelRef ref, ModelFromText(node, what));
    if (!ref.adapter.empty()) {
      return Expected(node, what, "one path here; the adapter is its own key, `lora`");
    }
    path = ref.path;
    revision = ref.revision;
    return absl::OkStatus();
  }
  if (node.kind != Kind::kMapping) return Expected(node, what, "a path or {path, revision}");
  static constexpr Key kKeys[] = {{"path"}, {"revision"}};
  RETURN_IF_ERROR(CheckKeys(node, what, kKeys));
  const YamlNode* path_node = node.Find("path");
  if (IsNull(path_node)) return RecipeError(node.at, absl::StrCat(what, " has no `path`"));
  ASSIGN_OR_RETURN(path, Text(*path_node, "path"));
  if (const YamlNode* revision_node = node.Find("revision"); !IsNull(revision_node)) {
    ASSIGN_OR_RETURN(revision, Text(*revision_node, "revision"));
  }
  return absl::OkStatus();
}

absl::StatusOr<ModelRef> YamlReader::ModelFromText(const YamlNode& node, absl::string_view what) {
  if (node.text.empty()) return Expected(node, what, "a path");
  auto ref = ParseModelRef(node.text);
  if (!ref.ok()) return RecipeError(node.at, ref.status().message());
  ref->at = node.at;
  return ref;
}

absl::StatusOr<ModelRef> YamlReader::ReadModel(const YamlNode& node, absl::string_view what) {
  if (node.kind == Kind::kScalar) return ModelFromText(node, what);
  if (node.kind != Kind::kMapping) {
    return Expected(node, what, "PATH[@REVISION][+ADAPTER] or a mapping with `model`");
  }
  static constexpr Key kKeys[] = {{"model"}, {"lora"}, {"override_architecture"}};
  RETURN_IF_ERROR(CheckKeys(node, what, kKeys));
  const YamlNode* model = node.Find("model");
  if (IsNull(model)) return RecipeError(node.at, absl::StrCat(what, " has no `model`"));
  ModelRef ref;
  ref.at = node.at;
  RETURN_IF_ERROR(ReadModelPath(*model, what, ref.path, ref.revision));
  if (const YamlNode* lora = node.Find("lora"); !IsNull(lora)) {
    RETURN_IF_ERROR(ReadModelPath(*lora, "`lora`", ref.adapter, ref.adapter_revision));
  }
  if (const YamlNode* name = node.Find("override_architecture"); !IsNull(name)) {
    ASSIGN_OR_RETURN(ref.override_architecture, Text(*name, "override_architecture"));
  }
  return ref;
}

absl::Status YamlReader::ReadOptionalModel(const YamlNode& mapping, absl::string_view key,
                                           std::optional<ModelRef>& model) {
  const YamlNode* node = mapping.Find(key);
  if (IsNull(node)) return absl::OkStatus();
  ASSIGN_OR_RETURN(model, ReadModel(*node, absl::StrCat("`", key, "`")));
  return absl::OkStatus();
}

absl::StatusOr<const YamlNode*> YamlReader::List(const YamlNode& mapping, absl::string_view key) {
  const YamlNode* node = mapping.Find(key);
  if (IsNull(node)) return nullptr;
  if (node->kind != Kind::kSequence) return Expected(*node, absl::StrCat("`", key, "`"), "a list");
  return node->items.empty() ? nullptr : node;
}

}  // namespace pewter
