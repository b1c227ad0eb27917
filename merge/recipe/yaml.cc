#include "merge/recipe/yaml.h"

#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/mark.h>
#include <yaml-cpp/parser.h>

#include <algorithm>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "base/status.h"

namespace pewter {
namespace {

constexpr absl::string_view kTagPrefix = "tag:yaml.org,2002:";

// Carries a status through yaml-cpp's parser; caught in YamlBuilder::Build.
struct BuildError : std::runtime_error {
  explicit BuildError(absl::Status s) : std::runtime_error("yaml"), status(std::move(s)) {}
  absl::Status status;
};

[[noreturn]] void Fail(TextPosition at, absl::string_view message) {
  throw BuildError(RecipeError(at, message));
}

// Position of the first byte that is not UTF-8, or npos.
size_t FindInvalidUtf8(absl::string_view text) {
  size_t i = 0;
  while (i < text.size()) {
    const auto lead = static_cast<unsigned char>(text[i]);
    int length = 1;
    uint32_t code = lead;
    if (lead >= 0xF0 && lead < 0xF8) {
      length = 4, code = lead & 0x07;
    } else if (lead >= 0xE0 && lead < 0xF0) {
      length = 3, code = lead & 0x0F;
    } else if (lead >= 0xC0 && lead < 0xE0) {
      length = 2, code = lead & 0x1F;
    } else if (lead >= 0x80) {
      return i;
    }
    if (i + length > text.size()) return i;
    for (int j = 1; j < length; ++j) {
      const auto byte = static_cast<unsigned char>(text[i + j]);
      if ((byte & 0xC0) != 0x80) return i;
      code = code << 6 | (byte & 0x3F);
    }
    constexpr uint32_t kLeast[] = {0, 0, 0x80, 0x800, 0x10000};
    if (code < kLeast[length] || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) return i;
    i += length;
  }
  return absl::string_view::npos;
}

TextPosition PositionOf(absl::string_view text, size_t offset, int first_line) {
  const absl::string_view before = text.substr(0, offset);
  const auto lines = std::count(before.begin(), before.end(), '\n');
  const size_t line_start = before.rfind('\n') + 1;  // npos + 1 == 0
  return {.line = static_cast<int>(lines) + first_line,
          .column = static_cast<int>(offset - line_start) + 1};
}

// True when a part of a text is blank lines and comments, and with `directives` also those.
bool WithoutContent(absl::string_view text, bool directives) {
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    absl::ConsumePrefix(&line, "---");
    line = absl::StripLeadingAsciiWhitespace(line);
    if (!line.empty() && line[0] != '#' && !(directives && line[0] == '%')) return false;
  }
  return true;
}

}  // namespace

// Receives yaml-cpp's events and appends nodes to a document.
class YamlBuilder : public YAML::EventHandler {
 public:
  // `first_line` is 0 for text that is not the recipe's (--set) and has no positions.
  YamlBuilder(YamlDocument& document, int first_line)
      : document_(document), first_line_(first_line) {}

  absl::StatusOr<const YamlNode*> Build(absl::string_view text) {
    try {
      std::istringstream stream{std::string(text)};
      YAML::Parser parser(stream);
      parser.HandleNextDocument(*this);
      second_ = true;
      parser.HandleNextDocument(*this);
    } catch (const BuildError& error) {
      return error.status;
    } catch (const YAML::Exception& error) {
      return RecipeError(At(error.mark), absl::StrCat("not YAML: ", error.msg));
    } catch (const std::exception& error) {
      return absl::InvalidArgumentError(absl::StrCat("recipe: not YAML: ", error.what()));
    }
    if (root_ == nullptr) {
      root_ = &NewNode(YamlNode::Kind::kNull, {.line = first_line_, .column = 1});
    }
    return root_;
  }

  void OnDocumentStart(const YAML::Mark& mark) override {
    if (second_) Fail(At(mark), "a second document; a recipe is one YAML document");
  }
  void OnDocumentEnd() override {}

  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    YamlNode& node = NewNode(YamlNode::Kind::kNull, At(mark));
    Remember(anchor, node);
    Attach(node);
  }

  void OnAlias(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    const auto it = anchors_.find(anchor);
    if (it == anchors_.end()) Fail(At(mark), "an alias without an anchor");
    for (const Open& open : open_) {
      if (open.node == it->second) Fail(At(mark), "an alias inside what it stands for");
    }
    Attach(*it->second);
  }

  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    YamlNode& node = NewNode(YamlNode::Kind::kScalar, At(mark));
    node.text = value;
    node.quoted = tag == "!";
    absl::string_view kind = tag;
    if (absl::ConsumePrefix(&kind, kTagPrefix)) {
      if (kind == "str") {
        node.quoted = true;
      } else if (kind == "null") {
        node.kind = YamlNode::Kind::kNull;
      } else if (kind != "int" && kind != "float" && kind != "bool") {
        Fail(At(mark), absl::StrCat("the tag ", tag, " means nothing here"));
      }
    } else if (!tag.empty() && tag != "!" && tag != "?") {
      Fail(At(mark), absl::StrCat("the tag ", tag, " means nothing here"));
    }
    Remember(anchor, node);
    Attach(node);
  }

  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    Start(YamlNode::Kind::kSequence, mark, tag, "seq", anchor);
  }
  void OnSequenceEnd() override { End(); }

  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    Start(YamlNode::Kind::kMapping, mark, tag, "map", anchor);
  }
  void OnMapEnd() override {
    ExpandMapping(*open_.back().node);
    End();
  }

 private:
  struct Open {
    YamlNode* node;
    const YamlNode* key = nullptr;  // of a mapping: waits for its value
  };

  TextPosition At(const YAML::Mark& mark) const {
    if (first_line_ == 0 || mark.line < 0) return {};
    return {.line = mark.line + first_line_, .column = mark.column + 1};
  }

  YamlNode& NewNode(YamlNode::Kind kind, TextPosition at) {
    Spend(1, at);
    YamlNode& node = document_.nodes_.emplace_back();
    node.kind = kind;
    node.at = first_line_ > 0 ? at : TextPosition{};
    return node;
  }

  // Bounds nodes plus the entries that merge keys copy.
  void Spend(int64_t count, TextPosition at) {
    spent_ += count;
    if (spent_ > YamlDocument::kMaxNodes) Fail(at, "more values than a recipe may have");
  }

  void Remember(YAML::anchor_t anchor, YamlNode& node) {
    if (anchor != 0) anchors_[anchor] = &node;
  }

  void Start(YamlNode::Kind kind, const YAML::Mark& mark, const std::string& tag,
             absl::string_view own_tag, YAML::anchor_t anchor) {
    if (!tag.empty() && tag != "!" && tag != "?" && tag != absl::StrCat(kTagPrefix, own_tag)) {
      Fail(At(mark), absl::StrCat("the tag ", tag, " means nothing here"));
    }
    if (open_.size() >= YamlDocument::kMaxDepth) Fail(At(mark), "nested too deep");
    YamlNode& node = NewNode(kind, At(mark));
    Remember(anchor, node);
    open_.push_back({.node = &node});
  }

  void End() {
    YamlNode& node = *open_.back().node;
    open_.pop_back();
    for (const YamlNode* item : node.items) Count(node, *item);
    for (const YamlNode::Entry& entry : node.entries) Count(node, *entry.value);
    Attach(node);
  }

  static void Count(YamlNode& node, const YamlNode& child) {
    node.expanded_nodes += child.expanded_nodes;
    if (node.expanded_nodes > YamlDocument::kMaxNodes) {
      Fail(node.at, "its aliases stand for more values than a recipe may have");
    }
  }

  void Attach(const YamlNode& node) {
    if (open_.empty()) {
      root_ = &node;
      return;
    }
    Open& open = open_.back();
    if (open.node->kind == YamlNode::Kind::kSequence) {
      open.node->items.push_back(&node);
    } else if (open.key == nullptr) {
      if (node.kind != YamlNode::Kind::kScalar) Fail(node.at, "a key must be text");
      open.key = &node;
    } else {
      open.node->entries.push_back({.key = open.key, .value = &node});
      open.key = nullptr;
    }
  }

  static bool IsMergeKey(const YamlNode& key) { return !key.quoted && key.text == "<<"; }

  // Applies merge keys (own keys win over merged ones, earlier merged mappings over later ones) and
  // keeps the last of equal keys.
  void ExpandMapping(YamlNode& node) {
    std::vector<YamlNode::Entry> own;
    std::vector<YamlNode::Entry> merged;
    const auto merge = [&](const YamlNode& from, TextPosition at) {
      if (from.kind != YamlNode::Kind::kMapping) {
        Fail(at, "`<<` takes a mapping or a list of mappings");
      }
      Spend(static_cast<int64_t>(from.entries.size()), at);
      merged.insert(merged.end(), from.entries.begin(), from.entries.end());
    };
    for (const YamlNode::Entry& entry : node.entries) {
      if (!IsMergeKey(*entry.key)) {
        own.push_back(entry);
      } else if (entry.value->kind == YamlNode::Kind::kSequence) {
        for (const YamlNode* item : entry.value->items) merge(*item, entry.key->at);
      } else {
        merge(*entry.value, entry.key->at);
      }
    }
    absl::flat_hash_map<absl::string_view, size_t> index;
    node.entries.clear();
    for (const YamlNode::Entry& entry : own) {
      const auto [it, is_new] = index.try_emplace(entry.key->text, node.entries.size());
      if (is_new) {
        node.entries.push_back(entry);
        continue;
      }
      document_.warnings_.push_back(absl::StrCat(
          entry.key->at.ToString(), ": key \"", entry.key->text,
          "\" is given twice; this one counts, not ", node.entries[it->second].key->at.ToString()));
      node.entries[it->second] = entry;
    }
    for (const YamlNode::Entry& entry : merged) {
      if (index.try_emplace(entry.key->text, node.entries.size()).second) {
        node.entries.push_back(entry);
      }
    }
  }

  YamlDocument& document_;
  const int first_line_;
  bool second_ = false;  // the first document is done
  int64_t spent_ = 0;
  absl::flat_hash_map<YAML::anchor_t, YamlNode*> anchors_;
  std::vector<Open> open_;
  const YamlNode* root_ = nullptr;
};

const YamlNode* YamlNode::Find(absl::string_view key) const {
  for (const Entry& entry : entries) {
    if (entry.key->text == key) return entry.value;
  }
  return nullptr;
}

std::string YamlNode::Describe() const {
  switch (kind) {
    case Kind::kNull:
      return "nothing";
    case Kind::kSequence:
      return "a list";
    case Kind::kMapping:
      return "a mapping";
    case Kind::kScalar:
      break;
  }
  constexpr size_t kShown = 60;
  if (text.size() <= kShown) return absl::StrCat("\"", text, "\"");
  size_t cut = kShown;  // not inside a UTF-8 sequence
  while (cut > 0 && (static_cast<unsigned char>(text[cut]) & 0xC0) == 0x80) --cut;
  return absl::StrCat("\"", text.substr(0, cut), "...\"");
}

std::vector<DocumentText> SplitYamlDocuments(absl::string_view text) {
  std::vector<DocumentText> parts = {{.text = text}};
  int line = 1;
  for (size_t end = text.find('\n'); end != absl::string_view::npos;
       end = text.find('\n', end + 1)) {
    ++line;
    const absl::string_view rest = text.substr(end + 1);
    absl::string_view after = rest;
    if (!absl::ConsumePrefix(&after, "---")) continue;
    if (!after.empty() && !absl::ascii_isspace(after[0])) continue;
    parts.back().text.remove_suffix(rest.size());
    parts.push_back({.text = rest, .first_line = line});
  }
  // Comments and directives before the first "---" belong to what follows it.
  if (parts.size() > 1 && !absl::StartsWith(parts[0].text, "---") &&
      WithoutContent(parts[0].text, /*directives=*/true)) {
    parts[0].text = {parts[0].text.data(), parts[0].text.size() + parts[1].text.size()};
    parts.erase(parts.begin() + 1);
  }
  const DocumentText first = parts[0];
  std::erase_if(parts, [](const DocumentText& part) {
    return WithoutContent(part.text, /*directives=*/false);
  });
  if (parts.empty()) parts.push_back(first);
  return parts;
}

absl::StatusOr<YamlDocument> YamlDocument::Parse(absl::string_view text, int first_line) {
  if (static_cast<int64_t>(text.size()) > kMaxBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("recipe: ", text.size(), " bytes; a recipe has at most ", kMaxBytes));
  }
  if (const size_t bad = FindInvalidUtf8(text); bad != absl::string_view::npos) {
    return RecipeError(PositionOf(text, bad, first_line), "not UTF-8");
  }
  if (const size_t nul = text.find('\0'); nul != absl::string_view::npos) {
    return RecipeError(PositionOf(text, nul, first_line), "a NUL byte");
  }
  YamlDocument document;
  ASSIGN_OR_RETURN(document.root_, YamlBuilder(document, first_line).Build(text));
  return document;
}

absl::Status YamlDocument::Set(absl::string_view path, absl::string_view value) {
  const std::vector<std::string> parts = absl::StrSplit(path, '.');
  const auto fail = [&](absl::string_view message) {
    return absl::InvalidArgumentError(absl::StrCat("--set ", path, "=", value, ": ", message));
  };
  if (static_cast<int64_t>(value.size()) > kMaxBytes ||
      FindInvalidUtf8(value) != absl::string_view::npos ||
      FindInvalidUtf8(path) != absl::string_view::npos) {
    return fail("too long, or not UTF-8");
  }
  if (parts.size() > kMaxDepth) return fail("nested too deep");
  auto parsed = YamlBuilder(*this, /*first_line=*/0).Build(value);
  if (!parsed.ok()) return fail(parsed.status().message());

  const YamlNode** slot = &root_;
  for (const std::string& part : parts) {
    if (part.empty()) return fail("an empty key; the form is key.key=value");
    YamlNode& copy = nodes_.emplace_back(**slot);
    *slot = &copy;
    if (copy.kind == YamlNode::Kind::kNull) copy.kind = YamlNode::Kind::kMapping;
    if (copy.kind == YamlNode::Kind::kScalar) {
      return fail(absl::StrCat("\"", part, "\" would be inside ", copy.Describe()));
    }
    if (copy.kind == YamlNode::Kind::kSequence) {
      int64_t index = 0;
      if (!absl::SimpleAtoi(part, &index) || index < 0 ||
          index >= static_cast<int64_t>(copy.items.size())) {
        return fail(absl::StrCat("\"", part, "\" must be the number of a list item, from 0 to ",
                                 static_cast<int64_t>(copy.items.size()) - 1));
      }
      slot = &copy.items[index];
      continue;
    }
    const auto it =
        std::find_if(copy.entries.begin(), copy.entries.end(),
                     [&](const YamlNode::Entry& entry) { return entry.key->text == part; });
    if (it != copy.entries.end()) {
      slot = &it->value;
      continue;
    }
    YamlNode& key = nodes_.emplace_back();
    key.kind = YamlNode::Kind::kScalar;
    key.text = part;
    copy.entries.push_back({.key = &key, .value = &nodes_.emplace_back()});
    slot = &copy.entries.back().value;
  }
  *slot = *parsed;
  return absl::OkStatus();
}

absl::Status RecipeError(TextPosition at, absl::string_view message) {
  return absl::InvalidArgumentError(absl::StrCat(at.ToString(), ": ", message));
}

std::optional<bool> YamlBool(const YamlNode& node) {
  if (node.kind != YamlNode::Kind::kScalar || node.quoted) return std::nullopt;
  for (absl::string_view word : {"yes", "on", "true"}) {
    if (absl::EqualsIgnoreCase(node.text, word)) return true;
  }
  for (absl::string_view word : {"no", "off", "false"}) {
    if (absl::EqualsIgnoreCase(node.text, word)) return false;
  }
  return std::nullopt;
}

std::optional<int64_t> YamlInt(const YamlNode& node) {
  if (node.kind != YamlNode::Kind::kScalar || node.quoted || node.text.empty()) return std::nullopt;
  std::string text = absl::StrReplaceAll(node.text, {{"_", ""}});
  absl::string_view digits = text;
  const bool negative = absl::ConsumePrefix(&digits, "-");
  if (!negative) absl::ConsumePrefix(&digits, "+");
  int base = 10;
  if (absl::ConsumePrefix(&digits, "0x")) {
    base = 16;
  } else if (absl::ConsumePrefix(&digits, "0b")) {
    base = 2;
  } else if (digits.size() > 1 && digits[0] == '0') {
    base = 8;
    digits.remove_prefix(1);
  }
  if (digits.empty()) return std::nullopt;
  int64_t value = 0;
  for (char c : digits) {
    int digit = 0;
    if (absl::ascii_isdigit(c)) {
      digit = c - '0';
    } else if (absl::ascii_isxdigit(c)) {
      digit = absl::ascii_tolower(c) - 'a' + 10;
    } else {
      return std::nullopt;
    }
    if (digit >= base || value > (std::numeric_limits<int64_t>::max() - digit) / base) {
      return std::nullopt;
    }
    value = value * base + digit;
  }
  return negative ? -value : value;
}

std::optional<double> YamlFloat(const YamlNode& node) {
  if (const std::optional<int64_t> number = YamlInt(node)) return static_cast<double>(*number);
  if (node.kind != YamlNode::Kind::kScalar || node.quoted || node.text.empty()) return std::nullopt;
  const std::string lower = absl::AsciiStrToLower(node.text);
  absl::string_view word = lower;
  const bool negative = absl::ConsumePrefix(&word, "-");
  if (!negative) absl::ConsumePrefix(&word, "+");
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (word == ".inf") return negative ? -kInfinity : kInfinity;
  if (word == ".nan") return std::numeric_limits<double>::quiet_NaN();
  // Words that C reads as numbers ("inf", "nan", "infinity") are text in YAML.
  if (word.empty() || (!absl::ascii_isdigit(word[0]) && word[0] != '.')) return std::nullopt;
  double value = 0;
  if (!absl::SimpleAtod(absl::StrReplaceAll(node.text, {{"_", ""}}), &value)) return std::nullopt;
  return value;
}

}  // namespace pewter
