// What a command prints: results on standard output, as text or as JSON; notes, warnings and errors
// on standard error. JSON field names are a contract. In JSON mode standard error carries nothing
// but the error object (warnings are part of the results), unless progress is drawn on a terminal.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "nlohmann/json.hpp"

namespace pewter::client {

// Keys keep the order in which they are written.
using Json = nlohmann::ordered_json;

// As given on the command line, for every command.
struct OutputOptions {
  std::string format = "text";  // or "json"
  bool quiet = false;
};

// Used from one thread.
class Output {
 public:
  explicit Output(OutputOptions options) : options_(std::move(options)) {}

  bool json() const { return options_.format == "json"; }
  // Only what a script would read: a path, an id.
  bool quiet() const { return options_.quiet; }

  // Results.
  void Text(absl::string_view text);
  void Print(const Json& value);

  // For people: "note: ..." and "warning: ...".
  void Note(absl::string_view message);
  void Warn(absl::string_view message);
  // "error: MESSAGE", or {"error": {"code", "message", "exit_code"}}.
  void Error(const absl::Status& status, int exit_code);

  // False when standard output took less than what was printed (a full disk).
  bool Flush();

 private:
  OutputOptions options_;
};

// Rows of text in aligned columns, two spaces apart, as kubectl prints them.
class Table {
 public:
  explicit Table(std::vector<std::string> header);
  // Numbers: flushed right.
  Table& RightAlign(int column);
  void Add(std::vector<std::string> row);
  int rows() const { return static_cast<int>(rows_.size()) - 1; }
  std::string ToString() const;

 private:
  std::vector<std::vector<std::string>> rows_;  // the first is the header
  std::vector<bool> right_;
};

// "1,234,567".
std::string FormatCount(int64_t count);
// "1 tensor", "2 tensors".
std::string FormatCount(int64_t count, absl::string_view noun);
// "0.4 s", "12 s", "3:07", "1:02:45".
std::string FormatSeconds(double seconds);
// "312 MB/s": powers of 1000, as drives are sold.
std::string FormatRate(double bytes_per_second);
// Columns that `text` takes on a terminal: code points of UTF-8.
int DisplayWidth(absl::string_view text);
// `text` in lines of at most `width` columns, each after `indent` spaces; words stay whole.
std::string Wrap(absl::string_view text, int width, int indent);

}  // namespace pewter::client
