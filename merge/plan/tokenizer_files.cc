#include "merge/plan/tokenizer_files.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/status.h"
#include "merge/checkpoint/dotted_key.h"
#include "merge/checkpoint/printable.h"
#include "merge/plan/json_text.h"

namespace pewter {
namespace {

using nlohmann::json;

constexpr int64_t kMaxTokens = int64_t{1} << 24;

constexpr absl::string_view kFast = "tokenizer.json";
constexpr absl::string_view kConfig = "tokenizer_config.json";
constexpr absl::string_view kRoles = "special_tokens_map.json";
constexpr absl::string_view kAdded = "added_tokens.json";
// Lists of further special tokens, beside the *_token keys.
constexpr absl::string_view kRoleLists[] = {"additional_special_tokens", "extra_special_tokens"};
// What holds the tokens that are not added ones.
constexpr absl::string_view kOrdinaryFiles[] = {"vocab.json", "merges.txt", "vocab.txt",
                                                "tokenizer.model", "sentencepiece.bpe.model"};

absl::StatusOr<bool> Exists(const Checkpoint& model, absl::string_view key) {
  const auto stat = model.store().Stat(key);
  if (stat.ok()) return true;
  if (absl::IsNotFound(stat.status())) return false;
  return stat.status();
}

// Text of a model's file; nullopt when it has none.
absl::StatusOr<std::optional<std::string>> ReadOptional(const Checkpoint& model,
                                                        absl::string_view key) {
  ASSIGN_OR_RETURN(const bool exists, Exists(model, key));
  if (!exists) return std::nullopt;
  ASSIGN_OR_RETURN(std::string text, ReadText(model.store(), key, kMaxTokenizerBytes));
  return text;
}

absl::Status Malformed(const Checkpoint& model, absl::string_view key, absl::string_view why) {
  return absl::DataLossError(absl::StrCat(model.store().Describe(key), ": ", why));
}

absl::StatusOr<json> Parse(const Checkpoint& model, absl::string_view key, absl::string_view text) {
  auto value = ParseBoundedJson(text);
  if (!value.ok()) return Malformed(model, key, value.status().message());
  return value;
}

// The JSON object in a file; an empty one when there is no such file.
absl::StatusOr<json> ReadObject(const Checkpoint& model, absl::string_view key) {
  ASSIGN_OR_RETURN(const std::optional<std::string> text, ReadOptional(model, key));
  if (!text) return json::object();
  ASSIGN_OR_RETURN(json value, Parse(model, key, *text));
  if (!value.is_object()) return Malformed(model, key, "not a JSON object");
  return value;
}

// A token that is written as text or as {"content": TEXT, ...}; null for anything else.
const std::string* TokenText(const json& value) {
  const json* text = &value;
  if (value.is_object()) {
    const auto content = value.find("content");
    if (content == value.end()) return nullptr;
    text = &*content;
  }
  return text->is_string() ? text->get_ptr<const std::string*>() : nullptr;
}

bool IsRole(absl::string_view key) { return absl::EndsWith(key, "_token"); }

int64_t VocabularySize(const Checkpoint& model) {
  const json config = json::parse(model.config_json(), nullptr, /*allow_exceptions=*/false);
  const auto keys = VocabularySizeKeys(config, ConfigParts::kLanguageModel);
  return keys.empty() ? std::numeric_limits<int64_t>::max()
                      : FindDotted(config, keys.front())->get<int64_t>();
}

class TokenizerReader {
 public:
  explicit TokenizerReader(const Checkpoint& model) : model_(model) {}

  absl::StatusOr<std::optional<Tokenizer>> Read() {
    ASSIGN_OR_RETURN(const std::optional<std::string> fast, ReadOptional(model_, kFast));
    if (fast) {
      RETURN_IF_ERROR(ReadFast(*fast));
    } else {
      ASSIGN_OR_RETURN(const bool any, ReadOrdinary());
      if (!any) return std::nullopt;
      ASSIGN_OR_RETURN(const json added, ReadObject(model_, kAdded));
      RETURN_IF_ERROR(AddMap(kAdded, added, /*added=*/true));
    }
    RETURN_IF_ERROR(ReadConfig());
    RETURN_IF_ERROR(CheckUnique());

    const int64_t size = VocabularySize(model_);
    for (const auto& [token, id] : result_.vocabulary) {
      if (id >= size) result_.surplus[id] = token;
    }
    for (const auto& [id, token] : result_.surplus) {
      result_.vocabulary.erase(token);
      result_.added.erase(id);
      result_.implied.erase(id);
    }
    return std::move(result_);
  }

 private:
  absl::StatusOr<int64_t> Id(absl::string_view file, const json& id) const {
    // Numbers above the greatest int64 are unsigned to the parser.
    const bool whole = id.is_number_integer() &&
                       !(id.is_number_unsigned() && id.get<uint64_t>() >= uint64_t{kMaxTokens});
    if (!whole || id.get<int64_t>() < 0) {
      return Malformed(model_, file,
                       absl::StrCat("token id ", id.dump(-1, ' ', false, kReplace).substr(0, 40),
                                    " is not a whole number from 0 to ", kMaxTokens - 1));
    }
    return id.get<int64_t>();
  }

  // A token that has an id already keeps it, as in the tokenizers library.
  void Add(absl::string_view token, int64_t id) { result_.vocabulary.try_emplace(token, id); }

  void AddAdded(int64_t id, AddedToken token) {
    id = result_.vocabulary.try_emplace(token.content, id).first->second;
    result_.added.insert_or_assign(id, std::move(token));
  }

  // {TOKEN: ID, ...}
  absl::Status AddMap(absl::string_view file, const json& map, bool added) {
    if (!map.is_object()) return Malformed(model_, file, "not a JSON object of tokens");
    for (const auto& [token, value] : map.items()) {
      ASSIGN_OR_RETURN(const int64_t id, Id(file, value));
      if (added) {
        AddAdded(id, {.content = token});
      } else {
        Add(token, id);
      }
    }
    return absl::OkStatus();
  }

  // {"content": TEXT, "lstrip": BOOL, ...}
  absl::StatusOr<AddedToken> ReadAdded(absl::string_view file, const json& entry) const {
    const std::string* content = TokenText(entry);
    if (content == nullptr || !entry.is_object()) {
      return Malformed(model_, file, "an added token without content");
    }
    AddedToken token{.content = *content};
    for (const auto& [key, flag] : {std::pair{"single_word", &token.single_word},
                                    {"lstrip", &token.lstrip},
                                    {"rstrip", &token.rstrip},
                                    {"normalized", &token.normalized},
                                    {"special", &token.special}}) {
      const auto value = entry.find(key);
      if (value == entry.end()) continue;
      if (!value->is_boolean()) {
        return Malformed(model_, file,
                         absl::StrCat("added token ", Printable(*content), ": \"", key,
                                      "\" is not true or false"));
      }
      *flag = value->get<bool>();
    }
    return token;
  }

  // {"model": {"vocab": {TOKEN: ID} or [[TOKEN, SCORE], ...]}, "added_tokens": [{id, content}]}
  absl::Status ReadFast(const std::string& text) {
    ASSIGN_OR_RETURN(const json root, Parse(model_, kFast, text));
    const json* vocab = FindDotted(root, "model.vocab");
    if (vocab == nullptr) return Malformed(model_, kFast, "has no model.vocab");
    if (vocab->is_array()) {
      int64_t id = 0;
      for (const json& entry : *vocab) {
        if (!entry.is_array() || entry.empty() || !entry[0].is_string()) {
          return Malformed(model_, kFast, "model.vocab has an entry that is not [token, score]");
        }
        Add(entry[0].get_ref<const std::string&>(), id++);
      }
    } else {
      RETURN_IF_ERROR(AddMap(kFast, *vocab, /*added=*/false));
    }
    const auto added = root.find("added_tokens");
    if (added == root.end() || added->is_null()) return absl::OkStatus();
    if (!added->is_array()) return Malformed(model_, kFast, "added_tokens is not a list");
    for (const json& entry : *added) {
      ASSIGN_OR_RETURN(AddedToken token, ReadAdded(kFast, entry));
      if (!entry.contains("id")) {
        return Malformed(model_, kFast,
                         absl::StrCat("added token ", Printable(token.content), " has no id"));
      }
      ASSIGN_OR_RETURN(const int64_t id, Id(kFast, entry["id"]));
      AddAdded(id, std::move(token));
    }
    return absl::OkStatus();
  }

  // vocab.json or vocab.txt. False when there is neither.
  absl::StatusOr<bool> ReadOrdinary() {
    ASSIGN_OR_RETURN(const std::optional<std::string> map, ReadOptional(model_, "vocab.json"));
    if (map) {
      ASSIGN_OR_RETURN(const json vocab, Parse(model_, "vocab.json", *map));
      RETURN_IF_ERROR(AddMap("vocab.json", vocab, /*added=*/false));
      return true;
    }
    ASSIGN_OR_RETURN(const std::optional<std::string> lines, ReadOptional(model_, "vocab.txt"));
    if (!lines) return false;
    int64_t id = 0;
    for (absl::string_view line : absl::StrSplit(absl::StripSuffix(*lines, "\n"), '\n')) {
      if (id == kMaxTokens) return Malformed(model_, "vocab.txt", "too many lines");
      // Of equal lines the last counts, as in transformers.
      result_.vocabulary[absl::StripSuffix(line, "\r")] = id++;
    }
    return true;
  }

  // What transformers adds to the files above when it loads them.
  absl::Status ReadConfig() {
    ASSIGN_OR_RETURN(const json config, ReadObject(model_, kConfig));
    if (const auto decoder = config.find("added_tokens_decoder"); decoder != config.end()) {
      if (!decoder->is_object()) {
        return Malformed(model_, kConfig, "added_tokens_decoder is not an object");
      }
      for (const auto& [key, entry] : decoder->items()) {
        ASSIGN_OR_RETURN(const int64_t id,
                         Id(kConfig, json::parse(key, nullptr, /*allow_exceptions=*/false)));
        ASSIGN_OR_RETURN(AddedToken token, ReadAdded(kConfig, entry));
        AddAdded(id, std::move(token));
      }
    }
    ASSIGN_OR_RETURN(const json map, ReadObject(model_, kRoles));
    for (const json* object : {&map, &config}) {
      for (const auto& [key, value] : object->items()) {
        const std::string* token = IsRole(key) ? TokenText(value) : nullptr;
        if (token != nullptr) result_.roles.insert_or_assign(key, *token);
      }
    }
    for (const auto& [role, token] : result_.roles) {
      if (token.empty() || result_.vocabulary.contains(token)) continue;
      const int64_t id = NextId();
      AddAdded(id, {.content = token, .normalized = false, .special = true});
      result_.implied[id] = result_.added[id];
    }
    return absl::OkStatus();
  }

  int64_t NextId() const {
    int64_t next = 0;
    for (const auto& [token, id] : result_.vocabulary) next = std::max(next, id + 1);
    return next;
  }

  absl::Status CheckUnique() const {
    absl::flat_hash_map<int64_t, const std::string*> by_id;
    int64_t twice = kMaxTokens;
    for (const auto& [token, id] : result_.vocabulary) {
      if (!by_id.emplace(id, &token).second) twice = std::min(twice, id);
    }
    if (twice == kMaxTokens) return absl::OkStatus();
    return absl::DataLossError(absl::StrCat(model_.store().Describe(""),
                                            ": the tokenizer gives id ", twice,
                                            " to more than one token"));
  }

  static constexpr auto kReplace = json::error_handler_t::replace;

  const Checkpoint& model_;
  Tokenizer result_;
};

// --- edits ----------------------------------------------------------------------------------

std::string AddedTokenJson(int64_t id, const AddedToken& token) {
  const auto flag = [](bool value) { return value ? "true" : "false"; };
  return absl::StrCat("{\"id\": ", id, ", \"content\": ", JsonString(token.content),
                      ", \"single_word\": ", flag(token.single_word),
                      ", \"lstrip\": ", flag(token.lstrip), ", \"rstrip\": ", flag(token.rstrip),
                      ", \"normalized\": ", flag(token.normalized),
                      ", \"special\": ", flag(token.special), "}");
}

std::string Listed(const std::map<int64_t, AddedToken>& tokens) {
  std::vector<std::string> lines;
  for (const auto& [id, token] : tokens) lines.push_back("    " + AddedTokenJson(id, token));
  return lines.empty() ? "[]" : absl::StrCat("[\n", absl::StrJoin(lines, ",\n"), "\n  ]");
}

// One file of one model, being edited.
class FileEditor {
 public:
  FileEditor(const Checkpoint& model, absl::string_view file, const TokenizerEdit& edit,
             std::vector<std::string>& warnings)
      : model_(model), file_(file), edit_(edit), warnings_(warnings) {
    for (const auto& [id, token] : edit.surplus) gone_.insert({token, id});
  }

  absl::StatusOr<std::optional<std::string>> Edit() {
    ASSIGN_OR_RETURN(const std::optional<std::string> text, ReadOptional(model_, file_));
    if (!text) return std::nullopt;
    const bool ordinary = std::find(std::begin(kOrdinaryFiles), std::end(kOrdinaryFiles), file_) !=
                          std::end(kOrdinaryFiles);
    if (ordinary) return EditOrdinary();
    if (file_ == "chat_template.jinja") return edit_.chat_template;
    if (file_ != kFast && file_ != kConfig && file_ != kRoles && file_ != kAdded &&
        file_ != "chat_template.json") {
      return std::nullopt;
    }
    ASSIGN_OR_RETURN(const json root, Parse(model_, file_, *text));
    if (!root.is_object()) return Malformed(model_, file_, "not a JSON object");
    std::string edited = *text;
    if (file_ == kFast) {
      RETURN_IF_ERROR(EditFast(root, edited));
    } else if (file_ == kAdded) {
      EditAdded(root, edited);
    } else {
      if (file_ != "chat_template.json") RETURN_IF_ERROR(EditRoles(root, edited));
      if (file_ == kConfig) EditDecoder(root, edited);
      if (file_ != kRoles && edit_.chat_template) {
        edited = SetJsonMember(edited, "chat_template", JsonString(*edit_.chat_template));
      }
    }
    if (edited == *text) return std::nullopt;
    return edited;
  }

 private:
  // True when a token that is left out is in a model's vocabulary, {TOKEN: ID} or [[TOKEN, SCORE]].
  bool AnyGone(const json& vocab) const {
    if (vocab.is_object()) {
      return std::any_of(gone_.begin(), gone_.end(),
                         [&](const auto& entry) { return vocab.contains(entry.first); });
    }
    return std::any_of(vocab.begin(), vocab.end(), [&](const json& entry) {
      return gone_.contains(entry[0].get_ref<const std::string&>());
    });
  }

  // These files cannot say that a token is gone.
  absl::StatusOr<std::optional<std::string>> EditOrdinary() {
    if (edit_.surplus.empty()) return std::nullopt;
    ASSIGN_OR_RETURN(const std::optional<std::string> fast, ReadOptional(model_, kFast));
    ASSIGN_OR_RETURN(const json root, fast ? Parse(model_, kFast, *fast) : json());
    const json* vocab = FindDotted(root, "model.vocab");
    if (vocab != nullptr && !AnyGone(*vocab)) return std::nullopt;
    if (vocab == nullptr) {
      return absl::FailedPreconditionError(absl::StrCat(
          "model ", model_.ref().ToString(), ": its tokenizer has ", edit_.surplus.size(),
          " tokens for which config.json's vocab_size leaves no row (",
          Printable(edit_.surplus.begin()->second),
          " is the first), and without a tokenizer.json they cannot be taken out"));
    }
    warnings_.push_back(absl::StrCat(file_,
                                     " is left out: it has tokens that the output's "
                                     "tokenizer.json has not"));
    return std::string();
  }

  absl::Status EditFast(const json& root, std::string& text) {
    if (edit_.added.empty() && edit_.surplus.empty()) return absl::OkStatus();
    std::map<int64_t, AddedToken> added = edit_.listed;
    for (const auto& [id, token] : edit_.added) added.insert_or_assign(id, token);
    text = SetJsonMember(text, "added_tokens", Listed(added));
    return AnyGone(*FindDotted(root, "model.vocab")) ? StripModel(root, text) : absl::OkStatus();
  }

  // Takes the surplus out of the vocabulary, with the merges that make or use it.
  absl::Status StripModel(const json& root, std::string& text) {
    const json& model = root["model"];
    std::string model_text(*JsonMember(text, "model"));
    json vocab = model["vocab"];
    if (vocab.is_object()) {
      for (const auto& [token, id] : gone_) vocab.erase(token);
    } else {
      vocab.erase(std::remove_if(vocab.begin(), vocab.end(),
                                 [&](const json& entry) {
                                   return gone_.contains(entry[0].get_ref<const std::string&>());
                                 }),
                  vocab.end());
    }
    model_text = SetJsonMember(model_text, "vocab", Dump(vocab));
    if (const auto merges = model.find("merges"); merges != model.end() && merges->is_array()) {
      json kept = json::array();
      for (const json& merge : *merges) {
        ASSIGN_OR_RETURN(const bool keep, Keeps(merge));
        if (keep) kept.push_back(merge);
      }
      model_text = SetJsonMember(model_text, "merges", Dump(kept));
    }
    const auto unknown = model.find("unk_token");
    if (unknown != model.end() && unknown->is_string() &&
        gone_.contains(unknown->get<std::string>())) {
      return NeedsSurplus("its unknown token", unknown->get<std::string>());
    }
    if (const auto post = root.find("post_processor"); post != root.end()) {
      const std::string processor = Dump(*post);
      for (const auto& [token, id] : gone_) {
        if (absl::StrContains(processor, JsonString(token))) {
          return NeedsSurplus("a token of its post_processor", token);
        }
      }
    }
    text = SetJsonMember(text, "model", model_text);
    return absl::OkStatus();
  }

  absl::Status NeedsSurplus(absl::string_view what, absl::string_view token) const {
    return absl::FailedPreconditionError(
        absl::StrCat("model ", model_.ref().ToString(), ": ", what, ", ", Printable(token),
                     ", has an id beyond config.json's vocab_size"));
  }

  // "LEFT RIGHT" or ["LEFT", "RIGHT"]
  absl::StatusOr<bool> Keeps(const json& merge) const {
    std::vector<std::string> parts;
    if (merge.is_string()) {
      parts = absl::StrSplit(merge.get_ref<const std::string&>(), ' ');
    } else if (merge.is_array()) {
      for (const json& part : merge) {
        if (part.is_string()) parts.push_back(part.get<std::string>());
      }
    }
    if (parts.size() != 2) return Malformed(model_, kFast, "a merge that is not of two tokens");
    return !gone_.contains(parts[0]) && !gone_.contains(parts[1]) &&
           !gone_.contains(parts[0] + parts[1]);
  }

  static std::string Dump(const json& value) {
    return value.dump(-1, ' ', false, json::error_handler_t::replace);
  }

  // Special tokens that are gone; transformers would add them again.
  absl::Status EditRoles(const json& root, std::string& text) {
    for (const auto& [key, value] : root.items()) {
      const std::string* token = IsRole(key) ? TokenText(value) : nullptr;
      if (token != nullptr && gone_.contains(*token)) {
        text = RemoveJsonMember(text, key);
        warnings_.push_back(absl::StrCat(file_, ": ", key, " ", Printable(*token),
                                         " has no row in the vocabulary and is left out"));
      }
    }
    for (absl::string_view key : kRoleLists) {
      const auto list = root.find(std::string(key));
      if (list == root.end() || !list->is_array()) continue;
      json kept = json::array();
      for (const json& entry : *list) {
        const std::string* token = TokenText(entry);
        if (token == nullptr || !gone_.contains(*token)) kept.push_back(entry);
      }
      if (kept.size() != list->size()) text = SetJsonMember(text, key, Dump(kept));
    }
    return absl::OkStatus();
  }

  void EditDecoder(const json& root, std::string& text) {
    const auto listed = root.find("added_tokens_decoder");
    if (listed == root.end()) return;
    json decoder = *listed;
    for (const auto& [id, token] : edit_.surplus) decoder.erase(absl::StrCat(id));
    for (const auto& [id, token] : edit_.added) {
      decoder[absl::StrCat(id)] = {
          {"content", token.content},       {"single_word", token.single_word},
          {"lstrip", token.lstrip},         {"rstrip", token.rstrip},
          {"normalized", token.normalized}, {"special", token.special}};
    }
    if (decoder != *listed) text = SetJsonMember(text, "added_tokens_decoder", Dump(decoder));
  }

  void EditAdded(const json& root, std::string& text) {
    json map = root;
    for (const auto& [token, id] : gone_) map.erase(token);
    for (const auto& [id, token] : edit_.added) map[token.content] = id;
    if (map != root) text = map.dump(2, ' ', false, json::error_handler_t::replace) + "\n";
  }

  const Checkpoint& model_;
  const absl::string_view file_;
  const TokenizerEdit& edit_;
  std::vector<std::string>& warnings_;
  std::map<std::string, int64_t> gone_;
};

}  // namespace

absl::StatusOr<std::optional<Tokenizer>> ReadTokenizer(const Checkpoint& model) {
  auto tokenizer = TokenizerReader(model).Read();
  if (!tokenizer.ok()) {
    return Annotate(tokenizer.status(), absl::StrCat("model ", model.ref().ToString()));
  }
  return tokenizer;
}

absl::StatusOr<bool> VocabulariesDiffer(const Checkpoint& a, const Checkpoint& b) {
  for (absl::string_view key : {"tokenizer.json", "vocab.json", "vocab.txt"}) {
    ASSIGN_OR_RETURN(const auto text_a, ReadOptional(a, key));
    ASSIGN_OR_RETURN(const auto text_b, ReadOptional(b, key));
    if (text_a.has_value() != text_b.has_value()) break;
    if (!text_a.has_value()) continue;
    if (*text_a == *text_b) return false;
    break;
  }
  ASSIGN_OR_RETURN(const auto tokenizer_a, ReadTokenizer(a));
  ASSIGN_OR_RETURN(const auto tokenizer_b, ReadTokenizer(b));
  return tokenizer_a && tokenizer_b && tokenizer_a->vocabulary != tokenizer_b->vocabulary;
}

absl::StatusOr<std::optional<std::string>> ReadChatTemplate(const Checkpoint& model) {
  ASSIGN_OR_RETURN(std::optional<std::string> jinja, ReadOptional(model, "chat_template.jinja"));
  if (jinja) return jinja;
  ASSIGN_OR_RETURN(const json config, ReadObject(model, kConfig));
  const auto found = config.find("chat_template");
  if (found == config.end()) return std::nullopt;
  if (found->is_string()) return found->get<std::string>();
  // {NAME: TEXT}, or [{"name": NAME, "template": TEXT}]
  if (found->is_object()) {
    const auto text = found->find("default");
    if (text != found->end() && text->is_string()) return text->get<std::string>();
  }
  if (found->is_array()) {
    for (const json& entry : *found) {
      if (!entry.is_object() || !entry.contains("name") || entry["name"] != "default") continue;
      if (entry.contains("template") && entry["template"].is_string()) {
        return entry["template"].get<std::string>();
      }
    }
  }
  return std::nullopt;
}

absl::StatusOr<std::optional<std::string>> EditTokenizerFile(const Checkpoint& model,
                                                             absl::string_view file,
                                                             const TokenizerEdit& edit,
                                                             std::vector<std::string>& warnings) {
  auto text = FileEditor(model, file, edit, warnings).Edit();
  if (!text.ok()) {
    return Annotate(text.status(), absl::StrCat("model ", model.ref().ToString()));
  }
  return text;
}

absl::StatusOr<std::optional<std::string>> MakeAddedTokensFile(const Checkpoint& model,
                                                               const TokenizerEdit& edit) {
  if (edit.added.empty()) return std::nullopt;
  ASSIGN_OR_RETURN(const bool exists, Exists(model, kAdded));
  if (exists) return std::nullopt;
  bool ordinary = false;
  for (absl::string_view file : kOrdinaryFiles) {
    ASSIGN_OR_RETURN(const bool present, Exists(model, file));
    ordinary = ordinary || present;
  }
  if (!ordinary) return std::nullopt;
  ASSIGN_OR_RETURN(const json config, ReadObject(model, kConfig));
  if (config.contains("added_tokens_decoder")) return std::nullopt;
  json map = json::object();
  for (const auto& [id, token] : edit.listed) map[token.content] = id;
  for (const auto& [id, token] : edit.added) map[token.content] = id;
  return map.dump(2, ' ', false, json::error_handler_t::replace) + "\n";
}

}  // namespace pewter
