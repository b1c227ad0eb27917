#include "merge/plan/prompt_tokens.h"

#include <re2/re2.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <optional>
#include <queue>
#include <tuple>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/status.h"
#include "merge/checkpoint/printable.h"
#include "merge/plan/json_text.h"
#include "merge/plan/tokenizer_files.h"
#include "store/object_store.h"

namespace pewter {
namespace {

using nlohmann::json;

constexpr int64_t kMaxFileBytes = int64_t{128} << 20;
constexpr size_t kMaxPromptBytes = size_t{64} << 10;
constexpr int64_t kMaxRegexBytes = int64_t{8} << 20;  // of memory, compiled

// One step of a normalizer.
struct Replacement {
  std::string from;  // empty: `to` is put in front of a text that is not empty
  std::string to;
};

struct Merge {
  int64_t rank = 0;
  int64_t id = 0;
};

// Metaspace: spaces become a visible character.
struct Metaspace {
  std::string replacement;
  std::string scheme;  // "always", "first", "never"
  bool split = true;
};

// ByteLevel: every byte of a word becomes a visible character.
struct ByteLevel {
  bool add_prefix_space = false;
  // Words, and in group 1 white space for which there is no better word; null: the whole text is
  // one.
  std::unique_ptr<const re2::RE2> words;
};

// The one of GPT-2, which the tokenizers library has built in.
constexpr char kByteLevelWords[] =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// Qwen's.
constexpr char kQwenWords[] =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

// Bytes of the UTF-8 character at the beginning of a text; 0 when there is none.
size_t CharacterBytes(absl::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(0);
  const size_t size = first < 0x80            ? 1
                      : first >> 5 == 0b110   ? 2
                      : first >> 4 == 0b1110  ? 3
                      : first >> 3 == 0b11110 ? 4
                                              : 0;
  if (size == 0 || size > text.size()) return 0;
  for (size_t i = 1; i < size; ++i) {
    if (byte(i) >> 6 != 0b10) return 0;
  }
  return size;
}

// The code of a character of CharacterBytes(text) bytes.
uint32_t CodePoint(absl::string_view character) {
  const auto first = static_cast<unsigned char>(character[0]);
  if (character.size() == 1) return first;
  uint32_t code = first & (0xffu >> (character.size() + 1));
  for (char c : character.substr(1)) code = code << 6 | (static_cast<unsigned char>(c) & 0x3fu);
  return code;
}

std::string Utf8(uint32_t code) {  // below 0x800
  if (code < 0x80) return std::string(1, static_cast<char>(code));
  return {static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 0x3f))};
}

// Characters of scripts that Unicode's normal form C leaves alone, whatever stands beside them.
bool UnchangedByNfc(uint32_t code) {
  static constexpr std::pair<uint32_t, uint32_t> kRanges[] = {
      {0x0000, 0x02ff},    // Latin
      {0x0400, 0x0482},    // Cyrillic
      {0x048a, 0x052f},    // Cyrillic
      {0x2010, 0x2027},    // punctuation
      {0x20a0, 0x20c0},    // currencies
      {0x2190, 0x22ff},    // arrows, mathematics
      {0x2500, 0x27bf},    // boxes, shapes, signs
      {0x3000, 0x3029},    // punctuation
      {0x3041, 0x3096},    // Hiragana
      {0x309b, 0x30ff},    // Katakana
      {0x4e00, 0x9fff},    // Han
      {0xac00, 0xd7a3},    // Hangul
      {0xff00, 0xffef},    // full width
      {0x1f300, 0x1faff},  // emoji
  };
  return std::any_of(std::begin(kRanges), std::end(kRanges),
                     [&](const auto& r) { return code >= r.first && code <= r.second; });
}

// Typed look-ups that give nothing where the JSON has something else.
std::optional<std::string> TextOf(const json& object, const char* key) {
  const auto it = object.is_object() ? object.find(key) : object.end();
  if (!object.is_object() || it == object.end() || !it->is_string()) return std::nullopt;
  return it->get<std::string>();
}
bool FlagOf(const json& object, const char* key, bool missing) {
  const auto it = object.find(key);
  return it != object.end() && it->is_boolean() ? it->get<bool>() : missing;
}
bool Absent(const json& object, const char* key) {
  const auto it = object.find(key);
  return it == object.end() || it->is_null() || *it == "" || *it == 0.0;
}

// The ids of the bytes' characters: those that are visible stand for themselves, the others for
// the characters from 256 on, in their order (GPT-2's encoder).
const std::array<std::string, 256>& ByteCharacters() {
  static const auto* const characters = [] {
    auto* const made = new std::array<std::string, 256>;
    uint32_t next = 256;
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const bool visible = (byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173);
      (*made)[byte] = Utf8(visible ? byte : next++);
    }
    return made;
  }();
  return *characters;
}

// A pattern of the tokenizers library for RE2, null when it is of another kind. RE2 looks at
// nothing behind a match, so that the usual end, "white space but for its last character", becomes
// group 1 and is cut by the caller. What is left of \s is spelled out, as RE2 knows ASCII's only.
std::unique_ptr<const re2::RE2> CompileWords(absl::string_view pattern) {
  if (!absl::ConsumeSuffix(&pattern, R"(|\s+(?!\S)|\s+)")) return nullptr;
  constexpr absl::string_view kSpaces = R"(\t\n\x0b\f\r\x{85}\p{Z})";
  std::string text = "(?:";
  bool in_class = false;
  for (size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    if (c != '\\') {
      if (c == '[') in_class = true;
      if (c == ']') in_class = false;
      text += c;
      continue;
    }
    // Others mean less to RE2 than they should.
    if (++i == pattern.size() || !absl::StrContains("spPrnt", pattern[i])) return nullptr;
    if (pattern[i] != 's') {
      absl::StrAppend(&text, "\\", pattern.substr(i, 1));
    } else if (in_class) {
      absl::StrAppend(&text, kSpaces);
    } else {
      absl::StrAppend(&text, "[", kSpaces, "]");
    }
  }
  absl::StrAppend(&text, ")|([", kSpaces, "]+)");
  re2::RE2::Options options(re2::RE2::Quiet);
  options.set_max_mem(kMaxRegexBytes);
  auto words = std::make_unique<const re2::RE2>(text, options);
  if (!words->ok() || words->NumberOfCapturingGroups() != 1) return nullptr;
  return words;
}

}  // namespace

struct PromptTokenizer::Data {
  std::string model;  // for messages
  std::string bos;
  Vocabulary vocabulary;
  absl::flat_hash_map<std::pair<int64_t, int64_t>, Merge> merges;
  std::optional<int64_t> unknown;
  bool fuse_unknown = false;
  bool byte_fallback = false;
  bool ignore_merges = false;
  std::vector<Replacement> normalizer;
  bool nfc = false;
  std::optional<Metaspace> metaspace;
  std::optional<ByteLevel> byte_level;
  std::vector<std::pair<AddedToken, int64_t>> added;

  absl::Status Read(const json& tokenizer);
  absl::Status ApplyClass(absl::string_view type, const json& tokenizer_config);
  absl::Status ReadNormalizer(const json& normalizer);
  absl::Status ReadSplitter(const json& splitter);
  absl::Status ReadMerges(const json& merges);
  void AddTokens(const Tokenizer& tokenizer);

  absl::Status Refuse(absl::string_view what) const {
    return absl::FailedPreconditionError(
        absl::StrCat("model ", model, ": tokenizer.json has ", what,
                     ", which Pewter cannot encode prompts with; give token ids instead "
                     "(`positive_prompt_ids`, `negative_prompt_ids`)"));
  }
  absl::Status Malformed(absl::string_view what) const {
    return absl::DataLossError(absl::StrCat("model ", model, ": tokenizer.json: ", what));
  }

  // A stretch without added tokens; `at_start`: it begins the text.
  absl::Status EncodeStretch(absl::string_view text, bool at_start, Encoded& to) const;
  absl::Status EncodeMetaspace(std::string text, bool at_start, Encoded& to) const;
  absl::Status EncodeByteLevel(std::string text, Encoded& to) const;
  absl::Status EncodeWord(absl::string_view word, Encoded& to) const;
};

absl::Status PromptTokenizer::Data::ReadNormalizer(const json& normalizer_json) {
  if (normalizer_json.is_null()) return absl::OkStatus();
  const std::string type = TextOf(normalizer_json, "type").value_or("?");
  if (type == "Sequence" && normalizer_json.contains("normalizers") &&
      normalizer_json["normalizers"].is_array()) {
    for (const json& step : normalizer_json["normalizers"]) RETURN_IF_ERROR(ReadNormalizer(step));
    return absl::OkStatus();
  }
  if (type == "NFC") {
    nfc = true;
    return absl::OkStatus();
  }
  if (type == "Prepend") {
    normalizer.push_back({"", TextOf(normalizer_json, "prepend").value_or("")});
    return absl::OkStatus();
  }
  if (type == "Replace" && normalizer_json.contains("pattern")) {
    const auto from = TextOf(normalizer_json["pattern"], "String");
    const auto to = TextOf(normalizer_json, "content");
    if (from && !from->empty() && to) {
      normalizer.push_back({*from, *to});
      return absl::OkStatus();
    }
  }
  return Refuse(absl::StrCat("a normalizer of type ", type));
}

// Nothing, Metaspace, ByteLevel, or a Split by a regular expression before ByteLevel.
absl::Status PromptTokenizer::Data::ReadSplitter(const json& splitter) {
  if (splitter.is_null()) return absl::OkStatus();
  const std::string kind = TextOf(splitter, "type").value_or("?");
  if (const auto replacement = TextOf(splitter, "replacement");
      kind == "Metaspace" && replacement) {
    metaspace = {*replacement,
                 TextOf(splitter, "prepend_scheme")
                     .value_or(FlagOf(splitter, "add_prefix_space", true) ? "always" : "never"),
                 FlagOf(splitter, "split", true)};
    return absl::OkStatus();
  }
  if (kind == "ByteLevel") {
    ByteLevel& made = byte_level.emplace();
    made.add_prefix_space = FlagOf(splitter, "add_prefix_space", true);
    if (FlagOf(splitter, "use_regex", true)) made.words = CompileWords(kByteLevelWords);
    return absl::OkStatus();
  }
  const bool two = kind == "Sequence" && splitter.contains("pretokenizers") &&
                   splitter["pretokenizers"].is_array() && splitter["pretokenizers"].size() == 2;
  if (!two) return Refuse(absl::StrCat("a pre-tokenizer of type ", kind));
  const json& split = splitter["pretokenizers"][0];
  const json& bytes = splitter["pretokenizers"][1];
  const std::string first = TextOf(split, "type").value_or("?");
  const std::string second = TextOf(bytes, "type").value_or("?");
  if (first != "Split" || second != "ByteLevel" || FlagOf(bytes, "use_regex", true) ||
      FlagOf(bytes, "add_prefix_space", true) || FlagOf(split, "invert", false) ||
      TextOf(split, "behavior").value_or("?") != "Isolated" || !split.contains("pattern")) {
    return Refuse(absl::StrCat("a pre-tokenizer of ", first, " and ", second));
  }
  const std::string pattern = TextOf(split["pattern"], "Regex").value_or("?");
  byte_level.emplace().words = CompileWords(pattern);
  if (byte_level->words == nullptr) {
    return Refuse(absl::StrCat("a pre-tokenizer that splits by ", Printable(pattern)));
  }
  return absl::OkStatus();
}

absl::Status PromptTokenizer::Data::ReadMerges(const json& list) {
  if (!list.is_array()) return Malformed("\"merges\" is not a list");
  for (const json& merge : list) {
    std::vector<std::string> pair;
    if (merge.is_string()) {
      pair = absl::StrSplit(merge.get_ref<const std::string&>(), ' ');
    } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() &&
               merge[1].is_string()) {
      pair = merge.get<std::vector<std::string>>();
    }
    if (pair.size() != 2) return Malformed("a merge is not a pair");
    const auto left = vocabulary.find(pair[0]), right = vocabulary.find(pair[1]),
               both = vocabulary.find(pair[0] + pair[1]);
    if (left == vocabulary.end() || right == vocabulary.end() || both == vocabulary.end()) {
      return Malformed("a merge has tokens that are not in the vocabulary");
    }
    const auto rank = static_cast<int64_t>(merges.size());
    merges.emplace(std::make_pair(left->second, right->second), Merge{rank, both->second});
  }
  return absl::OkStatus();
}

// Of some classes transformers 5 takes vocabulary and merges alone from tokenizer.json, and
// mergekit encodes with what it makes of them (AutoTokenizer of 5.23, for models that mixtures are
// made of).
absl::Status PromptTokenizer::Data::ApplyClass(absl::string_view type,
                                               const json& tokenizer_config) {
  const std::string name = TextOf(tokenizer_config, "tokenizer_class").value_or("");
  const absl::string_view tokenizer_class = absl::StripSuffix(name, "Fast");
  const bool qwen = type == "qwen2" || (tokenizer_class == "Qwen2Tokenizer" && type != "mistral");
  const bool llama = tokenizer_class == "LlamaTokenizer" && type != "mistral" && !byte_level;
  if (!qwen && !llama) return absl::OkStatus();
  normalizer.clear();
  metaspace.reset();
  byte_level.reset();
  unknown.reset();
  nfc = qwen;
  fuse_unknown = byte_fallback = !qwen;
  ignore_merges = false;
  const auto prefix = tokenizer_config.find("add_prefix_space");
  const bool said = prefix != tokenizer_config.end() && prefix->is_boolean();
  if (qwen) {
    if (said && prefix->get<bool>()) return Refuse("an \"add_prefix_space\" of Qwen2Tokenizer");
    byte_level.emplace().words = CompileWords(kQwenWords);
    return absl::OkStatus();
  }
  const bool add = !said || prefix->get<bool>();
  const bool legacy = FlagOf(tokenizer_config, "legacy", false);
  metaspace = {"\u2581", !add ? "never" : legacy ? "always" : "first", /*split=*/false};
  return absl::OkStatus();
}

// Special tokens of the configuration are added tokens, too.
void PromptTokenizer::Data::AddTokens(const Tokenizer& tokenizer) {
  for (const auto& [id, token] : tokenizer.added) added.emplace_back(token, id);
  for (const auto& [role, token] : tokenizer.roles) {
    if (role == "bos_token") bos = token;
    const auto id = tokenizer.vocabulary.find(token);
    if (id == tokenizer.vocabulary.end() || tokenizer.added.contains(id->second)) continue;
    added.emplace_back(AddedToken{.content = token, .normalized = false}, id->second);
  }
}

absl::Status PromptTokenizer::Data::Read(const json& tokenizer) {
  if (!tokenizer.is_object() || !tokenizer.contains("model") || !tokenizer["model"].is_object()) {
    return Malformed("it has no \"model\"");
  }
  const json& bpe = tokenizer["model"];
  const std::string type = TextOf(bpe, "type").value_or("?");
  if (type != "BPE") return Refuse(absl::StrCat("a model of type ", type));
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix", "dropout"}) {
    if (!Absent(bpe, key)) return Refuse(absl::StrCat("a \"", key, "\""));
  }
  RETURN_IF_ERROR(ReadNormalizer(tokenizer.value("normalizer", json())));
  RETURN_IF_ERROR(ReadSplitter(tokenizer.value("pre_tokenizer", json())));
  if (!bpe.contains("vocab") || !bpe["vocab"].is_object()) return Malformed("no vocabulary");
  for (const auto& [token, id] : bpe["vocab"].items()) {
    if (!id.is_number_integer()) return Malformed("a token's id is not a whole number");
    vocabulary[token] = id.get<int64_t>();
  }
  RETURN_IF_ERROR(ReadMerges(bpe.value("merges", json::array())));
  if (const auto token = TextOf(bpe, "unk_token")) {
    const auto it = vocabulary.find(*token);
    if (it == vocabulary.end()) return Malformed("the unknown token is not in the vocabulary");
    unknown = it->second;
  }
  fuse_unknown = FlagOf(bpe, "fuse_unk", false);
  byte_fallback = FlagOf(bpe, "byte_fallback", false);
  ignore_merges = FlagOf(bpe, "ignore_merges", false);
  return absl::OkStatus();
}

absl::StatusOr<PromptTokenizer> PromptTokenizer::Make(const Checkpoint& model) {
  auto data = std::make_shared<Data>();
  data->model = model.ref().ToString();
  const auto text = ReadText(model.store(), "tokenizer.json", kMaxFileBytes);
  if (absl::IsNotFound(text.status())) {
    return absl::FailedPreconditionError(
        absl::StrCat("model ", data->model,
                     " has no tokenizer.json, which prompts need; give token ids instead "
                     "(`positive_prompt_ids`, `negative_prompt_ids`)"));
  }
  RETURN_IF_ERROR(text.status());
  const auto json = ParseBoundedJson(*text);
  if (!json.ok()) return data->Malformed(json.status().message());
  RETURN_IF_ERROR(data->Read(*json));
  const auto config = nlohmann::json::parse(model.config_json(), nullptr, false);
  const auto tokenizer_config_text =
      ReadText(model.store(), "tokenizer_config.json", kMaxFileBytes);
  if (!tokenizer_config_text.ok() && !absl::IsNotFound(tokenizer_config_text.status())) {
    return tokenizer_config_text.status();
  }
  const auto tokenizer_config = ParseBoundedJson(tokenizer_config_text.value_or("{}"));
  if (!tokenizer_config.ok()) {
    return absl::DataLossError(absl::StrCat(
        "model ", data->model, ": tokenizer_config.json: ", tokenizer_config.status().message()));
  }
  RETURN_IF_ERROR(data->ApplyClass(TextOf(config, "model_type").value_or(""), *tokenizer_config));
  ASSIGN_OR_RETURN(const std::optional<Tokenizer> tokenizer, ReadTokenizer(model));
  if (tokenizer) data->AddTokens(*tokenizer);
  PromptTokenizer made;
  made.data_ = std::move(data);
  return made;
}

const std::string& PromptTokenizer::bos() const { return data_->bos; }

absl::StatusOr<PromptTokenizer::Encoded> PromptTokenizer::Encode(absl::string_view text) const {
  if (text.size() > kMaxPromptBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("a prompt has ", text.size(), " bytes; at most ", kMaxPromptBytes, " can be"));
  }
  for (size_t at = 0; at < text.size();) {
    const size_t size = CharacterBytes(text.substr(at));
    if (size == 0) return absl::InvalidArgumentError("a prompt is not UTF-8");
    const absl::string_view character = text.substr(at, size);
    if (data_->nfc && !UnchangedByNfc(CodePoint(character))) {
      return data_->Refuse(absl::StrCat("a normalizer of type NFC for \"", character,
                                        "\", which is of a script that may change"));
    }
    at += size;
  }
  Encoded encoded;
  size_t begin = 0;
  for (size_t at = 0; at <= text.size();) {
    // The longest added token that begins here.
    const std::pair<AddedToken, int64_t>* found = nullptr;
    for (const auto& token : data_->added) {
      const std::string& content = token.first.content;
      if (!content.empty() && absl::StartsWith(text.substr(at), content) &&
          (found == nullptr || content.size() > found->first.content.size())) {
        found = &token;
      }
    }
    if (found == nullptr && at < text.size()) {
      ++at;
      continue;
    }
    if (at > begin) {
      RETURN_IF_ERROR(data_->EncodeStretch(text.substr(begin, at - begin), begin == 0, encoded));
    }
    if (found == nullptr) break;
    const auto& [token, id] = *found;
    // A normalizer that changes nothing here leaves normalized tokens what they are, too.
    const bool plain = !token.single_word && !token.lstrip && !token.rstrip &&
                       (!token.normalized || data_->normalizer.empty());
    if (!plain) {
      return data_->Refuse(absl::StrCat("the added token ", Printable(token.content),
                                        ", found by rules of its own, in a prompt"));
    }
    encoded.ids.push_back(id);
    begin = at = at + token.content.size();
  }
  return encoded;
}

absl::Status PromptTokenizer::Data::EncodeStretch(absl::string_view text, bool at_start,
                                                  Encoded& to) const {
  std::string normal(text);
  for (const Replacement& step : normalizer) {
    if (!step.from.empty()) {
      normal = absl::StrReplaceAll(normal, {{step.from, step.to}});
    } else if (!normal.empty()) {
      normal = step.to + normal;
    }
  }
  if (metaspace) return EncodeMetaspace(std::move(normal), at_start, to);
  if (byte_level) return EncodeByteLevel(std::move(normal), to);
  return EncodeWord(normal, to);
}

absl::Status PromptTokenizer::Data::EncodeMetaspace(std::string text, bool at_start,
                                                    Encoded& to) const {
  const std::string& mark = metaspace->replacement;
  text = absl::StrReplaceAll(text, {{" ", mark}});
  const bool prepend = metaspace->scheme == "always" || (metaspace->scheme == "first" && at_start);
  if (prepend && !absl::StartsWith(text, mark)) text = mark + text;
  if (!metaspace->split) return EncodeWord(text, to);
  // Words begin at each mark.
  for (size_t begin = 0; begin < text.size();) {
    const size_t next = std::min(text.find(mark, begin + 1), text.size());
    RETURN_IF_ERROR(EncodeWord(absl::string_view(text).substr(begin, next - begin), to));
    begin = next;
  }
  return absl::OkStatus();
}

absl::Status PromptTokenizer::Data::EncodeByteLevel(std::string text, Encoded& to) const {
  if (byte_level->add_prefix_space && !absl::StartsWith(text, " ")) text = " " + text;
  const auto encode = [&](absl::string_view word) {
    std::string characters;
    for (char c : word) characters += ByteCharacters()[static_cast<unsigned char>(c)];
    return EncodeWord(characters, to);
  };
  if (byte_level->words == nullptr) return encode(text);
  const re2::StringPiece whole(text);
  for (size_t at = 0; at < text.size();) {
    re2::StringPiece found[2];
    if (!byte_level->words->Match(whole, at, whole.size(), re2::RE2::UNANCHORED, found, 2)) {
      return encode(absl::string_view(text).substr(at));
    }
    const size_t first = found[0].data() - text.data();
    if (found[0].empty()) return Refuse("a pre-tokenizer that makes empty words");
    if (first > at) RETURN_IF_ERROR(encode(absl::string_view(text).substr(at, first - at)));
    size_t end = first + found[0].size();
    // Of white space before a word the last character goes with the word, if another is left.
    if (found[1].data() != nullptr && end < text.size()) {
      size_t last = end - 1;
      while ((static_cast<unsigned char>(text[last]) & 0xc0) == 0x80) --last;
      if (last > first) end = last;
    }
    RETURN_IF_ERROR(encode(absl::string_view(text).substr(first, end - first)));
    at = end;
  }
  return absl::OkStatus();
}

// Characters are tokens first; of neighbours that can merge those with the lowest rank do, the
// leftmost first.
absl::Status PromptTokenizer::Data::EncodeWord(absl::string_view word, Encoded& to) const {
  if (const auto whole = vocabulary.find(word); ignore_merges && whole != vocabulary.end()) {
    to.ids.push_back(whole->second);
    return absl::OkStatus();
  }
  struct Symbol {
    int64_t id;
    int previous, next;
    bool alive = true;
  };
  std::vector<Symbol> symbols;
  const auto add = [&](int64_t id) {
    const int index = static_cast<int>(symbols.size());
    symbols.push_back({.id = id, .previous = index - 1, .next = index + 1});
  };
  bool last_unknown = false;
  for (size_t at = 0; at < word.size();) {
    const size_t size = CharacterBytes(word.substr(at));
    if (size == 0) return absl::InvalidArgumentError("a prompt is not UTF-8");
    const absl::string_view character = word.substr(at, size);
    at += size;
    if (const auto it = vocabulary.find(character); it != vocabulary.end()) {
      add(it->second);
      last_unknown = false;
      continue;
    }
    std::vector<int64_t> bytes;
    for (char c : character) {
      const auto it = vocabulary.find(absl::StrFormat("<0x%02X>", static_cast<unsigned char>(c)));
      if (byte_fallback && it != vocabulary.end()) bytes.push_back(it->second);
    }
    if (bytes.size() == size) {
      for (int64_t id : bytes) add(id);
      last_unknown = false;
      continue;
    }
    if (!unknown) {
      ++to.left_out;
      continue;
    }
    if (!(last_unknown && fuse_unknown)) add(*unknown);
    last_unknown = true;
  }
  if (symbols.empty()) return absl::OkStatus();
  symbols.back().next = -1;

  using Candidate = std::tuple<int64_t, int, int64_t, int64_t>;  // rank, place, left id, right id
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
  const auto consider = [&](int left) {
    if (left < 0 || symbols[left].next < 0) return;
    const std::pair<int64_t, int64_t> pair = {symbols[left].id, symbols[symbols[left].next].id};
    if (const auto it = merges.find(pair); it != merges.end()) {
      queue.emplace(it->second.rank, left, pair.first, pair.second);
    }
  };
  for (int i = 0; i < static_cast<int>(symbols.size()); ++i) consider(i);
  while (!queue.empty()) {
    const auto [rank, place, left_id, right_id] = queue.top();
    queue.pop();
    Symbol& left = symbols[place];
    // What was queued before a neighbour changed is stale.
    if (!left.alive || left.id != left_id || left.next < 0 || symbols[left.next].id != right_id) {
      continue;
    }
    Symbol& right = symbols[left.next];
    left.id = merges.at({left_id, right_id}).id;
    right.alive = false;
    left.next = right.next;
    if (left.next >= 0) symbols[left.next].previous = place;
    consider(left.previous);
    consider(place);
  }
  for (int i = 0; i >= 0; i = symbols[i].next) to.ids.push_back(symbols[i].id);
  return absl::OkStatus();
}

}  // namespace pewter
