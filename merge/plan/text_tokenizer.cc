#include "merge/plan/text_tokenizer.h"

#include <unicode/locid.h>
#include <unicode/normalizer2.h>
#include <unicode/regex.h>
#include <unicode/uchar.h>
#include <unicode/unistr.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <optional>
#include <queue>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "base/status.h"
#include "merge/checkpoint/dotted_key.h"
#include "merge/plan/json_text.h"
#include "merge/plan/tokenizer_files.h"
#include "merge/plan/utf8.h"
#include "store/object_store.h"

namespace pewter {
namespace {

using icu::UnicodeString;
using nlohmann::json;

constexpr int64_t kMaxId = int64_t{1} << 24;
// Of a pattern on one text: units of ICU, about milliseconds, and bytes.
constexpr int32_t kPatternTime = 1000, kPatternStack = 1 << 20;
// What the library takes an unknown character of a Unigram model to cost more than any token.
constexpr double kUnknownPenalty = 10;
// Every stretch of a text up to the longest token is looked up in a Unigram model.
constexpr size_t kMaxUnigramBytes = 1024;

// GPT-2's pattern, also of byte-level tokenizers that give none.
constexpr char kByteLevelPattern[] =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

UnicodeString ToIcu(absl::string_view text) {
  return UnicodeString::fromUTF8(icu::StringPiece(text.data(), static_cast<int32_t>(text.size())));
}

std::string FromIcu(const UnicodeString& text) {
  std::string bytes;
  text.toUTF8String(bytes);
  return bytes;
}

bool IsPunctuation(UChar32 c) {
  // BERT's: all of ASCII that is neither letter, digit nor space, and what Unicode says.
  return (c >= 33 && c <= 47) || (c >= 58 && c <= 64) || (c >= 91 && c <= 96) ||
         (c >= 123 && c <= 126) || u_ispunct(c);
}

// Half open, in units of UTF-16.
using Range = std::pair<int32_t, int32_t>;
using Ranges = std::vector<Range>;

// A pattern of tokenizer.json: {"Regex": TEXT} or {"String": TEXT}.
class Pattern {
 public:
  static absl::StatusOr<Pattern> Read(const json& spec) {
    Pattern pattern;
    if (spec.is_object() && spec.contains("String") && spec["String"].is_string()) {
      pattern.literal_ = ToIcu(spec["String"].get_ref<const std::string&>());
      return pattern;
    }
    if (!spec.is_object() || !spec.contains("Regex") || !spec["Regex"].is_string()) {
      return absl::DataLossError("a pattern is neither a String nor a Regex");
    }
    return Compile(spec["Regex"].get_ref<const std::string&>());
  }

  static absl::StatusOr<Pattern> Compile(const std::string& text) {
    Pattern pattern;
    UErrorCode error = U_ZERO_ERROR;
    UParseError where{};
    pattern.regex_.reset(icu::RegexPattern::compile(ToIcu(text), 0, where, error));
    if (U_FAILURE(error)) {
      return absl::UnimplementedError(absl::StrCat("the pattern ", text.substr(0, 80),
                                                   " is not understood: ", u_errorName(error)));
    }
    return pattern;
  }

  absl::StatusOr<Ranges> Find(const UnicodeString& text) const {
    Ranges found;
    if (regex_ == nullptr) {
      if (literal_.isEmpty()) return found;
      for (int32_t at = 0; (at = text.indexOf(literal_, at)) >= 0; at += literal_.length()) {
        found.emplace_back(at, at + literal_.length());
      }
      return found;
    }
    UErrorCode error = U_ZERO_ERROR;
    const std::unique_ptr<icu::RegexMatcher> matcher(regex_->matcher(text, error));
    if (U_SUCCESS(error)) {
      matcher->setTimeLimit(kPatternTime, error);
      matcher->setStackLimit(kPatternStack, error);
    }
    while (U_SUCCESS(error) && matcher->find(error)) {
      const Range range(matcher->start(error), matcher->end(error));
      if (range.first < range.second) found.push_back(range);
    }
    if (U_FAILURE(error)) {
      return absl::DataLossError(absl::StrCat("a pattern failed: ", u_errorName(error)));
    }
    return found;
  }

 private:
  UnicodeString literal_;
  std::shared_ptr<const icu::RegexPattern> regex_;
};

enum class Keep { kRemoved, kIsolated, kPrevious, kNext, kContiguous };

// Cuts a text at ranges that a pattern found.
std::vector<UnicodeString> Cut(const UnicodeString& text, const Ranges& found, Keep keep) {
  struct Part {
    Range range;
    bool matched = false;
  };
  std::vector<Part> parts;
  int32_t at = 0;
  for (const Range& range : found) {
    if (at < range.first) parts.push_back({{at, range.first}, false});
    parts.push_back({range, true});
    at = range.second;
  }
  if (at < text.length()) parts.push_back({{at, text.length()}, false});
  Ranges ranges;
  bool before = false;  // the part before is a match, and joins the next one
  for (const Part& part : parts) {
    const bool join = !ranges.empty() && ((keep == Keep::kPrevious && part.matched && !before) ||
                                          (keep == Keep::kNext && !part.matched && before) ||
                                          (keep == Keep::kContiguous && part.matched && before));
    if (join) {
      ranges.back().second = part.range.second;
    } else if (!part.matched || keep != Keep::kRemoved) {
      ranges.push_back(part.range);
    }
    before = part.matched;
  }
  std::vector<UnicodeString> pieces;
  for (const Range& range : ranges) {
    pieces.emplace_back(text, range.first, range.second - range.first);
  }
  return pieces;
}

// Ranges of characters that fn takes, each by itself.
template <class F>
Ranges Characters(const UnicodeString& text, const F& fn) {
  Ranges found;
  for (int32_t i = 0; i < text.length(); i = text.moveIndex32(i, 1)) {
    if (fn(text.char32At(i))) found.emplace_back(i, text.moveIndex32(i, 1));
  }
  return found;
}

// Steps of the two stages before the model.
using Normalize = std::function<absl::StatusOr<UnicodeString>(const UnicodeString& text)>;
// `first`: the piece begins the text.
using Split = std::function<absl::StatusOr<std::vector<UnicodeString>>(const UnicodeString& text,
                                                                       bool first)>;

// "type" of a component, which is an object.
absl::StatusOr<std::string> TypeOf(const json& spec) {
  if (!spec.is_object() || !spec.contains("type") || !spec["type"].is_string()) {
    return absl::DataLossError("a component has no type");
  }
  return spec["type"].get<std::string>();
}

bool Flag(const json& spec, const char* key, bool fallback) {
  const auto it = spec.find(key);
  return it == spec.end() || !it->is_boolean() ? fallback : it->get<bool>();
}

std::string Word(const json& spec, const char* key, const char* fallback) {
  const auto it = spec.find(key);
  return it == spec.end() || !it->is_string() ? fallback : it->get<std::string>();
}

absl::StatusOr<Keep> ReadKeep(const json& spec) {
  const std::string name = Word(spec, "behavior", "");
  for (const auto& [known, keep] : {std::pair{"Removed", Keep::kRemoved},
                                    {"Isolated", Keep::kIsolated},
                                    {"MergedWithPrevious", Keep::kPrevious},
                                    {"MergedWithNext", Keep::kNext},
                                    {"Contiguous", Keep::kContiguous}}) {
    if (name == known) return keep;
  }
  return absl::UnimplementedError(absl::StrCat("the behavior \"", name, "\" is not known"));
}

absl::StatusOr<Normalize> UnicodeForm(const icu::Normalizer2* (*form)(UErrorCode&)) {
  UErrorCode error = U_ZERO_ERROR;
  const icu::Normalizer2* const normalizer = form(error);
  if (U_FAILURE(error)) return absl::InternalError(u_errorName(error));
  return Normalize([normalizer](const UnicodeString& text) -> absl::StatusOr<UnicodeString> {
    UErrorCode status = U_ZERO_ERROR;
    UnicodeString result = normalizer->normalize(text, status);
    if (U_FAILURE(status)) return absl::InternalError(u_errorName(status));
    return result;
  });
}

UnicodeString WithoutAccents(const UnicodeString& text) {
  UnicodeString kept;
  for (int32_t i = 0; i < text.length(); i = text.moveIndex32(i, 1)) {
    if (u_charType(text.char32At(i)) != U_NON_SPACING_MARK) kept.append(text.char32At(i));
  }
  return kept;
}

UnicodeString Lower(UnicodeString text) { return text.toLower(icu::Locale::getRoot()); }

bool IsChinese(UChar32 c) {
  constexpr Range kBlocks[] = {{0x4e00, 0x9fff},   {0x3400, 0x4dbf},   {0x20000, 0x2a6df},
                               {0x2a700, 0x2b73f}, {0x2b740, 0x2b81f}, {0x2b920, 0x2ceaf},
                               {0xf900, 0xfaff},   {0x2f800, 0x2fa1f}};
  return std::any_of(std::begin(kBlocks), std::end(kBlocks),
                     [&](const Range& block) { return c >= block.first && c <= block.second; });
}

absl::StatusOr<Normalize> BertNormalizer(const json& spec) {
  const bool clean = Flag(spec, "clean_text", true);
  const bool chinese = Flag(spec, "handle_chinese_chars", true);
  const bool lower = Flag(spec, "lowercase", true);
  const bool strip = Flag(spec, "strip_accents", lower);
  ASSIGN_OR_RETURN(const Normalize decompose, UnicodeForm(&icu::Normalizer2::getNFDInstance));
  return Normalize([=](const UnicodeString& text) -> absl::StatusOr<UnicodeString> {
    UnicodeString result;
    for (int32_t i = 0; i < text.length(); i = text.moveIndex32(i, 1)) {
      UChar32 c = text.char32At(i);
      if (clean) {
        const bool space = c == '\t' || c == '\n' || c == '\r' || u_isUWhiteSpace(c);
        const int8_t type = u_charType(c);
        const bool control = type == U_CONTROL_CHAR || type == U_FORMAT_CHAR ||
                             type == U_PRIVATE_USE_CHAR || type == U_UNASSIGNED;
        if (c == 0 || c == 0xfffd || (control && !space)) continue;
        if (space) c = ' ';
      }
      if (chinese && IsChinese(c)) {
        result.append(UChar32{' '}).append(c).append(UChar32{' '});
      } else {
        result.append(c);
      }
    }
    if (strip) {
      ASSIGN_OR_RETURN(result, decompose(result));
      result = WithoutAccents(result);
    }
    return lower ? Lower(result) : result;
  });
}

absl::StatusOr<Normalize> ReadNormalizer(const json& spec) {
  ASSIGN_OR_RETURN(const std::string type, TypeOf(spec));
  if (type == "Sequence") {
    std::vector<Normalize> steps;
    if (!spec.contains("normalizers") || !spec["normalizers"].is_array()) {
      return absl::DataLossError("a sequence has no normalizers");
    }
    for (const json& step : spec["normalizers"]) {
      ASSIGN_OR_RETURN(steps.emplace_back(), ReadNormalizer(step));
    }
    return Normalize([steps](const UnicodeString& text) -> absl::StatusOr<UnicodeString> {
      UnicodeString result = text;
      for (const Normalize& step : steps) {
        ASSIGN_OR_RETURN(result, step(result));
      }
      return result;
    });
  }
  if (type == "NFC") return UnicodeForm(&icu::Normalizer2::getNFCInstance);
  if (type == "NFD") return UnicodeForm(&icu::Normalizer2::getNFDInstance);
  if (type == "NFKC") return UnicodeForm(&icu::Normalizer2::getNFKCInstance);
  if (type == "NFKD") return UnicodeForm(&icu::Normalizer2::getNFKDInstance);
  if (type == "BertNormalizer") return BertNormalizer(spec);
  if (type == "Lowercase") return Normalize([](const UnicodeString& text) { return Lower(text); });
  if (type == "StripAccents") return Normalize(&WithoutAccents);
  if (type == "ByteLevel") {
    return Normalize(
        [](const UnicodeString& text) { return ToIcu(EncodeByteLevel(FromIcu(text))); });
  }
  if (type == "Prepend") {
    return Normalize([prefix = ToIcu(Word(spec, "prepend", ""))](const UnicodeString& text) {
      return text.isEmpty() ? text : prefix + text;
    });
  }
  if (type == "Strip") {
    const bool left = Flag(spec, "strip_left", true), right = Flag(spec, "strip_right", true);
    return Normalize([left, right](const UnicodeString& text) {
      int32_t begin = 0, end = text.length();
      while (left && begin < end && u_isUWhiteSpace(text.char32At(begin))) ++begin;
      while (right && end > begin && u_isUWhiteSpace(text.char32At(end - 1))) --end;
      return UnicodeString(text, begin, end - begin);
    });
  }
  if (type == "Replace") {
    ASSIGN_OR_RETURN(const Pattern pattern, Pattern::Read(spec.value("pattern", json())));
    return Normalize([pattern, content = ToIcu(Word(spec, "content", ""))](
                         const UnicodeString& text) -> absl::StatusOr<UnicodeString> {
      ASSIGN_OR_RETURN(const Ranges found, pattern.Find(text));
      UnicodeString result;
      int32_t at = 0;
      for (const Range& range : found) {
        result.append(text, at, range.first - at).append(content);
        at = range.second;
      }
      return result.append(text, at, text.length() - at);
    });
  }
  return absl::UnimplementedError(absl::StrCat("the normalizer ", type, " is not known"));
}

using Pieces = std::vector<UnicodeString>;

Split SplitBytes(const json& spec, const Pattern& pattern) {
  const bool prefix = Flag(spec, "add_prefix_space", true);
  const bool regex = Flag(spec, "use_regex", true);
  return [=](const UnicodeString& text, bool) -> absl::StatusOr<Pieces> {
    UnicodeString whole = text;
    if (prefix && !whole.startsWith(UnicodeString(UChar32{' '}))) {
      whole.insert(0, UChar32{' '});
    }
    Pieces pieces = {whole};
    if (regex) {
      ASSIGN_OR_RETURN(const Ranges found, pattern.Find(whole));
      pieces = Cut(whole, found, Keep::kIsolated);
    }
    for (UnicodeString& piece : pieces) piece = ToIcu(EncodeByteLevel(FromIcu(piece)));
    return pieces;
  };
}

absl::StatusOr<Split> SplitWords(const json& spec) {
  const UnicodeString mark = ToIcu(Word(spec, "replacement", "\xe2\x96\x81"));
  std::string scheme = Word(spec, "prepend_scheme", "");
  if (scheme.empty()) scheme = Flag(spec, "add_prefix_space", true) ? "always" : "never";
  const bool split = Flag(spec, "split", true);
  return Split([=](const UnicodeString& text, bool first) -> absl::StatusOr<Pieces> {
    UnicodeString whole = text;
    whole.findAndReplace(UnicodeString(UChar32{' '}), mark);
    const bool prepend = scheme == "always" || (scheme == "first" && first);
    if (prepend && !whole.startsWith(mark)) whole.insert(0, mark);
    if (!split) return Pieces{whole};
    const UChar32 character = mark.char32At(0);
    return Cut(whole, Characters(whole, [&](UChar32 c) { return c == character; }), Keep::kNext);
  });
}

absl::StatusOr<Split> ReadSplit(const json& spec);

absl::StatusOr<Split> ReadSplits(const json& spec) {
  std::vector<Split> steps;
  if (!spec.contains("pretokenizers") || !spec["pretokenizers"].is_array()) {
    return absl::DataLossError("a sequence has no pretokenizers");
  }
  for (const json& step : spec["pretokenizers"]) {
    ASSIGN_OR_RETURN(steps.emplace_back(), ReadSplit(step));
  }
  return Split([steps](const UnicodeString& text, bool first) -> absl::StatusOr<Pieces> {
    Pieces pieces = {text};
    for (const Split& step : steps) {
      Pieces next;
      for (size_t i = 0; i < pieces.size(); ++i) {
        ASSIGN_OR_RETURN(Pieces some, step(pieces[i], first && i == 0));
        next.insert(next.end(), some.begin(), some.end());
      }
      pieces = std::move(next);
    }
    return pieces;
  });
}

absl::StatusOr<Split> ReadSplit(const json& spec) {
  ASSIGN_OR_RETURN(const std::string type, TypeOf(spec));
  const auto by = [](Keep keep, auto characters) {
    return Split([keep, characters](const UnicodeString& text, bool) -> absl::StatusOr<Pieces> {
      return Cut(text, Characters(text, characters), keep);
    });
  };
  if (type == "Sequence") return ReadSplits(spec);
  if (type == "ByteLevel") {
    ASSIGN_OR_RETURN(const Pattern pattern, Pattern::Compile(kByteLevelPattern));
    return SplitBytes(spec, pattern);
  }
  if (type == "Metaspace") return SplitWords(spec);
  if (type == "WhitespaceSplit") return by(Keep::kRemoved, &u_isUWhiteSpace);
  if (type == "Punctuation") {
    ASSIGN_OR_RETURN(const Keep keep, spec.contains("behavior") ? ReadKeep(spec) : Keep::kIsolated);
    return by(keep, &IsPunctuation);
  }
  if (type == "CharDelimiterSplit") {
    const UChar32 delimiter = ToIcu(Word(spec, "delimiter", "")).char32At(0);
    return by(Keep::kRemoved, [delimiter](UChar32 c) { return c == delimiter; });
  }
  if (type == "Digits") {
    const bool each = Flag(spec, "individual_digits", false);
    const auto digit = [](UChar32 c) {
      const int8_t t = u_charType(c);
      return t == U_DECIMAL_DIGIT_NUMBER || t == U_LETTER_NUMBER || t == U_OTHER_NUMBER;
    };
    return by(each ? Keep::kIsolated : Keep::kContiguous, digit);
  }
  if (type == "BertPreTokenizer") {
    return Split([](const UnicodeString& text, bool) -> absl::StatusOr<Pieces> {
      Pieces pieces;
      for (const UnicodeString& word :
           Cut(text, Characters(text, &u_isUWhiteSpace), Keep::kRemoved)) {
        for (UnicodeString& piece : Cut(word, Characters(word, &IsPunctuation), Keep::kIsolated)) {
          pieces.push_back(std::move(piece));
        }
      }
      return pieces;
    });
  }
  const bool whitespace = type == "Whitespace";
  if (type != "Split" && !whitespace) {
    return absl::UnimplementedError(absl::StrCat("the pre-tokenizer ", type, " is not known"));
  }
  ASSIGN_OR_RETURN(const Pattern pattern, whitespace
                                              ? Pattern::Compile(R"(\w+|[^\w\s]+)")
                                              : Pattern::Read(spec.value("pattern", json())));
  ASSIGN_OR_RETURN(const Keep keep, whitespace ? Keep::kRemoved : ReadKeep(spec));
  const bool invert = whitespace || Flag(spec, "invert", false);
  return Split([=](const UnicodeString& text, bool) -> absl::StatusOr<Pieces> {
    ASSIGN_OR_RETURN(Ranges found, pattern.Find(text));
    if (invert) {
      Ranges between;
      int32_t at = 0;
      for (const Range& range : found) {
        if (at < range.first) between.emplace_back(at, range.first);
        at = range.second;
      }
      if (at < text.length()) between.emplace_back(at, text.length());
      // What is found is kept apart from its neighbours.
      if (keep == Keep::kRemoved) {
        Pieces pieces;
        for (const Range& range : found) {
          pieces.emplace_back(text, range.first, range.second - range.first);
        }
        return pieces;
      }
      found = std::move(between);
    }
    return Cut(text, found, keep);
  });
}

// --- models --------------------------------------------------------------------------------------

using Encoded = TextTokenizer::Encoded;
using Ids = std::vector<int32_t>;
using IdOf = absl::flat_hash_map<std::string, int32_t>;

std::vector<std::string> SplitCharacters(absl::string_view text) {
  std::vector<std::string> characters;
  for (char byte : text) {
    if ((static_cast<unsigned char>(byte) & 0xc0) == 0x80 && !characters.empty()) {
      characters.back() += byte;
    } else {
      characters.emplace_back(1, byte);
    }
  }
  return characters;
}

class Model {
 public:
  virtual ~Model() = default;
  // Appends the tokens of a piece.
  virtual void Encode(const std::string& piece, Encoded& to) const = 0;

 protected:
  int32_t Find(const std::string& token) const {
    const auto found = ids_.find(token);
    return found == ids_.end() ? -1 : found->second;
  }
  // Tokens "<0xE2>" for the bytes of a character; false when one is missing.
  bool AppendBytes(absl::string_view character, Ids& ids) const {
    Ids bytes;
    for (char byte : character) {
      const auto value = static_cast<unsigned>(static_cast<unsigned char>(byte));
      bytes.push_back(Find(absl::StrFormat("<0x%02X>", value)));
      if (bytes.back() < 0) return false;
    }
    ids.insert(ids.end(), bytes.begin(), bytes.end());
    return true;
  }
  // For characters that no token has.
  void AppendUnknown(size_t characters, Encoded& to) const {
    if (unknown_ >= 0) {
      to.ids.push_back(unknown_);
    } else {
      to.left_out += static_cast<int64_t>(characters);
    }
  }

  IdOf ids_;
  int32_t unknown_ = -1;
};

absl::Status ReadVocabulary(const json& spec, IdOf& ids) {
  const auto vocab = spec.find("vocab");
  if (vocab == spec.end() || !vocab->is_object()) {
    return absl::DataLossError("model.vocab is not an object");
  }
  for (const auto& [token, id] : vocab->items()) {
    if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() >= kMaxId) {
      return absl::DataLossError("model.vocab has an id that is no whole number in range");
    }
    ids[token] = static_cast<int32_t>(id.get<int64_t>());
  }
  return absl::OkStatus();
}

class BytePairModel final : public Model {
 public:
  absl::Status Read(const json& spec) {
    RETURN_IF_ERROR(ReadVocabulary(spec, ids_));
    prefix_ = Word(spec, "continuing_subword_prefix", "");
    suffix_ = Word(spec, "end_of_word_suffix", "");
    fuse_unknown_ = Flag(spec, "fuse_unk", false);
    byte_fallback_ = Flag(spec, "byte_fallback", false);
    ignore_merges_ = Flag(spec, "ignore_merges", false);
    const auto dropout = spec.find("dropout");
    if (dropout != spec.end() && !dropout->is_null() && *dropout != 0.0) {
      return absl::UnimplementedError("model.dropout makes tokens random");
    }
    unknown_ = Find(Word(spec, "unk_token", ""));
    const auto merges = spec.find("merges");
    if (merges == spec.end() || !merges->is_array()) {
      return absl::DataLossError("model.merges is not a list");
    }
    for (const json& merge : *merges) {
      std::pair<std::string, std::string> pair;
      if (merge.is_string()) {
        pair = absl::StrSplit(merge.get_ref<const std::string&>(), absl::MaxSplits(' ', 1));
      } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() &&
                 merge[1].is_string()) {
        pair = {merge[0].get<std::string>(), merge[1].get<std::string>()};
      } else {
        return absl::DataLossError("model.merges has an entry that is no pair");
      }
      const bool continues = !prefix_.empty() && absl::StartsWith(pair.second, prefix_);
      const int32_t left = Find(pair.first), right = Find(pair.second);
      const int32_t both =
          Find(absl::StrCat(pair.first, pair.second.substr(continues ? prefix_.size() : 0)));
      if (left < 0 || right < 0 || both < 0) {
        return absl::DataLossError("model.merges names a token that model.vocab does not have");
      }
      const auto rank = static_cast<int32_t>(merges_.size());
      merges_.try_emplace({left, right}, rank, both);
    }
    return absl::OkStatus();
  }

  // Of neighbours that can merge, those with the lowest rank do, the leftmost first.
  void Encode(const std::string& piece, Encoded& to) const override {
    if (const int32_t whole = Find(piece); ignore_merges_ && whole >= 0) {
      to.ids.push_back(whole);
      return;
    }
    struct Symbol {
      int32_t id = 0;  // -1: it went into the one before
      int previous = -1, next = -1;
    };
    const Ids characters = Characters(piece, to.left_out);
    const int count = static_cast<int>(characters.size());
    std::vector<Symbol> symbols(count);
    for (int i = 0; i < count; ++i) symbols[i] = {characters[i], i - 1, i + 1 < count ? i + 1 : -1};
    struct Candidate {
      int32_t rank = 0;
      int left = 0;
      std::pair<int32_t, int32_t> pair;
      int32_t merged = 0;
    };
    const auto later = [](const Candidate& a, const Candidate& b) {
      return std::pair(a.rank, a.left) > std::pair(b.rank, b.left);
    };
    std::priority_queue<Candidate, std::vector<Candidate>, decltype(later)> queue(later);
    const auto consider = [&](int left) {
      if (left < 0 || symbols[left].next < 0) return;
      const std::pair<int32_t, int32_t> pair(symbols[left].id, symbols[symbols[left].next].id);
      if (const auto found = merges_.find(pair); found != merges_.end()) {
        queue.push({found->second.first, left, pair, found->second.second});
      }
    };
    for (int i = 0; i < count; ++i) consider(i);
    while (!queue.empty()) {
      const Candidate best = queue.top();
      queue.pop();
      Symbol& left = symbols[best.left];
      // What was queued before a neighbour changed is stale.
      if (left.id != best.pair.first || left.next < 0 ||
          symbols[left.next].id != best.pair.second) {
        continue;
      }
      Symbol& right = symbols[left.next];
      left.id = best.merged;
      right.id = -1;
      left.next = right.next;
      if (left.next >= 0) symbols[left.next].previous = best.left;
      consider(left.previous);
      consider(best.left);
    }
    for (const Symbol& symbol : symbols) {
      if (symbol.id >= 0) to.ids.push_back(symbol.id);
    }
  }

 private:
  // The tokens of single characters.
  Ids Characters(const std::string& piece, int64_t& left_out) const {
    Encoded single;
    bool after_unknown = false;
    const std::vector<std::string> characters = SplitCharacters(piece);
    for (size_t i = 0; i < characters.size(); ++i) {
      std::string symbol = i == 0 ? characters[i] : absl::StrCat(prefix_, characters[i]);
      if (i + 1 == characters.size()) absl::StrAppend(&symbol, suffix_);
      const int32_t id = Find(symbol);
      const bool known = id >= 0;
      if (known) single.ids.push_back(id);
      if (!known && byte_fallback_ && AppendBytes(characters[i], single.ids)) {
        after_unknown = false;
        continue;
      }
      const bool fused = fuse_unknown_ && after_unknown && unknown_ >= 0;
      if (!known && !fused) AppendUnknown(1, single);
      after_unknown = !known;
    }
    left_out += single.left_out;
    return std::move(single.ids);
  }

  absl::flat_hash_map<std::pair<int32_t, int32_t>, std::pair<int32_t, int32_t>>
      merges_;  // to rank and token
  std::string prefix_, suffix_;
  bool fuse_unknown_ = false, byte_fallback_ = false, ignore_merges_ = false;
};

// The longest token that the rest of a word begins with, again and again; unknown if none does.
class WordPieceModel final : public Model {
 public:
  absl::Status Read(const json& spec) {
    RETURN_IF_ERROR(ReadVocabulary(spec, ids_));
    prefix_ = Word(spec, "continuing_subword_prefix", "##");
    unknown_ = Find(Word(spec, "unk_token", "[UNK]"));
    const auto most = spec.find("max_input_chars_per_word");
    if (most != spec.end() && most->is_number_unsigned()) most_ = most->get<uint64_t>();
    return absl::OkStatus();
  }

  void Encode(const std::string& piece, Encoded& to) const override {
    const std::vector<std::string> characters = SplitCharacters(piece);
    Ids found;
    size_t start = 0;
    while (start < characters.size() && characters.size() <= most_) {
      std::string token = start == 0 ? "" : prefix_;
      int32_t longest = -1;
      size_t end = start;
      for (size_t i = start; i < characters.size(); ++i) {
        token += characters[i];
        if (const int32_t id = Find(token); id >= 0) {
          longest = id;
          end = i + 1;
        }
      }
      if (longest < 0) break;
      found.push_back(longest);
      start = end;
    }
    if (start == characters.size()) {
      to.ids.insert(to.ids.end(), found.begin(), found.end());
    } else {
      AppendUnknown(characters.size(), to);
    }
  }

 private:
  std::string prefix_;
  uint64_t most_ = 100;
};

// The most probable way to write a text with tokens of independent probabilities.
class UnigramModel final : public Model {
 public:
  absl::Status Read(const json& spec) {
    const auto vocab = spec.find("vocab");
    if (vocab == spec.end() || !vocab->is_array()) {
      return absl::DataLossError("model.vocab is not a list");
    }
    for (const json& entry : *vocab) {
      if (!entry.is_array() || entry.size() != 2 || !entry[0].is_string() ||
          !entry[1].is_number()) {
        return absl::DataLossError("model.vocab has an entry that is not [token, score]");
      }
      const auto& token = entry[0].get_ref<const std::string&>();
      if (token.size() > kMaxUnigramBytes) {
        return absl::UnimplementedError("model.vocab has a token of more than a kibibyte");
      }
      longest_ = std::max(longest_, token.size());
      ids_.try_emplace(token, static_cast<int32_t>(scores_.size()));
      scores_.push_back(entry[1].get<double>());
    }
    if (!scores_.empty()) {
      unknown_score_ = *std::min_element(scores_.begin(), scores_.end()) - kUnknownPenalty;
    }
    const auto unknown = spec.find("unk_id");
    if (unknown != spec.end() && unknown->is_number_unsigned() &&
        unknown->get<uint64_t>() < scores_.size()) {
      unknown_ = static_cast<int32_t>(unknown->get<uint64_t>());
    }
    byte_fallback_ = Flag(spec, "byte_fallback", false);
    return absl::OkStatus();
  }

  void Encode(const std::string& piece, Encoded& to) const override {
    struct Best {
      double score = -std::numeric_limits<double>::infinity();
      size_t start = 0;
      int32_t id = -1;  // -1: a character that no token has
    };
    std::vector<Best> best(piece.size() + 1);
    best[0].score = 0;
    for (size_t start = 0; start < piece.size();) {
      size_t next = start + 1;
      while (next < piece.size() && (static_cast<unsigned char>(piece[next]) & 0xc0) == 0x80) {
        ++next;
      }
      bool character = false;
      for (size_t end = start + 1; end <= std::min(piece.size(), start + longest_); ++end) {
        const int32_t id = Find(piece.substr(start, end - start));
        if (id < 0) continue;
        character = character || end == next;
        const double score = best[start].score + scores_[id];
        if (score > best[end].score) best[end] = {score, start, id};
      }
      const double unknown = best[start].score + unknown_score_;
      if (!character && unknown > best[next].score) best[next] = {unknown, start, -1};
      start = next;
    }
    std::vector<std::pair<Range, int32_t>> path;
    for (size_t end = piece.size(); end > 0; end = best[end].start) {
      path.push_back(
          {{static_cast<int32_t>(best[end].start), static_cast<int32_t>(end)}, best[end].id});
    }
    std::reverse(path.begin(), path.end());
    // Unknown characters that follow one another are one unknown token.
    for (size_t i = 0; i < path.size(); ++i) {
      if (path[i].second >= 0) {
        to.ids.push_back(path[i].second);
        continue;
      }
      Range range = path[i].first;
      while (i + 1 < path.size() && path[i + 1].second < 0) range.second = path[++i].first.second;
      const std::string text = piece.substr(range.first, range.second - range.first);
      if (byte_fallback_ && AppendBytes(text, to.ids)) continue;
      AppendUnknown(SplitCharacters(text).size(), to);
    }
  }

 private:
  std::vector<double> scores_;  // by id
  double unknown_score_ = -kUnknownPenalty;
  size_t longest_ = 0;
  bool byte_fallback_ = false;
};

class WordLevelModel final : public Model {
 public:
  absl::Status Read(const json& spec) {
    RETURN_IF_ERROR(ReadVocabulary(spec, ids_));
    unknown_ = Find(Word(spec, "unk_token", ""));
    return absl::OkStatus();
  }

  void Encode(const std::string& piece, Encoded& to) const override {
    if (const int32_t id = Find(piece); id >= 0) {
      to.ids.push_back(id);
    } else {
      AppendUnknown(SplitCharacters(piece).size(), to);
    }
  }
};

absl::StatusOr<std::unique_ptr<Model>> ReadModel(const json& spec) {
  const auto make = [&](auto model) -> absl::StatusOr<std::unique_ptr<Model>> {
    RETURN_IF_ERROR(model->Read(spec));
    return std::unique_ptr<Model>(std::move(model));
  };
  if (!spec.is_object()) return absl::DataLossError("there is no model");
  std::string type = Word(spec, "type", "");
  // Older files tell it by what is there.
  if (type.empty() && spec.contains("merges")) type = "BPE";
  if (type == "BPE") return make(std::make_unique<BytePairModel>());
  if (type == "WordPiece") return make(std::make_unique<WordPieceModel>());
  if (type == "Unigram") return make(std::make_unique<UnigramModel>());
  if (type == "WordLevel") return make(std::make_unique<WordLevelModel>());
  return absl::UnimplementedError(absl::StrCat("the model \"", type, "\" is not known"));
}

// --- the whole -----------------------------------------------------------------------------------

struct Added {
  UnicodeString content;
  int32_t id = 0;
  bool single_word = false, lstrip = false, rstrip = false, normalized = false;
};

bool IsWordCharacter(UChar32 c) {
  const int8_t type = u_charType(c);
  return u_isUAlphabetic(c) || c == '_' || type == U_DECIMAL_DIGIT_NUMBER ||
         type == U_NON_SPACING_MARK || type == U_CONNECTOR_PUNCTUATION;
}

class FileTokenizer final : public TextTokenizer {
 public:
  absl::Status Read(const json& root) {
    if (!root.is_object()) return absl::DataLossError("not a JSON object");
    if (const auto spec = root.find("normalizer"); spec != root.end() && !spec->is_null()) {
      ASSIGN_OR_RETURN(normalize_, ReadNormalizer(*spec));
    }
    if (const auto spec = root.find("pre_tokenizer"); spec != root.end() && !spec->is_null()) {
      ASSIGN_OR_RETURN(split_, ReadSplit(*spec));
    }
    ASSIGN_OR_RETURN(model_, ReadModel(root.value("model", json())));
    const auto added = root.find("added_tokens");
    if (added == root.end() || added->is_null()) return absl::OkStatus();
    if (!added->is_array()) return absl::DataLossError("added_tokens is not a list");
    for (const json& entry : *added) {
      const std::string content = entry.is_object() ? Word(entry, "content", "") : "";
      if (content.empty() || !entry.contains("id") || !entry["id"].is_number_integer() ||
          entry["id"].get<int64_t>() < 0 || entry["id"].get<int64_t>() >= kMaxId) {
        return absl::DataLossError("an added token has no content or no id");
      }
      Added token{.content = ToIcu(content),
                  .id = static_cast<int32_t>(entry["id"].get<int64_t>()),
                  .single_word = Flag(entry, "single_word", false),
                  .lstrip = Flag(entry, "lstrip", false),
                  .rstrip = Flag(entry, "rstrip", false),
                  .normalized = Flag(entry, "normalized", true)};
      if (token.normalized && normalize_) {
        ASSIGN_OR_RETURN(token.content, normalize_(token.content));
        if (token.content.isEmpty()) continue;
      }
      added_by_first_[token.content.charAt(0)].push_back(added_.size());
      added_.push_back(std::move(token));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<Encoded> Encode(absl::string_view text) const override {
    if (text.size() > kMaxTextBytes || !DecodeUtf8(text)) {
      return absl::InvalidArgumentError(
          absl::StrCat("the text is not UTF-8, or longer than ", kMaxTextBytes, " bytes"));
    }
    Encoded encoded;
    bool first = true;
    for (const Part& part : FindAdded(ToIcu(text), /*normalized=*/false)) {
      if (part.id >= 0) {
        encoded.ids.push_back(part.id);
      } else {
        UnicodeString normal = part.text;
        if (normalize_) {
          ASSIGN_OR_RETURN(normal, normalize_(normal));
        }
        for (const Part& inner : FindAdded(normal, /*normalized=*/true)) {
          if (inner.id >= 0) {
            encoded.ids.push_back(inner.id);
          } else {
            RETURN_IF_ERROR(EncodePart(inner.text, first, encoded));
          }
          first = false;
        }
      }
      first = false;
    }
    return encoded;
  }

 private:
  // Text, or an added token.
  struct Part {
    UnicodeString text;
    int32_t id = -1;
  };

  absl::Status EncodePart(const UnicodeString& text, bool first, Encoded& to) const {
    Pieces pieces = {text};
    if (split_) {
      ASSIGN_OR_RETURN(pieces, split_(text, first));
    }
    for (const UnicodeString& piece : pieces) {
      if (!piece.isEmpty()) model_->Encode(FromIcu(piece), to);
    }
    return absl::OkStatus();
  }

  static bool Bounded(const UnicodeString& text, int32_t begin, int32_t end) {
    return (begin == 0 || !IsWordCharacter(text.char32At(text.moveIndex32(begin, -1)))) &&
           (end == text.length() || !IsWordCharacter(text.char32At(end)));
  }

  // The longest added token at each place, from the left.
  std::vector<Part> FindAdded(const UnicodeString& text, bool normalized) const {
    std::vector<Part> parts;
    int32_t from = 0;
    for (int32_t at = 0; at < text.length();) {
      const Added* longest = nullptr;
      const auto candidates = added_by_first_.find(text.charAt(at));
      for (size_t i = 0; candidates != added_by_first_.end() && i < candidates->second.size();
           ++i) {
        const Added& token = added_[candidates->second[i]];
        if (token.normalized != normalized || !text.tempSubString(at).startsWith(token.content) ||
            (longest != nullptr && token.content.length() <= longest->content.length()) ||
            (token.single_word && !Bounded(text, at, at + token.content.length()))) {
          continue;
        }
        longest = &token;
      }
      if (longest == nullptr) {
        at = text.moveIndex32(at, 1);
        continue;
      }
      int32_t begin = at, end = at + longest->content.length();
      while (longest->lstrip && begin > from && u_isUWhiteSpace(text.char32At(begin - 1))) --begin;
      while (longest->rstrip && end < text.length() && u_isUWhiteSpace(text.char32At(end))) ++end;
      if (from < begin) parts.push_back({UnicodeString(text, from, begin - from)});
      parts.push_back({{}, longest->id});
      from = at = end;
    }
    if (from < text.length()) parts.push_back({UnicodeString(text, from)});
    return parts;
  }

  std::vector<Added> added_;
  absl::flat_hash_map<char16_t, std::vector<size_t>> added_by_first_;
  Normalize normalize_;  // empty: none
  Split split_;          // likewise
  std::unique_ptr<Model> model_;
};

}  // namespace

absl::StatusOr<std::shared_ptr<const TextTokenizer>> TextTokenizer::Parse(absl::string_view name,
                                                                          absl::string_view text) {
  const auto root = ParseBoundedJson(text);
  if (!root.ok()) return Annotate(root.status(), name);
  return Make(name, *root);
}

absl::StatusOr<std::shared_ptr<const TextTokenizer>> TextTokenizer::Make(
    absl::string_view name, const nlohmann::json& root) {
  auto tokenizer = std::make_shared<FileTokenizer>();
  RETURN_IF_ERROR(Annotate(tokenizer->Read(root), name));
  return tokenizer;
}

absl::StatusOr<std::shared_ptr<const TextTokenizer>> TextTokenizer::Read(const Checkpoint& model) {
  constexpr absl::string_view kFile = "tokenizer.json";
  const auto text = ReadText(model.store(), kFile, kMaxTokenizerBytes);
  if (absl::IsNotFound(text.status())) {
    return absl::FailedPreconditionError(
        absl::StrCat("model ", model.ref().ToString(),
                     " has no tokenizer.json, which texts are split by; choose another method"));
  }
  if (!text.ok()) return text.status();
  return Parse(model.store().Describe(kFile), *text);
}

}  // namespace pewter
