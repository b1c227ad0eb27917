#include "merge/plan/json_text.h"

#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "merge/checkpoint/json_error.h"

namespace pewter {
namespace {

using nlohmann::json;

// Goes through the text once and keeps nothing.
class LimitChecker final : public nlohmann::json_sax<json> {
 public:
  const std::string& error() const { return error_; }

  bool null() override { return Count(); }
  bool boolean(bool /*value*/) override { return Count(); }
  bool number_integer(number_integer_t /*value*/) override { return Count(); }
  bool number_unsigned(number_unsigned_t /*value*/) override { return Count(); }
  bool number_float(number_float_t /*value*/, const string_t& /*text*/) override { return Count(); }
  bool string(string_t& /*value*/) override { return Count(); }
  bool binary(binary_t& /*value*/) override { return Count(); }
  bool key(string_t& /*value*/) override { return true; }
  bool start_object(std::size_t /*elements*/) override { return Enter(); }
  bool start_array(std::size_t /*elements*/) override { return Enter(); }
  bool end_object() override { return Leave(); }
  bool end_array() override { return Leave(); }
  bool parse_error(std::size_t position, const std::string& /*token*/,
                   const json::exception& error) override {
    return Fail(JsonErrorText(position, error.what()));
  }

 private:
  bool Fail(std::string why) {
    error_ = std::move(why);
    return false;
  }
  bool Count() {
    return ++values_ <= kMaxJsonValues ||
           Fail(absl::StrCat("more than ", kMaxJsonValues, " values"));
  }
  bool Enter() {
    return ++depth_ <= kMaxJsonDepth
               ? Count()
               : Fail(absl::StrCat("nested deeper than ", kMaxJsonDepth, " levels"));
  }
  bool Leave() {
    --depth_;
    return true;
  }

  int64_t values_ = 0;
  int depth_ = 0;
  std::string error_;
};

// Offsets in an object's text.
struct Member {
  size_t begin = 0;  // of the key
  size_t value = 0;
  size_t end = 0;  // of the value
};

// Valid JSON is taken apart here, so that only strings need care.
class Scanner {
 public:
  explicit Scanner(absl::string_view text) : text_(text) {}

  std::vector<Member> FindAll(absl::string_view key) {
    const std::string literal = JsonString(key);
    std::vector<Member> members;
    at_ = text_.find('{') + 1;
    while (SkipSpace(), At() == '"') {
      Member member{.begin = at_};
      SkipString();
      const bool found = text_.substr(member.begin, at_ - member.begin) == literal;
      SkipSpace();
      ++at_;  // the colon
      SkipSpace();
      member.value = at_;
      SkipValue();
      member.end = at_;
      if (found) members.push_back(member);
      SkipSpace();
      if (At() == ',') ++at_;
    }
    return members;
  }

 private:
  char At() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  void SkipSpace() { at_ = std::min(text_.find_first_not_of(" \t\r\n", at_), text_.size()); }
  void SkipString() {
    for (++at_; at_ < text_.size() && text_[at_] != '"'; ++at_) {
      if (text_[at_] == '\\') ++at_;
    }
    ++at_;
  }
  void SkipValue() {
    int depth = 0;
    do {
      const char c = At();
      if (c == '"') {
        SkipString();
      } else if (c == '{' || c == '[') {
        ++depth, ++at_;
      } else if (c == '}' || c == ']') {
        --depth, ++at_;
      } else if (depth > 0) {
        ++at_;
      } else {
        at_ = std::min(text_.find_first_of(",}] \t\r\n", at_), text_.size());
      }
    } while (depth > 0 && at_ < text_.size());
  }

  absl::string_view text_;
  size_t at_ = 0;
};

}  // namespace

absl::StatusOr<json> ParseBoundedJson(absl::string_view text) {
  LimitChecker checker;
  if (!json::sax_parse(text.begin(), text.end(), &checker)) {
    return absl::DataLossError(checker.error());
  }
  return json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
}

std::optional<absl::string_view> JsonMember(absl::string_view object, absl::string_view key) {
  const std::vector<Member> members = Scanner(object).FindAll(key);
  if (members.empty()) return std::nullopt;
  return object.substr(members.back().value, members.back().end - members.back().value);
}

std::string SetJsonMember(absl::string_view object, absl::string_view key,
                          absl::string_view value) {
  const std::vector<Member> members = Scanner(object).FindAll(key);
  if (!members.empty()) {
    return absl::StrCat(object.substr(0, members.back().value), value,
                        object.substr(members.back().end));
  }
  const size_t brace = object.rfind('}');
  const size_t last = object.find_last_not_of(" \t\r\n", brace - 1);
  const bool empty = object[last] == '{';
  return absl::StrCat(object.substr(0, last + 1), empty ? "\n  " : ",\n  ", JsonString(key), ": ",
                      value, "\n", object.substr(brace));
}

std::string RemoveJsonMember(absl::string_view object, absl::string_view key) {
  std::string text(object);
  for (;;) {
    const std::vector<Member> members = Scanner(text).FindAll(key);
    if (members.empty()) return text;
    // With the comma that follows it, or the one before when it is the last.
    size_t begin = members[0].begin, end = members[0].end;
    const size_t next = text.find_first_not_of(" \t\r\n", end);
    if (text[next] == ',') {
      end = text.find_first_not_of(" \t\r\n", next + 1);
    } else if (const size_t before = text.find_last_not_of(" \t\r\n", begin - 1);
               text[before] == ',') {
      begin = before;
    }
    text.erase(begin, end - begin);
  }
}

std::string JsonString(absl::string_view text) {
  return json(text).dump(-1, ' ', false, json::error_handler_t::replace);
}

}  // namespace pewter
