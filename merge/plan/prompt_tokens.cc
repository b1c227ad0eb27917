#include "merge/plan/prompt_tokens.h"

#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/status.h"
#include "merge/plan/json_text.h"
#include "merge/plan/tokenizer_files.h"
#include "store/object_store.h"

namespace pewter {
namespace {

using nlohmann::json;

constexpr char kInstead[] = "give token ids instead (`positive_prompt_ids`, `negative_prompt_ids`)";

// Qwen's, of transformers.
constexpr char kQwenWords[] =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

std::string TextOf(const json& object, const char* key) {
  const auto it = object.find(key);
  return it != object.end() && it->is_string() ? it->get<std::string>() : "";
}

// Nothing, where the file has something else.
std::optional<bool> FlagOf(const json& object, const char* key) {
  const auto it = object.find(key);
  if (it == object.end() || !it->is_boolean()) return std::nullopt;
  return it->get<bool>();
}

absl::StatusOr<json> ReadObject(const Checkpoint& model, absl::string_view file) {
  ASSIGN_OR_RETURN(const std::string text, ReadText(model.store(), file, kMaxTokenizerBytes));
  auto parsed = ParseBoundedJson(text);
  if (!parsed.ok()) return Annotate(parsed.status(), model.store().Describe(file));
  if (!parsed->is_object()) {
    return absl::DataLossError(absl::StrCat(model.store().Describe(file), ": not a JSON object"));
  }
  return parsed;
}

// Of some classes transformers 5 takes vocabulary and merges alone from tokenizer.json, and
// mergekit encodes with what it makes of them (AutoTokenizer of 5.23, for models that mixtures are
// made of). `type` is config.json's model_type.
absl::Status ApplyClass(absl::string_view type, const json& config, json& tokenizer) {
  const std::string name = TextOf(config, "tokenizer_class");
  const absl::string_view tokenizer_class = absl::StripSuffix(name, "Fast");
  const json splitter = tokenizer.value("pre_tokenizer", json());
  const bool bytes = absl::StrContains(splitter.dump(), "\"ByteLevel\"");
  const bool qwen = type == "qwen2" || (tokenizer_class == "Qwen2Tokenizer" && type != "mistral");
  const bool llama = tokenizer_class == "LlamaTokenizer" && type != "mistral" && !bytes;
  if (!qwen && !llama) return absl::OkStatus();
  const auto model = tokenizer.find("model");
  if (model == tokenizer.end() || !model->is_object()) return absl::OkStatus();
  (*model)["unk_token"] = (*model)["dropout"] = nullptr;
  (*model)["fuse_unk"] = (*model)["byte_fallback"] = !qwen;
  (*model)["ignore_merges"] = false;
  const std::optional<bool> prefix = FlagOf(config, "add_prefix_space");
  if (qwen) {
    if (prefix.value_or(false)) {
      return absl::UnimplementedError("an \"add_prefix_space\" of Qwen2Tokenizer is not known");
    }
    tokenizer["normalizer"] = {{"type", "NFC"}};
    const json split = {
        {"type", "Split"}, {"pattern", {{"Regex", kQwenWords}}}, {"behavior", "Isolated"}};
    const json level = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}};
    tokenizer["pre_tokenizer"] = {{"type", "Sequence"},
                                  {"pretokenizers", json::array({split, level})}};
    return absl::OkStatus();
  }
  const bool legacy = FlagOf(config, "legacy").value_or(false);
  tokenizer["normalizer"] = nullptr;
  tokenizer["pre_tokenizer"] = {{"type", "Metaspace"},
                                {"replacement", "\u2581"},
                                {"prepend_scheme", !prefix.value_or(true) ? "never"
                                                   : legacy               ? "always"
                                                                          : "first"},
                                {"split", false}};
  return absl::OkStatus();
}

// Special tokens of the configuration are added tokens, too.
json AddedTokens(const Tokenizer& files) {
  json added = json::array();
  for (const auto& [id, token] : files.added) {
    added.push_back({{"id", id},
                     {"content", token.content},
                     {"single_word", token.single_word},
                     {"lstrip", token.lstrip},
                     {"rstrip", token.rstrip},
                     {"normalized", token.normalized}});
  }
  for (const auto& [role, token] : files.roles) {
    const auto id = files.vocabulary.find(token);
    if (id == files.vocabulary.end() || files.added.contains(id->second)) continue;
    added.push_back({{"id", id->second}, {"content", token}, {"normalized", false}});
  }
  return added;
}

}  // namespace

absl::StatusOr<PromptTokenizer> PromptTokenizer::Make(const Checkpoint& model) {
  constexpr absl::string_view kFile = "tokenizer.json", kConfig = "tokenizer_config.json";
  auto tokenizer = ReadObject(model, kFile);
  if (absl::IsNotFound(tokenizer.status())) {
    return absl::FailedPreconditionError(
        absl::StrCat("model ", model.ref().ToString(),
                     " has no tokenizer.json, which prompts need; ", kInstead));
  }
  RETURN_IF_ERROR(tokenizer.status());
  auto config = ReadObject(model, kConfig);
  if (absl::IsNotFound(config.status())) config = json::object();
  RETURN_IF_ERROR(config.status());
  ASSIGN_OR_RETURN(const std::optional<Tokenizer> files, ReadTokenizer(model));
  PromptTokenizer made;
  if (files) {
    (*tokenizer)["added_tokens"] = AddedTokens(*files);
    if (const auto bos = files->roles.find("bos_token"); bos != files->roles.end()) {
      made.bos_ = bos->second;
    }
  }
  const json model_config = json::parse(model.config_json(), nullptr, false);
  const std::string type = model_config.is_object() ? TextOf(model_config, "model_type") : "";
  const std::string name = model.store().Describe(kFile);
  const auto read = [&]() -> absl::Status {
    RETURN_IF_ERROR(Annotate(ApplyClass(type, *config, *tokenizer), name));
    ASSIGN_OR_RETURN(made.tokenizer_, TextTokenizer::Make(name, *tokenizer));
    return absl::OkStatus();
  };
  const absl::Status status = read();
  if (absl::IsUnimplemented(status)) {
    return absl::FailedPreconditionError(absl::StrCat(status.message(), "; ", kInstead));
  }
  RETURN_IF_ERROR(status);
  return made;
}

}  // namespace pewter
